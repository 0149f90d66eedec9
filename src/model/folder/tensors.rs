//! f32 tensors as a safetensors file: checkpoints, and whatever else is exact.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

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
    let file = SafeTensors::deserialize(bytes).map_err(malformed(path))?;
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
    safetensors::serialize(views.map_err(malformed(path))?, Some(metadata)).map_err(malformed(path))
}
