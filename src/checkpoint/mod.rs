//! Checkpoints: everything a run needs to go on, saved so that a crash cannot lose it.
//!
//! A [`Snapshot`] is the run's state on the host. A [`CheckpointStore`] keeps snapshots by step in a
//! run folder, one folder per step:
//!
//! ```text
//! checkpoints/step-000100/delta.safetensors       weights and moments: the difference from another step's, or alone
//!                         state.json              position in data and schedule, checksums
//! checkpoints/step-000200/model.safetensors       ... or whole: Hugging Face names and layout
//!                         optimizer.safetensors   <parameter path>.<moment>
//!                         extra.safetensors       <owner>.<name>, if there is extra state
//!                         state.json
//! checkpoints/best  checkpoints/last              text files holding a step folder's name
//! ```
//!
//! A save writes and flushes a hidden folder and renames it, so that a folder named `step-*` is
//! complete by construction; loading verifies its checksums all the same. Of whole checkpoints tensors are streamed and
//! hashed on their way to the file: a save holds one copy of the weights, then one of the moments. Differences are taken
//! from a [`Capture`] of both, and from the chain on the disk, chunk by chunk.
//!
//! A step that cannot be read does not end a run that can go on without it. The next save is a
//! keyframe, and nothing that could still repair the step is deleted. A [`Warning`] reports each
//! such step once.
//!
//! `store.rs` writes and reads; `rotate.rs` deletes; `chain.rs` has the delta format, `whole.rs`
//! the full format, `extra.rs` the extra state, `state.rs` the file state.json, and `list.rs` the
//! listing and restoring of checkpoints.

mod chain;
mod error;
mod extra;
mod list;
mod rotate;
mod state;
mod store;
mod whole;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use error::{CheckpointError, Warning};
pub use list::{Details, Listed, Stored};
pub use rotate::Rotated;
pub use store::{CheckpointStore, Saved};

use burn::tensor::Device;

use crate::config::DecoderSpec;
use crate::delta::Method;
use crate::extra::Extras;
use crate::gradient::LossScale;
use crate::model::folder::{decoder_from_hf, decoder_from_own, hf_from_own};
use crate::model::{Decoder, ModelError, Tensors, is_of_adapter};
use crate::optimizer::{AppliedStep, OptimizerState};

/// The state of a run between two optimizer steps.
#[derive(Debug)]
pub struct Snapshot {
    /// Weights.
    pub model: Weights,
    /// Moments and counters.
    pub optimizer: OptimizerState,
    /// The state of other owners, by owner.
    pub extra: Extras,
    /// How far the run has come.
    pub progress: Progress,
}

/// The weights that a checkpoint stores. An adapter's tensors are named by parameter path in both
/// variants.
#[derive(Debug, Clone, PartialEq)]
pub enum Weights {
    /// Under Hugging Face's names, in the layout of its files.
    Files(Tensors),
    /// By the parameters' paths, as they are in memory.
    Own(Tensors),
}

impl Weights {
    /// Whatever they are called.
    pub fn tensors(self) -> Tensors {
        match self {
            Self::Files(tensors) | Self::Own(tensors) => tensors,
        }
    }

    /// Converts the weights of a model with this spec to Hugging Face's names. The tensors of an
    /// adapter keep their parameter paths.
    pub fn files(self, spec: &DecoderSpec) -> Tensors {
        match self.split_adapter() {
            (Self::Own(tensors), adapter) => {
                let mut files = hf_from_own(spec, tensors);
                files.extend(adapter);
                files
            }
            (Self::Files(mut tensors), adapter) => {
                tensors.extend(adapter);
                tensors
            }
        }
    }

    /// Separates the tensors of an adapter from all others.
    pub fn split_adapter(self) -> (Self, Tensors) {
        let apart = |tensors: Tensors| -> (Tensors, Tensors) {
            let tensors = tensors.into_iter();
            tensors.partition(|(path, _)| !is_of_adapter(path))
        };
        match self {
            Self::Files(tensors) => {
                let (weights, adapter) = apart(tensors);
                (Self::Files(weights), adapter)
            }
            Self::Own(tensors) => {
                let (weights, adapter) = apart(tensors);
                (Self::Own(weights), adapter)
            }
        }
    }

    /// A model of this form with these weights.
    ///
    /// # Errors
    /// Weights that are not this model's.
    pub fn decoder(self, spec: &DecoderSpec, device: &Device) -> Result<Decoder, ModelError> {
        match self {
            Self::Files(tensors) => decoder_from_hf(spec, tensors, device),
            Self::Own(tensors) => decoder_from_own(spec, tensors, device),
        }
    }
}

/// A copy of a run's state, to be saved while training goes on.
#[derive(Debug)]
pub struct Capture {
    /// By the parameters' paths, as they are in memory.
    pub weights: Tensors,
    /// Moments and counters.
    pub optimizer: OptimizerState,
    /// Extra state, by owner.
    pub extra: Extras,
    /// The one step that led here from the last checkpoint, by parameter: none where there were more.
    pub steps: BTreeMap<String, AppliedStep>,
    /// config.json of the model, in Hugging Face's form; null if the checkpoint holds only an
    /// adapter. If it holds all weights and an adapter, it also says in which phase the adapter
    /// began. A config that differs from the last checkpoint's begins a new chain.
    pub config: serde_json::Value,
}

/// How checkpoints are written as differences from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainOptions {
    /// One in so many stands alone; 1 for all.
    pub keyframe_every: u64,
    /// The method that stores the weights of delta checkpoints with loss; None stores them exactly.
    /// Steps whose weights will be exported, and steps from which a run has to resume bit for bit,
    /// are saved without it.
    pub lossy: Option<Method>,
    /// Whether Adam's moments may, too; whatever else an optimizer keeps is exact.
    pub lossy_moments: bool,
}

impl ChainOptions {
    /// Nothing is lost.
    pub fn exact(keyframe_every: u64) -> Self {
        Self {
            keyframe_every,
            lossy: None,
            lossy_moments: false,
        }
    }
}

/// How far a run has come. The position in the data and in the schedule are functions of these
/// numbers and the config, so nothing else needs saving to continue exactly.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Completed optimizer steps.
    pub step: u64,
    /// The phase of the run that the last step belongs to, counted from 0; omitted if 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub phase: u64,
    /// Sequences drawn from the training data of the phase.
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
    /// Where a later phase begins in its data, because the regulator went back from there to an
    /// earlier phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_to: Option<SkipTo>,
    /// The cost of all training steps; omitted if nothing was counted, as by older versions.
    #[serde(default, skip_serializing_if = "Cost::is_zero")]
    pub cost: Cost,
}

/// A place in the data of a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkipTo {
    /// The phase, counted from 0.
    pub phase: u64,
    /// Sequences of the phase that are not drawn.
    pub sequences: u64,
}

impl Progress {
    /// The sequences that phase `number` leaves out at its beginning; it does so once.
    pub(crate) fn skip_to(&mut self, number: usize) -> u64 {
        let is_here = |skip: &mut SkipTo| skip.phase == number as u64;
        let skip = self.skip_to.take_if(is_here);
        skip.map_or(0, |skip| skip.sequences)
    }
}

/// The cost of training steps. Evaluation and saving are not part of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// Forward-backward passes: one per micro-batch.
    pub backward_passes: u64,
    /// Multiplications and additions by the forecast of the phase, for every token computed,
    /// trained or masked.
    pub flops: f64,
    /// Wall-clock seconds.
    pub train_seconds: f64,
    /// Bytes that a worker sent to exchange gradients, with compression.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sent_bytes: u64,
    /// Bytes that a worker received from the others, with compression.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub received_bytes: u64,
}

impl Cost {
    fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, more: Self) {
        self.backward_passes += more.backward_passes;
        self.flops += more.flops;
        self.train_seconds += more.train_seconds;
        self.sent_bytes += more.sent_bytes;
        self.received_bytes += more.received_bytes;
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The lowest validation loss of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BestEvaluation {
    /// Completed optimizer steps when it was measured.
    pub step: u64,
    /// Nats per token.
    pub val_loss: f64,
}
