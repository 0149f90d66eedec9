//! Loss and gradient of an optimizer step, computed by all cores.
//!
//! On the CPU most operations of a training step run on one core: they are too small to be worth
//! splitting one by one. So the rows of a micro-batch are split instead, and every core runs the
//! whole model forward and backward on its share. Each share has parameters of its own in the
//! autodiff graph (the values are shared, not copied), and the shares' gradients are added in
//! order, so the result depends on the number of threads but never on their timing.

use std::ops::Range;

use burn::module::Param;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::Gradient;
use crate::data::Batch;
use crate::model::{Decoder, MapParameters, ModelError, map_parameters};

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
    let weight: f64 = batches.iter().map(Batch::weight).sum();
    let mut total = Backward {
        nats: 0.0,
        weight,
        gradient: Gradient::default(),
    };
    for batch in batches {
        let shares: Vec<(f64, Gradient)> = shares(batch.rows, rayon::current_num_threads())
            .into_par_iter()
            .map(|rows| share(model, &batch.rows(rows), weight))
            .collect::<Result<_, _>>()?;
        for (nats, gradient) in shares {
            total.nats += nats;
            total.gradient = total.gradient.accumulate(gradient, model);
        }
    }
    Ok(total)
}

fn share(model: &Decoder, batch: &Batch, weight: f64) -> Result<(f64, Gradient), ModelError> {
    let model = map_parameters(model.clone(), &mut OwnGraph);
    let loss = model.loss(batch, 1.0 / weight)?;
    let gradient = Gradient::backward(&loss.objective, &model);
    Ok((f64::from(loss.sum.into_scalar::<f32>()), gradient))
}

/// Rows of each share: as equal as possible, none empty.
fn shares(rows: usize, threads: usize) -> Vec<Range<usize>> {
    let count = threads.clamp(1, rows.max(1));
    (0..count)
        .map(|i| i * rows / count..(i + 1) * rows / count)
        .collect()
}

/// Gives every parameter a leaf of its own: shares of one graph would wait for each other.
struct OwnGraph;

impl MapParameters for OwnGraph {
    fn map<const D: usize>(&mut self, _path: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let value = Tensor::from_inner(param.val().inner()).require_grad();
        Param::initialized(param.id, value)
    }
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
