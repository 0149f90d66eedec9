//! What a run tells the world while it trains.

use serde::{Deserialize, Serialize};

use super::TrainError;
use super::regulator::Irregular;
use crate::checkpoint::Cost;
use crate::config::SpikeAction;
use crate::gradient::ExchangeReport;
use crate::objective::{Evaluation, Metrics, ObjectiveSpec};

/// Something that happened in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Something a person should know: which files, which device, a cache hit.
    Note {
        /// One line of text.
        text: String,
    },
    /// A run goes on from a checkpoint; what had come after it is gone.
    Resumed {
        /// The checkpoint's step.
        step: u64,
    },
    /// The loop begins.
    Started {
        /// Completed steps: 0, or where a resumed run goes on.
        step: u64,
        /// Steps of the whole run.
        steps: u64,
        /// The objectives of the run, and the metrics of their steps and evaluations.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        objectives: Vec<ObjectiveSpec>,
    },
    /// The next phase begins.
    PhaseStarted {
        /// Completed steps.
        step: u64,
        /// The number of the phase, from 0.
        phase: usize,
        /// The name of the phase.
        name: String,
    },
    /// One optimizer step.
    Step(StepRecord),
    /// The validation split was measured.
    Evaluated {
        /// Completed steps.
        step: u64,
        /// The result.
        #[serde(flatten)]
        evaluation: Evaluation,
        /// The weights that were measured; None if the run does not average them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        weights: Option<EvaluatedWeights>,
        /// Whether it is the lowest so far.
        best: bool,
        /// Tokens trained on so far.
        #[serde(default)]
        tokens: u64,
        /// The cost of all training steps so far.
        #[serde(default)]
        cost: Cost,
    },
    /// A sample completion.
    Sample {
        /// Completed steps.
        step: u64,
        /// What was given.
        prompt: String,
        /// What the model added.
        completion: String,
    },
    /// A checkpoint is about to be written: what has been recorded up to it has to be on the disk
    /// first.
    Saving {
        /// Completed steps.
        step: u64,
    },
    /// A checkpoint was written.
    Saved {
        /// Completed steps.
        step: u64,
        /// Seconds of training so far, over all sessions of the run.
        seconds: f64,
    },
    /// A checkpoint was deleted by rotation.
    Deleted {
        /// Its step.
        step: u64,
    },
    /// A step was not applied because its loss or gradient was not finite.
    Skipped {
        /// The step that would have been completed.
        step: u64,
        /// The first sequence of its batch, by its place in the data order.
        first_sequence: u64,
        /// Sequences in its batch.
        sequences: u64,
        /// The loss, as text: JSON has no NaN.
        loss: String,
        /// The gradient norm, as text.
        grad_norm: String,
    },
    /// A step was not applied because a gradient overflowed f16. The loss scale is lowered, which
    /// is how its largest useful value is found.
    Overflowed {
        /// The step that would have been completed.
        step: u64,
        /// The loss scale from now on.
        loss_scale: f64,
    },
    /// The regulator has decided about a step whose loss or gradient norm leapt. The step was not
    /// applied.
    Regulated {
        /// The step that would have been completed.
        step: u64,
        /// What leapt.
        cause: Irregular,
        /// Its value.
        value: f64,
        /// Its limit.
        limit: f64,
        /// What was done.
        action: SpikeAction,
        /// The first sequence of the batch, by its place in the data order of the phase.
        first_sequence: u64,
        /// Sequences in the batch.
        sequences: u64,
        /// The checkpoint that the run went back to; None if it went on.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        back_to: Option<u64>,
    },
    /// A step was predicted and tried.
    Predicted {
        /// The step.
        step: u64,
        /// Whether the update was kept. If not, the step is computed after all.
        is_kept: bool,
        /// The loss of the last computed step.
        loss_before: f64,
        /// The loss of the same batch after the predicted update, as text: JSON has no NaN.
        loss_after: String,
    },
    /// The validation loss has stopped improving, and so does the run.
    StoppedEarly {
        /// Completed steps.
        step: u64,
        /// Evaluations since the best one.
        evaluations: u64,
        /// The step of the best one.
        best_step: u64,
    },
    /// The run ends before its last step with an error: interrupted, diverged, out of disk.
    Stopped {
        /// Completed steps.
        step: u64,
        /// The word in brackets after `error`.
        kind: String,
        /// What happened.
        message: String,
    },
    /// The run is over.
    Finished {
        /// Completed steps.
        step: u64,
        /// The step whose weights were exported.
        exported_step: u64,
        /// The weights of that step that were exported; None if the run does not average them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exported_weights: Option<EvaluatedWeights>,
        /// Nats per token of the bigram baseline on the validation split.
        bigram: Option<f64>,
        /// Whether it ended before its last step because validation stopped improving.
        stopped_early: bool,
    },
}

impl Event {
    /// The checkpoint that the run went back to. What observers have recorded after it is void.
    pub fn back_to(&self) -> Option<u64> {
        match self {
            Self::Regulated { back_to, .. } => *back_to,
            _ => None,
        }
    }

    /// A sentence about a decision of the regulator.
    pub(super) fn decision(&self) -> Option<String> {
        let Self::Regulated {
            step,
            cause,
            value,
            limit,
            action,
            back_to,
            ..
        } = self
        else {
            return None;
        };
        let what = match cause {
            Irregular::Loss => "the loss",
            Irregular::GradNorm => "the gradient norm",
        };
        let done = match (action, back_to) {
            (_, Some(to)) => format!(
                "went back to the checkpoint of step {to}, and on with the sequences after it"
            ),
            (SpikeAction::CutLr, None) => {
                "the step was skipped, and the learning rate is halved for a window".to_string()
            }
            (_, None) => "the step was skipped".to_string(),
        };
        Some(format!(
            "step {step}: {what} of {value:.4} is above its limit of {limit:.4}; {done}"
        ))
    }

    /// Completed optimizer steps when it happened; none for what says nothing about that.
    pub fn completed_steps(&self) -> Option<u64> {
        match self {
            // The step of a deletion is that of the checkpoint, not of the moment.
            Self::Note { .. } | Self::Deleted { .. } => None,
            Self::Step(record) => Some(record.step),
            Self::Regulated { step, back_to, .. } => Some(back_to.unwrap_or(*step)),
            Self::Resumed { step }
            | Self::Started { step, .. }
            | Self::PhaseStarted { step, .. }
            | Self::Evaluated { step, .. }
            | Self::Sample { step, .. }
            | Self::Saving { step }
            | Self::Saved { step, .. }
            | Self::Skipped { step, .. }
            | Self::Predicted { step, .. }
            | Self::Overflowed { step, .. }
            | Self::StoppedEarly { step, .. }
            | Self::Stopped { step, .. }
            | Self::Finished { step, .. } => Some(*step),
        }
    }
}

/// The weights that are evaluated or exported, in a run that averages them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvaluatedWeights {
    /// Those of the last step, because the average has not begun.
    Current,
    /// The average.
    Average,
}

impl EvaluatedWeights {
    /// Its name in metrics and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Average => "average",
        }
    }
}

/// What is known about one optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Completed steps, this one included.
    pub step: u64,
    /// The name of the phase; None if the run has one phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// The mean loss over the whole step, in the objective's unit.
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// Trained tokens per second over the last `logging_steps` steps, evaluation and saving apart.
    pub tokens_per_second: f64,
    /// Resident memory of the process after the step; none where the system does not say.
    pub memory_bytes: Option<u64>,
    /// Decisions of the regulator so far; None without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regulated: Option<u64>,
    /// What is recorded about prediction; None in a phase that computes every step. The loss of a
    /// predicted step is that of the batch before, after the update; it has no gradient norm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    /// How the gradients of the workers became one; None if they were added in f32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exchange: Option<ExchangeReport>,
    /// The cost of all steps so far, this one included.
    #[serde(default)]
    pub cost: Cost,
    /// The other metrics of the objective.
    #[serde(flatten)]
    pub metrics: Metrics,
}

impl StepRecord {
    /// The gradient norm; None for a predicted step, which computes no gradient.
    pub fn measured_grad_norm(&self) -> Option<f64> {
        let prediction = self.prediction.as_ref();
        let is_predicted = prediction.is_some_and(|prediction| prediction.mode == "predict");
        (!is_predicted).then_some(self.grad_norm)
    }
}

/// What is recorded about prediction at a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// What the step was: "full", "correct" (compared with a prediction) or "predict".
    pub mode: String,
    /// Predictions of the phase that were kept, up to here.
    pub predicted: u64,
    /// Predictions of the phase that were rejected, up to here.
    pub rejected: u64,
    /// The cosine of the last comparison of a prediction with the truth.
    pub cosine: Option<f64>,
}

/// Watches a run. An error ends the run: a metrics file that cannot be written is a failure, not a
/// detail.
pub trait Observer: Send {
    /// Called for every event, in order.
    ///
    /// # Errors
    /// Whatever makes it pointless to go on.
    fn observe(&mut self, event: &Event) -> Result<(), TrainError>;
}
