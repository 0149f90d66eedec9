//! Products in f32: of activations that are not quantised, and of gradients.
//!
//! The dense matrix is never formed. A block of a panel, 16 or 32 outputs wide, is unpacked to f32 in the first-level
//! cache, and multiplied with one tile of tokens after another. Forward, outputs are rows and the sum runs over
//! columns; backward it is the other way round.

use std::ops::Range;

use rayon::prelude::*;

use super::integer::{shares, split};
use super::kernel::{FloatKernel, FloatLine};
use super::panels::{Tile, tiles};
use crate::ternary::Granularity;
use crate::ternary::layout::PackedView;
use crate::ternary::layout::compute::BLOCK;

/// Which dimension of the weights is summed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// Over columns: x W'ᵀ.
    Forward,
    /// Over rows: dy W'.
    Backward,
}

/// Summands that are unpacked at a time: 16 KiB of a panel of 32 outputs.
const UNPACKED: usize = 128;

/// Bytes of activations that a panel is multiplied with before the next is unpacked.
const ACTIVATION_BYTES: usize = 1 << 20;

/// The operands of a product.
struct Product<'a> {
    kernel: &'a FloatKernel,
    weights: &'a PackedView<'a>,
    direction: Direction,
    tiles: Vec<Tile>,
    /// Tile by tile, `[summand][token]`.
    activations: Vec<f32>,
    /// Summands, padding to whole blocks included.
    depth: usize,
    outputs: usize,
}

/// y `[tokens, outputs]` from x `[tokens, summands]`.
pub(super) fn multiply(
    kernel: &FloatKernel,
    x: &[f32],
    weights: &PackedView,
    direction: Direction,
    y: &mut [f32],
) {
    let (outputs, summands) = match direction {
        Direction::Forward => (weights.rows(), weights.cols()),
        Direction::Backward => (weights.cols(), weights.rows()),
    };
    if summands == 0 || y.is_empty() {
        y.fill(0.0);
        return;
    }
    let tokens = y.len() / outputs;
    let depth = summands.next_multiple_of(BLOCK);
    let tiles = tiles(tokens, kernel.tile);
    let mut activations = vec![0f32; tokens * depth];
    arrange(x, summands, &tiles, depth, &mut activations);
    if direction == Direction::Backward {
        scale_rows(weights, &tiles, depth, &mut activations);
    }
    let product = Product {
        kernel,
        weights,
        direction,
        tiles,
        activations,
        depth,
        outputs,
    };
    let ranges = shares(
        outputs.div_ceil(BLOCK),
        tokens * outputs * summands,
        kernel.groups,
    );
    let parts = split(y, outputs, &ranges);
    ranges
        .into_par_iter()
        .zip(parts)
        .for_each(|(range, mut y)| product.share(range, &mut y));
}

/// x `[tokens, summands]` in tiles `[summand][token]`.
fn arrange(x: &[f32], summands: usize, tiles: &[Tile], depth: usize, mut out: &mut [f32]) {
    let mut work = Vec::with_capacity(tiles.len());
    for tile in tiles {
        work.push((
            tile,
            out.split_off_mut(..tile.tokens * depth).unwrap_or_default(),
        ));
    }
    work.into_par_iter().for_each(|(tile, out)| {
        for token in 0..tile.tokens {
            let x = &x[(tile.first + token) * summands..][..summands];
            let out = out[token..].iter_mut().step_by(tile.tokens);
            out.zip(x).for_each(|(out, x)| *out = *x);
        }
    });
}

/// Gradients times g of their row, where a row has one.
fn scale_rows(weights: &PackedView, tiles: &[Tile], depth: usize, mut activations: &mut [f32]) {
    let scale = |row: usize| match weights.granularity() {
        Granularity::Tensor => weights.scales()[0],
        Granularity::Row => weights.scales()[row],
        Granularity::Group(_) => 1.0,
    };
    for tile in tiles {
        let tile_of = activations
            .split_off_mut(..tile.tokens * depth)
            .unwrap_or_default();
        let rows = tile_of
            .chunks_mut(tile.tokens)
            .take(weights.rows())
            .enumerate();
        rows.for_each(|(row, values)| values.iter_mut().for_each(|value| *value *= scale(row)));
    }
}

impl Product<'_> {
    /// The outputs of a range of groups of 16.
    fn share(&self, range: Range<usize>, y: &mut [&mut [f32]]) {
        let groups = self.kernel.groups;
        let lanes = groups * BLOCK;
        let tokens_at_once = ACTIVATION_BYTES / (4 * self.depth).max(1);
        let tiles_at_once = (tokens_at_once / self.kernel.tile).max(1);
        let mut panel = vec![FloatLine::ZERO; UNPACKED * groups];
        for tiles in self.tiles.chunks(tiles_at_once) {
            let tokens: usize = tiles.iter().map(|tile| tile.tokens).sum();
            let mut sums = vec![0f32; tokens * lanes];
            for group in range.clone().step_by(groups) {
                sums.fill(0.0);
                for first in (0..self.depth).step_by(UNPACKED) {
                    let count = UNPACKED.min(self.depth - first);
                    let panel = &mut panel[..count * groups];
                    for part in 0..groups {
                        // Where the matrix ends within the panel, its last group fills the rest.
                        let group = (group + part).min(self.outputs.div_ceil(BLOCK) - 1);
                        self.unpack(group, first..first + count, &mut panel[part..]);
                    }
                    let mut rest = &mut sums[..];
                    for tile in tiles {
                        let sums = rest
                            .split_off_mut(..tile.tokens * lanes)
                            .unwrap_or_default();
                        let x = &self.activations[tile.first * self.depth + first * tile.tokens..];
                        let x = &x[..count * tile.tokens];
                        (self.kernel.multiply)(panel, x, tile.tokens, sums);
                    }
                }
                self.store([group, range.start], tiles[0].first, &sums, y);
            }
        }
    }

    /// A group of 16 outputs and a range of summands, into every `groups`-th line of `panel`.
    fn unpack(&self, group: usize, summands: Range<usize>, panel: &mut [FloatLine]) {
        let (weights, stride) = (self.weights, self.kernel.groups);
        match self.direction {
            Direction::Forward => {
                let words = &weights.row_group(group)[summands.start..summands.end];
                (self.kernel.unpack_columns)(words, panel, stride);
            }
            Direction::Backward => {
                for (i, row_group) in (summands.start / BLOCK..summands.end / BLOCK).enumerate() {
                    let words = &weights.row_group(row_group)[group * BLOCK..][..BLOCK];
                    let panel = &mut panel[i * BLOCK * stride..];
                    (self.kernel.unpack_rows)(words, panel, stride);
                }
            }
        }
        if let Granularity::Group(size) = weights.granularity() {
            let per_row = weights.granularity().scales_per_row(weights.cols());
            let lines = panel.iter_mut().step_by(stride).zip(summands);
            for (line, summand) in lines {
                match self.direction {
                    Direction::Forward => {
                        // Columns that pad the last block may be past the last group.
                        let segment = (summand / size).min(per_row - 1);
                        let scales = weights.scales()[group * BLOCK * per_row + segment..].iter();
                        let scales = scales.step_by(per_row);
                        line.0
                            .iter_mut()
                            .zip(scales)
                            .for_each(|(w, scale)| *w *= scale);
                    }
                    Direction::Backward if summand < weights.rows() => {
                        let scale = weights.scales()[summand * per_row + group * BLOCK / size];
                        line.0.iter_mut().for_each(|w| *w *= scale);
                    }
                    Direction::Backward => {}
                }
            }
        }
    }

    /// The sums of a panel, `[token][output]`, as outputs.
    fn store(
        &self,
        [group, range_start]: [usize; 2],
        first_token: usize,
        sums: &[f32],
        y: &mut [&mut [f32]],
    ) {
        let lanes = self.kernel.groups * BLOCK;
        for (sums, y) in sums.chunks(lanes).zip(&mut y[first_token..]) {
            let at = (group - range_start) * BLOCK;
            let end = y.len().min(at + lanes);
            let y = &mut y[at..end];
            let scales = match (self.direction, self.weights.granularity()) {
                (Direction::Forward, Granularity::Row) => &self.weights.scales()[group * BLOCK..],
                (Direction::Forward, Granularity::Tensor) => self.weights.scales(),
                _ => &[1.0],
            };
            if scales.len() == 1 {
                y.iter_mut()
                    .zip(sums)
                    .for_each(|(y, sum)| *y = sum * scales[0]);
            } else {
                y.iter_mut()
                    .zip(sums)
                    .zip(scales)
                    .for_each(|((y, sum), scale)| *y = sum * scale);
            }
        }
    }
}
