//! One training step, without disk and events.

use std::time::{Duration, Instant};

use burn::tensor::FloatDType;

use super::TrainState;
use super::regulator::{Irregular, StepLimits};
use crate::collective::{Collective, CollectiveError};
use crate::data::Batch;
use crate::gradient::{ExchangeReport, Gradient, PipelineError, StepContext};
use crate::model::ModelError;
use crate::objective::{Metrics, Objective, Precision, Sums, backward_part, weight_of};
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
    /// Logical workers of this rank, at least 1. Each takes an equal part of the micro-batches.
    pub workers: usize,
}

impl Default for StepSettings {
    /// f32 throughout, a norm of at most 1, a learning rate of 1e-3, seed 0, one worker.
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
            workers: 1,
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
    /// The micro-batches cannot be shared out evenly.
    #[error("{batches} micro-batches for {workers} logical workers")]
    Uneven {
        /// Micro-batches of this rank.
        batches: usize,
        /// Logical workers of this rank.
        workers: usize,
    },
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
    if settings.workers == 0 || !batches.len().is_multiple_of(settings.workers) {
        return Err(StepError::Uneven {
            batches: batches.len(),
            workers: settings.workers,
        });
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
        first_row: 0,
    };
    let (mut sums, mut gradients) = backward_workers(
        state,
        (batches, settings.workers),
        objective,
        (precision, weight),
        collective.rank(),
    )?;
    let backward = begun.elapsed();

    collective.sum(std::slice::from_mut(&mut sums.loss))?;
    collective.sum(&mut sums.others)?;
    let loss = sums.loss / weight;
    let metrics = objective.step_metrics(&sums, weight);
    let norms: Vec<f64> = gradients.iter().map(Gradient::norm).collect();
    let mut exchange = None;
    let are_finite = norms.iter().all(|norm| norm.is_finite());
    let mut is_finite = collective.all(loss.is_finite() && are_finite)?;
    let (gradient, grad_norm) = if is_finite && !state.pipeline.is_identity(collective) {
        let context = StepContext {
            step: state.progress.step,
            seed: settings.seed,
            collective,
        };
        let gradient = state.pipeline.reduce(gradients, &context)?;
        exchange = state.pipeline.exchange_report();
        // All ranks have the same bits, so they all decide alike.
        let norm = gradient.norm();
        is_finite = norm.is_finite();
        (gradient, norm)
    } else {
        // Several gradients are left only if one of them is not finite.
        let norm = norms.iter().sum();
        (gradients.pop().unwrap_or_default(), norm)
    };
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

/// The sums of all logical workers of this rank, and their gradients: one for each worker if the
/// pipeline needs them apart, else their sum.
fn backward_workers(
    state: &TrainState,
    (batches, workers): (&[Batch], usize),
    objective: &dyn Objective,
    (precision, weight): (Precision, f64),
    rank: usize,
) -> Result<(Sums, Vec<Gradient>), ModelError> {
    let (mut sums, mut gradients) = (Sums::default(), Vec::new());
    let of_worker = batches.len() / workers;
    for (worker, batches) in batches.chunks(of_worker).enumerate() {
        let rows: usize = batches.iter().map(|batch| batch.rows).sum();
        let precision = Precision {
            first_row: ((rank * workers + worker) * rows) as u64,
            ..precision
        };
        let found = backward_part(state.model(), batches, objective, (precision, weight))?;
        sums.add(&found.sums);
        match gradients.pop() {
            Some(before) if !state.pipeline.needs_each_worker() => {
                gradients.push(Gradient::add(before, found.gradient));
            }
            before => gradients.extend(before.into_iter().chain([found.gradient])),
        }
    }
    Ok((sums, gradients))
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
