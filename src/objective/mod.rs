//! The objectives that training minimises.
//!
//! An [`Objective`] turns a batch into a loss, its gradient and metrics. [`CrossEntropy`] is the
//! objective of language models, [`Preference`] that of pairs of answers. Both use the same loop
//! over the shards of a batch ([`backward_with`]) and the same evaluation loop ([`evaluate`]).

mod backward;
mod cross_entropy;
mod evaluate;
mod metrics;
mod passes;
mod preference;

pub use backward::{
    Backward, Precision, ShardPass, backward, backward_part, backward_with, weight_of,
};
pub use cross_entropy::CrossEntropy;
pub use evaluate::{EvaluateError, Evaluation, evaluate, evaluate_text, evaluate_together};
pub use metrics::{Better, MetricSpec, Metrics, ObjectiveSpec};
pub use preference::{PairLoss, Preference};

use crate::data::Batch;
use crate::gradient::Gradient;
use crate::model::{Decoder, ModelError};

/// A function that training minimises: the sum of the losses of a step's batches, divided by the
/// sum of their weights.
pub trait Objective: Send + Sync {
    /// The names and units of what the objective measures.
    fn spec(&self) -> ObjectiveSpec;

    /// The weight of a batch. The summed loss of a step is divided by the sum of its batches'
    /// weights. The weight depends on the batch alone, so that it is known before the backward
    /// pass.
    fn weight(&self, batch: &Batch) -> f64;

    /// The number of consecutive rows that belong together. A shard holds a multiple of this
    /// number.
    fn rows_together(&self) -> usize {
        1
    }

    /// Runs `model` (on an autodiff device) forward and backward over a shard of a batch. Returns
    /// the sums of this shard, and the gradient of `pass.scale` times its summed loss.
    ///
    /// # Errors
    /// Any error of the model about the batch.
    fn shard(
        &self,
        model: &Decoder,
        batch: &Batch,
        pass: &ShardPass,
    ) -> Result<(Sums, Gradient), ModelError>;

    /// Computes the sums of a batch without a gradient. `model` is on a plain device.
    ///
    /// # Errors
    /// As [`shard`](Self::shard).
    fn measure(&self, model: &Decoder, batch: &Batch) -> Result<Sums, ModelError>;

    /// The metrics of an optimizer step, in the order of the spec's `step`.
    fn step_metrics(&self, sums: &Sums, weight: f64) -> Metrics;

    /// The metrics of an evaluation, in the order of the spec's `evaluation`. `bytes` is the length
    /// of the evaluated text in UTF-8.
    fn evaluation_metrics(&self, sums: &Sums, weight: f64, bytes: u64) -> Metrics;
}

/// Sums over the rows of one or more batches.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sums {
    /// Σ loss.
    pub loss: f64,
    /// The other sums of the objective, in an order that the objective defines.
    pub others: Vec<f64>,
}

impl Sums {
    /// Adds the sums of more rows.
    pub fn add(&mut self, more: &Self) {
        self.loss += more.loss;
        self.others
            .resize(self.others.len().max(more.others.len()), 0.0);
        for (sum, more) in self.others.iter_mut().zip(&more.others) {
            *sum += more;
        }
    }
}
