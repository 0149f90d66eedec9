//! What can be wrong with a config.json.

use std::path::PathBuf;

/// A model that is not described, or described in a way this build cannot honour.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
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
        /// Its JSON, `nothing` when it is absent.
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
    /// The file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is larger than any config.json.
    #[error("{} is larger than {limit} bytes: not a model's config.json", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// The file is not JSON.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
}

impl SpecError {
    pub(crate) fn shape(message: String) -> Self {
        Self::Shape { message }
    }

    /// What to do about it, where there is something to say.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Unsupported { field, .. } if field.starts_with("quantization_config") => Some(
                "this build loads ternary weights that are rounded online, and those that `runner \
                 export` has packed: take the model's folder with unpacked weights"
                    .to_string(),
            ),
            Self::Unsupported { .. } => Some(
                "this build loads llama, mistral, qwen2, qwen3, phi3 and bitnet models with rotary \
                 positions of type default, linear or llama3, and the gpt2 models it writes"
                    .to_string(),
            ),
            _ => None,
        }
    }
}
