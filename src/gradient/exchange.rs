//! How the gradients of all ranks become one.

use super::{Gradient, PipelineError, StepContext};
use crate::extra::ExtraState;

/// Sums the gradients over the ranks in a way of its own. A pipeline without one sums them in f32.
pub trait Exchange: Send {
    /// The sum of all ranks' gradients, the same bits on every rank. Called on every rank, for the
    /// same steps in the same order.
    ///
    /// # Errors
    /// Any failure after which the run cannot go on.
    fn reduce(
        &mut self,
        gradient: Gradient,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError>;

    /// The report of the last exchange, on this rank. None before the first.
    fn report(&self) -> Option<ExchangeReport>;

    /// The state that the exchange needs to continue exactly; empty for one without memory.
    fn state(&self) -> ExtraState;

    /// Restores what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// [`PipelineError::State`] for a state that does not belong to this exchange.
    fn load(&mut self, state: ExtraState) -> Result<(), PipelineError>;
}

/// The cost and the loss of an exchange, on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ExchangeReport {
    /// Bytes that this rank sent to each other one: codes, scales, vectors, everything.
    pub sent_bytes: u64,
    /// Bytes that it received from all others.
    pub received_bytes: u64,
    /// Bytes of its gradient in f32.
    pub gradient_bytes: u64,
    /// The share of the squared norm of residual and gradient that was sent, of all matrices
    /// together. It is δ where the code is that of least squared error, and 1 in a step without
    /// compression.
    pub sent_energy: f64,
    /// Norm of the residuals after the step.
    pub residual_norm: f64,
}

/// The owner of the state of a pipeline's exchange.
pub(super) const OWNER: &str = "gradient";
