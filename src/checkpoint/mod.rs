//! Checkpoints: everything a run needs to go on, saved so that a crash cannot lose it.
//!
//! A [`Snapshot`] is the run's state on the host. A [`CheckpointStore`] keeps snapshots by step in a
//! run folder, one folder per step:
//!
//! ```text
//! checkpoints/step-000100/model.safetensors       Hugging Face names and layout
//!                         optimizer.safetensors   <parameter path>.<moment>
//!                         state.json              position in data and schedule, BLAKE3 of all three
//! checkpoints/best  checkpoints/last              text files holding a step folder's name
//! ```
//!
//! A save writes and flushes a hidden folder and renames it, so that a folder named `step-*` is
//! complete by construction; loading verifies its checksums all the same. Tensors are streamed and
//! hashed on their way to the file: a save holds one copy of the weights, then one of the moments.

mod error;
mod files;
mod store;

use serde::{Deserialize, Serialize};

pub use error::CheckpointError;
pub use store::CheckpointStore;

use crate::gradient::LossScale;
use crate::model::Tensors;
use crate::optimizer::OptimizerState;

/// The state of a run between two optimizer steps.
#[derive(Debug)]
pub struct Snapshot {
    /// Weights under Hugging Face's names and layout.
    pub model: Tensors,
    /// Moments and counters.
    pub optimizer: OptimizerState,
    /// How far the run has come.
    pub progress: Progress,
}

/// How far a run has come. The position in the data and in the schedule are functions of these
/// numbers and the config, so nothing else needs saving to continue exactly.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Completed optimizer steps.
    pub step: u64,
    /// Sequences drawn from the training data.
    pub sequences: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Non-finite steps in a row, up to now.
    pub nonfinite_in_a_row: u32,
    /// The evaluation of this step, where there was one.
    pub val_loss: Option<f64>,
    /// The best evaluation up to now.
    pub best: Option<BestEvaluation>,
    /// The loss scale of a run in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// Evaluations since the best one: what early stopping counts. Left out where it is 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub evaluations_since_best: u64,
    /// Seconds of training, evaluation and saving included, over all sessions of the run.
    pub seconds: f64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The lowest validation loss of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BestEvaluation {
    /// Completed optimizer steps when it was measured.
    pub step: u64,
    /// Nats per token.
    pub val_loss: f64,
}
