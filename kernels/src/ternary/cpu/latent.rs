//! From f32 weights to packed ones.
//!
//! A weight w of scale g is the trit of its sign if |w| > g / 2, else 0. That is `round(w / g)`, exactly: half of g
//! is exact, and where |w| is above it by the least that f32 can be, the quotient rounds to more than a half. Ties
//! go to 0, the even one.
//!
//! Two orders of memory: row-major `[rows, cols]`, and its transpose `[cols, rows]`, as a layer holds that
//! multiplies `x W`.

use rayon::prelude::*;

use super::Path;
use super::kernel::{self, PackKernel};
use crate::ternary::layout::LayoutError;
use crate::ternary::layout::compute::{BLOCK, Packed, ZERO_WORD, check_shape, words};
use crate::ternary::{Granularity, SMALLEST_MEAN, reference};

/// How a dense matrix lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `[rows, cols]`: a row's inputs are neighbours.
    RowMajor,
    /// `[cols, rows]`: an input's outputs are neighbours.
    Transposed,
}

/// Row groups that a task packs: their words are neighbours, and of a transposed matrix it reads runs of as many
/// times 64 bytes.
const TASK_GROUPS: usize = 16;

/// Values of which [`reference::absmean`] keeps a sum of its own.
const CHUNK: usize = 1 << 16;

/// Quantises and packs latent weights of `rows` outputs and `cols` inputs.
///
/// Trits are those of [`reference::quantise_weights`], and so are scales, but for one: that of a whole transposed
/// matrix is a sum in another order, in f64, which rounds to another f32 about once in 10^8 matrices.
///
/// # Errors
///
/// A wrong length, or a shape or group size that [`super::super::layout::compute`] does not have.
pub fn pack_latent(
    weights: &[f32],
    [rows, cols]: [usize; 2],
    order: Order,
    granularity: Granularity,
) -> Result<Packed, LayoutError> {
    check_shape(rows, cols, granularity)?;
    check_length(weights, rows, cols)?;
    let scales = match (granularity, order) {
        (Granularity::Tensor, _) => vec![reference::absmean(weights)],
        (_, Order::Transposed) => transposed_means(weights, rows, cols, granularity),
        (Granularity::Row, _) => {
            let rows = weights.par_chunks(cols.max(1)).map(reference::absmean);
            if cols == 0 {
                vec![SMALLEST_MEAN; weights.len()]
            } else {
                rows.collect()
            }
        }
        (Granularity::Group(size), _) => weights
            .par_chunks(cols.max(1))
            .flat_map_iter(|row| row.chunks(size).map(reference::absmean))
            .collect(),
    };
    let mut words = vec![ZERO_WORD; words(rows, cols)];
    let packer = Packer {
        weights,
        rows,
        cols,
        order,
        granularity,
        scales: Some(&scales),
    };
    packer.pack(&mut words, &mut []);
    Packed::new(words, rows, cols, scales, granularity)
}

/// Packs weights that are g T already: the trit is the sign, and g the largest magnitude of its matrix, row or
/// group. One pass over `weights`.
///
/// # Errors
///
/// As [`pack_latent`].
pub fn pack_quantised(
    weights: &[f32],
    [rows, cols]: [usize; 2],
    order: Order,
    granularity: Granularity,
) -> Result<Packed, LayoutError> {
    check_shape(rows, cols, granularity)?;
    check_length(weights, rows, cols)?;
    let mut words = vec![ZERO_WORD; words(rows, cols)];
    let row_granularity = match granularity {
        Granularity::Tensor => Granularity::Row,
        other => other,
    };
    let mut largest = vec![0f32; row_granularity.scales(rows, cols)];
    let packer = Packer {
        weights,
        rows,
        cols,
        order,
        granularity: row_granularity,
        scales: None,
    };
    packer.pack(&mut words, &mut largest);
    if granularity == Granularity::Tensor {
        let bits = largest.iter().map(|scale| scale.to_bits()).max();
        largest = vec![f32::from_bits(bits.unwrap_or(0))];
    }
    Packed::new(words, rows, cols, largest, granularity)
}

fn check_length(weights: &[f32], rows: usize, cols: usize) -> Result<(), LayoutError> {
    let (expected, found) = (rows * cols, weights.len());
    if expected == found {
        Ok(())
    } else {
        Err(LayoutError::Length {
            what: "weights",
            expected,
            found,
        })
    }
}

/// What it takes to pack a matrix. Without scales, trits are signs.
struct Packer<'a> {
    weights: &'a [f32],
    rows: usize,
    cols: usize,
    order: Order,
    granularity: Granularity,
    scales: Option<&'a [f32]>,
}

impl Packer<'_> {
    /// Fills `words`, and `largest` with the largest magnitudes where it is not empty.
    fn pack(&self, words: &mut [u32], largest: &mut [f32]) {
        if self.rows == 0 || self.cols == 0 {
            return;
        }
        let kernel = kernel::pack(Path::detect());
        let per_row = self.granularity.scales_per_row(self.cols);
        let words = words.par_chunks_mut(TASK_GROUPS * self.cols.div_ceil(BLOCK) * BLOCK);
        if largest.is_empty() {
            words
                .enumerate()
                .for_each(|(task, words)| self.task(kernel, task, words, &mut []));
        } else {
            let largest = largest.par_chunks_mut(TASK_GROUPS * BLOCK * per_row);
            let tasks = words.zip(largest).enumerate();
            tasks.for_each(|(task, (words, largest))| self.task(kernel, task, words, largest));
        }
    }

    fn task(&self, kernel: &PackKernel, task: usize, words: &mut [u32], largest: &mut [f32]) {
        let blocks = self.cols.div_ceil(BLOCK);
        let per_row = self.granularity.scales_per_row(self.cols);
        let first_group = task * TASK_GROUPS;
        let groups = words.len() / (blocks * BLOCK);
        let mut tile = [[0f32; BLOCK]; BLOCK];
        for block in 0..blocks {
            for group in 0..groups {
                let segment = match self.granularity {
                    Granularity::Group(size) => block * BLOCK / size,
                    _ => 0,
                };
                let row = (first_group + group) * BLOCK;
                let valid = (self.rows - row).min(BLOCK);
                let thresholds = self.thresholds(row, valid, segment);
                let words = &mut words[(group * blocks + block) * BLOCK..][..BLOCK];
                let magnitudes = match self.columns(block, row, valid, &mut tile) {
                    Some((columns, stride)) => (kernel.pack)(columns, stride, &thresholds, words),
                    None => (kernel.pack)(tile.as_flattened(), BLOCK, &thresholds, words),
                };
                if !largest.is_empty() {
                    let largest = &mut largest[group * BLOCK * per_row + segment..];
                    let largest = largest.iter_mut().step_by(per_row);
                    for (largest, magnitude) in largest.zip(&magnitudes[..valid]) {
                        *largest = f32::from_bits(largest.to_bits().max(*magnitude));
                    }
                }
            }
        }
    }

    /// Half the scale of each of 16 rows. Rows that pad the matrix hold zeros, and any threshold does.
    fn thresholds(&self, row: usize, valid: usize, segment: usize) -> [f32; BLOCK] {
        let mut thresholds = [0.0; BLOCK];
        let Some(scales) = self.scales else {
            return thresholds;
        };
        let per_row = self.granularity.scales_per_row(self.cols);
        match self.granularity {
            Granularity::Tensor => thresholds = [0.5 * scales[0]; BLOCK],
            Granularity::Row | Granularity::Group(_) => {
                let scales = scales[row * per_row + segment..].iter().step_by(per_row);
                for (threshold, scale) in thresholds[..valid].iter_mut().zip(scales) {
                    *threshold = 0.5 * scale;
                }
            }
        }
        thresholds
    }

    /// 16 columns of 16 rows, `[column][row]`, and how far apart columns are: as they lie in memory, or else in
    /// `tile`, padded with zeros.
    fn columns(
        &self,
        block: usize,
        row: usize,
        valid: usize,
        tile: &mut [[f32; BLOCK]; BLOCK],
    ) -> Option<(&[f32], usize)> {
        let first = block * BLOCK;
        let cols = (self.cols - first).min(BLOCK);
        if self.order == Order::Transposed && valid == BLOCK && cols == BLOCK {
            let end = (first + BLOCK - 1) * self.rows + row + BLOCK;
            return Some((&self.weights[first * self.rows + row..end], self.rows));
        }
        if valid < BLOCK || cols < BLOCK {
            *tile = [[0.0; BLOCK]; BLOCK];
        }
        match self.order {
            Order::Transposed => {
                for (col, tile) in tile[..cols].iter_mut().enumerate() {
                    let from = &self.weights[(first + col) * self.rows + row..][..valid];
                    tile[..valid].copy_from_slice(from);
                }
            }
            Order::RowMajor => {
                for lane in 0..valid {
                    let from = &self.weights[(row + lane) * self.cols + first..][..cols];
                    for (tile, &weight) in tile.iter_mut().zip(from) {
                        tile[lane] = weight;
                    }
                }
            }
        }
        None
    }
}

/// Scales of rows or groups of a transposed matrix, summed in the order of [`reference::absmean`].
fn transposed_means(
    weights: &[f32],
    rows: usize,
    cols: usize,
    granularity: Granularity,
) -> Vec<f32> {
    let per_row = granularity.scales_per_row(cols);
    let segment = match granularity {
        Granularity::Group(size) => size,
        _ => cols.max(1),
    };
    let mut scales = vec![SMALLEST_MEAN; rows * per_row];
    let tasks = scales.par_chunks_mut(BLOCK * per_row.max(1)).enumerate();
    tasks.for_each(|(task, scales)| {
        let row = task * BLOCK;
        let valid = (rows - row).min(BLOCK);
        for index in 0..per_row {
            let range = index * segment..cols.min((index + 1) * segment);
            let count = range.len();
            let mut total = [0f64; BLOCK];
            for first in range.clone().step_by(CHUNK) {
                let mut lanes = [[0f64; BLOCK]; 16];
                for col in first..range.end.min(first + CHUNK) {
                    let lane = &mut lanes[(col - first) % 16];
                    let weights = &weights[col * rows + row..][..valid];
                    for (sum, weight) in lane.iter_mut().zip(weights) {
                        *sum += f64::from(weight.abs());
                    }
                }
                for (lane, total) in total.iter_mut().enumerate() {
                    *total += lanes.iter().map(|sums| sums[lane]).sum::<f64>();
                }
            }
            for (lane, total) in total[..valid].iter().enumerate() {
                scales[lane * per_row + index] = reference::mean_scale(*total, count);
            }
        }
    });
    scales
}
