//! What can be wrong with a checkpoint.

use std::path::PathBuf;

use serde_json::error::Category;

use crate::delta::DeltaError;
use crate::durable;
use crate::model::ModelError;

/// A checkpoint that cannot be written, found or trusted.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the checkpoint is malformed.
    #[error("{}: {source}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The weights or moments cannot be read.
    #[error(transparent)]
    Tensors(#[from] ModelError),
    /// A file is not the one that was saved.
    #[error("{} is damaged: its BLAKE3 is {found}, saved was {expected}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// BLAKE3 in state.json.
        expected: String,
        /// BLAKE3 of the file.
        found: String,
    },
    /// state.json is of another step or another version of this program.
    #[error(
        "{} is version {version} of step {saved}, not one that this build reads of step {step}",
        path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// The step it says it is of.
        saved: u64,
        /// The step of its folder.
        step: u64,
    },
    /// The tensors of a checkpoint in a chain.
    #[error(transparent)]
    Delta(#[from] DeltaError),
    /// A file of a chain that does not go with the rest of it.
    #[error("{} is damaged, or of another run: {message}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        message: String,
    },
    /// A checkpoint that is the difference from one that is gone.
    #[error("{} is the difference from step {parent}, which is gone", folder.display())]
    NoParent {
        /// The step's folder.
        folder: PathBuf,
        /// The step it was written beside.
        parent: u64,
    },
    /// A checkpoint that is whole where one of a chain is needed.
    #[error("{} is a whole checkpoint, and part of no chain", folder.display())]
    NotInChain {
        /// The step's folder.
        folder: PathBuf,
    },
    /// The extra state cannot be stored in a checkpoint.
    #[error("the extra state of `{owner}` cannot be saved: {message}")]
    Extra {
        /// The owner of the state.
        owner: String,
        /// What is wrong with it.
        message: String,
    },
    /// There is a checkpoint of that step already.
    #[error("{} is there already", folder.display())]
    StepExists {
        /// The step's folder.
        folder: PathBuf,
    },
    /// There is no checkpoint of that step.
    #[error("{} has no checkpoint of step {step}{}", folder.display(), listed(available))]
    NoSuchStep {
        /// The checkpoints folder.
        folder: PathBuf,
        /// The step asked for.
        step: u64,
        /// The steps there are.
        available: Vec<u64>,
    },
}

/// A problem that the user should know about but that does not end the run.
#[derive(Debug, thiserror::Error)]
pub enum Warning {
    /// A step is stored as a keyframe because the checkpoint before it cannot be read.
    #[error(
        "the checkpoint of step {before} cannot be read: that of step {step} is stored without it. \
         {cause}"
    )]
    StandsAlone {
        /// The step that was saved.
        step: u64,
        /// The step before it.
        before: u64,
        /// Why the step before it cannot be read.
        cause: CheckpointError,
    },
    /// A kept step cannot be read, so it cannot be made a keyframe. The steps that it may depend on
    /// are kept too.
    #[error(
        "the checkpoint of step {step} cannot be read{}. {cause}",
        kept_with(held)
    )]
    Unreadable {
        /// The step.
        step: u64,
        /// Earlier steps that would have been deleted.
        held: Vec<u64>,
        /// Why it cannot be read.
        cause: CheckpointError,
    },
}

fn kept_with(steps: &[u64]) -> String {
    let listed: Vec<String> = steps.iter().map(u64::to_string).collect();
    match steps {
        [] => String::new(),
        [_] => format!("; step {} is kept with it", listed.join(", ")),
        _ => format!("; steps {} are kept with it", listed.join(", ")),
    }
}

fn listed(steps: &[u64]) -> String {
    let steps: Vec<String> = steps.iter().map(u64::to_string).collect();
    if steps.is_empty() {
        String::new()
    } else {
        format!("; there are: {}", steps.join(", "))
    }
}

fn is_out_of_space(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

impl CheckpointError {
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(super) fn malformed(path: impl Into<PathBuf>) -> impl FnOnce(serde_json::Error) -> Self {
        let path = path.into();
        move |source| Self::Malformed { path, source }
    }

    /// Whether a write failed because of the checkpoint that it builds on, and not because of the new
    /// file.
    pub(super) fn is_of_source(&self) -> bool {
        matches!(
            self,
            Self::Delta(DeltaError::Source(_)) | Self::Broken { .. }
        )
    }

    /// How to fix it, when no run is being resumed.
    pub fn help_outside_runs(&self) -> Option<String> {
        match self {
            Self::Io { source, .. } | Self::Delta(DeltaError::Io { source, .. }) => {
                durable::help(source).map(str::to_string)
            }
            _ => None,
        }
    }

    /// What to do about it, where there is something to say.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Delta(DeltaError::Io { source, .. }) | Self::Io { source, .. }
                if is_out_of_space(source) =>
            {
                Some(
                    "the checkpoints before this one are untouched: make room on the disk or raise \
                     its quota, then run the same command again"
                        .to_string(),
                )
            }
            // The file is valid JSON, but this version cannot have written it.
            Self::Malformed { source, .. } if source.classify() == Category::Data => Some(
                "a newer version of this program may have written it: go on with that, or go back to \
                 another checkpoint with --resume STEP"
                    .to_string(),
            ),
            Self::Damaged { .. }
            | Self::Malformed { .. }
            | Self::Foreign { .. }
            | Self::Delta(_)
            | Self::Broken { .. }
            | Self::NoParent { .. } => {
                Some("go back to another checkpoint with --resume STEP".to_string())
            }
            _ => None,
        }
    }
}
