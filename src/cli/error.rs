//! Every way a verb can fail, with its exit code.

use std::path::PathBuf;

use super::report::{self, Diagnostic};
use crate::adapter::AdapterError;
use crate::checkpoint::CheckpointError;
use crate::collective::LaunchError;
use crate::compare::CompareError;
use crate::config::{ConfigError, SweepError};
use crate::data::DataError;
use crate::delta::DeltaError;
use crate::device::DeviceError;
use crate::durable;
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
    /// Ranks that cannot meet.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A comparison.
    #[error(transparent)]
    Compare(#[from] CompareError),
    /// A sweep's file, and the experiment it varies.
    #[error(transparent)]
    Sweep(#[from] SweepError),
    /// A model folder.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An adapter.
    #[error(transparent)]
    Adapter(AdapterError),
    /// An adapter that does not say which model it is for.
    #[error("{} does not say which base model it is for", path.display())]
    NoBaseModel {
        /// The adapter's folder.
        path: PathBuf,
    },
    /// An adapter whose base model is not where it says.
    #[error("{}: its base model is not in {}", path.display(), base.display())]
    BaseModelGone {
        /// The adapter's folder.
        path: PathBuf,
        /// Where the adapter says that the base model is.
        base: PathBuf,
    },
    /// An adapter where a model is needed.
    #[error("{} is an adapter, and not a model", path.display())]
    AdapterAlone {
        /// The adapter's folder.
        path: PathBuf,
    },
    /// Merging without an adapter.
    #[error("there is nothing to merge: no --adapter, and --model is not an adapter's folder")]
    NoAdapter,
    /// A phase that the experiment does not have.
    #[error("there is no phase `{}`", wanted.escape_debug())]
    NoSuchPhase {
        /// The phase that was asked for.
        wanted: String,
        /// The names of the phases.
        names: Vec<String>,
    },
    /// The checkpoints of a run.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A folder without checkpoints.
    #[error("{} has no checkpoints", path.display())]
    NoCheckpoints {
        /// What was taken for a run folder.
        path: PathBuf,
    },
    /// A checkpoint without an average of the weights.
    #[error("the checkpoint of step {step} has no average of the weights")]
    NoAverage {
        /// The step.
        step: u64,
    },
    /// A full checkpoint whose average is to be written as a model.
    #[error("{} is a whole checkpoint: its weights have other names than their average", folder.display())]
    AverageOfWhole {
        /// The step's folder.
        folder: PathBuf,
    },
    /// A difference between models.
    #[error(transparent)]
    Delta(#[from] DeltaError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A tokenizer.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A completion.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A flag that says nothing about the form that was asked for.
    #[error("{flag} says nothing here: it is for {forms}")]
    UselessFlag {
        /// The flag.
        flag: &'static str,
        /// The forms it is for.
        forms: &'static str,
    },
    /// A folder to write that holds something.
    #[error("{} is not empty", path.display())]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
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
            Self::Config(_) | Self::Sweep(_) | Self::Device(_) | Self::Launch(_) => 2,
            Self::Compare(error) => error.exit_code(),
            Self::Train(error) => error.exit_code(),
            Self::Data(error) => error.exit_code(),
            Self::Model(error) => error.exit_code(),
            Self::Adapter(error) => error.exit_code(),
            Self::NoBaseModel { .. } | Self::AdapterAlone { .. } => 2,
            Self::NoAdapter | Self::UselessFlag { .. } | Self::NoSuchPhase { .. } => 2,
            Self::BaseModelGone { .. } | Self::Delta(_) => 1,
            Self::Checkpoint(_) | Self::NoCheckpoints { .. } | Self::NoAverage { .. } => 1,
            Self::AverageOfWhole { .. } => 1,
            Self::Io { .. } | Self::NotEmpty { .. } => 1,
            Self::Generate(error) => error.exit_code(),
        }
    }

    /// Shows it on standard error.
    pub(super) fn print(&self) {
        report::print(|styled| match self {
            Self::Config(error) | Self::Train(TrainError::Config(error)) => {
                report::render_config(error, styled)
            }
            Self::Sweep(SweepError(errors)) => {
                let texts = errors
                    .iter()
                    .map(|error| report::render_config(error, styled));
                texts.collect::<Vec<_>>().join("\n")
            }
            other => report::render(&[other.diagnostic()], styled),
        });
    }

    fn diagnostic(&self) -> Diagnostic {
        let (kind, help) = match self {
            Self::Config(_) | Self::Sweep(_) => ("config", None),
            Self::Launch(error) => ("ranks", Some(error.help().to_string())),
            Self::Compare(error) => (error.kind(), error.help()),
            Self::Train(error) => (error.kind(), error.help()),
            Self::Model(error) => ("model", error.help()),
            Self::Adapter(error) => ("adapter", error.help()),
            Self::NoBaseModel { .. } | Self::BaseModelGone { .. } => {
                let help = "name it: --model BASE --adapter THIS";
                ("adapter", Some(help.to_string()))
            }
            Self::AdapterAlone { path } => {
                let merge = format!("runner merge --model {} --out MODEL", path.display());
                let help = format!("put it into its base model first: {merge}");
                ("adapter", Some(help))
            }
            Self::NoAdapter => {
                let help = "name the folder of a run with [adapter], or one that PEFT wrote";
                ("adapter", Some(help.to_string()))
            }
            Self::NoSuchPhase { names, .. } => {
                let help = format!("the phases are {}", names.join(", "));
                ("config", Some(help))
            }
            Self::Checkpoint(error) => ("checkpoint", error.help_outside_runs()),
            Self::NoCheckpoints { .. } => {
                let help = "name the folder of a run: the one with resolved.toml in it";
                ("checkpoint", Some(help.to_string()))
            }
            Self::NoAverage { .. } => {
                let help = "the run has no [average], or it begins later: leave out --average";
                ("checkpoint", Some(help.to_string()))
            }
            Self::AverageOfWhole { .. } => {
                let help = "a finished run has exported its average to the run folder; only checkpoints with \
                            format = \"delta\" can be written as models of their average";
                ("checkpoint", Some(help.to_string()))
            }
            Self::Delta(error) => ("delta", error.help()),
            Self::Device(error) => ("device", Some(error.help())),
            Self::Data(error) => ("data", error.help()),
            Self::Generate(error) => ("generate", error.help()),
            Self::UselessFlag { flag, .. } => ("config", Some(format!("remove {flag}"))),
            Self::NotEmpty { .. } => {
                let help = "an export replaces nothing: name a folder that is absent or empty";
                ("io", Some(help.to_string()))
            }
            Self::Io { source, .. } => ("io", durable::help(source).map(str::to_string)),
        };
        Diagnostic {
            help,
            ..Diagnostic::new(kind, self.to_string())
        }
    }
}
