//! Writing a model folder: weights in f32, bf16 or f16, in shards where they are large.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use burn::tensor::TensorData;
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde_json::json;

use super::tensors::header;
use super::{CONFIG, INDEX, WEIGHTS};
use crate::config::{DecoderSpec, SaveDtype};
use crate::durable;
use crate::model::{ModelError, Tensors};

/// How a model folder is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveOptions {
    /// Number format of the weights.
    pub dtype: SaveDtype,
    /// Most bytes of tensors in one file; a tensor that is larger gets one of its own.
    pub max_shard_bytes: u64,
}

impl Default for SaveOptions {
    /// f32, and Hugging Face's size of a shard.
    fn default() -> Self {
        Self {
            dtype: SaveDtype::F32,
            max_shard_bytes: 5_000_000_000,
        }
    }
}

/// Writes a model folder: weights, each file replaced atomically, then the weights of an earlier
/// model that are not part of this one are deleted, then config.json. A folder that has a config has
/// the weights it describes.
///
/// # Errors
/// [`ModelError::Io`]; [`ModelError::OutOfRange`] for a weight that the format cannot hold.
pub fn save(
    folder: &Path,
    spec: &DecoderSpec,
    tensors: &Tensors,
    options: &SaveOptions,
) -> Result<(), ModelError> {
    check_range(tensors, options.dtype)?;
    let shards = shards(tensors, options);
    let names = shard_names(shards.len());
    let config_path = folder.join(CONFIG);
    // One file in the place of one file is replaced at once. Anything else takes several changes,
    // and a folder in between is no model.
    let is_one_change = shards.len() == 1 && !folder.join(INDEX).exists();
    if !is_one_change && config_path.exists() {
        durable::remove_file(&config_path).map_err(ModelError::io(&config_path))?;
    }
    for (name, shard) in names.iter().zip(&shards) {
        write_file(&folder.join(name), shard, options.dtype)?;
    }
    let mut kept = names.clone();
    if shards.len() > 1 {
        let index = index(&names, &shards, options.dtype);
        let path = folder.join(INDEX);
        durable::replace_with(&path, format!("{index:#}\n")).map_err(ModelError::io(&path))?;
        kept.push(INDEX.to_string());
    }
    delete_stale(folder, &kept)?;
    let config = format!("{:#}\n", spec.to_config_json(options.dtype));
    durable::replace_with(&config_path, config).map_err(ModelError::io(&config_path))
}

type Shard<'a> = Vec<(&'a String, &'a TensorData)>;

/// In the order of names, as many as fit.
fn shards<'a>(tensors: &'a Tensors, options: &SaveOptions) -> Vec<Shard<'a>> {
    let mut shards: Vec<Shard> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let bytes = bytes_of(tensor.1, options.dtype) as u64;
        let last = shards.len() - 1;
        if filled + bytes > options.max_shard_bytes && !shards[last].is_empty() {
            shards.push(vec![tensor]);
            filled = bytes;
        } else {
            shards[last].push(tensor);
            filled += bytes;
        }
    }
    shards
}

fn shard_names(count: usize) -> Vec<String> {
    if count == 1 {
        return vec![WEIGHTS.to_string()];
    }
    let names = (1..=count).map(|shard| format!("model-{shard:05}-of-{count:05}.safetensors"));
    names.collect()
}

fn index(names: &[String], shards: &[Shard], dtype: SaveDtype) -> serde_json::Value {
    let all = || names.iter().zip(shards);
    let total: usize = all()
        .flat_map(|(_, shard)| shard.iter().map(|(_, data)| bytes_of(data, dtype)))
        .sum();
    let weight_map: BTreeMap<&String, &String> = all()
        .flat_map(|(file, shard)| shard.iter().map(move |(name, _)| (*name, file)))
        .collect();
    json!({ "metadata": { "total_size": total }, "weight_map": weight_map })
}

/// One safetensors file, converted and written piece by piece.
fn write_file(path: &Path, shard: &Shard, dtype: SaveDtype) -> Result<(), ModelError> {
    let kind = match dtype {
        SaveDtype::F32 => Dtype::F32,
        SaveDtype::Bf16 => Dtype::BF16,
        SaveDtype::F16 => Dtype::F16,
    };
    let tensors = shard.iter().map(|(name, data)| {
        let shape = data.shape().as_slice().to_vec();
        ((*name).clone(), kind, shape, bytes_of(data, dtype))
    });
    let header = header(path, tensors)?;
    let written = durable::replace(path, |file| {
        file.write_all(&header)?;
        shard
            .iter()
            .try_for_each(|(_, data)| write_values(file, data, dtype))
    });
    written.map_err(ModelError::io(path))
}

fn bytes_of(data: &TensorData, dtype: SaveDtype) -> usize {
    let each = match dtype {
        SaveDtype::F32 => 4,
        SaveDtype::Bf16 | SaveDtype::F16 => 2,
    };
    data.num_elements() * each
}

fn write_values(file: &mut dyn Write, data: &TensorData, dtype: SaveDtype) -> std::io::Result<()> {
    let mut values = data.iter::<f32>();
    let mut bytes = Vec::with_capacity(4 * PIECE);
    loop {
        bytes.clear();
        for value in values.by_ref().take(PIECE) {
            // Rounded to the nearest, ties to even, by `half`.
            match dtype {
                SaveDtype::F32 => bytes.extend(value.to_le_bytes()),
                SaveDtype::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                SaveDtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
            }
        }
        if bytes.is_empty() {
            return Ok(());
        }
        file.write_all(&bytes)?;
    }
}

/// Values that are converted at a time.
const PIECE: usize = 1 << 14;

/// A finite weight must not become infinite.
fn check_range(tensors: &Tensors, dtype: SaveDtype) -> Result<(), ModelError> {
    let fits = |value: f32| match dtype {
        SaveDtype::F32 => true,
        SaveDtype::Bf16 => bf16::from_f32(value).is_finite(),
        SaveDtype::F16 => f16::from_f32(value).is_finite(),
    };
    if dtype == SaveDtype::F32 {
        return Ok(());
    }
    for (name, data) in tensors {
        let mut values = data.iter::<f32>();
        if let Some(value) = values.find(|&value| value.is_finite() && !fits(value)) {
            return Err(ModelError::OutOfRange {
                name: name.clone(),
                value,
                dtype,
            });
        }
    }
    Ok(())
}

/// Weights that an earlier save left and this one did not write.
fn delete_stale(folder: &Path, kept: &[String]) -> Result<(), ModelError> {
    let entries = fs::read_dir(folder).map_err(ModelError::io(folder))?;
    for entry in entries {
        let entry = entry.map_err(ModelError::io(folder))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let ours = name == WEIGHTS || name == INDEX || is_shard(name);
        if ours && !kept.iter().any(|kept| kept == name) {
            let path = entry.path();
            durable::remove_file(&path).map_err(ModelError::io(path))?;
        }
    }
    durable::sync_folder(folder).map_err(ModelError::io(folder))
}

/// model-00001-of-00003.safetensors.
fn is_shard(name: &str) -> bool {
    let Some(numbers) = name
        .strip_prefix("model-")
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .and_then(|rest| rest.split_once("-of-"))
    else {
        return false;
    };
    let digits = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    digits(numbers.0) && digits(numbers.1)
}
