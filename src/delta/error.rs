//! What can be wrong with a difference between two states.

use std::path::{Path, PathBuf};

use crate::durable;

/// A difference that cannot be written, read or applied.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that is no difference, or one of another version, or one whose header is damaged.
    #[error("{}: {message}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor's bytes in a file are not those that were written, or not of this tensor.
    #[error("{}: tensor `{tensor}`: {message}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        message: String,
    },
    /// The parent is not the one that the difference was taken from.
    #[error("{} was not made from {parent}: {message}", path.display())]
    OtherParent {
        /// The file.
        path: PathBuf,
        /// What was taken for its parent.
        parent: String,
        /// The first thing that differs.
        message: String,
    },
    /// The weights are not a valid safetensors file.
    #[error("{}: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is malformed.
        source: safetensors::SafeTensorError,
    },
    /// While a difference was being written, its source or its parent could not be read, or was not
    /// the expected one. Every other error of a write is about the new file.
    #[error(transparent)]
    Source(Box<DeltaError>),
}

impl DeltaError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(super) fn header(path: &Path, message: impl Into<String>) -> Self {
        Self::Header {
            path: path.to_path_buf(),
            message: message.into(),
        }
    }

    pub(super) fn tensor(path: &Path, tensor: &str, message: impl Into<String>) -> Self {
        Self::Tensor {
            path: path.to_path_buf(),
            tensor: tensor.to_string(),
            message: message.into(),
        }
    }

    /// Marks an error as one of the states that a difference is made from.
    pub(super) fn of_source(self) -> Self {
        Self::Source(Box::new(self))
    }

    /// What to do about it, where there is something to say.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Io { source, .. } => durable::help(source).map(str::to_string),
            Self::Source(error) => error.help(),
            Self::OtherParent { .. } => {
                Some("apply it to the folder it was made from, unchanged".to_string())
            }
            _ => None,
        }
    }
}
