//! Loss and gradient of an optimizer step, computed by all cores.
//!
//! On the CPU most operations of a training step run on one core: they are too small to be worth
//! splitting one by one. So the rows of a micro-batch are split into shards instead, and every core
//! runs the whole model forward and backward on its shard. Each shard has parameters of its own in
//! the autodiff graph (the values are shared, not copied), and the shards' gradients are added in
//! order, so the result depends on the number of threads but never on their timing.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::FloatDType;
use rayon::prelude::*;

use super::{CrossEntropy, Objective, Sums};
use crate::data::Batch;
use crate::device::lanes;
use crate::gradient::{Gradient, ParameterOrder};
use crate::model::{Decoder, Dropout, ModelError};

/// How a gradient is computed. The default is f32 throughout with every activation kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Precision {
    /// Dtype of the forward and backward pass. Weights are rounded to it, and ternary ones to trits,
    /// once per step from the f32 masters; gradients are added up in f32 (Micikevicius et al., 2018).
    pub dtype: FloatDType,
    /// The loss is multiplied by this before the backward pass and the gradient divided after it,
    /// so that small gradients do not vanish in f16. A power of two changes nothing else.
    pub loss_scale: f64,
    /// Keep only what goes into each block and compute the rest again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Multiply ternary weights and eight-bit activations as integers in the forward pass: the same
    /// up to rounding. Nothing changes for a model without both.
    pub int8_forward: bool,
    /// The share of the rounded values in ternary weights and their inputs: 0 computes dense, 1
    /// ternary. Integers are multiplied at 1 only.
    pub ternary_blend: f64,
    /// What decides which inputs of adapters are dropped: run and step. None drops
    /// nothing, as in evaluation.
    pub dropout_seed: Option<[u64; 2]>,
    /// The number of the first row among those of the whole step. It decides, together with the
    /// seed, what is dropped.
    pub first_row: u64,
}

impl Default for Precision {
    fn default() -> Self {
        Self {
            dtype: FloatDType::F32,
            loss_scale: 1.0,
            gradient_checkpointing: false,
            int8_forward: false,
            ternary_blend: 1.0,
            dropout_seed: None,
            first_row: 0,
        }
    }
}

/// What one optimizer step needs to know about its batches.
#[derive(Debug)]
pub struct Backward {
    /// Sums over all rows of this rank.
    pub sums: Sums,
    /// The weight of the whole step, which the sums are divided by.
    pub weight: f64,
    /// Gradient of Σ loss / weight.
    pub gradient: Gradient,
}

impl Backward {
    /// The mean loss, in the objective's unit.
    pub fn loss(&self) -> f64 {
        self.sums.loss / self.weight
    }
}

/// How a shard's forward and backward pass is computed.
#[derive(Debug, Clone)]
pub struct ShardPass {
    /// Dtype, gradient checkpointing and integer products.
    pub precision: Precision,
    /// Factor of the summed loss whose gradient the shard computes: the loss scale divided by the
    /// weight of the step.
    pub scale: f64,
    /// The model's parameters, for [`Gradient::empty`].
    pub order: Arc<ParameterOrder>,
    pub(super) dropout: Option<Dropout>,
}

/// The weight of a step, by which the summed loss of its batches is divided.
pub fn weight_of(objective: &dyn Objective, batches: &[Batch]) -> f64 {
    batches.iter().map(|batch| objective.weight(batch)).sum()
}

/// Runs `model` (on an autodiff device) forward and backward over the micro-batches of one step, by
/// cross-entropy, in f32.
///
/// Every shard's gradient is scaled by one over the trained tokens of the whole step, so that
/// shards and micro-batches add up to the gradient of the mean however the tokens are grouped.
///
/// # Errors
/// A sequence longer than the model's learned positions.
///
/// ```
/// use burn::tensor::Device;
/// use firebrick::config::{LionPlan, OptimizerPlan, Preset};
/// use firebrick::data::Batch;
/// use firebrick::model::{Decoder, DecoderSpec};
/// use firebrick::objective::backward;
/// use firebrick::optimizer::Optimizer;
///
/// let spec = DecoderSpec {
///     shape: Preset::Stories260K.shape(),
///     vocab_size: 16,
///     eos_token_id: None,
///     bos_token_id: None,
/// };
/// let mut model = Decoder::new(&spec, 42, &Device::flex().autodiff())?;
/// let mut optimizer = Optimizer::new(&OptimizerPlan::Lion(LionPlan::new([0.9, 0.99], 0.1)));
/// let batches = [Batch::of_row(&[1, 2, 3, 1, 2, 3]), Batch::of_row(&[3, 1, 2, 3])];
/// let before = backward(&model, &batches)?;
/// assert_eq!(before.weight, 8.0);
/// let loss = before.loss();
/// model = optimizer.step(model, before.gradient, 1e-3);
/// assert!(backward(&model, &batches)?.loss() < loss);
/// # Ok::<(), firebrick::model::ModelError>(())
/// ```
pub fn backward(model: &Decoder, batches: &[Batch]) -> Result<Backward, ModelError> {
    backward_with(model, batches, &CrossEntropy, Precision::default())
}

/// The same as [`backward`] for any objective and precision.
///
/// # Errors
/// Any error of the model about a batch.
///
/// # Panics
/// If a batch holds only some of the rows that belong together.
pub fn backward_with(
    model: &Decoder,
    batches: &[Batch],
    objective: &dyn Objective,
    precision: Precision,
) -> Result<Backward, ModelError> {
    let weight = weight_of(objective, batches);
    backward_part(model, batches, objective, (precision, weight))
}

/// The same as [`backward_with`] for the part of a step that one rank computes. `weight` is the
/// weight of the whole step, so that the gradients of all parts add up to that of the mean.
///
/// # Errors
/// As [`backward_with`].
///
/// # Panics
/// As [`backward_with`].
pub fn backward_part(
    model: &Decoder,
    batches: &[Batch],
    objective: &dyn Objective,
    (precision, weight): (Precision, f64),
) -> Result<Backward, ModelError> {
    let order = Arc::new(ParameterOrder::of(model));
    let mut total = Backward {
        sums: Sums::default(),
        weight,
        gradient: Gradient::empty(&order),
    };
    let compute = computing(model, precision);
    let (lanes, together) = (lanes(&model.device()), objective.rows_together());
    let mut first = precision.first_row;
    for batch in batches {
        assert!(
            batch.rows.is_multiple_of(together),
            "{} rows are not groups of {together}",
            batch.rows
        );
        let shards: Vec<(Sums, Gradient)> = shards(batch.rows / together, lanes)
            .into_par_iter()
            .map(|groups| {
                let rows = together * groups.start..together * groups.end;
                let dropout = precision.dropout_seed.map(|seed| Dropout {
                    seed,
                    first: first + rows.start as u64,
                    dims: [rows.len(), batch.cols],
                });
                let pass = ShardPass {
                    precision,
                    scale: precision.loss_scale / weight,
                    order: order.clone(),
                    dropout,
                };
                // Each shard has leaves of its own: shards of one graph would wait for each other.
                let model = compute.clone().cast(precision.dtype);
                let (sums, gradient) = objective.shard(&model, &batch.rows(rows), &pass)?;
                Ok((sums, gradient.cast(FloatDType::F32)))
            })
            .collect::<Result<_, ModelError>>()?;
        first += batch.rows as u64;
        for (sums, gradient) in shards {
            total.sums.add(&sums);
            total.gradient = total.gradient.add(gradient);
        }
    }
    if precision.loss_scale != 1.0 {
        total.gradient = total.gradient.scale(1.0 / precision.loss_scale);
    }
    Ok(total)
}

/// The model as the passes of one step compute it.
fn computing(model: &Decoder, precision: Precision) -> Decoder {
    let blended = model.clone().with_ternary_blend(precision.ternary_blend);
    let mut compute = blended.rounded().with_fixed_norms();
    if precision.int8_forward {
        compute = compute.with_integer_products();
    }
    compute.cast(precision.dtype)
}

/// Rows of each shard: as equal as possible, none empty.
fn shards(rows: usize, threads: usize) -> Vec<Range<usize>> {
    let count = threads.clamp(1, rows.max(1));
    (0..count)
        .map(|i| i * rows / count..(i + 1) * rows / count)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_every_row_once() {
        for rows in 1..20 {
            for threads in 1..9 {
                let shards = shards(rows, threads);
                assert!(shards.iter().all(|shard| !shard.is_empty()));
                assert_eq!(
                    shards.into_iter().flatten().collect::<Vec<_>>(),
                    (0..rows).collect::<Vec<_>>()
                );
            }
        }
    }
}
