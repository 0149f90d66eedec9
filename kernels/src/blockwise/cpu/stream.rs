//! Products of few tokens: reading the weights is what takes the time, and they are multiplied as they are read.
//!
//! The sums of a block's products are multiplied with its scale, so that a weight takes a table look-up and one
//! multiply-add.

use std::array;
use std::ops::Range;

use rayon::prelude::*;

use super::unpack::{Decode, Group, GroupScales, Kernel, Stream};
use crate::blockwise::layout::BlockwiseView;
use crate::blockwise::tables::DYNAMIC_MAP;
use crate::blockwise::{BlockwiseShape, SCALE_BLOCK, double};
use crate::panel::{LANES, shares, split};

/// How a product of so many tokens can be streamed, if it can: where rows are whole blocks.
pub(super) fn stream(
    kernel: &'static Kernel,
    tokens: usize,
    shape: &BlockwiseShape,
) -> Option<&'static Stream> {
    let stream = kernel.stream.as_ref()?;
    // Blocks are counted in 32 bits.
    let fits = shape.places() <= i32::MAX as usize;
    let streams = tokens <= stream.tokens && shape.blocks_per_row().is_some() && fits;
    streams.then_some(stream)
}

/// y `[tokens, rows]` from x `[tokens, cols]`.
pub(super) fn multiply(stream: &Stream, x: &[f32], weights: &BlockwiseView, y: &mut [f32]) {
    let BlockwiseShape { rows, cols, .. } = weights.shape();
    if y.is_empty() {
        return;
    }
    let (tokens, decode) = (x.len() / cols, Decode::new(weights.shape().format));
    let places = (stream.places)(tokens);
    let ranges = shares(weights.shape().row_groups(), x.len() * rows, places);
    let parts = split(y, rows, &ranges);
    let work = |(range, mut y): (Range<usize>, Vec<&mut [f32]>)| {
        let apart = range.len() / places;
        let mut sums = vec![[0f32; LANES]; tokens * places];
        // As many groups at once as there are places, and the rest one by one.
        let together = (0..apart).map(|i| (i, places));
        let rest = (apart * places..range.len()).map(|i| (i, 1));
        for (first, count) in together.chain(rest) {
            let indices = (0..count).map(|place| range.start + first + place * apart);
            let groups: Vec<Group> = indices.clone().map(|i| Group::new(weights, i)).collect();
            let sums = &mut sums[..count * tokens];
            (stream.multiply)(&groups, decode, x, tokens, sums);
            for (group, sums) in indices.zip(sums.chunks(tokens)) {
                store(sums, (group - range.start) * LANES, &mut y);
            }
        }
    };
    if ranges.len() == 1 {
        ranges.into_iter().zip(parts).for_each(work);
    } else {
        ranges.into_par_iter().zip(parts).for_each(work);
    }
}

/// The sums of a row group, `[token][16 rows]`, to their outputs.
fn store(sums: &[[f32; LANES]], at: usize, y: &mut [&mut [f32]]) {
    for (y, sums) in y.iter_mut().zip(sums) {
        let end = y.len().min(at + LANES);
        let y = &mut y[at..end];
        y.copy_from_slice(&sums[..y.len()]);
    }
}

impl<'a> Group<'a> {
    fn new(weights: &BlockwiseView<'a>, group: usize) -> Self {
        let shape = weights.shape();
        // Asked for before a product is streamed.
        let per_row = shape.blocks_per_row().unwrap_or_default();
        let blocks = group * per_row..(group + 1) * per_row;
        let scales = match weights.double_scales() {
            Some(double) => GroupScales::Double {
                codes: &double.codes.as_chunks().0[blocks.clone()],
                scales: double.scales,
                mean: double.mean,
                // Rows that pad the group are taken for the last.
                first: array::from_fn(|lane| {
                    let row = (group * LANES + lane).min(shape.rows - 1);
                    (row * per_row) as i32
                }),
            },
            None => GroupScales::Single(&weights.single_scales().as_chunks().0[blocks.clone()]),
        };
        let zeros = if shape.format.has_zero_points() {
            &weights.zero_words()[2 * blocks.start..2 * blocks.end]
        } else {
            &[]
        };
        Self {
            words: weights.row_group(group),
            scales,
            zeros,
            block: shape.block,
        }
    }

    /// The scales of 16 rows in a block of columns.
    pub fn scales_of(&self, index: usize) -> [f32; LANES] {
        match self.scales {
            GroupScales::Single(lines) => lines[index],
            GroupScales::Double {
                codes,
                scales,
                mean,
                first,
            } => {
                let map = &*DYNAMIC_MAP;
                array::from_fn(|lane| {
                    let code = codes[index][lane / 4].to_le_bytes()[lane % 4];
                    let block = first[lane] as usize + index;
                    double::expand(map, code, scales[block / SCALE_BLOCK], mean)
                })
            }
        }
    }

    /// Their zero points: 0 where the format has none.
    pub fn zeros_of(&self, index: usize) -> [f32; LANES] {
        if self.zeros.is_empty() {
            return [0.0; LANES];
        }
        let words = &self.zeros[2 * index..][..2];
        array::from_fn(|lane| (words[lane / 8] >> (4 * (lane % 8)) & 15) as f32)
    }

    /// Panics where a kernel would read beyond the slices.
    pub fn check(&self, cols: usize, zeros: bool, codes_per_word: usize) {
        assert_eq!(self.words.len() * codes_per_word, LANES * cols);
        assert!(self.block > 0 && self.block.is_multiple_of(LANES));
        assert!(cols.is_multiple_of(self.block));
        let blocks = cols / self.block;
        assert!(!zeros || self.zeros.len() == 2 * blocks);
        match self.scales {
            GroupScales::Single(lines) => assert_eq!(lines.len(), blocks),
            GroupScales::Double {
                codes,
                scales,
                first,
                ..
            } => {
                assert_eq!(codes.len(), blocks);
                let last = |first: i32| usize::try_from(first).map(|first| first + blocks - 1);
                let inside =
                    |first| last(first).is_ok_and(|last| last / SCALE_BLOCK < scales.len());
                assert!(first.into_iter().all(inside));
            }
        }
    }
}
