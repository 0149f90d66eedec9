//! Sums of quantised activations times trits, and the outputs they become.

use std::ops::Range;

use rayon::prelude::*;

use super::kernel::{IntegerKernel, Line};
use super::panels::{BLOCK_QUADS, QUAD, Quantised, Tile};
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

/// Multiplications below which other threads are not asked to help.
const ALONE: usize = 1 << 18;

/// Shares of the work that each thread gets: more than one, since a thread may be slowed by other programs.
const SHARES: usize = 4;

/// y `[tokens, rows]` from quantised activations.
pub(super) fn multiply(
    kernel: &IntegerKernel,
    activations: &Quantised,
    weights: &PackedView,
    y: &mut [f32],
) {
    let tokens = activations.scales.len();
    if weights.rows() == 0 || weights.cols() == 0 {
        y.fill(0.0);
        return;
    }
    let stream = tokens <= kernel.stream_tokens;
    let unit = if stream { 1 } else { kernel.groups };
    let multiplications = tokens * weights.rows() * weights.cols();
    let ranges = shares(weights.row_groups(), multiplications, unit);
    let outputs = split(y, weights.rows(), &ranges);
    let run = |(range, mut y): (Range<usize>, Vec<&mut [f32]>)| {
        if stream {
            streamed(kernel, activations, weights, range, &mut y);
        } else {
            unpacked(kernel, activations, weights, range, &mut y);
        }
    };
    if ranges.len() == 1 {
        ranges.into_iter().zip(outputs).for_each(run);
    } else {
        ranges.into_par_iter().zip(outputs).for_each(run);
    }
}

/// Ranges of groups of 16 outputs, one a task, each but the last a multiple of `unit`.
pub(super) fn shares(groups: usize, multiplications: usize, unit: usize) -> Vec<Range<usize>> {
    let units = groups.div_ceil(unit);
    let threads = rayon::current_num_threads();
    let shares = if threads == 1 || multiplications < ALONE {
        1
    } else {
        (SHARES * threads).min(units)
    };
    let start = |i: usize| (i * units / shares * unit).min(groups);
    (0..shares).map(|i| start(i)..start(i + 1)).collect()
}

/// For each range of groups of 16 outputs, its part of y `[tokens, outputs]`: a slice for each token.
pub(super) fn split<'y>(
    y: &'y mut [f32],
    rows: usize,
    ranges: &[Range<usize>],
) -> Vec<Vec<&'y mut [f32]>> {
    let tokens = y.len() / rows;
    let mut parts: Vec<_> = ranges.iter().map(|_| Vec::with_capacity(tokens)).collect();
    for mut y in y.chunks_mut(rows) {
        for (range, part) in ranges.iter().zip(&mut parts) {
            let end = (range.end * BLOCK).min(rows) - range.start * BLOCK;
            part.push(y.split_off_mut(..end).unwrap_or_default());
        }
    }
    parts
}

/// g of the 16 rows of a row group, in one segment. Rows that pad the group have 0.
fn group_scales(
    weights: &PackedView,
    group: usize,
    segment: usize,
    segments: usize,
) -> [f32; BLOCK] {
    let mut scales = [0.0; BLOCK];
    let valid = (weights.rows() - group * BLOCK).min(BLOCK);
    for (lane, scale) in scales[..valid].iter_mut().enumerate() {
        *scale = match weights.granularity() {
            Granularity::Tensor => weights.scales()[0],
            Granularity::Row => weights.scales()[group * BLOCK + lane],
            Granularity::Group(_) => weights.scales()[(group * BLOCK + lane) * segments + segment],
        };
    }
    scales
}

/// Outputs of 16 rows at most, where one scale is for all of a row.
fn store(sums: &[i32], token_scale: f32, scales: &[f32; BLOCK], y: &mut [f32]) {
    for ((y, &sum), &scale) in y.iter_mut().zip(sums).zip(scales) {
        *y = sum as f32 * (token_scale * scale);
    }
}

/// Adds one segment's share to the totals of 16 rows.
fn accumulate(sums: &[i32], scales: &[f32; BLOCK], totals: &mut [f32]) {
    for ((total, &sum), &scale) in totals.iter_mut().zip(sums).zip(scales) {
        *total += sum as f32 * scale;
    }
}

/// Few tokens: each word is read once, in the order of memory.
fn streamed(
    kernel: &IntegerKernel,
    activations: &Quantised,
    weights: &PackedView,
    range: Range<usize>,
    y: &mut [&mut [f32]],
) {
    let tile = activations.tiles[0];
    let tokens = tile.tokens;
    let stride = weights.blocks() * BLOCK;
    let row = tokens * BLOCK;
    let grouped = matches!(weights.granularity(), Granularity::Group(_));
    let mut sums = vec![0i32; STREAMED_GROUPS * row];
    let mut totals = vec![0f32; row];
    for first in range.clone().step_by(STREAMED_GROUPS) {
        let groups = first..range.end.min(first + STREAMED_GROUPS);
        if !grouped {
            let sums = &mut sums[..groups.len() * row];
            for sums in sums.chunks_mut(row) {
                subtract_sums(activations, &tile, 0, sums);
            }
            let words = &weights.words()[first * stride..groups.end * stride];
            let quads = activations.tile(&tile, 0, activations.quads);
            (kernel.stream)(words, stride, quads, tokens, sums);
        }
        for (i, group) in groups.enumerate() {
            let y_at = (group - range.start) * BLOCK;
            if grouped {
                totals.fill(0.0);
                stream_group(
                    kernel,
                    activations,
                    weights,
                    group,
                    &mut sums[..row],
                    &mut totals,
                );
            }
            for (token, y) in y.iter_mut().enumerate() {
                let end = y.len().min(y_at + BLOCK);
                let y = &mut y[y_at..end];
                let s = activations.scales[token];
                if grouped {
                    let totals = &totals[token * BLOCK..];
                    y.iter_mut()
                        .zip(totals)
                        .for_each(|(y, total)| *y = total * s);
                } else {
                    let sums = &sums[i * row + token * BLOCK..][..BLOCK];
                    store(sums, s, &group_scales(weights, group, 0, 1), y);
                }
            }
        }
    }
}

/// One row group whose columns have scales of their own, `totals` `[token][16 rows]`.
fn stream_group(
    kernel: &IntegerKernel,
    activations: &Quantised,
    weights: &PackedView,
    group: usize,
    sums: &mut [i32],
    totals: &mut [f32],
) {
    let tile = activations.tiles[0];
    let words = weights.row_group(group);
    for segment in 0..activations.segments {
        let first = segment * activations.segment;
        let quads = activations.segment.min(activations.quads - first);
        subtract_sums(activations, &tile, segment, sums);
        let words = &words[first / BLOCK_QUADS * BLOCK..][..quads * QUAD];
        (kernel.stream)(
            words,
            0,
            activations.tile(&tile, first, quads),
            tile.tokens,
            sums,
        );
        let scales = group_scales(weights, group, segment, activations.segments);
        for (sums, totals) in sums.chunks(BLOCK).zip(totals.chunks_mut(BLOCK)) {
            accumulate(sums, &scales, totals);
        }
    }
}

/// Starts the sums of a tile, `[token][row]`, at -Σ q: weights are multiplied as T + 1.
fn subtract_sums(activations: &Quantised, tile: &Tile, segment: usize, sums: &mut [i32]) {
    let rows = sums.len() / tile.tokens;
    for (token, sums) in sums.chunks_mut(rows).enumerate() {
        sums.fill(-activations.sums[(tile.first + token) * activations.segments + segment]);
    }
}

/// Many tokens: a panel is unpacked block by block, and multiplied with one tile after another.
fn unpacked(
    kernel: &IntegerKernel,
    activations: &Quantised,
    weights: &PackedView,
    range: Range<usize>,
    y: &mut [&mut [f32]],
) {
    let tokens_at_once = ACTIVATION_BYTES / (activations.quads * QUAD).max(1);
    let tiles_at_once = (tokens_at_once / kernel.tile).max(1);
    let lanes = kernel.groups * BLOCK;
    let mut panel = vec![Line::ZERO; UNPACKED_QUADS * kernel.groups];
    for tiles in activations.tiles.chunks(tiles_at_once) {
        let tokens: usize = tiles.iter().map(|tile| tile.tokens).sum();
        let mut sums = vec![0i32; tokens * lanes];
        let mut totals = vec![0f32; tokens * lanes];
        for group in range.clone().step_by(kernel.groups) {
            totals.fill(0.0);
            for segment in 0..activations.segments {
                sum_segment(
                    kernel,
                    activations,
                    weights,
                    [group, segment],
                    tiles,
                    &mut panel,
                    &mut sums,
                );
                if matches!(weights.granularity(), Granularity::Group(_)) {
                    for part in 0..kernel.groups.min(weights.row_groups() - group) {
                        let scales =
                            group_scales(weights, group + part, segment, activations.segments);
                        let sums = sums.chunks(BLOCK).skip(part).step_by(kernel.groups);
                        let totals = totals.chunks_mut(BLOCK).skip(part).step_by(kernel.groups);
                        sums.zip(totals)
                            .for_each(|(s, t)| accumulate(s, &scales, t));
                    }
                }
            }
            write(
                kernel,
                activations,
                weights,
                tiles,
                [group, range.start],
                &sums,
                &totals,
                y,
            );
        }
    }
}

/// Σ q T of a panel and some tiles, in one segment.
fn sum_segment(
    kernel: &IntegerKernel,
    activations: &Quantised,
    weights: &PackedView,
    [group, segment]: [usize; 2],
    tiles: &[Tile],
    panel: &mut [Line],
    sums: &mut [i32],
) {
    let lanes = kernel.groups * BLOCK;
    let mut rest = &mut *sums;
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
        let panel = &mut panel[..quads * kernel.groups];
        for part in 0..kernel.groups {
            // Where the matrix ends within the panel, its last row group fills the rest: any numbers do.
            let group = (group + part).min(weights.row_groups() - 1);
            let words = &weights.row_group(group)[first / BLOCK_QUADS * BLOCK..][..quads * QUAD];
            (kernel.unpack)(words, &mut panel[part..], kernel.groups);
        }
        let mut rest = &mut *sums;
        for tile in tiles {
            let sums = rest
                .split_off_mut(..tile.tokens * lanes)
                .unwrap_or_default();
            (kernel.multiply)(
                panel,
                activations.tile(tile, first, quads),
                tile.tokens,
                sums,
            );
        }
    }
}

/// The outputs of a panel and some tiles.
#[expect(
    clippy::too_many_arguments,
    reason = "one call, all of it state of the caller's loop"
)]
fn write(
    kernel: &IntegerKernel,
    activations: &Quantised,
    weights: &PackedView,
    tiles: &[Tile],
    [group, range_start]: [usize; 2],
    sums: &[i32],
    totals: &[f32],
    y: &mut [&mut [f32]],
) {
    let grouped = matches!(weights.granularity(), Granularity::Group(_));
    let first_token = tiles[0].first;
    for part in 0..kernel.groups.min(weights.row_groups() - group) {
        let scales = group_scales(weights, group + part, 0, activations.segments);
        let y_at = (group + part - range_start) * BLOCK;
        let lines = sums.chunks(BLOCK).zip(totals.chunks(BLOCK));
        for (token, (sums, totals)) in lines.skip(part).step_by(kernel.groups).enumerate() {
            let s = activations.scales[first_token + token];
            let y = &mut y[first_token + token];
            let end = y.len().min(y_at + BLOCK);
            let y = &mut y[y_at..end];
            if grouped {
                y.iter_mut()
                    .zip(totals)
                    .for_each(|(y, total)| *y = total * s);
            } else {
                store(sums, s, &scales, y);
            }
        }
    }
}
