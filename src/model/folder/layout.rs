//! Reading and writing a model's files as the [table](super::table) of its family has them.

use std::collections::HashSet;

use burn::tensor::TensorData;
use firebrick_kernels::blockwise::Quantised;

use super::blockwise::{self, Matrix};
use super::packed;
use super::table::{FileTensor, HEAD, Layout, SCALE, embedding_name, is_derived, table};
use super::tensors::floats;
use crate::config::DecoderSpec;
use crate::model::{ModelError, Tensors};

/// Where tensors under their file names come from.
pub(super) trait Source {
    /// The shape of a tensor, if it is there.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// All there are.
    fn names(&self) -> Vec<String>;
    /// The values of a tensor that is there.
    fn values(&self, name: &str) -> Result<Vec<f32>, ModelError>;
    /// The bytes of a tensor that is there, and is bytes.
    fn bytes(&self, name: &str) -> Result<Vec<u8>, ModelError>;
    /// The values, where the tensor is not needed again.
    fn take(&mut self, name: &str) -> Result<Vec<f32>, ModelError> {
        self.values(name)
    }
}

impl Source for Tensors {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.get(name)?.shape().as_slice().to_vec())
    }

    fn names(&self) -> Vec<String> {
        self.keys().cloned().collect()
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let data = self.get(name).cloned();
        data.map(floats).ok_or_else(|| missing(name))
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        let data = self.get(name).ok_or_else(|| missing(name))?;
        let bytes = data.as_slice::<u8>().map(<[u8]>::to_vec);
        bytes.map_err(|_| ModelError::TensorMismatch {
            name: name.to_string(),
            expected: "U8".to_string(),
            found: format!("{:?}", data.dtype()),
        })
    }

    fn take(&mut self, name: &str) -> Result<Vec<f32>, ModelError> {
        self.remove(name).map(floats).ok_or_else(|| missing(name))
    }
}

/// Our parameters out of a model's files. Every name and shape is checked before the first value is
/// read, so that a file that lies about itself costs no memory.
///
/// # Errors
/// A tensor that is missing, unexpected or of another shape; a value that cannot be honoured.
pub(super) fn own_tensors(
    spec: &DecoderSpec,
    mut source: impl Source,
    mut quantiser: Option<&mut Quantiser>,
) -> Result<Tensors, ModelError> {
    let quantised = blockwise::matrices(spec);
    for tensor in table(spec) {
        match source.shape(&tensor.name) {
            None if tensor.layout == Layout::Zeros => {}
            None => return Err(missing(&tensor.name)),
            Some(found) if found != tensor.shape => {
                return Err(ModelError::TensorMismatch {
                    name: tensor.name,
                    expected: format!("{:?}", tensor.shape),
                    found: format!("{found:?}"),
                });
            }
            Some(_) => {}
        }
    }
    for (name, expected) in quantised.iter().flat_map(Matrix::tensors) {
        let Some(found) = source.shape(&name) else {
            return Err(missing(&name));
        };
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            return Err(ModelError::TensorMismatch {
                name,
                expected: format!("{expected:?}"),
                found: format!("{found:?}"),
            });
        }
    }
    check_the_rest(spec, &quantised, &source)?;
    let mut own = Tensors::new();
    for tensor in table(spec) {
        if tensor.layout == Layout::Zeros && source.shape(&tensor.name).is_none() {
            continue;
        }
        if let Layout::Packed(layout, dims) = tensor.layout {
            let bytes = source.bytes(&tensor.name)?;
            let words = packed::read(&tensor.name, bytes, layout, dims)?;
            own.insert(tensor.path(), words);
            continue;
        }
        let values = source.take(&tensor.name)?;
        let is_scale = is_exact(spec, &tensor.name);
        if let Some(&value) = values.iter().find(|&&value| is_scale && value < 0.0) {
            let name = tensor.name;
            return Err(ModelError::NegativeScale { name, value });
        }
        match &mut quantiser {
            Some(quantiser) if tensor.is_linear() => {
                tensor.quantise(values, quantiser, &mut own)?
            }
            _ => tensor.unpack(values, &mut own)?,
        }
    }
    for matrix in &quantised {
        matrix.read(&mut source, &mut own)?;
    }
    Ok(own)
}

/// Makes codes of the weights `[out, in]`, row after row, of the layer at a path.
pub type Quantiser<'a> = dyn FnMut(&str, &[f32], [usize; 2]) -> Result<Quantised, ModelError> + 'a;

/// A model's files out of our parameters.
pub(super) fn file_tensors(spec: &DecoderSpec, mut own: Tensors) -> Tensors {
    let mut files = Tensors::new();
    for tensor in table(spec) {
        let data = tensor.pack(&mut own);
        files.insert(tensor.name, data);
    }
    for matrix in blockwise::matrices(spec) {
        matrix.write(&mut own, &mut files);
    }
    files
}

/// Tensors in the files that are not in the table.
fn check_the_rest(
    spec: &DecoderSpec,
    quantised: &[Matrix],
    source: &impl Source,
) -> Result<(), ModelError> {
    let mut known: HashSet<String> = table(spec).map(|tensor| tensor.name).collect();
    let codes = quantised.iter().flat_map(Matrix::tensors);
    known.extend(codes.map(|(name, _)| name));
    for name in source.names() {
        if known.contains(&name) || is_derived(&name, spec.shape.architecture) {
            continue;
        }
        let tied = spec.shape.tie_word_embeddings && name == HEAD;
        if !tied {
            return Err(ModelError::UnexpectedTensor { name });
        }
        // Some exports keep the tied head as a tensor of its own.
        let embedding = embedding_name(spec.shape.architecture);
        if source.values(&name)? != source.values(embedding)? {
            return Err(ModelError::TensorMismatch {
                name,
                expected: "a copy of the embedding (tie_word_embeddings)".to_string(),
                found: "other values".to_string(),
            });
        }
    }
    Ok(())
}

fn missing(name: &str) -> ModelError {
    ModelError::MissingTensor {
        name: name.to_string(),
    }
}

/// Whether a tensor is f32 in files whatever the other weights are rounded to.
pub(crate) fn is_exact(spec: &DecoderSpec, name: &str) -> bool {
    let packed = spec.shape.ternary.and_then(|ternary| ternary.packed);
    let is_quantised = spec.shape.blockwise.is_some();
    packed.is_some() && name.ends_with(SCALE) || is_quantised && blockwise::is_scale(name)
}

impl FileTensor {
    /// Its values as codes of its parts. `values` has as many elements as `shape`.
    fn quantise(
        self,
        values: Vec<f32>,
        quantiser: &mut Quantiser,
        own: &mut Tensors,
    ) -> Result<(), ModelError> {
        let path = |path: &str| path.trim_end_matches(".weight").to_string();
        let mut quantise = |name: &str, weights: &[f32], dims| {
            let quantised = quantiser(&path(name), weights, dims)?;
            blockwise::put(name, quantised.operands(), own);
            Ok(())
        };
        if self.layout == Layout::Transposed {
            let inputs = self.shape[1];
            let mut start = 0;
            return self.parts.iter().try_for_each(|(name, outputs)| {
                let rows = &values[start * inputs..(start + outputs) * inputs];
                start += outputs;
                quantise(name, rows, [*outputs, inputs])
            });
        }
        let mut parts = Tensors::new();
        self.unpack(values, &mut parts)?;
        for (name, data) in parts {
            let dims = [data.shape().as_slice()[0], data.shape().as_slice()[1]];
            let turned = transpose(&floats(data), dims[0], dims[1]);
            quantise(&name, &turned, [dims[1], dims[0]])?;
        }
        Ok(())
    }

    /// Its values as parameters of ours. `values` has as many elements as `shape`.
    pub(super) fn unpack(self, values: Vec<f32>, own: &mut Tensors) -> Result<(), ModelError> {
        let total = self.shape.last().copied().unwrap_or(1);
        let mut start = 0;
        match self.layout {
            Layout::Zeros if values.iter().any(|&value| value != 0.0) => {
                // Absent in our sense: a file may hold zeros, anything else would be lost.
                return Err(ModelError::UnexpectedTensor { name: self.name });
            }
            Layout::Zeros | Layout::Packed(..) => {}
            Layout::Same => {
                if let [(path, _)] = self.parts.as_slice() {
                    own.insert(path.clone(), TensorData::new(values, self.shape));
                }
            }
            Layout::Transposed => {
                for (path, rows) in self.parts {
                    let part = &values[start * total..(start + rows) * total];
                    let part = transpose(part, rows, total);
                    own.insert(path, TensorData::new(part, [total, rows]));
                    start += rows;
                }
            }
            Layout::Columns => {
                for (path, width) in self.parts {
                    let rows = values.chunks(total);
                    let part: Vec<f32> = rows
                        .flat_map(|row| &row[start..start + width])
                        .copied()
                        .collect();
                    let mut shape = self.shape.clone();
                    if let Some(last) = shape.last_mut() {
                        *last = width;
                    }
                    own.insert(path, TensorData::new(part, shape));
                    start += width;
                }
            }
        }
        Ok(())
    }

    /// Takes its parameters out of ours. A module has every parameter in its table.
    pub(super) fn pack(&self, own: &mut Tensors) -> TensorData {
        if let Layout::Packed(layout, dims) = self.layout {
            let path = self.path();
            let words = own.remove(&path);
            let words =
                words.unwrap_or_else(|| unreachable!("{path} is not a parameter of this model"));
            return packed::write(words, layout, dims);
        }
        let mut part = |path: &String| {
            let data = own.remove(path);
            floats(data.unwrap_or_else(|| unreachable!("{path} is not a parameter of this model")))
        };
        let count = self.shape.iter().product();
        let values = match self.layout {
            Layout::Zeros | Layout::Packed(..) => vec![0.0; count],
            Layout::Same => self.parts.iter().flat_map(|(path, _)| part(path)).collect(),
            Layout::Transposed => {
                let input = self.shape[1];
                let parts = self.parts.iter();
                let turned = parts.map(|(path, rows)| transpose(&part(path), input, *rows));
                joined(turned.collect())
            }
            Layout::Columns => {
                let parts: Vec<(Vec<f32>, usize)> = self
                    .parts
                    .iter()
                    .map(|(path, width)| (part(path), *width))
                    .collect();
                let rows = count / self.shape.last().copied().unwrap_or(1);
                let mut values = Vec::with_capacity(count);
                for row in 0..rows {
                    for (part, width) in &parts {
                        values.extend_from_slice(&part[row * width..(row + 1) * width]);
                    }
                }
                values
            }
        };
        TensorData::new(values, self.shape.clone())
    }
}

/// One after the other; a single one is not copied.
fn joined(mut parts: Vec<Vec<f32>>) -> Vec<f32> {
    match parts.len() {
        1 => parts.remove(0),
        _ => parts.concat(),
    }
}

/// `[rows, cols]` -> `[cols, rows]`.
pub(crate) fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    // Blocks keep both the reads and the writes within a few cache lines.
    const BLOCK: usize = 32;
    for row_block in (0..rows).step_by(BLOCK) {
        for col_block in (0..cols).step_by(BLOCK) {
            for row in row_block..(row_block + BLOCK).min(rows) {
                for col in col_block..(col_block + BLOCK).min(cols) {
                    out[col * rows + row] = values[row * cols + col];
                }
            }
        }
    }
    out
}
