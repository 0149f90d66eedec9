//! Activations as products read them: quantised, in tiles of a few tokens.

use rayon::prelude::*;

use super::kernel::IntegerKernel;
use crate::panel::{Tile, tiles};
use crate::ternary::Granularity;
use crate::ternary::fake_quantize::scale_of_magnitude;
use crate::ternary::layout::compute::BLOCK;

/// Columns of a quad.
pub(super) const QUAD: usize = 4;

/// Quads of a block.
pub(super) const BLOCK_QUADS: usize = BLOCK / QUAD;

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
    /// Tile by tile, `[quad][token][4 bytes]`.
    words: Vec<u32>,
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

    fn fill(&mut self, kernel: &IntegerKernel, x: &[f32], cols: usize) {
        let (mut words, mut scales, mut sums) = (
            &mut self.words[..],
            &mut self.scales[..],
            &mut self.sums[..],
        );
        let mut work = Vec::with_capacity(self.tiles.len());
        for tile in &self.tiles {
            work.push((
                tile,
                words
                    .split_off_mut(..tile.tokens * self.quads)
                    .unwrap_or_default(),
                scales.split_off_mut(..tile.tokens).unwrap_or_default(),
                sums.split_off_mut(..tile.tokens * self.segments)
                    .unwrap_or_default(),
            ));
        }
        let (quads, segment, segments) = (self.quads, self.segment, self.segments);
        let fill = |(tile, words, scales, sums): (&Tile, &mut [u32], &mut [f32], &mut [i32])| {
            debug_assert_eq!(words.len(), tile.tokens * quads);
            for token in 0..tile.tokens {
                let x = &x[(tile.first + token) * cols..][..cols];
                scales[token] = scale_of_magnitude((kernel.absmax)(x));
                if scales[token].is_nan() {
                    continue;
                }
                for (i, x) in x.chunks(segment * QUAD).enumerate() {
                    let out = &mut words[i * segment * tile.tokens + token..];
                    sums[token * segments + i] =
                        (kernel.quantise)(x, scales[token], out, tile.tokens);
                }
            }
        };
        if work.len() == 1 {
            work.into_iter().for_each(fill);
        } else {
            work.into_par_iter().for_each(fill);
        }
    }

    /// The words of a tile, from quad `first` on, so many quads.
    pub fn tile(&self, tile: &Tile, first: usize, quads: usize) -> &[u32] {
        &self.words[tile.first * self.quads + first * tile.tokens..][..quads * tile.tokens]
    }
}
