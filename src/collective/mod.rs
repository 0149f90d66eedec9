//! The ranks of a data-parallel run, and the exchanges between them during a training step.
//!
//! Data-parallel training runs one process, or one thread, per rank. Ranks exchange values at three
//! points of a step: they agree on the weight of the step's batch, vote on whether the gradient is
//! finite, and sum their gradients. A [`Collective`] provides these exchanges. Every rank has to
//! take part in each of them, in the same order.

mod threads;

pub use threads::ThreadRank;

/// The connection of one rank to all ranks of the run.
pub trait Collective: Send + Sync {
    /// The number of this rank, counted from 0.
    fn rank(&self) -> usize;

    /// The number of ranks, at least 1.
    fn ranks(&self) -> usize;

    /// Replaces the values by their sums over all ranks, added in the order of the ranks, so that
    /// every rank gets the same bits.
    ///
    /// # Errors
    /// [`CollectiveError`] if a rank is gone.
    fn sum(&self, values: &mut [f64]) -> Result<(), CollectiveError>;

    /// Sums the gradient of the parameter at `path` over all ranks, in the same way.
    ///
    /// # Errors
    /// As [`sum`](Self::sum).
    fn sum_gradient(&self, path: &str, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Every rank's bytes, in the order of the ranks. Ranks may give different numbers of bytes.
    ///
    /// # Errors
    /// As [`sum`](Self::sum).
    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// Whether every rank votes yes.
    ///
    /// # Errors
    /// As [`sum`](Self::sum).
    fn all(&self, vote: bool) -> Result<bool, CollectiveError> {
        let mut noes = [f64::from(u8::from(!vote))];
        self.sum(&mut noes)?;
        Ok(noes[0] == 0.0)
    }
}

/// An exchange between ranks failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} cannot reach the other ranks: {reason}")]
pub struct CollectiveError {
    /// The rank that reports the failure.
    pub rank: usize,
    /// What happened.
    pub reason: String,
}

/// The only rank of a run with one process. Every exchange returns its own values.
#[derive(Debug, Clone, Copy, Default)]
pub struct SingleProcess;

impl Collective for SingleProcess {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn sum(&self, _values: &mut [f64]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn sum_gradient(&self, _path: &str, _values: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![bytes])
    }
}
