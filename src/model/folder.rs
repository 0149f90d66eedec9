//! Hugging Face model folders: `config.json` and `model.safetensors`.
//!
//! Our parameters are named as in HF's LLaMA and hold linear weights as `[in, out]`; files hold
//! `[out, in]`. GPT-2 differs: other names, `[in, out]` in its files too (`Conv1D`), one fused
//! tensor for queries, keys and values, and biases that always exist, which a model without biases
//! writes as zeros.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use burn::tensor::{DType, Device, TensorData};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::{Decoder, DecoderSpec, ModelError, Tensors, parameters, with_parameters};
use crate::config::{Architecture, ModelShape};
use crate::durable;

/// The weights' file name.
pub const WEIGHTS: &str = "model.safetensors";
/// The shape's file name.
pub const CONFIG: &str = "config.json";

/// Loads a model folder onto a device.
///
/// # Errors
/// A missing or malformed file, a field this build does not support, a tensor that is missing,
/// unexpected, or of another shape or dtype than f32.
pub fn load(folder: &Path, device: &Device) -> Result<Decoder, ModelError> {
    let spec = read_config(folder)?;
    let tensors = read_tensors(&folder.join(WEIGHTS))?;
    decoder_from_hf(&spec, tensors, device)
}

/// Reads `config.json` alone.
///
/// # Errors
/// As [`load`].
pub fn read_config(folder: &Path) -> Result<DecoderSpec, ModelError> {
    for missing in [CONFIG, WEIGHTS] {
        if !folder.join(missing).is_file() {
            return Err(ModelError::NotAModel {
                path: folder.to_path_buf(),
                missing,
            });
        }
    }
    let path = folder.join(CONFIG);
    let text = fs::read_to_string(&path).map_err(ModelError::io(&path))?;
    let config = serde_json::from_str(&text).map_err(|source| ModelError::Json { path, source })?;
    DecoderSpec::from_config_json(&config)
}

/// Writes a model folder's two files, each replaced atomically, weights first: a folder that has a
/// new config has the weights it describes.
///
/// # Errors
/// [`ModelError::Io`].
pub fn save(folder: &Path, spec: &DecoderSpec, tensors: &Tensors) -> Result<(), ModelError> {
    write_tensors(&folder.join(WEIGHTS), tensors)?;
    let config = format!("{:#}\n", spec.to_config_json());
    let path = folder.join(CONFIG);
    durable::replace_with(&path, config).map_err(ModelError::io(&path))
}

/// A model's weights under Hugging Face's names and layout.
pub fn hf_tensors(model: &Decoder) -> Tensors {
    let spec = model.spec();
    let own = parameters(model);
    match spec.shape.architecture {
        Architecture::Llama => own
            .into_iter()
            .map(|(path, data)| (llama_name(&path), to_file_layout(&path, data)))
            .collect(),
        Architecture::Gpt2 => gpt2_to_hf(&spec.shape, own),
    }
}

/// A decoder from weights under Hugging Face's names and layout.
///
/// # Errors
/// As [`load`].
pub fn decoder_from_hf(
    spec: &DecoderSpec,
    tensors: Tensors,
    device: &Device,
) -> Result<Decoder, ModelError> {
    // The seed does not matter: every parameter is replaced before it is ever drawn.
    let model = Decoder::new(spec, 0, device)?;
    let own = match spec.shape.architecture {
        Architecture::Llama => llama_from_hf(spec, tensors),
        Architecture::Gpt2 => gpt2_from_hf(spec, tensors)?,
    };
    with_parameters(model, own, device)
}

fn llama_name(path: &str) -> String {
    if path.starts_with("lm_head.") {
        path.to_string()
    } else {
        format!("model.{path}")
    }
}

fn llama_from_hf(spec: &DecoderSpec, tensors: Tensors) -> Tensors {
    let tied_copy = |name: &str| spec.shape.tie_word_embeddings && name == "lm_head.weight";
    let renamed = tensors
        .into_iter()
        .filter(|(name, _)| !tied_copy(name))
        .map(|(name, data)| {
            let path = name.strip_prefix("model.").unwrap_or(&name).to_string();
            let data = to_file_layout(&path, data);
            (path, data)
        });
    renamed.collect()
}

/// Transposes linear weights; the same both ways.
fn to_file_layout(path: &str, data: TensorData) -> TensorData {
    let linear = path.ends_with("_proj.weight") || path == "lm_head.weight";
    match *data.shape().as_slice() {
        [rows, cols] if linear => transposed(&floats(&data), rows, cols),
        _ => data,
    }
}

fn transposed(values: &[f32], rows: usize, cols: usize) -> TensorData {
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
    TensorData::new(out, [cols, rows])
}

/// Our names of one GPT-2 tensor in a file; the fused one has three.
fn gpt2_sources(name: &str) -> Option<Vec<String>> {
    let top = match name {
        "transformer.wte.weight" => "embed_tokens.weight",
        "transformer.wpe.weight" => "embed_positions.weight",
        "transformer.ln_f.weight" => "norm.weight",
        "transformer.ln_f.bias" => "norm.bias",
        "lm_head.weight" => "lm_head.weight",
        _ => "",
    };
    if !top.is_empty() {
        return Some(vec![top.to_string()]);
    }
    let (layer, rest) = name.strip_prefix("transformer.h.")?.split_once('.')?;
    let (module, leaf) = rest.rsplit_once('.')?;
    let ours: &[&str] = match module {
        "ln_1" => &["input_layernorm"],
        "ln_2" => &["post_attention_layernorm"],
        "attn.c_attn" => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn.c_proj" => &["self_attn.o_proj"],
        "mlp.c_fc" => &["mlp.up_proj"],
        "mlp.c_proj" => &["mlp.down_proj"],
        _ => return None,
    };
    Some(
        ours.iter()
            .map(|module| format!("layers.{layer}.{module}.{leaf}"))
            .collect(),
    )
}

/// Every tensor name of a GPT2LMHeadModel of this shape.
fn gpt2_names(shape: &ModelShape) -> Vec<String> {
    let mut names: Vec<String> = ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"]
        .map(|name| format!("transformer.{name}"))
        .into();
    let modules = [
        "ln_1",
        "ln_2",
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ];
    for layer in 0..shape.num_hidden_layers {
        for module in modules {
            for leaf in ["weight", "bias"] {
                names.push(format!("transformer.h.{layer}.{module}.{leaf}"));
            }
        }
    }
    if !shape.tie_word_embeddings {
        names.push("lm_head.weight".to_string());
    }
    names
}

/// Width of a GPT-2 bias in a file.
fn gpt2_bias_width(shape: &ModelShape, name: &str) -> usize {
    match name {
        _ if name.ends_with("attn.c_attn.bias") => 3 * shape.hidden_size,
        _ if name.ends_with("mlp.c_fc.bias") => shape.intermediate_size,
        _ => shape.hidden_size,
    }
}

fn gpt2_to_hf(shape: &ModelShape, mut own: Tensors) -> Tensors {
    let mut out = Tensors::new();
    for name in gpt2_names(shape) {
        let sources = gpt2_sources(&name).unwrap_or_default();
        let parts: Vec<TensorData> = sources.iter().filter_map(|path| own.remove(path)).collect();
        let data = match parts.len() {
            0 => TensorData::zeros::<f32, _>([gpt2_bias_width(shape, &name)]),
            1 if name == "lm_head.weight" => to_file_layout(&name, parts[0].clone()),
            1 => parts[0].clone(),
            _ => beside(&parts),
        };
        out.insert(name, data);
    }
    out
}

fn gpt2_from_hf(spec: &DecoderSpec, mut tensors: Tensors) -> Result<Tensors, ModelError> {
    let shape = &spec.shape;
    let mut own = Tensors::new();
    for name in gpt2_names(shape) {
        let data = tensors.remove(&name);
        let sources = gpt2_sources(&name).unwrap_or_default();
        if name.ends_with(".bias") && !shape.bias {
            // Absent in our sense: a file may hold zeros, anything else would be lost.
            if data.is_some_and(|data| floats(&data).iter().any(|&value| value != 0.0)) {
                return Err(ModelError::UnexpectedTensor { name });
            }
            continue;
        }
        let data = data.ok_or_else(|| ModelError::MissingTensor { name: name.clone() })?;
        match sources.as_slice() {
            [path] if path == "lm_head.weight" => {
                own.insert(path.clone(), to_file_layout(path, data));
            }
            [path] => {
                own.insert(path.clone(), data);
            }
            paths => own.extend(paths.iter().cloned().zip(apart(&name, &data, paths.len())?)),
        }
    }
    // Some exports keep the tied head, and GPT-2's causal mask, as tensors of their own.
    tensors.retain(|name, _| {
        let tied = shape.tie_word_embeddings && name == "lm_head.weight";
        !tied && !name.ends_with(".attn.bias") && !name.ends_with(".attn.masked_bias")
    });
    match tensors.into_keys().next() {
        Some(name) => Err(ModelError::UnexpectedTensor { name }),
        None => Ok(own),
    }
}

/// Joins matrices `[rows, n]` or vectors `[n]` along their last axis.
fn beside(parts: &[TensorData]) -> TensorData {
    let (matrix, rows) = match *parts[0].shape().as_slice() {
        [rows, _] => (true, rows),
        _ => (false, 1),
    };
    let parts: Vec<Vec<f32>> = parts.iter().map(floats).collect();
    let mut joined = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    for row in 0..rows {
        for part in &parts {
            let width = part.len() / rows;
            joined.extend_from_slice(&part[row * width..(row + 1) * width]);
        }
    }
    let width = joined.len() / rows;
    if matrix {
        TensorData::new(joined, [rows, width])
    } else {
        TensorData::new(joined, [width])
    }
}

/// Undoes [`beside`].
fn apart(name: &str, data: &TensorData, count: usize) -> Result<Vec<TensorData>, ModelError> {
    let (rows, width) = match *data.shape().as_slice() {
        [rows, width] if width > 0 && width.is_multiple_of(count) => (Some(rows), width / count),
        [width] if width > 0 && width.is_multiple_of(count) => (None, width / count),
        _ => {
            return Err(ModelError::TensorMismatch {
                name: name.to_string(),
                expected: format!("{count} equal parts"),
                found: format!("{:?}", data.shape().as_slice()),
            });
        }
    };
    let values = floats(data);
    let part = |index: usize| {
        let chunk = values
            .chunks(width)
            .skip(index)
            .step_by(count)
            .flatten()
            .copied()
            .collect::<Vec<f32>>();
        match rows {
            Some(rows) => TensorData::new(chunk, [rows, width]),
            None => TensorData::new(chunk, [width]),
        }
    };
    Ok((0..count).map(part).collect())
}

/// The values of an f32 tensor. Everything in this module is f32: `read_tensors` accepts nothing
/// else and parameters are nothing else.
fn floats(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

/// Reads every tensor of a safetensors file.
///
/// # Errors
/// A file that cannot be read or is malformed; a dtype other than f32.
pub fn read_tensors(path: &Path) -> Result<Tensors, ModelError> {
    let bytes = fs::read(path).map_err(ModelError::io(path))?;
    tensors_from_bytes(path, &bytes)
}

/// [`read_tensors`] of a file that is in memory; `path` is for messages.
///
/// # Errors
/// As [`read_tensors`].
pub fn tensors_from_bytes(path: &Path, bytes: &[u8]) -> Result<Tensors, ModelError> {
    let malformed = |source| ModelError::Safetensors {
        path: path.to_path_buf(),
        source,
    };
    let file = SafeTensors::deserialize(bytes).map_err(malformed)?;
    let mut tensors = Tensors::new();
    for (name, view) in file.iter() {
        if view.dtype() != Dtype::F32 {
            return Err(ModelError::TensorMismatch {
                name: name.to_string(),
                expected: "F32".to_string(),
                found: format!("{:?}", view.dtype()),
            });
        }
        let values: Vec<f32> = view
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        tensors.insert(
            name.to_string(),
            TensorData::new(values, view.shape().to_vec()),
        );
    }
    Ok(tensors)
}

/// Writes f32 tensors as one safetensors file, atomically.
///
/// # Errors
/// [`ModelError::Io`].
pub fn write_tensors(path: &Path, tensors: &Tensors) -> Result<(), ModelError> {
    let bytes = tensors_to_bytes(path, tensors)?;
    durable::replace_with(path, bytes).map_err(ModelError::io(path))
}

/// The bytes [`write_tensors`] writes; `path` is for messages.
///
/// # Errors
/// [`ModelError::Safetensors`] for a tensor that is not f32.
pub fn tensors_to_bytes(path: &Path, tensors: &Tensors) -> Result<Vec<u8>, ModelError> {
    let malformed = |source| ModelError::Safetensors {
        path: path.to_path_buf(),
        source,
    };
    let views = tensors.iter().map(|(name, data)| {
        debug_assert_eq!(data.dtype(), DType::F32);
        let shape = data.shape().as_slice().to_vec();
        Ok((
            name.as_str(),
            TensorView::new(Dtype::F32, shape, data.as_bytes())?,
        ))
    });
    let views: Result<Vec<_>, _> = views.collect();
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize(views.map_err(malformed)?, Some(metadata)).map_err(malformed)
}
