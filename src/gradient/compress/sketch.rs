//! A linear sketch that finds the large elements of a sum.

use firebrick_kernels::sketch::SparseError;
use firebrick_kernels::vsa::Seed;

use super::{CompressError, LinearCompressor, Round, TensorContext, sparse};

/// Sends the elements that are large in the sum over all workers, in f32, at places that all workers
/// find together.
///
/// The first round sends a count sketch (Charikar, Chen and Farach-Colton, 2002): each element is
/// bound to a random sign and bundled into a bucket, in three independent rows. A sketch is linear,
/// so the sum of the workers' sketches is the sketch of the sum (Ivkin et al., 2019, "SketchedSGD").
/// The median of an element's three buckets estimates it. The second round sends the values of the
/// elements with the largest estimates, so that what is subtracted from the residual is exact; one
/// value in four is of a random place, so that every element is sent some day, whatever the sketch
/// says.
///
/// A third of the numbers is the sketch, the rest are values. The sum of the workers' matrices loses
/// nothing, but a worker whose own large elements lie elsewhere may send little of its own: δ is 0
/// for a single worker and step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sketch {
    density: f64,
}

/// Independent rows of the sketch.
const ROWS: usize = 3;

/// One value in so many is of a random place.
const RANDOM: usize = 4;

/// The numbers of a matrix.
struct Sizes {
    /// Buckets of a row.
    width: usize,
    /// Values at large estimates.
    large: usize,
    /// Values at random places.
    random: usize,
}

impl Sketch {
    /// Sends numbers for the share `density` of the elements, both rounds together.
    ///
    /// # Errors
    /// [`SparseError::Density`] for a density that is not above 0 and at most 1.
    pub fn new(density: f64) -> Result<Self, SparseError> {
        sparse::checked(density).map(|density| Self { density })
    }

    /// The numbers that a matrix of `len` elements sends in both rounds.
    pub(super) fn count(self, len: usize) -> usize {
        let sizes = self.sizes(len);
        ROWS * sizes.width + sizes.large + sizes.random
    }

    fn sizes(self, len: usize) -> Sizes {
        let all = (self.density * len as f64).round() as usize;
        let width = (all / (3 * ROWS)).max(1);
        let values = all.saturating_sub(ROWS * width).clamp(1, len.max(1));
        let random = values / RANDOM;
        Sizes {
            width,
            large: values - random,
            random,
        }
    }

    /// The sign and the bucket of an element in a row.
    fn bucket(of_row: Seed, place: usize, width: usize) -> (f32, usize) {
        let word = of_row.word(place as u64);
        let sign = if word & 1 == 0 { 1.0 } else { -1.0 };
        // The high half times the width, divided by 2^32: evenly spread without a division.
        let bucket = ((word >> 32) * width as u64) >> 32;
        (sign, bucket as usize)
    }

    /// The places whose values the second round sends, each once, in order: those with the largest
    /// estimates, and random ones.
    fn places(self, tensor: &TensorContext, sketch: &[f32], len: usize) -> Vec<usize> {
        let sizes = self.sizes(len);
        let rows = rows(tensor.seed);
        let estimate = |place: usize| {
            let [a, b, c]: [f32; ROWS] = std::array::from_fn(|row| {
                let (sign, bucket) = Self::bucket(rows[row], place, sizes.width);
                sign * sketch[row * sizes.width + bucket]
            });
            // The median of three.
            a.max(b).min(a.min(b).max(c)).abs()
        };
        let mut all: Vec<(f32, usize)> = (0..len).map(|place| (estimate(place), place)).collect();
        let large = sizes.large.min(len);
        if large < len {
            // The larger first, ties by place.
            let larger =
                |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            all.select_nth_unstable_by(large, larger);
        }
        let mut places: Vec<usize> = all[..large].iter().map(|(_, place)| *place).collect();
        let at_random = tensor.seed.with(ROWS as u64);
        for number in 0..sizes.random {
            let (first, end) = (
                number * len / sizes.random,
                (number + 1) * len / sizes.random,
            );
            let word = at_random.word(number as u64);
            places.push(first + (word % (end - first) as u64) as usize);
        }
        places.sort_unstable();
        places.dedup();
        places
    }
}

/// A seed for each row.
fn rows(seed: Seed) -> [Seed; ROWS] {
    std::array::from_fn(|row| seed.with(row as u64))
}

impl LinearCompressor for Sketch {
    fn rounds(&self) -> usize {
        2
    }

    fn project(
        &self,
        tensor: &TensorContext,
        round: &Round,
        values: &mut [f32],
        numbers: &mut Vec<f32>,
    ) -> Result<(), CompressError> {
        let Some(sketch) = round.before.first() else {
            let width = self.sizes(values.len()).width;
            numbers.resize(ROWS * width, 0.0);
            for (of_row, numbers) in rows(tensor.seed).into_iter().zip(numbers.chunks_mut(width)) {
                for (place, value) in values.iter().enumerate() {
                    let (sign, bucket) = Self::bucket(of_row, place, width);
                    numbers[bucket] += sign * value;
                }
            }
            return Ok(());
        };
        let places = self.places(tensor, sketch, values.len());
        numbers.extend(
            places
                .iter()
                .map(|place| std::mem::take(&mut values[*place])),
        );
        Ok(())
    }

    fn reconstruct(
        &self,
        tensor: &TensorContext,
        sums: &[&[f32]],
        _memory: &mut Vec<f32>,
        sum: &mut [f32],
    ) -> Result<(), CompressError> {
        let &[sketch, values] = sums else {
            return Err(CompressError::Damaged(format!("{} rounds", sums.len())));
        };
        let places = self.places(tensor, sketch, sum.len());
        for (place, value) in places.into_iter().zip(values) {
            sum[place] += value;
        }
        Ok(())
    }
}
