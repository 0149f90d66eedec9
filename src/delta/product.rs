//! The difference of a matrix as a product of two narrow ones, of the least rank that keeps enough of it.

use burn::tensor::{Device, Tensor, TensorData};
use firebrick_kernels::lossy::{Factors, Loss, Path, Rounding, loss, misses, subtract};
use rayon::prelude::*;

use super::chunk::{chunk_bytes, element};
use super::{DeltaError, Source, TensorInfo};
use crate::svd::largest_factors;

/// What is kept of the squared change if nothing is asked for.
pub(super) const ENERGY: f64 = 0.95;
/// Directions that are looked for first.
const FIRST: usize = 8;
/// And at most: beyond, finding them takes minutes a matrix.
const MOST: usize = 256;
/// Factors take at most one byte in so many of the matrix's.
const SHARE: usize = 4;
/// Where the random search of directions starts.
const SEED: u64 = 0;

/// A tensor, and its parent's, as matrices: the first dimension, and all others.
pub(super) struct Pair<'a> {
    pub info: &'a TensorInfo,
    pub child: &'a dyn Source,
    pub parent: (&'a dyn Source, &'a str),
}

/// Rows and columns of a tensor of two dimensions or more.
pub(super) fn dims(info: &TensorInfo) -> [usize; 2] {
    let (rows, rest) = info
        .shape
        .split_first()
        .map_or((0, [].as_slice()), |(&rows, rest)| (rows, rest));
    [rows, rest.iter().product()]
}

impl Pair<'_> {
    fn read(&self, chunk: usize) -> Result<[std::borrow::Cow<'_, [u8]>; 2], DeltaError> {
        let (parent, name) = self.parent;
        let one = |mut read: Vec<_>| read.pop().unwrap_or_default();
        let before = one(parent.read(&[name], chunk)?);
        Ok([before, one(self.child.read(&[&self.info.name], chunk)?)])
    }

    /// The factors of least rank that keep so much of the squared change; none if that takes too many.
    ///
    /// Memory: some copies of the matrix in f32.
    pub(super) fn factors(&self, energy: f64) -> Result<Option<Factors>, DeltaError> {
        let [rows, cols] = dims(self.info);
        let bytes = self.info.bytes().unwrap_or(0);
        let most = (bytes / SHARE / Factors::bytes(rows, cols, 1))
            .min(MOST)
            .min(rows)
            .min(cols);
        if most == 0 {
            return Ok(None);
        }
        let difference = self.difference(rows * cols)?;
        let total: f64 = difference.iter().map(|&d| f64::from(d).powi(2)).sum();
        if total == 0.0 {
            return Ok(None);
        }
        let matrix = TensorData::new(difference, [rows, cols]);
        let matrix = Tensor::<2>::from_data(matrix, &Device::flex());
        let mut rank = FIRST.min(most);
        loop {
            let [left, right] = largest_factors(&matrix, rank, SEED);
            let left: Vec<f32> = left.into_data().iter::<f32>().collect();
            let right: Vec<f32> = right.into_data().iter::<f32>().collect();
            // Of U √S a column's squares add up to the singular value.
            let values: Vec<f64> = (0..rank)
                .map(|k| {
                    left.iter()
                        .skip(k)
                        .step_by(rank)
                        .map(|&x| f64::from(x).powi(2))
                        .sum()
                })
                .collect();
            let mut kept = 0.0;
            let enough = values.iter().position(|value| {
                kept += value.powi(2);
                kept >= energy * total
            });
            // Rounding loses a little more: some directions more may make up for it.
            let mut tried = enough.map_or(rank + 1, |last| last + 1);
            while tried <= rank {
                let narrow: Vec<f32> = left
                    .chunks(rank)
                    .flat_map(|row| &row[..tried])
                    .copied()
                    .collect();
                let factors = Factors::round(tried, &narrow, &right[..tried * cols]);
                let lost = self.loss(&factors)?;
                if lost.error <= (1.0 - energy) * lost.change {
                    return Ok(Some(factors));
                }
                tried += tried.div_ceil(8);
            }
            // No direction beyond these has more in it than the last of them.
            let beyond = (most - rank) as f64 * values[rank - 1].powi(2);
            if rank == most || enough.is_none() && kept + beyond < energy * total {
                return Ok(None);
            }
            rank = (2 * rank).min(most);
        }
    }

    fn difference(&self, elements: usize) -> Result<Vec<f32>, DeltaError> {
        let element = element(self.info.dtype);
        let mut difference = vec![0.0; elements];
        let parts = difference.par_chunks_mut(chunk_bytes(self.info.dtype) / element.width());
        parts.enumerate().try_for_each(|(chunk, out)| {
            let [before, after] = self.read(chunk)?;
            subtract(Path::detect(), element, (&before, &after), out)
                .expect("floats of this length");
            Ok::<(), DeltaError>(())
        })?;
        Ok(difference)
    }

    fn loss(&self, factors: &Factors) -> Result<Loss, DeltaError> {
        let (element, length) = (element(self.info.dtype), chunk_bytes(self.info.dtype));
        let chunks = self.info.bytes().unwrap_or(0).div_ceil(length);
        let of = |chunk: usize| {
            let [before, after] = self.read(chunk)?;
            let start = chunk * length / element.width();
            let mut back = vec![0; before.len()];
            let path = Path::detect();
            factors
                .reconstruct(path, element, start, &before, &mut back)
                .expect("floats");
            // These will be stored as they are.
            let missed = misses(element, Rounding::Nearest, &after, &back).expect("floats");
            for place in missed {
                let range =
                    place as usize * element.width()..(place as usize + 1) * element.width();
                back[range.clone()].copy_from_slice(&after[range]);
            }
            Ok(loss(path, element, &before, &after, &back).expect("floats"))
        };
        let losses: Vec<Loss> = (0..chunks)
            .into_par_iter()
            .map(of)
            .collect::<Result<_, DeltaError>>()?;
        Ok(losses.into_iter().fold(Loss::default(), Loss::and))
    }
}
