//! The ranks of a data-parallel run, and the exchanges between them during a training step.
//!
//! Data-parallel training runs one process, or one thread, per rank. Ranks exchange values at three
//! points of a step: they agree on the weight of the step's batch, vote on whether the gradient is
//! finite, and sum their gradients. A [`Collective`] provides these exchanges. Every rank has to
//! take part in each of them, in the same order.

#[cfg(any(feature = "mpi", test))]
mod messages;
#[cfg(feature = "mpi")]
mod mpi;
mod threads;

use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "mpi")]
pub use mpi::MpiRank;
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

    /// Every rank's bytes on rank 0, in the order of the ranks. What the other ranks get means
    /// nothing.
    ///
    /// # Errors
    /// As [`sum`](Self::sum).
    fn collect(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.gather(bytes)
    }

    /// Whether every rank votes yes.
    ///
    /// # Errors
    /// As [`sum`](Self::sum).
    fn all(&self, vote: bool) -> Result<bool, CollectiveError> {
        let mut noes = [f64::from(u8::from(!vote))];
        self.sum(&mut noes)?;
        Ok(noes[0] == 0.0)
    }

    /// Ends all ranks with this exit code, where they are processes that would otherwise wait for
    /// this one.
    fn abandon(&self, _code: i32) {}
}

/// This process's connection to the ranks that it was started with: by `mpirun` or a program like
/// it. A process that was started alone is the only rank.
///
/// # Errors
/// [`LaunchError`]
pub fn started_together(timeout: Duration) -> Result<Arc<dyn Collective>, LaunchError> {
    let Some(ranks) = started_ranks() else {
        return Ok(Arc::new(SingleProcess));
    };
    #[cfg(feature = "mpi")]
    {
        let _ = ranks;
        Ok(Arc::new(MpiRank::join(timeout)?))
    }
    #[cfg(not(feature = "mpi"))]
    {
        let _ = timeout;
        match ranks {
            1 => Ok(Arc::new(SingleProcess)),
            _ => Err(LaunchError::NotCompiledIn { ranks }),
        }
    }
}

/// How many ranks this process was started as one of, as its launcher says; None without a launcher.
pub fn started_ranks() -> Option<usize> {
    launched_ranks(|name| std::env::var(name).ok())
}

/// How many ranks a launcher says it has started; None without a launcher. Open MPI, then MPICH and
/// Intel MPI, then Slurm's own launcher.
fn launched_ranks(variable: impl Fn(&str) -> Option<String>) -> Option<usize> {
    let number = |name| variable(name).and_then(|value| value.parse().ok());
    let of_slurm = || variable("PMIX_RANK").and_then(|_| number("SLURM_NTASKS"));
    number("OMPI_COMM_WORLD_SIZE")
        .or_else(|| number("PMI_SIZE"))
        .or_else(of_slurm)
}

/// Ranks were started that cannot meet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// This build has no MPI.
    #[error(
        "{ranks} ranks were started, and this build has no MPI: each of them would be a run of its own"
    )]
    NotCompiledIn {
        /// The number of ranks.
        ranks: usize,
    },
    /// A program that does not share its work has been started as several ranks.
    #[error("{ranks} ranks were started, and only `runner train` shares its work among them")]
    OneProcess {
        /// The number of ranks.
        ranks: usize,
    },
    /// MPI itself failed.
    #[error(transparent)]
    Mpi(#[from] CollectiveError),
}

impl LaunchError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            Self::NotCompiledIn { .. } => {
                "build with --features mpi, or start one process and set gradient.logical_workers"
            }
            Self::OneProcess { .. } => "start it without mpirun",
            Self::Mpi(_) => {
                "start the ranks with the mpirun of the MPI that this build is linked to"
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n1_launchers_are_recognised_by_what_they_set() {
        let of = |set: &[(&str, &str)]| {
            launched_ranks(|name| {
                let found = set.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_string())
            })
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("OMPI_COMM_WORLD_SIZE", "4")]), Some(4));
        assert_eq!(of(&[("PMI_SIZE", "2")]), Some(2));
        // A batch job of Slurm that starts one process by itself.
        assert_eq!(of(&[("SLURM_NTASKS", "8")]), None);
        assert_eq!(of(&[("SLURM_NTASKS", "8"), ("PMIX_RANK", "3")]), Some(8));
    }
}
