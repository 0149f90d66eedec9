//! What training minimises.
//!
//! An [`Objective`] turns a batch into a loss, its gradient and named numbers. [`CrossEntropy`] is
//! that of language models, [`Preference`] that of pairs of answers. All of them share one loop over
//! the shards of a batch ([`backward_with`]) and one evaluation loop ([`evaluate`]).

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
pub use evaluate::{Evaluation, evaluate, evaluate_text};
pub use metrics::{Better, MetricSpec, Metrics, ObjectiveSpec};
pub use preference::{PairLoss, Preference};

use crate::data::Batch;
use crate::gradient::Gradient;
use crate::model::{Decoder, ModelError};

/// What training minimises: the sum of the losses of a step's parts, divided by the sum of their
/// weights.
pub trait Objective: Send + Sync {
    /// What the objective measures.
    fn spec(&self) -> ObjectiveSpec;

    /// The weight of a batch: what the summed loss is divided by, over all batches of a step. It
    /// follows from the batch alone, so that it is known before the backward pass.
    fn weight(&self, batch: &Batch) -> f64;

    /// Rows of a batch that belong together: a shard holds a multiple of so many.
    fn rows_together(&self) -> usize {
        1
    }

    /// Runs `model` (on an autodiff device) forward and backward over a shard of a batch. Returns
    /// the sums and the gradient of `pass.scale` times the summed loss, both of this shard alone.
    ///
    /// # Errors
    /// Whatever the model finds wrong with the batch.
    fn shard(
        &self,
        model: &Decoder,
        batch: &Batch,
        pass: &ShardPass,
    ) -> Result<(Sums, Gradient), ModelError>;

    /// The sums of a batch without a gradient. `model` is on a plain device.
    ///
    /// # Errors
    /// As [`shard`](Self::shard).
    fn measure(&self, model: &Decoder, batch: &Batch) -> Result<Sums, ModelError>;

    /// The numbers of an optimizer step, in the order of the spec's `step`.
    fn step_metrics(&self, sums: &Sums, weight: f64) -> Metrics;

    /// The numbers of an evaluation, in the order of the spec's `evaluation`. `bytes` is the length
    /// of the evaluated text in UTF-8.
    fn evaluation_metrics(&self, sums: &Sums, weight: f64, bytes: u64) -> Metrics;
}

/// Sums over the rows of some batches.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sums {
    /// Σ loss.
    pub loss: f64,
    /// What else the objective adds up, in an order of its own.
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
