//! Loss and gradient of an optimizer step, computed by all cores.
//!
//! On the CPU most operations of a training step run on one core: they are too small to be worth
//! splitting one by one. So the rows of a micro-batch are split instead, and every core runs the
//! whole model forward and backward on its share. Each share has parameters of its own in the
//! autodiff graph (the values are shared, not copied), and the shares' gradients are added in
//! order, so the result depends on the number of threads but never on their timing.

use std::ops::Range;

use burn::tensor::FloatDType;
use rayon::prelude::*;

use super::Gradient;
use super::share::{by_block, whole};
use crate::data::Batch;
use crate::device::lanes;
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
    /// What decides which inputs of adapters are dropped: run and step. None drops
    /// nothing, as in evaluation.
    pub dropout_seed: Option<[u64; 2]>,
}

impl Default for Precision {
    fn default() -> Self {
        Self {
            dtype: FloatDType::F32,
            loss_scale: 1.0,
            gradient_checkpointing: false,
            int8_forward: false,
            dropout_seed: None,
        }
    }
}

/// What one optimizer step needs to know about its batches.
#[derive(Debug)]
pub struct Backward {
    /// Σ weight · nats over all batches.
    pub nats: f64,
    /// Σ weight: the number of trained tokens.
    pub weight: f64,
    /// Gradient of nats / weight.
    pub gradient: Gradient,
}

impl Backward {
    /// Mean loss in nats per trained token.
    pub fn loss(&self) -> f64 {
        self.nats / self.weight
    }
}

/// Runs `model` (on an autodiff device) forward and backward over the micro-batches of one step.
///
/// Every share's gradient is scaled by one over the trained tokens of the whole step, so that
/// shares and micro-batches add up to the gradient of the mean however the tokens are grouped.
///
/// # Errors
/// A sequence longer than the model's learned positions.
///
/// ```
/// use burn::tensor::Device;
/// use firebrick::config::{OptimizerPlan, Preset};
/// use firebrick::data::Batch;
/// use firebrick::gradient::backward;
/// use firebrick::model::{Decoder, DecoderSpec};
/// use firebrick::optimizer::Optimizer;
///
/// let spec = DecoderSpec {
///     shape: Preset::Stories260K.shape(),
///     vocab_size: 16,
///     eos_token_id: None,
///     bos_token_id: None,
/// };
/// let mut model = Decoder::new(&spec, 42, &Device::flex().autodiff())?;
/// let mut optimizer = Optimizer::new(&OptimizerPlan::Lion { betas: [0.9, 0.99], weight_decay: 0.1 });
/// let batches = [Batch::of_row(&[1, 2, 3, 1, 2, 3]), Batch::of_row(&[3, 1, 2, 3])];
/// let before = backward(&model, &batches)?;
/// assert_eq!(before.weight, 8.0);
/// let loss = before.loss();
/// model = optimizer.step(model, before.gradient, 1e-3);
/// assert!(backward(&model, &batches)?.loss() < loss);
/// # Ok::<(), firebrick::model::ModelError>(())
/// ```
pub fn backward(model: &Decoder, batches: &[Batch]) -> Result<Backward, ModelError> {
    backward_with(model, batches, Precision::default())
}

/// As [`backward`], in another precision or with less memory.
///
/// # Errors
/// As [`backward`].
pub fn backward_with(
    model: &Decoder,
    batches: &[Batch],
    precision: Precision,
) -> Result<Backward, ModelError> {
    let weight: f64 = batches.iter().map(Batch::weight).sum();
    let mut total = Backward {
        nats: 0.0,
        weight,
        gradient: Gradient::default(),
    };
    let compute = computing(model, precision);
    let lanes = lanes(&model.device());
    let mut first = 0;
    for batch in batches {
        let shares: Vec<(f64, Gradient)> = shares(batch.rows, lanes)
            .into_par_iter()
            .map(|rows| {
                let dropout = precision.dropout_seed.map(|seed| Dropout {
                    seed,
                    first: first + rows.start as u64,
                    dims: [rows.len(), batch.cols],
                });
                share(&compute, &batch.rows(rows), weight, (precision, dropout))
            })
            .collect::<Result<_, _>>()?;
        first += batch.rows as u64;
        for (nats, gradient) in shares {
            total.nats += nats;
            total.gradient = total.gradient.accumulate(gradient, model);
        }
    }
    if precision.loss_scale != 1.0 {
        total.gradient = total.gradient.scale(1.0 / precision.loss_scale, model);
    }
    Ok(total)
}

/// The model as the passes of one step compute it.
pub(super) fn computing(model: &Decoder, precision: Precision) -> Decoder {
    let mut compute = model.clone().rounded().with_fixed_norms();
    if precision.int8_forward {
        compute = compute.with_integer_products();
    }
    compute.cast(precision.dtype)
}

fn share(
    model: &Decoder,
    batch: &Batch,
    weight: f64,
    (precision, dropout): (Precision, Option<Dropout>),
) -> Result<(f64, Gradient), ModelError> {
    // Leaves of its own: shares of one graph would wait for each other.
    let model = model.clone().cast(precision.dtype);
    let scale = precision.loss_scale / weight;
    let (nats, gradient) = if precision.gradient_checkpointing {
        by_block(&model, batch, scale, dropout, None)?
    } else {
        whole(&model, batch, scale, dropout, None)?
    };
    Ok((nats, gradient.cast(FloatDType::F32, &model)))
}

/// Rows of each share: as equal as possible, none empty.
pub(super) fn shares(rows: usize, threads: usize) -> Vec<Range<usize>> {
    let count = threads.clamp(1, rows.max(1));
    (0..count)
        .map(|i| i * rows / count..(i + 1) * rows / count)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_every_row_once() {
        for rows in 1..20 {
            for threads in 1..9 {
                let shares = shares(rows, threads);
                assert!(shares.iter().all(|share| !share.is_empty()));
                assert_eq!(
                    shares.into_iter().flatten().collect::<Vec<_>>(),
                    (0..rows).collect::<Vec<_>>()
                );
            }
        }
    }
}
