//! How the gradients of all workers become one.
//!
//! A worker computes the gradient of its own part of each step. A rank has one worker, or several
//! logical workers, which take turns in one process. Workers are numbered over the whole run: those
//! of rank 0 first.

use serde::{Deserialize, Serialize};

use super::{Gradient, NamedParameter, PipelineError, StepContext};
use crate::collective::Collective;
use crate::extra::ExtraState;

/// Sums the gradients over all workers in a way of its own. A pipeline without one sums them in f32.
pub trait Exchange: Send {
    /// The sum of all workers' gradients, the same bits on every rank. `gradients` are those of this
    /// rank's workers, at least one. Called on every rank, for the same steps in the same order, with
    /// the same number of gradients.
    ///
    /// # Errors
    /// Any failure after which the run cannot go on.
    fn reduce(
        &mut self,
        gradients: Vec<Gradient>,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError>;

    /// The report of the last exchange, on this rank. None before the first.
    fn report(&self) -> Option<ExchangeReport>;

    /// The state that all ranks together need to continue exactly, on rank 0; empty for an exchange
    /// without memory. What the other ranks get means nothing. Called on every rank, for the same
    /// steps.
    ///
    /// # Errors
    /// [`PipelineError::Collective`]
    fn state(&self, collective: &dyn Collective) -> Result<ExtraState, PipelineError>;

    /// Restores the state of this rank from that of all ranks together, as a run of any number of
    /// ranks has saved it. Returns a note for the user if the state does not mean exactly the same
    /// here.
    ///
    /// # Errors
    /// [`PipelineError::State`] for a state that does not belong to this exchange.
    fn load(
        &mut self,
        state: ExtraState,
        collective: &dyn Collective,
    ) -> Result<Option<String>, PipelineError>;

    /// Enters a phase that trains the parameters `trained`. What is kept of parameters that are no
    /// longer trained, or that begin anew, is dropped.
    ///
    /// # Errors
    /// [`PipelineError::Stage`] if the exchange does not work with these parameters.
    fn enter_phase(
        &mut self,
        trained: &[NamedParameter],
        is_new: &dyn Fn(&str) -> bool,
    ) -> Result<(), PipelineError>;
}

/// The cost and the loss of an exchange, on one rank. With several logical workers the bytes are
/// those of one of them, on average.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ExchangeReport {
    /// Bytes that a worker sent: codes, scales, lengths, vectors, everything.
    pub sent_bytes: u64,
    /// Bytes that it received from all others. Numbers that are added on their way arrive once.
    pub received_bytes: u64,
    /// Bytes of its gradient in f32.
    pub gradient_bytes: u64,
    /// The share of the squared norm of residual and gradient that was sent, of all matrices
    /// together. It is δ where the code is that of least squared error, and 1 in a step without
    /// compression.
    pub sent_energy: f64,
    /// The cosine of the angle between the sum over all workers and the sum over those of this rank:
    /// how much what is applied looks like the step's own gradient. 0 if one of them is zero.
    pub cosine: f64,
    /// Norm of the residuals of this rank's workers after the step.
    pub residual_norm: f64,
}

/// The owner of the state of a pipeline's exchange.
pub(super) const OWNER: &str = "gradient";
