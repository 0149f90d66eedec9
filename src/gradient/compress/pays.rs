//! The link on which compression pays.

use std::time::{Duration, Instant};

use super::{Code, Method, PipelineError, Reach, StepContext};
use crate::collective::{Collective, CollectiveError};
use crate::gradient::{Exchange, Gradient};

/// Stands in for a group of ranks that all send what this one does, over a link without end.
struct Echo {
    ranks: usize,
}

impl Collective for Echo {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn sum(&self, _values: &mut [f64]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn sum_gradient(&self, _path: &str, _values: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![bytes; self.ranks])
    }
}

/// What coding costs a worker, and what it saves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pays {
    /// Time that a worker codes and decodes in a step.
    pub coding: Duration,
    /// Bytes that a worker sends or receives less, whichever are more.
    pub saved_bytes: f64,
}

impl Pays {
    /// Bits per second below which a link is so slow that compression saves more time than it takes.
    /// None if it saves no bytes: the codes of all workers are together as many as the gradient.
    pub fn below(&self) -> Option<f64> {
        (self.saved_bytes > 0.0).then(|| 8.0 * self.saved_bytes / self.coding.as_secs_f64())
    }

    /// For a person.
    pub fn describe(&self, workers: usize) -> String {
        let coding = 1e3 * self.coding.as_secs_f64();
        match self.below() {
            Some(bits) => {
                let speed = match bits {
                    1e9.. => format!("{:.1} Gbit/s", bits / 1e9),
                    _ => format!("{:.0} Mbit/s", bits / 1e6),
                };
                format!(
                    "coding takes about {coding:.1} ms of a step here: compression pays on links below \
                     {speed}"
                )
            }
            None => format!(
                "warning: each of {workers} workers receives the codes of all others, which are more bytes \
                 than the sum of whole gradients: this compression does not pay on any link"
            ),
        }
    }
}

impl Method {
    /// Measures what the method costs on this machine, for `workers` workers whose gradients look like
    /// `gradient`. Changes nothing of the method.
    ///
    /// # Errors
    /// As [`Exchange::reduce`].
    pub fn pays(
        &self,
        gradient: &Gradient,
        workers: usize,
        fresh: impl Fn() -> Result<Self, PipelineError>,
    ) -> Result<Pays, PipelineError> {
        let mut probe = fresh()?;
        let echo = Echo { ranks: workers };
        let mut coding = Duration::MAX;
        // The first time memory is new.
        for step in 0..2 {
            let context = StepContext {
                step: step + probe.compression.settings.warmup_steps,
                seed: 0,
                collective: &echo,
            };
            let gradients = vec![gradient.clone()];
            let begun = Instant::now();
            probe.compression.reduce(gradients, &context)?;
            coding = coding.min(begun.elapsed());
        }
        let others = workers.saturating_sub(1) as f64;
        let Reach {
            sent_bytes,
            gradient_bytes,
        } = self.reach;
        // A sum sends each rank's share to its owner, and the sum of it to all.
        let of_sum = 2.0 * others / workers.max(1) as f64;
        let received = match &self.compression.code {
            Code::Gathered(_) => others * sent_bytes,
            Code::Added(_) => of_sum * sent_bytes,
        };
        Ok(Pays {
            coding,
            saved_bytes: of_sum * gradient_bytes - received,
        })
    }
}
