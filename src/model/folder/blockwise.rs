//! Blockwise weights in files: as bitsandbytes writes them, or in a form of our own.
//!
//! | bitsandbytes | ours | |
//! |---|---|---|
//! | `X.weight` `[bytes, 1]` U8 | `X.weight` `[bytes]` U8 | codes of `[out, in]` |
//! | `X.weight.absmax` F32 | `X.weight_scale` F32 | a scale for each block, where they are not quantised |
//! | `X.weight.absmax` U8 | `X.weight_scale_codes` U8 | codes of scales, where they are |
//! | `X.weight.nested_absmax` F32 | `X.weight_scale` F32 | a scale for each 256 of them |
//! | in `X.weight.quant_state.bitsandbytes__nf4` | `X.weight_scale_offset` F32 | their mean |
//! | | `X.weight_zero_point` U8 | two a byte |

use std::fmt::Write;

use burn::tensor::TensorData;
use firebrick_kernels::blockwise::layout::{BlockwiseView, Operands};
use firebrick_kernels::blockwise::tables::{DYNAMIC_MAP, FP4, NF4};
use firebrick_kernels::blockwise::{BlockwiseError, BlockwiseShape, Format, Quantised, Scales};
use serde_json::Value;

use super::layout::Source;
use super::tensors::floats;
use crate::config::{Architecture, DecoderSpec};
use crate::model::{ModelError, Tensors};

/// A quantised matrix of a model's files.
pub(super) struct Matrix {
    /// In the file.
    name: String,
    /// Of our parameters, which have `.words`, `.scales` and `.side` behind it.
    path: String,
    shape: BlockwiseShape,
    is_bitsandbytes: bool,
}

/// The quantised matrices of a model's files; none where weights are not quantised.
pub(super) fn matrices(spec: &DecoderSpec) -> Vec<Matrix> {
    let Some(blockwise) = spec.shape.blockwise else {
        return Vec::new();
    };
    let prefix = match spec.shape.architecture {
        Architecture::Gpt2 => "transformer",
        _ => "model",
    };
    let is_bitsandbytes = spec.shape.is_bitsandbytes();
    let layers = spec.shape.linear_layers(spec.vocab_size).into_iter();
    let in_blocks = layers.filter(|layer| layer.block.is_some());
    let matrices = in_blocks.map(|layer| Matrix {
        name: format!("{prefix}.{}.weight", layer.path),
        path: format!("{}.weight", layer.path),
        shape: blockwise.of_matrix(layer.dims),
        is_bitsandbytes,
    });
    matrices.collect()
}

/// Whether a tensor of a quantised model is f32 in files whatever its other weights are rounded to.
pub(super) fn is_scale(name: &str) -> bool {
    let endings = [
        ".weight.absmax",
        ".weight.nested_absmax",
        ".weight.quant_map",
        ".weight.nested_quant_map",
        ".weight_scale",
        ".weight_scale_offset",
    ];
    endings.iter().any(|ending| name.ends_with(ending))
}

impl Matrix {
    fn tensor(&self, theirs: &str, ours: &str) -> String {
        let ending = if self.is_bitsandbytes { theirs } else { ours };
        format!("{}{ending}", self.name)
    }

    fn state_name(&self) -> String {
        format!(
            "{}.quant_state.bitsandbytes__{}",
            self.name,
            self.shape.format.name()
        )
    }

    /// The names and shapes of its tensors. What bitsandbytes says about itself has no fixed length.
    pub(super) fn tensors(&self) -> Vec<(String, Option<Vec<usize>>)> {
        let shape = self.shape;
        let codes = match self.is_bitsandbytes {
            true => vec![shape.code_bytes(), 1],
            false => vec![shape.code_bytes()],
        };
        let mut tensors = vec![(self.name.clone(), Some(codes))];
        let mut add = |name: String, count: usize| tensors.push((name, Some(vec![count])));
        if shape.double {
            add(self.tensor(".absmax", "_scale_codes"), shape.blocks());
            add(
                self.tensor(".nested_absmax", "_scale"),
                shape.scale_blocks(),
            );
        } else {
            add(self.tensor(".absmax", "_scale"), shape.blocks());
        }
        if shape.format.has_zero_points() {
            add(format!("{}_zero_point", self.name), shape.zero_bytes());
        }
        if self.is_bitsandbytes {
            add(format!("{}.quant_map", self.name), 16);
            if shape.double {
                add(format!("{}.nested_quant_map", self.name), 256);
            }
            tensors.push((self.state_name(), None));
        } else if shape.double {
            add(format!("{}_scale_offset", self.name), 1);
        }
        tensors
    }

    /// Takes it out of a model's files and puts what products read of it into `own`.
    ///
    /// # Errors
    /// A tensor that is not of the type it has to be, or says that these are other weights.
    pub(super) fn read(
        &self,
        source: &mut impl Source,
        own: &mut Tensors,
    ) -> Result<(), ModelError> {
        let offset = match (self.is_bitsandbytes, self.shape.double) {
            (true, _) => self.read_state(source)?,
            (false, true) => {
                let offset = source.take(&format!("{}_scale_offset", self.name))?;
                offset.first().copied().unwrap_or(f32::NAN)
            }
            (false, false) => 0.0,
        };
        let scales = if self.shape.double {
            Scales::Double {
                codes: source.bytes(&self.tensor(".absmax", "_scale_codes"))?,
                scales: source.take(&self.tensor(".nested_absmax", "_scale"))?,
                offset,
            }
        } else {
            Scales::Single(source.take(&self.tensor(".absmax", "_scale"))?)
        };
        let zeros = match self.shape.format.has_zero_points() {
            true => source.bytes(&format!("{}_zero_point", self.name))?,
            false => Vec::new(),
        };
        let codes = source.bytes(&self.name)?;
        let quantised = Quantised::from_parts(self.shape, codes, scales, zeros);
        let quantised = quantised.map_err(|source| self.invalid(source))?;
        put(&self.path, quantised.operands(), own);
        Ok(())
    }

    fn invalid(&self, source: BlockwiseError) -> ModelError {
        ModelError::Quantised {
            name: self.name.clone(),
            source,
        }
    }

    /// What bitsandbytes says of the matrix has to be what config.json says. Returns the mean of
    /// scales.
    fn read_state(&self, source: &mut impl Source) -> Result<f32, ModelError> {
        let table = |name: String, expected: &[f32]| {
            let found = source.values(&name)?;
            if found == expected {
                return Ok(());
            }
            let message = "is another code than the one of this format".to_string();
            Err(ModelError::QuantState { name, message })
        };
        let levels = if self.shape.format == Format::Nf4 {
            NF4
        } else {
            FP4
        };
        table(format!("{}.quant_map", self.name), &levels)?;
        if self.shape.double {
            table(format!("{}.nested_quant_map", self.name), &*DYNAMIC_MAP)?;
        }
        let name = self.state_name();
        let bytes = source.bytes(&name)?;
        let wrong = |message: String| ModelError::QuantState {
            name: name.clone(),
            message,
        };
        let state: Value = serde_json::from_slice(&bytes)
            .map_err(|error| wrong(format!("is not JSON: {error}")))?;
        let shape = self.shape;
        let mut expected = vec![
            ("quant_type", Value::from(shape.format.name())),
            ("blocksize", Value::from(shape.block)),
            ("shape", Value::from(vec![shape.rows, shape.cols])),
        ];
        if shape.double {
            expected.push(("nested_blocksize", Value::from(256)));
        }
        for (field, value) in expected {
            if state[field] != value {
                return Err(wrong(format!(
                    "says {field} {}, expected {value}",
                    state[field]
                )));
            }
        }
        match (shape.double, state["nested_offset"].as_f64()) {
            (false, _) => Ok(0.0),
            (true, Some(offset)) => Ok(offset as f32),
            (true, None) => Err(wrong("has no nested_offset".to_string())),
        }
    }

    /// Takes it out of our parameters and adds its tensors to a model's files.
    pub(super) fn write(&self, own: &mut Tensors, files: &mut Tensors) {
        let mut take = |name: &str| {
            let path = format!("{}.{name}", self.path);
            own.remove(&path)
                .unwrap_or_else(|| unreachable!("{path} is not a parameter of this model"))
        };
        let words = |data: TensorData| -> Vec<u32> {
            data.try_into_vec()
                .unwrap_or_else(|error| unreachable!("codes are u32: {error:?}"))
        };
        let (codes, side) = (words(take("words")), words(take("side")));
        let scales = floats(take("scales"));
        let view = BlockwiseView::new(self.shape, &codes, &scales, &side);
        let quantised = view.and_then(|view| view.to_quantised());
        // A model computes with it: lengths are right, and scales were finite when they were read.
        let quantised = quantised.unwrap_or_else(|error| unreachable!("{}: {error}", self.path));
        let bytes = |bytes: &[u8], shape: Vec<usize>| TensorData::new(bytes.to_vec(), shape);
        let numbers = |values: &[f32]| TensorData::new(values.to_vec(), [values.len()]);
        let mut put = |name: String, data: TensorData| {
            files.insert(name, data);
        };
        let code_shape = match self.is_bitsandbytes {
            true => vec![quantised.codes().len(), 1],
            false => vec![quantised.codes().len()],
        };
        put(self.name.clone(), bytes(quantised.codes(), code_shape));
        let mut mean = None;
        match quantised.scales() {
            Scales::Single(scales) => put(self.tensor(".absmax", "_scale"), numbers(scales)),
            Scales::Double {
                codes,
                scales,
                offset,
            } => {
                let name = self.tensor(".absmax", "_scale_codes");
                put(name, bytes(codes, vec![codes.len()]));
                put(self.tensor(".nested_absmax", "_scale"), numbers(scales));
                mean = Some(*offset);
            }
        }
        if self.is_bitsandbytes {
            self.write_state(mean, &mut put);
        } else if let Some(mean) = mean {
            put(format!("{}_scale_offset", self.name), numbers(&[mean]));
        }
        let zeros = quantised.zero_points();
        if !zeros.is_empty() {
            let name = format!("{}_zero_point", self.name);
            put(name, bytes(zeros, vec![zeros.len()]));
        }
    }

    fn write_state(&self, mean: Option<f32>, put: &mut impl FnMut(String, TensorData)) {
        let shape = self.shape;
        let levels = if shape.format == Format::Nf4 {
            NF4
        } else {
            FP4
        };
        put(
            format!("{}.quant_map", self.name),
            TensorData::new(levels.to_vec(), [16]),
        );
        // The order and the spaces of bitsandbytes.
        let mut state = format!(
            "{{\"quant_type\": \"{}\", \"blocksize\": {}, \"dtype\": \"float32\", \"shape\": [{}, {}]",
            shape.format.name(),
            shape.block,
            shape.rows,
            shape.cols
        );
        if let Some(mean) = mean {
            let map = DYNAMIC_MAP.to_vec();
            put(
                format!("{}.nested_quant_map", self.name),
                TensorData::new(map, [256]),
            );
            let mean = Value::from(f64::from(mean));
            // Writing to a String cannot fail.
            let _ = write!(
                state,
                ", \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": {mean}"
            );
        }
        state.push('}');
        let length = state.len();
        put(
            self.state_name(),
            TensorData::new(state.into_bytes(), [length]),
        );
    }
}

/// What products read of a matrix, as parameters.
pub(super) fn put(path: &str, operands: Operands, own: &mut Tensors) {
    let shape = operands.shape;
    let words = [shape.row_groups(), shape.words_per_group()];
    let (scales, side) = ([operands.scales.len()], [operands.side.len()]);
    own.insert(
        format!("{path}.words"),
        TensorData::new(operands.words, words),
    );
    own.insert(
        format!("{path}.scales"),
        TensorData::new(operands.scales, scales),
    );
    own.insert(format!("{path}.side"), TensorData::new(operands.side, side));
}
