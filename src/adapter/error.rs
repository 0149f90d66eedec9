//! What can be wrong with an adapter.

use std::path::PathBuf;

use crate::model::ModelError;

/// An adapter that cannot be read, attached, mixed or merged.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// A file of the adapter could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The folder has no adapter in it.
    #[error("{} is not an adapter: it has no {missing}", path.display())]
    NotAnAdapter {
        /// The folder.
        path: PathBuf,
        /// The file that is missing.
        missing: &'static str,
    },
    /// adapter_config.json is not one.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A field that this build cannot honour.
    #[error("{}: `{field}` = {value} is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value.
        value: String,
    },
    /// A tensor that has to be there.
    #[error("adapter tensor `{name}` is missing")]
    Missing {
        /// Its name in the file.
        name: String,
    },
    /// A tensor that the base model has no place for.
    #[error("adapter tensor `{name}` has no place in this base model")]
    Unexpected {
        /// Its name in the file.
        name: String,
    },
    /// A tensor of another shape than the base model needs.
    #[error("adapter tensor `{name}` is {found:?}, expected {expected}")]
    Shape {
        /// Its name in the file.
        name: String,
        /// The shape in words.
        expected: String,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A value that is not a number or not finite.
    #[error("adapter tensor `{name}` holds {value}")]
    NotFinite {
        /// Its name in the file.
        name: String,
        /// The first such value.
        value: f32,
    },
    /// An embedding that was trained apart from an output head that is the same matrix.
    #[error(
        "adapter tensor `{name}` is an embedding for a base model whose output head is the same matrix, and stays as it was"
    )]
    Unties {
        /// Its name in the file.
        name: String,
    },
    /// An adapter that the files of its base model have no place for.
    #[error("the adapter cannot be written: {reason}")]
    NotWritable {
        /// Why.
        reason: String,
    },
    /// Adapters that have no sum.
    #[error("adapters cannot be mixed: {reason}")]
    NotMixable {
        /// Why.
        reason: String,
    },
    /// An adapter that nobody has trained.
    #[error("the adapter changes nothing: every lora_B is zero")]
    Untrained,
    /// A name that the registry does not know, or knows already.
    #[error("{problem} adapter `{name}` (there are: {known})")]
    Name {
        /// "no" or "already an".
        problem: &'static str,
        /// The name.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The base model, or what is to be written.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl AdapterError {
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// The process exit code: what the caller asked for is 2, a damaged or foreign folder 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Untrained
            | Self::NotMixable { .. }
            | Self::NotWritable { .. }
            | Self::Name { .. } => 2,
            Self::Model(error) => error.exit_code(),
            _ => 1,
        }
    }

    /// What to do about it, where there is something to say.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::NotAnAdapter { .. } => Some(
                "--adapter takes the run folder of a run with [adapter], or a folder that PEFT wrote"
                    .to_string(),
            ),
            Self::Unsupported { field, .. } if field == "peft_type" => {
                Some("LoRA and DoRA adapters can be read".to_string())
            }
            Self::Unsupported { field, .. } if field == "init_lora_weights" => Some(
                "it belongs to a base model that its beginning was taken out of: convert it with PEFT, \
                 save_pretrained(..., path_initial_model_for_weight_conversion=...)"
                    .to_string(),
            ),
            Self::Unties { .. } => Some(
                "train it with ensure_weight_tying = true in PEFT, or on a base model whose output head \
                 is a matrix of its own"
                    .to_string(),
            ),
            Self::Unexpected { .. } | Self::Shape { .. } | Self::Missing { .. } => Some(
                "the adapter was trained on another base model, or its files do not belong together"
                    .to_string(),
            ),
            Self::Untrained => {
                Some("train it first, or name the checkpoint that was meant".to_string())
            }
            Self::Model(error) => error.help(),
            _ => None,
        }
    }
}
