//! Random elements.

use firebrick_kernels::sketch::SparseError;

use super::{CompressError, LinearCompressor, Round, TensorContext, sparse};

/// Sends elements that are chosen at random, from a seed that all ranks share, in f32 (random-k;
/// Stich, Cordonnier and Jaggi, 2018, "Sparsified SGD with memory"). Places need not be sent, and
/// values are added on their way. It is the yardstick for methods that choose.
///
/// Each group of `1 / density` consecutive elements sends one of them, so δ is 0 for a single step
/// and `density` on average.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomK {
    density: f64,
}

impl RandomK {
    /// Sends the share `density` of the elements, above 0 and at most 1.
    ///
    /// # Errors
    /// [`SparseError::Density`] for a density that is not above 0 and at most 1.
    pub fn new(density: f64) -> Result<Self, SparseError> {
        sparse::checked(density).map(|density| Self { density })
    }

    /// The places of the elements that a step sends, in order.
    fn places(self, tensor: &TensorContext, len: usize) -> impl Iterator<Item = usize> {
        let (count, seed) = (self.count(len), tensor.seed);
        (0..count).map(move |number| {
            let (first, end) = (number * len / count, (number + 1) * len / count);
            first + (seed.word(number as u64) % (end - first) as u64) as usize
        })
    }

    /// The number of elements that a matrix of `len` sends.
    pub(super) fn count(self, len: usize) -> usize {
        ((self.density * len as f64).round() as usize).clamp(1, len.max(1))
    }
}

impl LinearCompressor for RandomK {
    fn project(
        &self,
        tensor: &TensorContext,
        _round: &Round,
        values: &mut [f32],
        numbers: &mut Vec<f32>,
    ) -> Result<(), CompressError> {
        for place in self.places(tensor, values.len()) {
            numbers.push(std::mem::take(&mut values[place]));
        }
        Ok(())
    }

    fn reconstruct(
        &self,
        tensor: &TensorContext,
        sums: &[&[f32]],
        _memory: &mut Vec<f32>,
        sum: &mut [f32],
    ) -> Result<(), CompressError> {
        for (place, value) in self.places(tensor, sum.len()).zip(sums[0]) {
            sum[place] += value;
        }
        Ok(())
    }
}
