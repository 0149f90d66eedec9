//! The tensors of a full checkpoint: two files, and a third if there is extra state.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use burn::tensor::TensorData;
use safetensors::SafeTensors;

use super::CheckpointError;
use crate::durable;
use crate::model::folder::{memory_dtype, stream_tensors, tensors_from_bytes, tensors_header};
use crate::model::{ModelError, Tensors};

pub(super) const MODEL: &str = "model.safetensors";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
pub(super) const EXTRA: &str = "extra.safetensors";

/// Writes and flushes a file. Returns its BLAKE3.
pub(super) fn write_tensors(path: &Path, tensors: &Tensors) -> Result<String, CheckpointError> {
    let header = tensors_header(path, tensors)?;
    let mut hasher = blake3::Hasher::new();
    let written = durable::create(path, |file| {
        let mut hashed = Hashed {
            file,
            hasher: &mut hasher,
        };
        stream_tensors(&mut hashed, &header, tensors)
    });
    written
        .and_then(|file| file.sync_all())
        .map_err(CheckpointError::io(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Hashes what passes through on its way to a file.
struct Hashed<'a> {
    file: &'a mut dyn Write,
    hasher: &'a mut blake3::Hasher,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // No more at a time than stays in the cache between the two.
        let piece = &bytes[..bytes.len().min(1 << 18)];
        let written = self.file.write(piece)?;
        self.hasher.update(&piece[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Reads and verifies a file of the model or the optimizer.
pub(super) fn read_tensors(path: &Path, expected: &str) -> Result<Tensors, CheckpointError> {
    let bytes = read_verified(path, expected)?;
    Ok(tensors_from_bytes(path, &bytes)?)
}

/// Reads and verifies the file of extra state.
pub(super) fn read_extra(path: &Path, expected: &str) -> Result<Tensors, CheckpointError> {
    let bytes = read_verified(path, expected)?;
    let malformed = |source| ModelError::Safetensors {
        path: path.to_path_buf(),
        source,
    };
    let file = SafeTensors::deserialize(&bytes).map_err(malformed)?;
    let tensors = file.iter().map(|(name, view)| {
        let dtype = memory_dtype(view.dtype()).ok_or_else(|| CheckpointError::Broken {
            path: path.to_path_buf(),
            message: format!("no checkpoint has a tensor `{name}` of {}", view.dtype()),
        })?;
        let data = TensorData::from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), dtype);
        Ok((name.to_string(), data))
    });
    tensors.collect()
}

fn read_verified(path: &Path, expected: &str) -> Result<Vec<u8>, CheckpointError> {
    let bytes = fs::read(path).map_err(CheckpointError::io(path))?;
    let found = blake3::hash(&bytes).to_hex().to_string();
    if found != expected {
        let expected = expected.to_string();
        return Err(CheckpointError::Damaged {
            path: path.to_path_buf(),
            expected,
            found,
        });
    }
    Ok(bytes)
}
