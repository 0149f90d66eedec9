//! What can end a run before its last step.

use std::path::PathBuf;

use super::interrupt::Signal;
use super::{InsufficientDisk, StepError};
use crate::adapter::AdapterError;
use crate::checkpoint::CheckpointError;
use crate::collective::CollectiveError;
use crate::config::{ConfigError, SpecError};
use crate::data::DataError;
use crate::device::DeviceError;
use crate::durable;
use crate::forecast::Shortage;
use crate::generate::GenerateError;
use crate::gradient::PipelineError;
use crate::model::ModelError;
use crate::objective::EvaluateError;
use crate::optimizer::OptimizerError;
use crate::phase::TimelineError;

/// A run that did not finish.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The config, where it contradicts the data.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// It would not fit in memory.
    #[error(transparent)]
    Memory(#[from] Shortage),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The optimizer's saved state.
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    /// A failure of the gradient pipeline.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A failure of the exchange between ranks.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Ranks that do not have the same configuration, version or data.
    #[error("the {what} of rank {rank} is not that of rank 0:\n{difference}")]
    RanksDiffer {
        /// What differs.
        what: &'static str,
        /// The first rank that differs.
        rank: usize,
        /// The values on both ranks.
        difference: String,
    },
    /// Ranks whose weights are no longer the same.
    #[error("the weights of rank {rank} are not those of rank 0 after step {step}")]
    RanksDrifted {
        /// The first rank that differs.
        rank: usize,
        /// Completed steps.
        step: u64,
    },
    /// The lengths, adapters or settings of the phases are not possible.
    #[error(transparent)]
    Timeline(#[from] TimelineError),
    /// A phase freezes every parameter.
    #[error("phase `{phase}` freezes every parameter: there is nothing to train")]
    NothingTrained {
        /// The phase.
        phase: String,
    },
    /// The data of two phases would make different tokenizers.
    #[error("the data of phase `{phase}` make another tokenizer than those of the first phase")]
    OtherTokenizer {
        /// The phase.
        phase: String,
    },
    /// The checkpoint belongs to another phase than the plan has at its step.
    #[error(
        "the checkpoint of step {step} was saved in phase {saved} of the run, counted from 0, and \
         the plan has phase {planned} there"
    )]
    OtherPhase {
        /// Completed steps.
        step: u64,
        /// The phase in which the checkpoint was saved.
        saved: u64,
        /// The phase that the plan has at that step.
        planned: u64,
    },
    /// The checkpoint has the state of an owner that this run does not have.
    #[error("the checkpoint has state of `{owner}`, and nothing in this run takes it")]
    UnknownOwner {
        /// The owner.
        owner: String,
    },
    /// A sample completion.
    #[error("eval.sample_prompts, {prompt:?}: {source}")]
    Sample {
        /// The prompt.
        prompt: String,
        /// Why it cannot be completed.
        source: GenerateError,
    },
    /// The run folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The disk has no room for what the run will save.
    #[error(transparent)]
    InsufficientDisk(#[from] Box<InsufficientDisk>),
    /// Another process is training into this folder.
    #[error("{} is in use by another run", folder.display())]
    Locked {
        /// The run folder.
        folder: PathBuf,
    },
    /// The folder holds something and `--resume never` was given.
    #[error("{} is not empty, and --resume never asks for a fresh run", folder.display())]
    NotEmpty {
        /// The run folder.
        folder: PathBuf,
    },
    /// The folder holds something that is not a run.
    #[error("{} is not empty and holds no run", folder.display())]
    NotARun {
        /// The folder.
        folder: PathBuf,
    },
    /// The folder holds a run of another config.
    #[error("{} holds a run with another config:\n{difference}", folder.display())]
    OtherConfig {
        /// The run folder.
        folder: PathBuf,
        /// The keys that differ, one a line.
        difference: String,
    },
    /// The folder holds a run on other data.
    #[error("{} holds a run on other data: {file} has changed", folder.display())]
    OtherData {
        /// The run folder.
        folder: PathBuf,
        /// The first file that differs.
        file: String,
    },
    /// The folder holds a run with another tokenizer, special token or chat template.
    #[error("{} holds a run with another {what}", folder.display())]
    OtherTokens {
        /// The run folder.
        folder: PathBuf,
        /// What differs: the chat template, say.
        what: String,
    },
    /// The folder holds a run with other phases.
    #[error("{} holds a run with other phases:\n{difference}", folder.display())]
    OtherPhases {
        /// The run folder.
        folder: PathBuf,
        /// What differs.
        difference: String,
    },
    /// A phase that has already begun would begin at another step.
    #[error(
        "phase `{name}` began at step {before}; with the length that the run is to have now it would have begun at step {now}"
    )]
    MovedPhase {
        /// The phase.
        name: String,
        /// Its first step in the run so far.
        before: u64,
        /// Its first step in the requested run.
        now: u64,
    },
    /// The run ends before the average of its weights begins.
    #[error(
        "the average of the weights would begin at step {first}, and the run has {steps} steps"
    )]
    AverageNeverBegins {
        /// The first step whose weights would be averaged.
        first: u64,
        /// Steps of the run.
        steps: u64,
    },
    /// `start` of an average that a plan made in code has.
    #[error("`start` in [average] {reason}")]
    AverageStart {
        /// What is wrong with it.
        reason: String,
    },
    /// An average that has already begun would begin at another step.
    #[error(
        "the average of the weights began after step {before}; with its `start` and the length that the run is to have now it would have begun after step {now}"
    )]
    MovedAverage {
        /// The steps before it in the run so far.
        before: u64,
        /// The steps before it in the requested run.
        now: u64,
    },
    /// A plan made in code cannot be written to a file: a number exceeds TOML's range, or a path is
    /// not UTF-8.
    #[error("{what} cannot be written to the run folder: {message}")]
    Unwritable {
        /// The part of the plan.
        what: &'static str,
        /// The reason.
        message: String,
    },
    /// The folder holds a finished run that has no checkpoint to continue from.
    #[error(
        "{} holds a run that ended at step {step}, and its checkpoints are gone: it cannot go on to \
         step {steps}",
        folder.display()
    )]
    CheckpointsGone {
        /// The run folder.
        folder: PathBuf,
        /// The step at which it ended.
        step: u64,
        /// The requested number of steps.
        steps: u64,
    },
    /// The folder holds a run that began from other weights.
    #[error("{} holds a run from another base model: {file} has changed", folder.display())]
    OtherBaseModel {
        /// The run folder.
        folder: PathBuf,
        /// The first file that differs.
        file: String,
    },
    /// The folder's record of its run is not readable.
    #[error("{} is not a run's record: {message}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The worker threads could not be started.
    #[error("cannot start {threads} worker threads: {source}")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// Why.
        source: rayon::ThreadPoolBuildError,
    },
    /// Loss or gradient stopped being finite.
    #[error("diverged: loss or gradient was not finite {times} at step {step}", times = times(*in_a_row))]
    Diverged {
        /// Optimizer steps taken when it ended.
        step: u64,
        /// Non-finite steps in a row.
        in_a_row: u32,
        /// The last checkpoint.
        checkpoint: Option<u64>,
    },
    /// The regulator has gone back to the same checkpoint too often.
    #[error(
        "diverged: the run went back to the checkpoint of step {checkpoint} {rollbacks} times, from step {step} last"
    )]
    Unstable {
        /// The last irregular step.
        step: u64,
        /// The checkpoint.
        checkpoint: u64,
        /// Rollbacks to it.
        rollbacks: u64,
    },
    /// The saved state of a part of the loop cannot be used.
    #[error("the checkpoint's state of the {owner} has no usable `{what}`")]
    OwnerState {
        /// The part.
        owner: String,
        /// The tensor or number.
        what: String,
    },
    /// The user asked to stop; the run was saved and can be resumed.
    #[error("stopped by {signal} after step {step}; saved, run the same command again to continue")]
    Interrupted {
        /// What asked.
        signal: Signal,
        /// Optimizer steps taken.
        step: u64,
    },
}

fn times(in_a_row: u32) -> String {
    if in_a_row == 1 {
        "once".to_string()
    } else {
        format!("{in_a_row} times in a row")
    }
}

impl From<StepError> for TrainError {
    fn from(error: StepError) -> Self {
        match error {
            StepError::NoBatches | StepError::Uneven { .. } => {
                unreachable!("every worker has the passes of its phase")
            }
            StepError::Model(error) => Self::Model(error),
            StepError::Collective(error) => Self::Collective(error),
            StepError::Pipeline(error) => Self::Pipeline(error),
        }
    }
}

impl From<EvaluateError> for TrainError {
    fn from(error: EvaluateError) -> Self {
        match error {
            EvaluateError::Model(error) => Self::Model(error),
            EvaluateError::Collective(error) => Self::Collective(error),
        }
    }
}

impl TrainError {
    /// Whether every rank of the run ends with this error, so that one of them is enough to report it.
    pub fn is_of_all_ranks(&self) -> bool {
        matches!(self.kind(), "ranks" | "interrupted" | "diverged")
            || matches!(self, Self::RanksDiffer { .. })
    }

    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// The process exit code: see the table in the book's chapter on the command line.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Data(error) => error.exit_code(),
            Self::OtherData { .. } => 3,
            Self::Sample { source, .. } => source.exit_code(),
            Self::Memory(_) => 4,
            Self::Diverged { .. } | Self::Unstable { .. } => 5,
            Self::Interrupted { signal, .. } => signal.exit_code(),
            Self::Model(ModelError::NoParameter { .. })
            | Self::Model(ModelError::Spec(SpecError::Shape { .. })) => 2,
            Self::Model(error) => error.exit_code(),
            Self::Adapter(error) => error.exit_code(),
            _ if matches!(self.kind(), "config" | "device") => 2,
            _ => 1,
        }
    }

    /// The word in brackets after `error`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Data(_) | Self::OtherData { .. } => "data",
            Self::Config(_)
            | Self::OtherConfig { .. }
            | Self::OtherBaseModel { .. }
            | Self::OtherPhase { .. }
            | Self::OtherPhases { .. }
            | Self::MovedPhase { .. }
            | Self::AverageNeverBegins { .. }
            | Self::AverageStart { .. }
            | Self::MovedAverage { .. }
            | Self::Unwritable { .. }
            | Self::OtherTokens { .. }
            | Self::OtherTokenizer { .. }
            | Self::NothingTrained { .. }
            | Self::Timeline(_)
            | Self::NotEmpty { .. }
            | Self::Pipeline(PipelineError::Ratio(_))
            | Self::RanksDiffer { .. }
            | Self::NotARun { .. } => "config",
            Self::Device(_) => "device",
            Self::Memory(_) => "memory",
            Self::Model(_) => "model",
            Self::Adapter(_) => "adapter",
            Self::Checkpoint(_) | Self::Optimizer(_) | Self::UnknownOwner { .. } => "checkpoint",
            Self::CheckpointsGone { .. } | Self::OwnerState { .. } => "checkpoint",
            Self::InsufficientDisk(_) => "disk",
            Self::Diverged { .. } | Self::Unstable { .. } => "diverged",
            Self::Interrupted { .. } => "interrupted",
            Self::Collective(_)
            | Self::Pipeline(PipelineError::Collective(_))
            | Self::RanksDrifted { .. } => "ranks",
            Self::Sample { .. } => "generate",
            _ => "io",
        }
    }

    /// What to do about it, where there is something to say.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Data(error) => error.help(),
            Self::Io { source, .. } => durable::help(source).map(str::to_string),
            Self::Device(error) => Some(error.help()),
            Self::Memory(shortage) => Some(shortage.help()),
            Self::Model(error) => error.help(),
            Self::Adapter(error) => error.help(),
            Self::Checkpoint(error) => error.help(),
            Self::Sample { source, .. } => source.help(),
            Self::InsufficientDisk(error) => Some(error.help.clone()),
            Self::Collective(_) | Self::Pipeline(PipelineError::Collective(_)) => Some(
                "look for the error of that rank; the same command goes on from the last checkpoint, also \
                 with another number of ranks. If the rank is only slow, raise gradient.timeout_seconds"
                    .to_string(),
            ),
            Self::RanksDiffer { .. } => Some(
                "start all ranks with the same program, command line and files".to_string(),
            ),
            Self::RanksDrifted { .. } => Some(
                "use the same kind of CPU or GPU for all ranks: others round differently".to_string(),
            ),
            Self::Locked { .. } => {
                Some("wait for it, or give this run its own --output-dir".to_string())
            }
            Self::NotEmpty { .. }
            | Self::NotARun { .. }
            | Self::OtherConfig { .. }
            | Self::OtherPhases { .. }
            | Self::CheckpointsGone { .. } => {
                Some("give this run its own --output-dir, or delete the folder".to_string())
            }
            Self::MovedPhase { .. } => Some(
                "give the phases lengths in steps, or this run its own --output-dir".to_string(),
            ),
            Self::AverageNeverBegins { .. } => {
                Some("lower start or every in [average], or remove the section".to_string())
            }
            Self::AverageStart { .. } => Some("1000 (steps) or \"75%\"".to_string()),
            Self::MovedAverage { before, .. } => Some(format!(
                "start = {before} in [average], or give this run its own --output-dir"
            )),
            Self::OtherTokens { .. } | Self::OtherBaseModel { .. } | Self::OtherData { .. } => {
                Some("put it back as it was, or give this run its own --output-dir".to_string())
            }
            Self::Diverged { checkpoint, .. } => {
                let last = checkpoint.map_or(String::new(), |step| {
                    format!("; the last checkpoint is that of step {step}")
                });
                Some(format!(
                    "lower optimizer.learning_rate or raise lr_scheduler.warmup_steps, with another --output-dir{last}"
                ))
            }
            Self::Unstable { .. } => Some(
                "lower optimizer.learning_rate, or on_spike = \"skip\" in [regulator], with another \
                 --output-dir"
                    .to_string(),
            ),
            _ => None,
        }
    }
}
