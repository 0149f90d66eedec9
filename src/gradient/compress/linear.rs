//! Codes that may be added on their way between workers.

use std::collections::BTreeMap;
use std::fmt::Debug;

use firebrick_kernels::vsa::Seed;
use rayon::prelude::*;

use super::{CompressError, PipelineError, Received, Sent, StepContext, TensorContext, failure};

/// A code of matrices that is linear: numbers whose sum over all workers stands for the sum of the
/// matrices. It may take several rounds, each of which knows the sums of the rounds before.
///
/// The number of numbers has to be the same on every rank.
pub trait LinearCompressor: Debug + Send + Sync {
    /// The number of rounds.
    fn rounds(&self) -> usize {
        1
    }

    /// Appends a worker's numbers of a round. The last round also subtracts from `values`, which are
    /// finite, what the worker's numbers stand for.
    ///
    /// # Errors
    /// [`CompressError`] for values that have no code.
    fn project(
        &self,
        tensor: &TensorContext,
        round: &Round,
        values: &mut [f32],
        numbers: &mut Vec<f32>,
    ) -> Result<(), CompressError>;

    /// Adds to `sum` what the sums of all rounds stand for. `memory` is what the code keeps of this
    /// matrix for the next step, the same on every rank; it may be changed.
    ///
    /// # Errors
    /// [`CompressError::Damaged`] for sums that cannot have come of [`project`](Self::project).
    fn reconstruct(
        &self,
        tensor: &TensorContext,
        sums: &[&[f32]],
        memory: &mut Vec<f32>,
        sum: &mut [f32],
    ) -> Result<(), CompressError>;
}

/// A round of a [`LinearCompressor`].
#[derive(Debug)]
pub struct Round<'a> {
    /// The sums over all workers of the rounds before, so that their number is that of this round,
    /// counted from 0.
    pub before: Vec<&'a [f32]>,
    /// What the code kept of the matrix in the last step; empty in the first.
    pub memory: &'a [f32],
}

/// Takes all rounds, and turns their sums into those of the tensors. Vectors are part of the first
/// round, in f32.
pub(super) fn added(
    compressor: &dyn LinearCompressor,
    memory: &mut BTreeMap<String, Vec<f32>>,
    workers: &mut [Vec<Sent>],
    context: &StepContext,
) -> Result<Received, PipelineError> {
    let of_step = Seed::new(context.seed).with(context.step);
    let tensors = workers[0].len();
    // By round, then by tensor.
    let mut rounds: Vec<Vec<Vec<f32>>> = Vec::new();
    let mut bytes = 0;
    let no_memory = Vec::new();
    for number in 0..compressor.rounds() {
        let mut totals: Vec<Vec<f32>> = vec![Vec::new(); tensors];
        // Workers in their order, tensors at the same time.
        for sent in workers.iter_mut() {
            let of_tensor = |(place, sent): (usize, &mut Sent)| {
                let mut numbers = Vec::new();
                if !sent.is_matrix() {
                    if number == 0 {
                        numbers = std::mem::take(&mut sent.values);
                        sent.values = vec![0.0; numbers.len()];
                    }
                    return Ok(numbers);
                }
                let path = &sent.parameter.path;
                let round = Round {
                    before: rounds.iter().map(|round| round[place].as_slice()).collect(),
                    memory: memory.get(path).unwrap_or(&no_memory),
                };
                let tensor = TensorContext::new(&sent.parameter, of_step);
                compressor
                    .project(&tensor, &round, &mut sent.values, &mut numbers)
                    .map_err(|error| failure(format!("`{path}`: {error}")))?;
                Ok(numbers)
            };
            let numbers: Vec<Vec<f32>> = sent
                .par_iter_mut()
                .enumerate()
                .map(of_tensor)
                .collect::<Result<_, PipelineError>>()?;
            for (total, numbers) in totals.iter_mut().zip(numbers) {
                if total.is_empty() {
                    *total = numbers;
                } else {
                    total.iter_mut().zip(numbers).for_each(|(sum, x)| *sum += x);
                }
            }
        }
        let mut all: Vec<f32> = totals.iter().flatten().copied().collect();
        bytes += 4 * all.len() as u64;
        context
            .collective
            .sum_gradient(&format!("round {number}"), &mut all)?;
        let mut rest = all.as_slice();
        for total in &mut totals {
            let (own, after) = rest.split_at(total.len());
            total.copy_from_slice(own);
            rest = after;
        }
        rounds.push(totals);
    }
    let kept = workers[0].iter().map(|sent| {
        let path = &sent.parameter.path;
        memory.remove(path).unwrap_or_default()
    });
    let mut kept: Vec<Vec<f32>> = kept.collect();
    let sum_of = |((place, sent), memory): ((usize, &Sent), &mut Vec<f32>)| {
        let sums: Vec<&[f32]> = rounds.iter().map(|round| round[place].as_slice()).collect();
        if !sent.is_matrix() {
            return Ok(sums[0].to_vec());
        }
        let mut sum = vec![0.0; sent.values.len()];
        let tensor = TensorContext::new(&sent.parameter, of_step);
        compressor
            .reconstruct(&tensor, &sums, memory, &mut sum)
            .map_err(|error| failure(format!("`{}`: {error}", sent.parameter.path)))?;
        Ok(sum)
    };
    let sums = workers[0].par_iter().enumerate().zip(&mut kept).map(sum_of);
    let sums = sums.collect::<Result<_, PipelineError>>()?;
    for (sent, kept) in workers[0].iter().zip(kept) {
        if !kept.is_empty() {
            memory.insert(sent.parameter.path.clone(), kept);
        }
    }
    let alone = workers.len() * context.collective.ranks() == 1;
    Ok(Received {
        sums,
        sent: bytes * workers.len() as u64,
        received: if alone { 0 } else { bytes },
    })
}
