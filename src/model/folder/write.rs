//! Writing a model folder: weights in f32, bf16 or f16, in shards where they are large.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde_json::json;

use super::tensors::header;
use super::{CONFIG, INDEX, WEIGHTS, layout, packed};
use crate::config::{DecoderSpec, PackedLayout, SaveDtype};
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
    let tensors = formatted(spec, tensors, options.dtype);
    check_range(&tensors)?;
    let shards = shards(&tensors, options);
    let names = shard_names(shards.len());
    let config_path = folder.join(CONFIG);
    // One file in the place of one file is replaced at once. Anything else takes several changes,
    // and a folder in between is no model.
    let is_one_change = shards.len() == 1 && !folder.join(INDEX).exists();
    if !is_one_change && config_path.exists() {
        durable::remove_file(&config_path).map_err(ModelError::io(&config_path))?;
    }
    for (name, shard) in names.iter().zip(&shards) {
        let layout = spec.shape.ternary.and_then(|ternary| ternary.packed);
        write_file(&folder.join(name), shard, layout)?;
    }
    let mut kept = names.clone();
    if shards.len() > 1 {
        let index = index(&names, &shards);
        let path = folder.join(INDEX);
        durable::replace_with(&path, format!("{index:#}\n")).map_err(ModelError::io(&path))?;
        kept.push(INDEX.to_string());
    }
    delete_stale(folder, &kept)?;
    let config = format!("{:#}\n", spec.to_config_json(options.dtype));
    durable::replace_with(&config_path, config).map_err(ModelError::io(&config_path))
}

/// Writes tensors of f32 as one safetensors file in `dtype`, atomically.
///
/// # Errors
/// As [`save`].
pub(crate) fn write_tensors_as(
    path: &Path,
    tensors: &Tensors,
    dtype: SaveDtype,
) -> Result<(), ModelError> {
    let format = Format::Floats(dtype);
    let tensors = tensors
        .iter()
        .map(|(name, data)| Formatted { name, data, format });
    let tensors: Vec<Formatted> = tensors.collect();
    check_range(&tensors)?;
    write_file(path, &tensors.iter().collect(), None)
}

/// A tensor and how it is written.
struct Formatted<'a> {
    name: &'a String,
    data: &'a TensorData,
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// Numbers.
    Floats(SaveDtype),
    /// Bytes as they are: packed weights.
    Bytes,
}

impl Formatted<'_> {
    fn bytes(&self) -> usize {
        let each = match self.format {
            Format::Floats(SaveDtype::F32) => 4,
            Format::Floats(SaveDtype::Bf16 | SaveDtype::F16) => 2,
            Format::Bytes => 1,
        };
        self.data.num_elements() * each
    }

    fn kind(&self) -> Dtype {
        match self.format {
            Format::Floats(SaveDtype::F32) => Dtype::F32,
            Format::Floats(SaveDtype::Bf16) => Dtype::BF16,
            Format::Floats(SaveDtype::F16) => Dtype::F16,
            Format::Bytes => Dtype::U8,
        }
    }
}

fn formatted<'a>(spec: &DecoderSpec, tensors: &'a Tensors, dtype: SaveDtype) -> Vec<Formatted<'a>> {
    let format = |name: &str, data: &TensorData| match data.dtype() {
        DType::U8 => Format::Bytes,
        _ if layout::is_exact(spec, name) => Format::Floats(SaveDtype::F32),
        _ => Format::Floats(dtype),
    };
    let tensors = tensors.iter().map(|(name, data)| Formatted {
        name,
        data,
        format: format(name, data),
    });
    tensors.collect()
}

type Shard<'a> = Vec<&'a Formatted<'a>>;

/// In the order of names, as many as fit.
fn shards<'a>(tensors: &'a [Formatted<'a>], options: &SaveOptions) -> Vec<Shard<'a>> {
    let mut shards: Vec<Shard> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.bytes() as u64;
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

fn index(names: &[String], shards: &[Shard]) -> serde_json::Value {
    let all = || names.iter().zip(shards);
    let total: usize = all()
        .flat_map(|(_, shard)| shard.iter().map(|tensor| tensor.bytes()))
        .sum();
    let weight_map: BTreeMap<&String, &String> = all()
        .flat_map(|(file, shard)| shard.iter().map(move |tensor| (tensor.name, file)))
        .collect();
    json!({ "metadata": { "total_size": total }, "weight_map": weight_map })
}

/// One safetensors file, converted and written piece by piece.
fn write_file(path: &Path, shard: &Shard, layout: Option<PackedLayout>) -> Result<(), ModelError> {
    let tensors = shard.iter().map(|tensor| {
        let shape = tensor.data.shape().as_slice().to_vec();
        (tensor.name.clone(), tensor.kind(), shape, tensor.bytes())
    });
    let header = header(
        path,
        layout.map(|layout| (packed::NAME_OF_LAYOUT, layout.name())),
        tensors,
    )?;
    let written = durable::replace(path, |file| {
        file.write_all(&header)?;
        shard.iter().try_for_each(|tensor| match tensor.format {
            Format::Floats(dtype) => write_values(file, tensor.data, dtype),
            Format::Bytes => file.write_all(tensor.data.as_bytes()),
        })
    });
    written.map_err(ModelError::io(path))
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
fn check_range(tensors: &[Formatted]) -> Result<(), ModelError> {
    for Formatted { name, data, format } in tensors {
        let (dtype, fits): (_, fn(f32) -> bool) = match format {
            Format::Bytes | Format::Floats(SaveDtype::F32) => continue,
            Format::Floats(SaveDtype::Bf16) => {
                (SaveDtype::Bf16, |value| bf16::from_f32(value).is_finite())
            }
            Format::Floats(SaveDtype::F16) => {
                (SaveDtype::F16, |value| f16::from_f32(value).is_finite())
            }
        };
        let mut values = data.iter::<f32>();
        if let Some(value) = values.find(|&value| value.is_finite() && !fits(value)) {
            return Err(ModelError::OutOfRange {
                name: (*name).clone(),
                value,
                dtype,
            });
        }
    }
    Ok(())
}

/// Deletes the model in a folder, if there is one. config.json is deleted first, because without it
/// the other files are not a model.
///
/// # Errors
/// [`ModelError::Io`]
pub(crate) fn remove(folder: &Path) -> Result<(), ModelError> {
    let config = folder.join(CONFIG);
    durable::remove_file(&config).map_err(ModelError::io(&config))?;
    delete_stale(folder, &[])
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
