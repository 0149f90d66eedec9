//! One training step, without disk and events.

use std::time::{Duration, Instant};

use burn::tensor::FloatDType;

use super::TrainState;
use super::regulator::{Irregular, StepLimits};
use crate::collective::{Collective, CollectiveError};
use crate::data::Batch;
use crate::gradient::{ExchangeReport, PipelineError, StepContext};
use crate::model::ModelError;
use crate::objective::{Metrics, Objective, Precision, backward_part, weight_of};
use crate::optimizer::StepFacts;

/// The settings of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSettings {
    /// Dtype of the forward and backward pass.
    pub dtype: FloatDType,
    /// Whether the backward pass recomputes the forward pass of each block.
    pub gradient_checkpointing: bool,
    /// Whether the forward pass multiplies ternary weights as integers.
    pub int8_forward: bool,
    /// The share of the rounded values in ternary weights and their inputs: 0 computes dense, 1
    /// ternary.
    pub ternary_blend: f64,
    /// Largest norm of the whole gradient; 0 = no limit.
    pub max_grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// The largest loss and gradient norm that a step may have to be taken.
    pub limits: StepLimits,
    /// The seed for the random numbers of dropout and the gradient pipeline, together with the
    /// step.
    pub seed: u64,
}

impl Default for StepSettings {
    /// f32 throughout, a norm of at most 1, a learning rate of 1e-3, seed 0.
    fn default() -> Self {
        Self {
            dtype: FloatDType::F32,
            gradient_checkpointing: false,
            int8_forward: false,
            ternary_blend: 1.0,
            max_grad_norm: 1.0,
            learning_rate: 1e-3,
            limits: StepLimits::default(),
            seed: 0,
        }
    }
}

/// The result of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// The mean loss over all ranks, in the objective's unit.
    pub loss: f64,
    /// Trained tokens of all ranks.
    pub tokens: f64,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// The other metrics of the objective.
    pub metrics: Metrics,
    /// The report of the gradient exchange. None if the gradients were added in f32.
    pub exchange: Option<ExchangeReport>,
    /// Whether the weights were updated.
    pub outcome: StepOutcome,
    /// The time that the parts of the step took.
    pub time: StepTime,
}

/// Whether the weights were updated, and if not, why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StepOutcome {
    /// The weights were updated.
    Updated,
    /// A gradient overflowed f16: the weights are unchanged, and the loss scale is lowered.
    Overflowed {
        /// The new loss scale.
        loss_scale: f64,
    },
    /// Loss or gradient was not finite: the weights are unchanged.
    NotFinite,
    /// Loss or gradient norm was above its limit: the weights are unchanged.
    Irregular(Irregular),
}

/// The time that the parts of a step took. A GPU only queues its work, so these times mean little
/// there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepTime {
    /// Forward and backward passes.
    pub backward: Duration,
    /// Vote, gradient pipeline, norm and clipping.
    pub gradient: Duration,
    /// The optimizer's update.
    pub update: Duration,
}

/// Why a step could not be computed. The weights are unchanged.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// This rank has no micro-batches. Every rank needs a part of the step.
    #[error("a step without micro-batches")]
    NoBatches,
    /// The model refuses a batch.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An exchange between ranks failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A stage of the gradient pipeline failed.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
}

/// Takes one optimizer step on the micro-batches of this rank: backward, unscale, finite vote,
/// gradient pipeline, norm, clip, update, average.
///
/// With several ranks, every rank has to call this function for the same step; afterwards all of
/// them hold the same weights. If the step is not finite on one rank, all ranks skip it.
///
/// # Errors
/// [`StepError`]
///
/// ```
/// use burn::tensor::Device;
/// use firebrick::collective::SingleProcess;
/// use firebrick::config::{LionPlan, OptimizerPlan, Preset};
/// use firebrick::data::Batch;
/// use firebrick::model::{Decoder, DecoderSpec};
/// use firebrick::objective::CrossEntropy;
/// use firebrick::optimizer::Optimizer;
/// use firebrick::train::{StepSettings, TrainState, train_step};
///
/// let spec = DecoderSpec {
///     shape: Preset::Stories260K.shape(),
///     vocab_size: 16,
///     eos_token_id: None,
///     bos_token_id: None,
/// };
/// let model = Decoder::new(&spec, 42, &Device::flex().autodiff())?;
/// let optimizer = Optimizer::new(&OptimizerPlan::Lion(LionPlan::new([0.9, 0.99], 0.1)));
/// let mut state = TrainState::new(model, optimizer);
/// let batches = [Batch::of_row(&[1, 2, 3, 1, 2, 3]), Batch::of_row(&[3, 1, 2, 3])];
/// let mut step = || {
///     let settings = StepSettings::default();
///     train_step(&mut state, &batches, &CrossEntropy, &settings, &SingleProcess)
/// };
/// let first = step()?;
/// assert_eq!(first.tokens, 8.0);
/// assert!(step()?.loss < first.loss);
/// assert_eq!(state.progress.step, 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn train_step(
    state: &mut TrainState,
    batches: &[Batch],
    objective: &dyn Objective,
    settings: &StepSettings,
    collective: &dyn Collective,
) -> Result<StepReport, StepError> {
    if batches.is_empty() {
        return Err(StepError::NoBatches);
    }
    let begun = Instant::now();
    // The weight of the whole step, by which each rank divides its own losses.
    let own_tokens: f64 = batches.iter().map(Batch::weight).sum();
    let mut of_all = [weight_of(objective, batches), own_tokens];
    collective.sum(&mut of_all)?;
    let [weight, tokens] = of_all;

    let precision = Precision {
        dtype: settings.dtype,
        loss_scale: state.progress.loss_scale.map_or(1.0, |scale| scale.scale),
        gradient_checkpointing: settings.gradient_checkpointing,
        int8_forward: settings.int8_forward,
        ternary_blend: settings.ternary_blend,
        dropout_seed: Some([settings.seed, state.progress.step]),
    };
    let mut found = backward_part(state.model(), batches, objective, (precision, weight))?;
    let backward = begun.elapsed();

    collective.sum(std::slice::from_mut(&mut found.sums.loss))?;
    collective.sum(&mut found.sums.others)?;
    let loss = found.loss();
    let metrics = objective.step_metrics(&found.sums, weight);
    let mut gradient = found.gradient;
    let mut grad_norm = gradient.norm();
    let mut exchange = None;
    let mut is_finite = collective.all(loss.is_finite() && grad_norm.is_finite())?;
    if is_finite && !state.pipeline.is_identity(collective) {
        let context = StepContext {
            step: state.progress.step,
            seed: settings.seed,
            collective,
        };
        gradient = state.pipeline.reduce(gradient, &context)?;
        exchange = state.pipeline.exchange_report();
        // All ranks have the same bits, so they all decide alike.
        grad_norm = gradient.norm();
        is_finite = grad_norm.is_finite();
    }
    let mut report = StepReport {
        loss,
        tokens,
        grad_norm,
        metrics,
        exchange,
        outcome: StepOutcome::Updated,
        time: StepTime {
            backward,
            gradient: Duration::ZERO,
            update: Duration::ZERO,
        },
    };
    // All ranks have the same loss and the same norm, so they all decide alike.
    let irregular = settings
        .limits
        .exceeded(loss, grad_norm)
        .filter(|_| is_finite);
    if is_finite && irregular.is_none() {
        if let Some(predictor) = &mut state.predictor {
            predictor.take_gradient(&gradient);
        }
        let gradient = gradient.clip(grad_norm, settings.max_grad_norm);
        report.time.gradient = begun.elapsed() - backward;
        let facts = StepFacts {
            learning_rate: settings.learning_rate,
            loss: Some(loss),
            grad_norm: Some(grad_norm),
        };
        state.change_model(|model, optimizer| optimizer.step(model, gradient, facts));
    } else {
        report.time.gradient = begun.elapsed() - backward;
    }
    report.outcome = state.count_step(is_finite, irregular, &report);
    if report.outcome == StepOutcome::Updated {
        state.average_weights();
    }
    report.time.update = begun.elapsed() - backward - report.time.gradient;
    Ok(report)
}

impl TrainState {
    /// Counts a step, and adapts the loss scale to its outcome.
    fn count_step(
        &mut self,
        is_finite: bool,
        irregular: Option<Irregular>,
        report: &StepReport,
    ) -> StepOutcome {
        let progress = &mut self.progress;
        progress.step += 1;
        progress.val_loss = None;
        if is_finite {
            if let Some(scale) = &mut progress.loss_scale {
                scale.held();
            }
            progress.nonfinite_in_a_row = 0;
            if let Some(irregular) = irregular {
                return StepOutcome::Irregular(irregular);
            }
            progress.tokens += report.tokens as u64;
            return StepOutcome::Updated;
        }
        // With a finite loss, the loss scale is to blame as long as it can still be lowered.
        if let Some(scale) = &mut progress.loss_scale
            && report.loss.is_finite()
            && scale.overflowed()
        {
            let loss_scale = scale.scale;
            return StepOutcome::Overflowed { loss_scale };
        }
        progress.nonfinite_in_a_row += 1;
        StepOutcome::NotFinite
    }
}
