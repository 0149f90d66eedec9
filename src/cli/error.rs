//! Every way a verb can fail, with its exit code.

use std::path::PathBuf;

use super::report::{self, Diagnostic};
use crate::config::ConfigError;
use crate::data::DataError;
use crate::generate::GenerateError;
use crate::model::ModelError;
use crate::train::TrainError;

/// An error that reached the command line.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The TOML or the `--set` arguments.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A model folder.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tokenizer.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A completion.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A file or stream.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or stream.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl CliError {
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// The process exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => 2,
            Self::Train(error) => error.exit_code(),
            Self::Data(error) => error.exit_code(),
            Self::Model(_) | Self::Io { .. } => 1,
            Self::Generate(error) => match error {
                GenerateError::Model(_) | GenerateError::NotFinite => 1,
                GenerateError::Tokenizer(_)
                | GenerateError::EmptyPrompt
                | GenerateError::UnknownToken { .. } => 2,
            },
        }
    }

    /// Shows it on standard error.
    pub(super) fn print(&self) {
        report::print(|styled| match self {
            Self::Config(error) => report::render_config(error, styled),
            other => report::render(&[Diagnostic::new(other.kind(), other.to_string())], styled),
        });
    }

    /// The word in `error[kind]`.
    fn kind(&self) -> &'static str {
        match self {
            Self::Config(_) => "config",
            Self::Train(TrainError::Data(_)) => "data",
            Self::Train(TrainError::Model(_)) => "model",
            Self::Train(TrainError::OtherConfig { .. }) => "config",
            Self::Train(TrainError::Io { .. }) => "io",
            Self::Train(_) => "train",
            Self::Model(_) => "model",
            Self::Data(_) => "data",
            Self::Generate(_) => "generate",
            Self::Io { .. } => "io",
        }
    }
}
