//! What can be wrong with a model: its shape, its folder, its weights.

use std::path::PathBuf;

/// A model that cannot be built, loaded or saved.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A shape no decoder can have.
    #[error("impossible model shape: {message}")]
    Shape {
        /// What does not fit.
        message: String,
    },
    /// A field of config.json is missing or has the wrong type.
    #[error("config.json: `{field}` must be {expected}, found {found}")]
    Field {
        /// The field.
        field: String,
        /// Its JSON, `null` when it is absent.
        found: String,
        /// What it must be.
        expected: String,
    },
    /// A field asks for something this build does not implement.
    #[error("config.json: `{field}` = {value} is not supported")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        value: String,
    },
    /// A file of the model could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The folder has no model in it.
    #[error("{} is not a model folder: it has no {missing}", path.display())]
    NotAModel {
        /// The folder.
        path: PathBuf,
        /// The file that is missing.
        missing: &'static str,
    },
    /// config.json is not JSON.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The weights are not a valid safetensors file.
    #[error("{}: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is malformed.
        source: safetensors::SafeTensorError,
    },
    /// A tensor the model needs is absent.
    #[error("tensor `{name}` is missing")]
    MissingTensor {
        /// Its name in the file.
        name: String,
    },
    /// A tensor the model has no place for.
    #[error("tensor `{name}` has no place in this model")]
    UnexpectedTensor {
        /// Its name in the file.
        name: String,
    },
    /// A tensor of the wrong shape or type.
    #[error("tensor `{name}`: expected {expected}, found {found}")]
    TensorMismatch {
        /// Its name in the file.
        name: String,
        /// Shape or dtype the model needs.
        expected: String,
        /// Shape or dtype in the file.
        found: String,
    },
    /// A sequence longer than a learned position table.
    #[error("{length} tokens do not fit a model with {limit} positions")]
    TooLong {
        /// Tokens asked for.
        length: usize,
        /// Positions the model has.
        limit: usize,
    },
}

impl ModelError {
    pub(super) fn shape(message: String) -> Self {
        Self::Shape { message }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// What to do about it, where there is something to say.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::NotAModel { path, .. } if path.join("checkpoints").is_dir() => Some(
                "the run in this folder has not finished; `runner train` with its config goes on"
                    .to_string(),
            ),
            Self::NotAModel { .. } => Some(
                "--model takes a run folder of `runner train`, or a Hugging Face model folder"
                    .to_string(),
            ),
            Self::Unsupported { .. } => Some(
                "this build loads LLaMA models without rope scaling, and the GPT-2 models it writes"
                    .to_string(),
            ),
            Self::TooLong { limit, .. } => Some(format!(
                "shorten the prompt or ask for fewer new tokens: together at most {limit}"
            )),
            _ => None,
        }
    }
}
