//! Activations as products read them: quantised, in tiles of a few tokens.

use std::ops::Range;

use rayon::prelude::*;

use super::kernel::IntegerKernel;
use crate::ternary::layout::compute::BLOCK;
use crate::ternary::{Granularity, SMALLEST_ACTIVATION};

/// Columns of a quad.
pub(super) const QUAD: usize = 4;

/// Quads of a block.
pub(super) const BLOCK_QUADS: usize = BLOCK / QUAD;

/// Some tokens that are multiplied together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    /// The first token.
    pub first: usize,
    /// How many.
    pub tokens: usize,
}

/// Cuts tokens into tiles of `most` at most, as even as they can be: a small tile costs nearly what a large one does.
pub(super) fn tiles(tokens: usize, most: usize) -> Vec<Tile> {
    let count = tokens.div_ceil(most);
    let start = |i: usize| i * tokens / count;
    (0..count)
        .map(|i| Tile {
            first: start(i),
            tokens: start(i + 1) - start(i),
        })
        .collect()
}

/// Stretches of columns that have a scale of their own, in quads.
pub(super) fn segment_quads(granularity: Granularity, quads: usize) -> usize {
    match granularity {
        Granularity::Tensor | Granularity::Row => quads.max(1),
        Granularity::Group(size) => size / QUAD,
    }
}

/// Quantised activations.
pub(super) struct Quantised {
    /// Quads of a token, padding to whole blocks included.
    pub quads: usize,
    /// Quads of a segment, but for the last.
    pub segment: usize,
    /// Segments of a token.
    pub segments: usize,
    pub tiles: Vec<Tile>,
    /// s of each token, NaN where a value is not finite.
    pub scales: Vec<f32>,
    /// Σ q of each segment, `[token][segment]`.
    pub sums: Vec<i32>,
    /// Block by block of [`UNPACKED_QUADS`], and in each tile by tile, `[quad][token][4 bytes]`: what is read one after
    /// the other lies so. Blocks start anew with each segment.
    words: Vec<u32>,
}

/// Quads that are unpacked at a time: 16 KiB of a panel of two row groups, and as much again for a tile of
/// activations and its sums, stay in a first-level cache of 32 KiB.
pub(super) const UNPACKED_QUADS: usize = 128;

/// Blocks of [`UNPACKED_QUADS`] at most of a segment: the first quad of each, and how many.
pub(super) fn blocks(segment: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    let end = segment.end;
    segment
        .step_by(UNPACKED_QUADS)
        .map(move |first| (first, UNPACKED_QUADS.min(end - first)))
}

impl Quantised {
    /// Quantises x `[tokens, cols]`.
    pub fn new(
        kernel: &IntegerKernel,
        x: &[f32],
        tokens: usize,
        cols: usize,
        granularity: Granularity,
    ) -> Self {
        let quads = cols.div_ceil(BLOCK) * BLOCK_QUADS;
        let segment = segment_quads(granularity, quads);
        let segments = quads.div_ceil(segment);
        let most = if tokens <= kernel.stream_tokens {
            kernel.stream_tokens
        } else {
            kernel.tile
        };
        let mut activations = Self {
            quads,
            segment,
            segments,
            tiles: tiles(tokens, most),
            scales: vec![0.0; tokens],
            sums: vec![0; tokens * segments],
            words: vec![0; tokens * quads],
        };
        if cols > 0 {
            activations.fill(kernel, x, cols);
        }
        activations
    }

    /// The quads of a segment.
    pub fn segment(&self, segment: usize) -> Range<usize> {
        let first = segment * self.segment;
        first..self.quads.min(first + self.segment)
    }

    fn fill(&mut self, kernel: &IntegerKernel, x: &[f32], cols: usize) {
        let (quads, segments) = (self.quads, self.segments);
        let ranges: Vec<Range<usize>> = (0..segments).map(|i| self.segment(i)).collect();
        let mut parts: Vec<Vec<&mut [u32]>> = self.tiles.iter().map(|_| Vec::new()).collect();
        let mut words = &mut self.words[..];
        for (_, quads) in ranges.iter().cloned().flat_map(blocks) {
            for (tile, parts) in self.tiles.iter().zip(&mut parts) {
                parts.push(
                    words
                        .split_off_mut(..tile.tokens * quads)
                        .unwrap_or_default(),
                );
            }
        }
        let (mut scales, mut sums) = (&mut self.scales[..], &mut self.sums[..]);
        let mut work = Vec::with_capacity(self.tiles.len());
        for (tile, words) in self.tiles.iter().zip(parts) {
            let scales = scales.split_off_mut(..tile.tokens).unwrap_or_default();
            let sums = sums
                .split_off_mut(..tile.tokens * segments)
                .unwrap_or_default();
            work.push((tile, words, scales, sums));
        }
        let fill = |(tile, mut words, scales, sums): Share| {
            debug_assert_eq!(
                words.iter().map(|w| w.len()).sum::<usize>(),
                tile.tokens * quads
            );
            for token in 0..tile.tokens {
                let x = &x[(tile.first + token) * cols..][..cols];
                let s = scale((kernel.absmax)(x));
                scales[token] = s;
                if s.is_nan() {
                    continue;
                }
                let mut words = words.iter_mut();
                for (segment, range) in ranges.iter().enumerate() {
                    let sum = &mut sums[token * segments + segment];
                    for ((first, quads), words) in blocks(range.clone()).zip(&mut words) {
                        let x = &x[first * QUAD..cols.min((first + quads) * QUAD)];
                        *sum += (kernel.quantise)(x, s, &mut words[token..], tile.tokens);
                    }
                }
            }
        };
        if work.len() == 1 {
            work.into_iter().for_each(fill);
        } else {
            work.into_par_iter().for_each(fill);
        }
    }

    /// The words of a tile in a block that [`blocks`] names. Of a single tile, any quads.
    pub fn tile(&self, tile: &Tile, first: usize, quads: usize) -> &[u32] {
        let at = first * self.scales.len() + tile.first * quads;
        &self.words[at..][..quads * tile.tokens]
    }
}

/// A tile, its words in each block, its scales and sums.
type Share<'a> = (&'a Tile, Vec<&'a mut [u32]>, &'a mut [f32], &'a mut [i32]);

/// s of a token whose largest magnitude has these bits; NaN if that is not finite.
pub(super) fn scale(absmax: u32) -> f32 {
    let absmax = f32::from_bits(absmax);
    if absmax.is_finite() {
        absmax.max(SMALLEST_ACTIVATION) / 127.0
    } else {
        f32::NAN
    }
}
