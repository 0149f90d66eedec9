//! States that tensors are read from, chunk by chunk.

use std::borrow::Cow;
use std::collections::HashMap;

use super::chunk::chunk_bytes;
use super::{DeltaError, LossRecord, TensorInfo};

/// A set of named tensors whose bytes can be read a chunk at a time, from several threads at once.
pub trait Source: Sync {
    /// The tensors, in any order.
    fn tensors(&self) -> Vec<TensorInfo>;

    /// The same chunk of each of some tensors that are of one size.
    ///
    /// # Errors
    /// A tensor that is not there, or cannot be read.
    fn read(&self, names: &[&str], chunk: usize) -> Result<Vec<Cow<'_, [u8]>>, DeltaError>;

    /// What to call it in messages.
    fn describe(&self) -> String;

    /// What was lost of a tensor when it was written, if anything was.
    fn lossy(&self, _name: &str) -> Option<LossRecord> {
        None
    }
}

impl<S: Source + ?Sized> Source for &S {
    fn tensors(&self) -> Vec<TensorInfo> {
        (**self).tensors()
    }

    fn read(&self, names: &[&str], chunk: usize) -> Result<Vec<Cow<'_, [u8]>>, DeltaError> {
        (**self).read(names, chunk)
    }

    fn describe(&self) -> String {
        (**self).describe()
    }

    fn lossy(&self, name: &str) -> Option<LossRecord> {
        (**self).lossy(name)
    }
}

/// Tensors in memory.
#[derive(Debug, Default)]
pub struct Memory<'a> {
    tensors: HashMap<String, (TensorInfo, &'a [u8])>,
}

impl<'a> Memory<'a> {
    /// A state of tensors and their bytes, little-endian, in the order of rows.
    ///
    /// # Panics
    /// If a tensor has other bytes than its shape and type ask for.
    pub fn new(tensors: impl IntoIterator<Item = (TensorInfo, &'a [u8])>) -> Self {
        let named = tensors.into_iter().map(|(info, bytes)| {
            assert_eq!(info.bytes(), Some(bytes.len()), "bytes of `{}`", info.name);
            (info.name.clone(), (info, bytes))
        });
        Self {
            tensors: named.collect(),
        }
    }
}

impl Source for Memory<'_> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.tensors
            .values()
            .map(|(info, _)| info.clone())
            .collect()
    }

    fn read(&self, names: &[&str], chunk: usize) -> Result<Vec<Cow<'_, [u8]>>, DeltaError> {
        let of = |name: &&str| {
            // Only what `tensors` names is asked for.
            let (info, bytes) = &self.tensors[*name];
            let length = chunk_bytes(info.dtype);
            let start = chunk * length;
            Cow::Borrowed(&bytes[start..bytes.len().min(start + length)])
        };
        Ok(names.iter().map(of).collect())
    }

    fn describe(&self) -> String {
        "memory".to_string()
    }
}
