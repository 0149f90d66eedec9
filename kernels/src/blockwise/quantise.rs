//! From weights to codes and back.

use pulp::{Arch, NullaryFnOnce};
use rayon::prelude::*;

use super::double;
use super::error::check_length;
use super::reference::SMALLEST_ABSMAX;
use super::tables::{FP4_BORDERS, FP4_ORDER, NF4_BORDERS};
use super::{BlockwiseError, BlockwiseShape, Format, reference};

/// Weights that a task quantises, about.
const TASK: usize = 1 << 14;

/// Weights that are compared side by side.
const LANES: usize = 16;

/// Scales of blocks.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// One each, in f32.
    Single(Vec<f32>),
    /// Double quantisation.
    Double {
        /// One each: a place in [`DYNAMIC_MAP`](super::tables::DYNAMIC_MAP).
        codes: Vec<u8>,
        /// One for each 256 codes.
        scales: Vec<f32>,
        /// The mean, added to every scale.
        offset: f32,
    },
}

impl Scales {
    fn kind(&self) -> &'static str {
        match self {
            Self::Single(_) => SINGLE,
            Self::Double { .. } => DOUBLE,
        }
    }

    /// Every block's scale in f32.
    pub fn expand(&self) -> Vec<f32> {
        match self {
            Self::Single(scales) => scales.clone(),
            Self::Double {
                codes,
                scales,
                offset,
            } => double::expand_all(codes, scales, *offset),
        }
    }

    fn check(&self, shape: &BlockwiseShape) -> Result<(), BlockwiseError> {
        let (kind, expected) = (self.kind(), if shape.double { DOUBLE } else { SINGLE });
        if kind != expected {
            return Err(BlockwiseError::ScaleKind {
                expected,
                found: kind,
            });
        }
        match self {
            Self::Single(scales) => {
                check_length("scales", scales.len(), shape.blocks())?;
                check_finite(scales, 0)
            }
            Self::Double {
                codes,
                scales,
                offset,
            } => {
                check_length("codes of scales", codes.len(), shape.blocks())?;
                check_length("scales of scales", scales.len(), shape.scale_blocks())?;
                check_finite(scales, 0)?;
                check_finite(&[*offset], scales.len())?;
                for (i, scale) in scales.iter().enumerate() {
                    // Levels are within ±1: no scale is further from 0.
                    check_finite(&[scale.abs() + offset.abs()], i)?;
                }
                Ok(())
            }
        }
    }
}

const SINGLE: &str = "f32";
const DOUBLE: &str = "eight-bit";

pub(super) fn check_finite(scales: &[f32], first: usize) -> Result<(), BlockwiseError> {
    match scales.iter().position(|scale| !scale.is_finite()) {
        Some(i) => Err(BlockwiseError::Scale {
            index: first + i,
            value: scales[i],
        }),
        None => Ok(()),
    }
}

/// A quantised matrix, its parts as files hold them.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantised {
    shape: BlockwiseShape,
    codes: Vec<u8>,
    scales: Scales,
    zeros: Vec<u8>,
}

impl Quantised {
    /// A matrix from its parts, as [`codes`](Self::codes), [`scales`](Self::scales) and
    /// [`zero_points`](Self::zero_points) gave them.
    ///
    /// # Errors
    ///
    /// A shape that cannot be, parts of other lengths than it asks for, scales of another kind or not finite.
    pub fn from_parts(
        shape: BlockwiseShape,
        codes: Vec<u8>,
        scales: Scales,
        zeros: Vec<u8>,
    ) -> Result<Self, BlockwiseError> {
        shape.check()?;
        check_length("bytes of codes", codes.len(), shape.code_bytes())?;
        scales.check(&shape)?;
        check_length("bytes of zero points", zeros.len(), shape.zero_bytes())?;
        Ok(Self {
            shape,
            codes,
            scales,
            zeros,
        })
    }

    /// What it is.
    pub fn shape(&self) -> BlockwiseShape {
        self.shape
    }

    /// Codes, row after row: of four bits two a byte, the first in the high half, or one a byte. The half behind an odd
    /// number of codes holds the code of 0.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// A scale for each block.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// Zero points of blocks, two a byte, the first in the high half. Empty where the format has none.
    pub fn zero_points(&self) -> &[u8] {
        &self.zeros
    }

    /// W' `[rows, cols]`, row after row.
    pub fn dequantise(&self) -> Vec<f32> {
        let BlockwiseShape { format, block, .. } = self.shape;
        let scales = self.scales.expand();
        let mut weights = vec![0f32; self.shape.elements()];
        let blocks_at_once = (TASK / block).max(1);
        let tasks = weights.par_chunks_mut(blocks_at_once * block);
        tasks.enumerate().for_each(|(task, weights)| {
            for (i, weights) in weights.chunks_mut(block).enumerate() {
                let index = task * blocks_at_once + i;
                let zero = self.zero_point(index);
                for (j, weight) in weights.iter_mut().enumerate() {
                    let code = self.code(index * block + j);
                    *weight = reference::dequantise(format, code, zero, scales[index]);
                }
            }
        });
        weights
    }

    /// The code of a weight.
    #[inline(always)]
    pub(super) fn code(&self, index: usize) -> u8 {
        match self.shape.format {
            Format::Int8 => self.codes[index],
            _ => half(&self.codes, index),
        }
    }

    /// The zero point of a block: 0 where the format has none.
    pub(super) fn zero_point(&self, block: usize) -> u8 {
        if self.shape.format.has_zero_points() {
            half(&self.zeros, block)
        } else {
            0
        }
    }
}

/// Four bits of bytes that hold the first of two in their high half.
#[inline(always)]
fn half(bytes: &[u8], index: usize) -> u8 {
    bytes[index / 2] >> (4 * (1 - index % 2)) & 15
}

/// Bytes of codes of four bits, two each; `padding` in the last where there is an odd number.
pub(super) fn pack_halves(codes: &[u8], padding: u8, bytes: &mut [u8]) {
    let (pairs, rest) = codes.as_chunks::<2>();
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = high << 4 | low;
    }
    if let ([high], Some(byte)) = (rest, bytes.last_mut()) {
        *byte = high << 4 | padding;
    }
}

/// Quantises a matrix of weights, row after row, by the definitions of [`super`].
///
/// Threads are those of the current rayon pool; the bytes do not depend on how many.
///
/// # Errors
///
/// A shape that cannot be, another number of weights than it has, a weight that is not finite. With `double`, scales
/// so near the end of f32's range that their mean and their distance from it do not fit.
pub fn quantise(weights: &[f32], shape: BlockwiseShape) -> Result<Quantised, BlockwiseError> {
    shape.check()?;
    check_length("weights", weights.len(), shape.elements())?;
    if let Some(index) = first_not_finite(weights) {
        let value = weights[index];
        return Err(BlockwiseError::NotFinite { index, value });
    }
    let (codes, scales, zeros) = quantise_blocks(weights, shape);
    let mut zero_bytes = vec![0; shape.zero_bytes()];
    if shape.format.has_zero_points() {
        pack_halves(&zeros, 0, &mut zero_bytes);
    }
    let scales = if shape.double {
        let (codes, scales, offset) = double::compress(&scales);
        Scales::Double {
            codes,
            scales,
            offset,
        }
    } else {
        Scales::Single(scales)
    };
    Quantised::from_parts(shape, codes, scales, zero_bytes)
}

fn first_not_finite(weights: &[f32]) -> Option<usize> {
    let infinite = |x: &f32| !x.is_finite();
    // A task looks at all its weights: what can stop at any of them is no vector code.
    let any = |weights: &[f32]| weights.iter().fold(false, |any, x| any | infinite(x));
    let task = weights.par_chunks(TASK).position_first(any)?;
    let rest = &weights[task * TASK..];
    Some(task * TASK + rest.iter().position(infinite)?)
}

/// Bytes of codes, scales, and zero points one a byte.
fn quantise_blocks(weights: &[f32], shape: BlockwiseShape) -> (Vec<u8>, Vec<f32>, Vec<u8>) {
    let BlockwiseShape { format, block, .. } = shape;
    // An even number of blocks is a whole number of bytes.
    let blocks_at_once = (TASK / block).next_multiple_of(2).max(2);
    let mut bytes = vec![0; shape.code_bytes()];
    let (mut scales, mut zeros) = (vec![0f32; shape.blocks()], vec![0u8; shape.blocks()]);
    let weights_at_once = blocks_at_once.saturating_mul(block);
    let tasks = (weights.par_chunks(weights_at_once))
        .zip(bytes.par_chunks_mut(weights_at_once.saturating_mul(format.bits()).div_ceil(8)))
        .zip(scales.par_chunks_mut(blocks_at_once))
        .zip(zeros.par_chunks_mut(blocks_at_once));
    tasks.for_each(|(((weights, bytes), scales), zeros)| {
        let mut codes = vec![0u8; weights.len()];
        Arch::new().dispatch(Task {
            shape,
            weights,
            codes: &mut codes,
            scales,
            zeros,
        });
        if format.bits() == 8 {
            bytes.copy_from_slice(&codes);
        } else {
            pack_halves(&codes, format.code_of_zero(), bytes);
        }
    });
    (bytes, scales, zeros)
}

/// Some blocks. A closure of this size would not be compiled for the instructions that it is dispatched to.
struct Task<'a> {
    shape: BlockwiseShape,
    weights: &'a [f32],
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    zeros: &'a mut [u8],
}

impl NullaryFnOnce for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let BlockwiseShape { format, block, .. } = self.shape;
        let blocks = self.codes.chunks_mut(block).zip(self.weights.chunks(block));
        for ((codes, weights), (scale, zero)) in blocks.zip(self.scales.iter_mut().zip(self.zeros))
        {
            (*scale, *zero) = quantise_block(format, weights, weights.len() < block, codes);
        }
    }
}

/// [`reference::quantise_block`], for the compiler to vectorise where much is to be compared.
#[inline(always)]
fn quantise_block(format: Format, weights: &[f32], short: bool, codes: &mut [u8]) -> (f32, u8) {
    let borders = match format {
        Format::Nf4 => &NF4_BORDERS,
        Format::Fp4 => &FP4_BORDERS,
        _ => return reference::quantise_block(format, weights, short, codes),
    };
    let absmax = absmax(weights);
    let divisor = absmax.max(SMALLEST_ABSMAX);
    let inverse = 1.0 / divisor;
    let scaled = |x: f32| {
        let scaled = if short { x / divisor } else { x * inverse };
        scaled.clamp(-1.0, 1.0)
    };
    let mut padded = [0f32; LANES];
    for (codes, weights) in codes.chunks_mut(LANES).zip(weights.chunks(LANES)) {
        padded[..weights.len()].copy_from_slice(weights);
        let scaled = padded.map(scaled);
        let mut above = [0u32; LANES];
        for &border in borders {
            for lane in 0..LANES {
                above[lane] += u32::from(scaled[lane] > border);
            }
        }
        for (code, above) in codes.iter_mut().zip(above) {
            *code = above as u8;
        }
    }
    if format == Format::Fp4 {
        codes
            .iter_mut()
            .for_each(|code| *code = FP4_ORDER[usize::from(*code)]);
    }
    (if short { divisor } else { absmax }, 0)
}

/// The largest magnitude of finite numbers, compared as bits.
#[inline(always)]
fn absmax(weights: &[f32]) -> f32 {
    let mut lanes = [0u32; LANES];
    let (chunks, rest) = weights.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = lanes[lane].max(chunk[lane].to_bits() & !(1 << 31));
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = (*lane).max(value.to_bits() & !(1 << 31));
    }
    f32::from_bits(lanes.into_iter().fold(0, u32::max))
}
