//! The layout that products read. Files hold [`Quantised`]'s bytes instead, which are bitsandbytes'.
//!
//! Rows (outputs) come in groups of 16, columns (inputs) in blocks of 16. A word belongs to one row and holds the codes
//! of neighbouring columns, the first in its low bits: eight of four bits, or four of eight. The words of the same
//! columns of 16 rows follow each other, 64 bytes; then come those of the next columns, and behind a row group the next
//! one. Rows and columns that pad the matrix have the code 0.
//!
//! So one vector holds 16 rows, and a shift by a constant brings the codes of a column to where a table look-up takes
//! them. Memory is read in order.
//!
//! Beside the words there are scales in f32 and a few small codes, again in words:
//!
//! | | scales | side |
//! |---|---|---|
//! | single | one for each place of a block | |
//! | double | one for each 256 blocks, then the mean | codes of scales, one for each place, four a word |
//! | `int4-affine` | | then zero points, one for each place, eight a word, from a new word on |
//!
//! Where rows are whole blocks of a multiple of 16 columns, the places of 16 rows' blocks of the same columns follow
//! each other, as their words do; rows that pad the matrix have places too. Other blocks have the places of their order.
//! Where nothing is in `side` it is one word of 0, since devices dislike tensors of nothing.

use std::borrow::Cow;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rayon::prelude::*;

use super::error::check_length;
use super::quantise::{check_finite, pack_halves};
use super::tables::DYNAMIC_MAP;
use super::{BlockwiseError, BlockwiseShape, Format, Quantised, SCALE_BLOCK, Scales, double};

/// Rows of a group, and columns of a block.
pub const BLOCK: usize = 16;

impl Format {
    /// Codes of a word.
    pub fn codes_per_word(self) -> usize {
        32 / self.bits()
    }
}

impl BlockwiseShape {
    /// Groups of 16 rows.
    pub fn row_groups(&self) -> usize {
        self.rows.div_ceil(BLOCK)
    }

    /// Words of a group of 16 rows.
    pub fn words_per_group(&self) -> usize {
        self.cols.next_multiple_of(BLOCK) * BLOCK / self.format.codes_per_word()
    }

    /// Words of the matrix.
    pub fn words(&self) -> usize {
        self.row_groups() * self.words_per_group()
    }

    /// Blocks of a row, where rows are whole blocks of a multiple of 16 columns.
    pub(super) fn blocks_per_row(&self) -> Option<usize> {
        let whole = self.cols > 0 && self.block.is_multiple_of(BLOCK);
        (whole && self.cols.is_multiple_of(self.block)).then(|| self.cols / self.block)
    }

    /// Places of blocks.
    pub(super) fn places(&self) -> usize {
        match self.blocks_per_row() {
            Some(per_row) => self.row_groups() * BLOCK * per_row,
            None => self.blocks(),
        }
    }

    /// The place of a block.
    pub(super) fn place(&self, block: usize) -> usize {
        match self.blocks_per_row() {
            Some(per_row) => {
                let (row, col) = (block / per_row, block % per_row);
                (row / BLOCK * per_row + col) * BLOCK + row % BLOCK
            }
            None => block,
        }
    }

    /// Scales that products are given.
    pub fn scales(&self) -> usize {
        if self.double {
            self.scale_blocks() + 1
        } else {
            self.places()
        }
    }

    /// Words of codes of scales.
    pub(super) fn scale_code_words(&self) -> usize {
        if self.double {
            self.places().div_ceil(4)
        } else {
            0
        }
    }

    fn zero_words(&self) -> usize {
        if self.format.has_zero_points() {
            self.places().div_ceil(8)
        } else {
            0
        }
    }

    /// Words of small codes, at least one.
    pub fn side_words(&self) -> usize {
        (self.scale_code_words() + self.zero_words()).max(1)
    }
}

/// What products read of a matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Operands {
    /// What it is.
    pub shape: BlockwiseShape,
    /// Codes: [`BlockwiseShape::words`], `[row groups, words of a group]`.
    pub words: Vec<u32>,
    /// [`BlockwiseShape::scales`] of them.
    pub scales: Vec<f32>,
    /// [`BlockwiseShape::side_words`] of them.
    pub side: Vec<u32>,
}

impl Operands {
    /// The operands as [`blockwise_linear`](super::blockwise_linear) takes them: words
    /// `[row groups, words of a group]`, scales, side.
    pub fn into_tensors(self, device: &Device) -> (Tensor<2, Int>, Tensor<1>, Tensor<1, Int>) {
        let words = [self.shape.row_groups(), self.shape.words_per_group()];
        let words = TensorData::new(self.words, words);
        let scales = TensorData::new(self.scales, [self.shape.scales()]);
        let side = TensorData::new(self.side, [self.shape.side_words()]);
        (
            Tensor::from_data(words, (device, DType::U32)),
            Tensor::from_data(scales, (device, DType::F32)),
            Tensor::from_data(side, (device, DType::U32)),
        )
    }

    /// The operands, borrowed.
    pub fn view(&self) -> BlockwiseView<'_> {
        BlockwiseView {
            shape: self.shape,
            words: &self.words,
            scales: &self.scales,
            side: &self.side,
        }
    }
}

/// Operands that somebody else holds.
#[derive(Debug, Clone, Copy)]
pub struct BlockwiseView<'a> {
    shape: BlockwiseShape,
    words: &'a [u32],
    scales: &'a [f32],
    side: &'a [u32],
}

/// Scales in eight bits.
#[derive(Debug, Clone, Copy)]
pub(super) struct DoubleScales<'a> {
    /// Four a word, by places.
    pub codes: &'a [u32],
    /// Of 256 blocks each.
    pub scales: &'a [f32],
    pub mean: f32,
}

impl DoubleScales<'_> {
    /// The scale of a block, whose code has a place.
    #[inline(always)]
    fn expand(&self, map: &[f32; 256], place: usize, block: usize) -> f32 {
        let code = (self.codes[place / 4] >> (8 * (place % 4))) as u8;
        double::expand(map, code, self.scales[block / SCALE_BLOCK], self.mean)
    }
}

impl<'a> BlockwiseView<'a> {
    /// Checks that the slices have the lengths that the shape asks for. Their values are not looked at: any give some
    /// product.
    ///
    /// # Errors
    ///
    /// A shape that cannot be, or wrong lengths.
    pub fn new(
        shape: BlockwiseShape,
        words: &'a [u32],
        scales: &'a [f32],
        side: &'a [u32],
    ) -> Result<Self, BlockwiseError> {
        shape.check()?;
        check_length("words", words.len(), shape.words())?;
        check_length("scales", scales.len(), shape.scales())?;
        check_length("side words", side.len(), shape.side_words())?;
        Ok(Self {
            shape,
            words,
            scales,
            side,
        })
    }

    /// What the matrix is.
    pub fn shape(&self) -> BlockwiseShape {
        self.shape
    }

    /// The words of one row group.
    pub fn row_group(&self, group: usize) -> &'a [u32] {
        let size = self.shape.words_per_group();
        &self.words[group * size..][..size]
    }

    /// Every place's scale in f32. Rows that pad the matrix have any.
    pub(super) fn expanded_scales(&self) -> Cow<'a, [f32]> {
        let Some(double) = self.double_scales() else {
            return Cow::Borrowed(self.scales);
        };
        let (shape, map) = (self.shape, &*DYNAMIC_MAP);
        let mut scales = vec![0.0; shape.places()];
        match shape.blocks_per_row() {
            None => {
                for (block, scale) in scales.iter_mut().enumerate() {
                    *scale = double.expand(map, block, block);
                }
            }
            Some(per_row) => {
                let groups = scales.chunks_mut(BLOCK * per_row).enumerate();
                groups.for_each(|(group, scales)| {
                    for lane in 0..BLOCK.min(shape.rows - group * BLOCK) {
                        let first = (group * BLOCK + lane) * per_row;
                        for (col, scale) in scales[lane..].iter_mut().step_by(BLOCK).enumerate() {
                            let place = (group * per_row + col) * BLOCK + lane;
                            *scale = double.expand(map, place, first + col);
                        }
                    }
                });
            }
        }
        Cow::Owned(scales)
    }

    /// What scales are made of, where they are in eight bits.
    pub(super) fn double_scales(&self) -> Option<DoubleScales<'a>> {
        let (mean, scales) = self.scales.split_last()?;
        self.shape.double.then_some(DoubleScales {
            codes: self.side,
            scales,
            mean: *mean,
        })
    }

    /// Every place's scale, where they are in f32.
    pub(super) fn single_scales(&self) -> &'a [f32] {
        self.scales
    }

    /// The zero point of a place: 0 where the format has none.
    pub(super) fn zero_point(&self, place: usize) -> u8 {
        if self.shape.format.has_zero_points() {
            (self.zero_words()[place / 8] >> (4 * (place % 8))) as u8 & 15
        } else {
            0
        }
    }

    /// Zero points by places, eight a word.
    pub(super) fn zero_words(&self) -> &'a [u32] {
        &self.side[self.shape.scale_code_words()..]
    }

    /// The code of a weight.
    fn code(&self, row: usize, col: usize) -> u8 {
        let format = self.shape.format;
        let per_word = format.codes_per_word();
        let at = col / per_word * BLOCK + row % BLOCK;
        let word = self.row_group(row / BLOCK)[at] >> (format.bits() * (col % per_word));
        word as u8 & (u8::MAX >> (8 - format.bits()))
    }

    /// The same matrix as files hold it.
    ///
    /// # Errors
    ///
    /// Scales that are not finite.
    pub fn to_quantised(&self) -> Result<Quantised, BlockwiseError> {
        let shape = self.shape;
        check_finite(self.scales, 0)?;
        let weight = |i: usize| self.code(i / shape.cols, i % shape.cols);
        let codes: Vec<u8> = (0..shape.elements()).into_par_iter().map(weight).collect();
        let codes = if shape.format.bits() == 8 {
            codes
        } else {
            let mut bytes = vec![0; shape.code_bytes()];
            pack_halves(&codes, shape.format.code_of_zero(), &mut bytes);
            bytes
        };
        let places = (0..shape.blocks()).map(|block| shape.place(block));
        let scales = match self.double_scales() {
            Some(double) => Scales::Double {
                codes: (places.clone())
                    .map(|place| double.codes[place / 4].to_le_bytes()[place % 4])
                    .collect(),
                scales: double.scales.to_vec(),
                offset: double.mean,
            },
            None => Scales::Single(places.clone().map(|place| self.scales[place]).collect()),
        };
        let zeros: Vec<u8> = places.map(|place| self.zero_point(place)).collect();
        let mut zero_bytes = vec![0; shape.zero_bytes()];
        if shape.format.has_zero_points() {
            pack_halves(&zeros, 0, &mut zero_bytes);
        }
        Quantised::from_parts(shape, codes, scales, zero_bytes)
    }
}

impl Quantised {
    /// What products read of it.
    pub fn operands(&self) -> Operands {
        let shape = self.shape();
        let mut words = vec![0u32; shape.words()];
        if !words.is_empty() {
            let groups = words.par_chunks_mut(shape.words_per_group()).enumerate();
            groups.for_each(|(group, words)| self.pack_group(group, words));
        }
        let (scales, mut side) = match self.scales() {
            Scales::Single(scales) => (placed(&shape, |block| scales[block]), Vec::new()),
            Scales::Double {
                codes,
                scales,
                offset,
            } => {
                let mut scales = scales.clone();
                scales.push(*offset);
                let codes = placed(&shape, |block| codes[block]);
                (scales, pack_words::<4>(&codes, 8))
            }
        };
        if shape.format.has_zero_points() {
            let zeros = placed(&shape, |block| self.zero_point(block));
            side.extend(pack_words::<8>(&zeros, 4));
        }
        side.resize(shape.side_words(), 0);
        Operands {
            shape,
            words,
            scales,
            side,
        }
    }

    fn pack_group(&self, group: usize, words: &mut [u32]) {
        let BlockwiseShape {
            rows, cols, format, ..
        } = self.shape();
        let (per_word, bits) = (format.codes_per_word(), format.bits());
        for (lane, row) in (group * BLOCK..rows.min((group + 1) * BLOCK)).enumerate() {
            for (i, word) in words[lane..].iter_mut().step_by(BLOCK).enumerate() {
                for j in 0..per_word.min(cols.saturating_sub(i * per_word)) {
                    let code = self.code(row * cols + i * per_word + j);
                    *word |= u32::from(code) << (bits * j);
                }
            }
        }
    }
}

/// Values of blocks by places.
fn placed<T: Clone + Default>(shape: &BlockwiseShape, of_block: impl Fn(usize) -> T) -> Vec<T> {
    let mut values = vec![T::default(); shape.places()];
    (0..shape.blocks()).for_each(|block| values[shape.place(block)] = of_block(block));
    values
}

/// Codes of so many bits, N a word, the first in the low bits.
fn pack_words<const N: usize>(codes: &[u8], bits: usize) -> Vec<u32> {
    let word = |codes: &[u8]| {
        let codes = codes.iter().enumerate();
        codes.fold(0, |word, (i, &code)| word | u32::from(code) << (bits * i))
    };
    codes.chunks(N).map(word).collect()
}
