//! Sums of quantised activations times trits, and the outputs they become.

use std::ops::Range;

use rayon::prelude::*;

use super::kernel::{IntegerKernel, Line};
use super::panels::{BLOCK_QUADS, QUAD, Quantised};
use crate::panel::{Tile, shares, split};
use crate::ternary::Granularity;
use crate::ternary::layout::PackedView;
use crate::ternary::layout::compute::BLOCK;

/// Quads that are unpacked at a time: 16 KiB of a panel of two row groups, and as much again for a tile of
/// activations and its sums, stay in a first-level cache of 32 KiB.
const UNPACKED_QUADS: usize = 128;

/// Bytes of quantised activations that a panel is multiplied with before the next is unpacked. They are read again
/// for every panel, from the second-level cache.
const ACTIVATION_BYTES: usize = 1 << 20;

/// Row groups whose sums are kept before they become outputs, when words are used as they are read.
const STREAMED_GROUPS: usize = 32;

/// y `[tokens, rows]` from quantised activations.
pub(super) fn multiply(
    kernel: &IntegerKernel,
    activations: &Quantised,
    weights: &PackedView,
    y: &mut [f32],
) {
    let tokens = activations.scales.len();
    if y.is_empty() || weights.cols() == 0 {
        y.fill(0.0);
        return;
    }
    let stream = tokens <= kernel.stream_tokens;
    let unit = if stream { 1 } else { kernel.groups };
    let multiplications = tokens * weights.rows() * weights.cols();
    let ranges = shares(weights.row_groups(), multiplications, unit);
    let outputs = split(y, weights.rows(), &ranges);
    let grouped = matches!(weights.granularity(), Granularity::Group(_));
    let product = Product {
        kernel,
        activations,
        weights,
        grouped,
    };
    let run = |(range, mut y): (Range<usize>, Vec<&mut [f32]>)| {
        if stream {
            product.stream(range, &mut y);
        } else {
            product.unpack(range, &mut y);
        }
    };
    if ranges.len() == 1 {
        ranges.into_iter().zip(outputs).for_each(run);
    } else {
        ranges.into_par_iter().zip(outputs).for_each(run);
    }
}

/// Outputs of 16 rows at most, where one scale is for all of a row.
fn store(sums: &[i32; BLOCK], token_scale: f32, scales: &[f32; BLOCK], y: &mut [f32]) {
    let output = |lane: usize| sums[lane] as f32 * (token_scale * scales[lane]);
    match y.as_mut_array::<BLOCK>() {
        // A loop of known length, for the compiler to vectorise.
        Some(y) => (0..BLOCK).for_each(|lane| y[lane] = output(lane)),
        None => y
            .iter_mut()
            .enumerate()
            .for_each(|(lane, y)| *y = output(lane)),
    }
}

/// Adds one segment's share to the totals of 16 rows.
fn accumulate(sums: &[i32; BLOCK], scales: &[f32; BLOCK], totals: &mut [f32; BLOCK]) {
    for lane in 0..BLOCK {
        totals[lane] += sums[lane] as f32 * scales[lane];
    }
}

/// Outputs of 16 rows at most, where groups of columns have scales.
fn store_totals(totals: &[f32; BLOCK], token_scale: f32, y: &mut [f32]) {
    y.iter_mut()
        .zip(totals)
        .for_each(|(y, total)| *y = total * token_scale);
}

/// Starts the sums of a tile, `[token][row]`, at -Σ q: weights are multiplied as T + 1.
fn subtract_sums(activations: &Quantised, tile: &Tile, segment: usize, sums: &mut [i32]) {
    let rows = sums.len() / tile.tokens;
    for (token, sums) in sums.chunks_mut(rows).enumerate() {
        sums.fill(-activations.sums[(tile.first + token) * activations.segments + segment]);
    }
}

/// The operands of a product.
struct Product<'a> {
    kernel: &'a IntegerKernel,
    activations: &'a Quantised,
    weights: &'a PackedView<'a>,
    /// Whether groups of columns have scales of their own.
    grouped: bool,
}

/// What a share of a product writes to before there are outputs.
struct Buffers {
    panel: Vec<Line>,
    /// Of one segment, `[token][row of the panel]`.
    sums: Vec<i32>,
    /// Of the segments before, scaled; empty where rows have one segment.
    totals: Vec<f32>,
}

impl Product<'_> {
    /// g of the 16 rows of a row group, in one segment. Rows that pad the group have 0.
    fn scales(&self, group: usize, segment: usize) -> [f32; BLOCK] {
        let segments = self.activations.segments;
        let mut scales = [0.0; BLOCK];
        let first = group * BLOCK;
        let valid = (self.weights.rows() - first).min(BLOCK);
        let all = self.weights.scales();
        match self.weights.granularity() {
            Granularity::Tensor => scales[..valid].fill(all[0]),
            Granularity::Row => scales[..valid].copy_from_slice(&all[first..first + valid]),
            Granularity::Group(_) => {
                let column = all[first * segments + segment..].iter().step_by(segments);
                scales[..valid]
                    .iter_mut()
                    .zip(column)
                    .for_each(|(scale, g)| *scale = *g);
            }
        }
        scales
    }

    /// Few tokens: each word is read once, in the order of memory.
    fn stream(&self, range: Range<usize>, y: &mut [&mut [f32]]) {
        let tile = self.activations.tiles[0];
        let row = tile.tokens * BLOCK;
        let mut sums = vec![0i32; STREAMED_GROUPS * row];
        let mut totals = vec![0f32; row];
        for first in range.clone().step_by(STREAMED_GROUPS) {
            let groups = first..range.end.min(first + STREAMED_GROUPS);
            if !self.grouped {
                self.stream_rows(groups.clone(), &mut sums[..groups.len() * row]);
            }
            for (i, group) in groups.enumerate() {
                let y_at = (group - range.start) * BLOCK;
                if self.grouped {
                    totals.fill(0.0);
                    self.stream_segments(group, &mut sums[..row], &mut totals);
                }
                let scales = self.scales(group, 0);
                for (token, y) in y.iter_mut().enumerate() {
                    let end = y.len().min(y_at + BLOCK);
                    let y = &mut y[y_at..end];
                    let s = self.activations.scales[token];
                    if self.grouped {
                        store_totals(&totals.as_chunks().0[token], s, y);
                    } else {
                        store(&sums.as_chunks().0[i * tile.tokens + token], s, &scales, y);
                    }
                }
            }
        }
    }

    /// Σ q T of some row groups, `[row group][token][16 rows]`.
    fn stream_rows(&self, groups: Range<usize>, sums: &mut [i32]) {
        let tile = self.activations.tiles[0];
        for sums in sums.chunks_mut(tile.tokens * BLOCK) {
            subtract_sums(self.activations, &tile, 0, sums);
        }
        let stride = self.weights.blocks() * BLOCK;
        let words = &self.weights.words()[groups.start * stride..groups.end * stride];
        let quads = self.activations.tile(&tile, 0, self.activations.quads);
        (self.kernel.stream)(words, stride, quads, tile.tokens, sums);
    }

    /// One row group whose columns have scales of their own, `totals` `[token][16 rows]`.
    fn stream_segments(&self, group: usize, sums: &mut [i32], totals: &mut [f32]) {
        let tile = self.activations.tiles[0];
        let words = self.weights.row_group(group);
        for segment in 0..self.activations.segments {
            let first = segment * self.activations.segment;
            let quads = self.activations.segment.min(self.activations.quads - first);
            subtract_sums(self.activations, &tile, segment, sums);
            let words = &words[first / BLOCK_QUADS * BLOCK..][..quads * QUAD];
            let quads = self.activations.tile(&tile, first, quads);
            (self.kernel.stream)(words, 0, quads, tile.tokens, sums);
            let scales = self.scales(group, segment);
            let totals = totals.as_chunks_mut().0;
            for (sums, totals) in sums.as_chunks().0.iter().zip(totals) {
                accumulate(sums, &scales, totals);
            }
        }
    }

    /// Many tokens: a panel is unpacked block by block, and multiplied with one tile after another.
    fn unpack(&self, range: Range<usize>, y: &mut [&mut [f32]]) {
        let kernel = self.kernel;
        let tokens_at_once = ACTIVATION_BYTES / (self.activations.quads * QUAD);
        let tiles_at_once = (tokens_at_once / kernel.tile).max(1);
        let lanes = kernel.groups * BLOCK;
        let most = (tiles_at_once * kernel.tile).min(self.activations.scales.len());
        let mut buffers = Buffers {
            panel: vec![Line::ZERO; UNPACKED_QUADS * kernel.groups],
            sums: vec![0; most * lanes],
            totals: vec![0.0; if self.grouped { most * lanes } else { 0 }],
        };
        for tiles in self.activations.tiles.chunks(tiles_at_once) {
            for group in range.clone().step_by(kernel.groups) {
                buffers.totals.fill(0.0);
                for segment in 0..self.activations.segments {
                    self.sum_segment(group, segment, tiles, &mut buffers);
                    if self.grouped {
                        self.scale_segment(group, segment, &mut buffers);
                    }
                }
                self.write(group, tiles, &buffers, (group - range.start) * BLOCK, y);
            }
        }
    }

    /// Σ q T of a panel and some tiles, in one segment.
    fn sum_segment(&self, group: usize, segment: usize, tiles: &[Tile], buffers: &mut Buffers) {
        let (kernel, activations) = (self.kernel, self.activations);
        let lanes = kernel.groups * BLOCK;
        let mut rest = &mut buffers.sums[..];
        for tile in tiles {
            let sums = rest
                .split_off_mut(..tile.tokens * lanes)
                .unwrap_or_default();
            subtract_sums(activations, tile, segment, sums);
        }
        let first = segment * activations.segment;
        let end = activations.quads.min(first + activations.segment);
        for first in (first..end).step_by(UNPACKED_QUADS) {
            let quads = UNPACKED_QUADS.min(end - first);
            let panel = &mut buffers.panel[..quads * kernel.groups];
            for part in 0..kernel.groups {
                // Where the matrix ends within the panel, its last row group fills the rest: any numbers do.
                let words = self
                    .weights
                    .row_group((group + part).min(self.weights.row_groups() - 1));
                let words = &words[first / BLOCK_QUADS * BLOCK..][..quads * QUAD];
                (kernel.unpack)(words, &mut panel[part..], kernel.groups);
            }
            let mut rest = &mut buffers.sums[..];
            for tile in tiles {
                let sums = rest
                    .split_off_mut(..tile.tokens * lanes)
                    .unwrap_or_default();
                let quads = activations.tile(tile, first, quads);
                (kernel.multiply)(panel, quads, tile.tokens, sums);
            }
        }
    }

    /// Adds one segment's share to the totals of a panel.
    fn scale_segment(&self, group: usize, segment: usize, buffers: &mut Buffers) {
        let groups = self.kernel.groups;
        for part in 0..groups.min(self.weights.row_groups() - group) {
            let scales = self.scales(group + part, segment);
            let sums = buffers.sums.as_chunks().0[part..].iter().step_by(groups);
            let totals = buffers.totals.as_chunks_mut().0[part..]
                .iter_mut()
                .step_by(groups);
            sums.zip(totals)
                .for_each(|(sums, totals)| accumulate(sums, &scales, totals));
        }
    }

    /// The outputs of a panel and some tiles, at `y_at` of each token's.
    fn write(
        &self,
        group: usize,
        tiles: &[Tile],
        buffers: &Buffers,
        y_at: usize,
        y: &mut [&mut [f32]],
    ) {
        let groups = self.kernel.groups;
        let tokens = tiles[0].first..tiles[tiles.len() - 1].first + tiles[tiles.len() - 1].tokens;
        for part in 0..groups.min(self.weights.row_groups() - group) {
            let scales = self.scales(group + part, 0);
            let y_at = y_at + part * BLOCK;
            for (i, token) in tokens.clone().enumerate() {
                let end = y[token].len().min(y_at + BLOCK);
                let y = &mut y[token][y_at..end];
                let s = self.activations.scales[token];
                let at = i * groups + part;
                if self.grouped {
                    store_totals(&buffers.totals.as_chunks().0[at], s, y);
                } else {
                    store(&buffers.sums.as_chunks().0[at], s, &scales, y);
                }
            }
        }
    }
}
