//! What can be wrong with a model: its shape, its folder, its weights.

use std::path::PathBuf;

use firebrick_kernels::blockwise::BlockwiseError;
use firebrick_kernels::ternary::layout::LayoutError;

use crate::config::{SaveDtype, SpecError};

/// A model that cannot be built, loaded or saved.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// What describes it.
    #[error(transparent)]
    Spec(#[from] SpecError),
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
    /// The list of shards is not one, or does not agree with the shards.
    #[error("{} {message}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
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
    /// A weight that is finite, and would not be in the number format it is to be saved in.
    #[error("tensor `{name}` holds {value:e}, which {} cannot", dtype.torch_name())]
    OutOfRange {
        /// The tensor's name in the file.
        name: String,
        /// The first such weight.
        value: f32,
        /// The number format.
        dtype: SaveDtype,
    },
    /// Packed weights that are no weights.
    #[error("tensor `{name}`: {source}")]
    PackedWeights {
        /// The tensor's name in the file.
        name: String,
        /// What is wrong with its bytes.
        source: LayoutError,
    },
    /// Quantised weights that are no weights.
    #[error("tensor `{name}`: {source}")]
    Quantised {
        /// The tensor's name in the file.
        name: String,
        /// What is wrong with it.
        source: BlockwiseError,
    },
    /// Quantised weights that say of themselves something else than config.json.
    #[error("tensor `{name}` {message}")]
    QuantState {
        /// The tensor's name in the file.
        name: String,
        /// What is wrong with it.
        message: String,
    },
    /// A file whose weights are packed in another way than its model's config.json says.
    #[error(
        "{}: its weights are packed as {named}, config.json says {expected}",
        path.display()
    )]
    PackedLayout {
        /// The file.
        path: PathBuf,
        /// The layout that its header names.
        named: String,
        /// The layout that config.json names.
        expected: String,
    },
    /// A scale that no weights have.
    #[error("tensor `{name}` has a negative scale, {value}")]
    NegativeScale {
        /// The tensor's name in the file.
        name: String,
        /// The first of its negative values.
        value: f32,
    },
    /// An adapter for a layer that is not there.
    #[error("this model has no linear layer `{path}` to adapt")]
    NoLayer {
        /// The layer's path.
        path: String,
    },
    /// A selector matches none of the model's parameters.
    #[error("this model has no parameter `{selector}`")]
    NoParameter {
        /// The selector.
        selector: String,
    },
    /// Quantising what is quantised already.
    #[error("the model's weights are not dense: they are in few bits already")]
    NotDense,
    /// Packing a model of dense weights.
    #[error("the model's weights are not ternary: there is nothing to pack")]
    NotTernary,
    /// A tokenizer of another model.
    #[error("the tokenizer has ids up to {}, the model has embeddings up to {}", ids - 1, rows - 1)]
    TokenizerMismatch {
        /// Largest token id + 1.
        ids: usize,
        /// Rows of the embedding matrix.
        rows: usize,
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
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// The process exit code: what does not fit the model is the caller's, 2; a damaged or foreign
    /// folder is 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::TooLong { .. }
            | Self::TokenizerMismatch { .. }
            | Self::NotTernary
            | Self::NotDense => 2,
            _ => 1,
        }
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
            Self::Spec(error) => error.help(),
            Self::NotTernary => Some(
                "train it with `[quantization] weights = \"ternary\"`, from scratch or from this model"
                    .to_string(),
            ),
            Self::NotDense => Some("name the folder that it was quantised from".to_string()),
            Self::TokenizerMismatch { .. } => {
                Some("use the tokenizer.json that the model was trained with".to_string())
            }
            Self::OutOfRange { .. } => {
                Some("save it as f32, or as bf16, which has f32's range".to_string())
            }
            Self::UnexpectedTensor { .. } | Self::MissingTensor { .. } => Some(
                "config.json and the weights are not of the same model, or of one this build has no place for"
                    .to_string(),
            ),
            Self::TooLong { limit, .. } => Some(format!(
                "at most {limit} tokens at a time: a shorter sequence or prompt, or fewer new tokens"
            )),
            _ => None,
        }
    }
}
