//! Reads and writes exact tensors as safetensors files, for checkpoints and other uses.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use half::f16;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use serde_json::Value;

use super::weight_files::regular;
use crate::durable;
use crate::model::{ModelError, Tensors};

/// The values of an f32 tensor. Everything in this module is f32: files are turned into it on
/// reading, and parameters are nothing else.
pub(super) fn floats(data: TensorData) -> Vec<f32> {
    debug_assert_eq!(data.dtype(), DType::F32);
    // It fails for another type only, and then says so here rather than converting.
    data.try_into_vec::<f32>()
        .unwrap_or_else(|error| unreachable!("parameters are f32: {error:?}"))
}

pub(super) fn malformed(path: &Path) -> impl Fn(safetensors::SafeTensorError) -> ModelError {
    let path = path.to_path_buf();
    move |source| ModelError::Safetensors {
        path: path.clone(),
        source,
    }
}

/// Reads every tensor of a safetensors file.
///
/// # Errors
/// A file that cannot be read or is malformed; a dtype other than f32 and u8.
pub fn read_tensors(path: &Path) -> Result<Tensors, ModelError> {
    let bytes = fs::read(path).map_err(ModelError::io(path))?;
    tensors_from_bytes(path, &bytes)
}

/// [`read_tensors`] of a file that is in memory; `path` is for messages.
///
/// # Errors
/// As [`read_tensors`].
pub fn tensors_from_bytes(path: &Path, bytes: &[u8]) -> Result<Tensors, ModelError> {
    let file = SafeTensors::deserialize(bytes).map_err(malformed(path))?;
    let mut tensors = Tensors::new();
    for (name, view) in file.iter() {
        let shape = view.shape().to_vec();
        let floats = view.data().chunks_exact(4);
        let data = match view.dtype() {
            Dtype::U8 => TensorData::new(view.data().to_vec(), shape),
            Dtype::F32 => {
                let floats = floats.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                TensorData::new(floats.collect::<Vec<f32>>(), shape)
            }
            other => {
                return Err(ModelError::TensorMismatch {
                    name: name.to_string(),
                    expected: "F32 or U8".to_string(),
                    found: format!("{other:?}"),
                });
            }
        };
        tensors.insert(name.to_string(), data);
    }
    Ok(tensors)
}

/// Reads every tensor of a safetensors file of floats as f32.
///
/// # Errors
/// A file that cannot be read, is no regular file or is malformed; a dtype other than f32, bf16 and
/// f16.
pub(crate) fn read_float_tensors(path: &Path) -> Result<Tensors, ModelError> {
    regular(path).map_err(ModelError::io(path))?;
    let bytes = fs::read(path).map_err(ModelError::io(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(malformed(path))?;
    let tensors = file.iter().map(|(name, view)| {
        let mut values = Vec::with_capacity(view.shape().iter().product());
        as_f32(name, view.dtype(), view.data(), &mut values)?;
        let data = TensorData::new(values, view.shape().to_vec());
        Ok((name.to_string(), data))
    });
    tensors.collect()
}

/// Adds the values of some of a tensor's bytes, whole elements, to `values`.
pub(super) fn as_f32(
    name: &str,
    dtype: Dtype,
    bytes: &[u8],
    values: &mut Vec<f32>,
) -> Result<(), ModelError> {
    let pairs = || {
        bytes
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    };
    match dtype {
        Dtype::F32 => {
            let words = bytes.chunks_exact(4);
            values.extend(words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
        // bf16 is the upper half of an f32.
        Dtype::BF16 => values.extend(pairs().map(|bits| f32::from_bits(u32::from(bits) << 16))),
        Dtype::F16 => values.extend(pairs().map(|bits| f16::from_bits(bits).to_f32())),
        other => {
            return Err(ModelError::TensorMismatch {
                name: name.to_string(),
                expected: "F32, BF16 or F16".to_string(),
                found: format!("{other:?}"),
            });
        }
    }
    Ok(())
}

/// The dtype's name in a safetensors file; None if our files cannot hold it.
pub(crate) fn file_dtype(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::U32 => Dtype::U32,
        DType::U8 => Dtype::U8,
        _ => return None,
    })
}

/// The inverse of [`file_dtype`].
pub(crate) fn memory_dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::U32 => DType::U32,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
}

/// Writes tensors as one safetensors file, atomically.
///
/// # Errors
/// As [`tensors_header`]; the file system's.
pub fn write_tensors(path: &Path, tensors: &Tensors) -> Result<(), ModelError> {
    let header = tensors_header(path, tensors)?;
    durable::replace(path, |file| stream_tensors(file, &header, tensors))
        .map_err(ModelError::io(path))
}

/// What a file of tensors begins with; `path` is for messages.
///
/// # Errors
/// [`ModelError::TensorMismatch`] for a dtype that our files cannot hold,
/// [`ModelError::Safetensors`] for tensors that cannot be stored in a file.
pub fn tensors_header(path: &Path, tensors: &Tensors) -> Result<Vec<u8>, ModelError> {
    let infos = tensors.iter().map(|(name, data)| {
        let dtype = file_dtype(data.dtype()).ok_or_else(|| ModelError::TensorMismatch {
            name: name.clone(),
            expected: "a type that files hold".to_string(),
            found: format!("{:?}", data.dtype()),
        })?;
        let shape = data.shape().as_slice().to_vec();
        Ok((name.clone(), dtype, shape, data.as_bytes().len()))
    });
    let infos: Vec<_> = infos.collect::<Result<_, ModelError>>()?;
    header(path, None, infos.into_iter())
}

/// Writes a file of tensors after its [`header`](tensors_header), tensor by tensor: nothing is
/// copied.
///
/// # Errors
/// The writer's.
pub fn stream_tensors(
    file: &mut dyn Write,
    header: &[u8],
    tensors: &Tensors,
) -> std::io::Result<()> {
    file.write_all(header)?;
    tensors
        .values()
        .try_for_each(|data| file.write_all(data.as_bytes()))
}

/// The length of the header and the header: names, types, shapes and bytes of tensors that follow
/// one another in this order. `safetensors` itself would want all of them at once, or leave a file
/// that only its owner can read. `note` is a name and its value in `__metadata__`.
pub(super) fn header(
    path: &Path,
    note: Option<(&str, &str)>,
    tensors: impl Iterator<Item = (String, Dtype, Vec<usize>, usize)>,
) -> Result<Vec<u8>, ModelError> {
    let mut offset = 0;
    let infos = tensors.map(|(name, dtype, shape, bytes)| {
        let start = offset;
        offset += bytes;
        let data_offsets = (start, offset);
        let info = TensorInfo {
            dtype,
            shape,
            data_offsets,
        };
        (name, info)
    });
    let notes = [("format", "pt")].into_iter().chain(note);
    let notes = notes.map(|(name, value)| (name.to_string(), value.to_string()));
    let notes: HashMap<String, String> = notes.collect();
    let metadata = Metadata::new(Some(notes), infos.collect()).map_err(malformed(path))?;
    let json = ordered_json(&metadata).map_err(std::io::Error::from);
    let mut json = json.map_err(ModelError::io(path))?.into_bytes();
    // Tensors begin at a multiple of eight.
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

/// The same file has the same bytes: `__metadata__` is in no order of its own.
fn ordered_json(metadata: &Metadata) -> serde_json::Result<String> {
    let mut json = serde_json::to_value(metadata)?;
    if let Some(Value::Object(notes)) = json.get_mut("__metadata__") {
        notes.sort_keys();
    }
    serde_json::to_string(&json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    #[test]
    fn streamed_files_have_the_bytes_that_the_safetensors_crate_writes() {
        let tensor = |values: &[f32], shape: &[usize]| TensorData::new(values.to_vec(), shape);
        let tensors = Tensors::from([
            (
                "b.weight".to_string(),
                tensor(&[1.5, -0.0, 2.0, 3.0], &[2, 2]),
            ),
            ("b.Weight".to_string(), tensor(&[f32::NAN], &[1])),
            ("a \"quoted\" name".to_string(), tensor(&[], &[0, 3])),
            ("z".to_string(), tensor(&[7.0], &[])),
        ]);
        for tensors in [tensors, Tensors::new()] {
            let views = tensors.iter().map(|(name, data)| {
                let shape = data.shape().as_slice().to_vec();
                (
                    name,
                    TensorView::new(Dtype::F32, shape, data.as_bytes()).unwrap(),
                )
            });
            let format = HashMap::from([("format".to_string(), "pt".to_string())]);
            let expected = safetensors::serialize(views, Some(format)).unwrap();
            let mut streamed = Vec::new();
            let header = tensors_header(Path::new("x"), &tensors).unwrap();
            stream_tensors(&mut streamed, &header, &tensors).unwrap();
            assert_eq!(streamed, expected);
        }
    }
}
