//! The definitions of [`super`] in scalar Rust. Every other path is tested against this one.

use super::tables::{FP4_BORDERS, FP4_ORDER, NF4_BORDERS};
use super::{BlockwiseShape, Format};

/// Divisors of NF4 and FP4 are at least this: a block of zeros has one too.
pub const SMALLEST_ABSMAX: f32 = 1e-38;

/// Codes of one block of finite weights, its scale and its zero point.
///
/// `short` says that the block is the last and not full: NF4 and FP4 then divide by the scale, which is at least
/// [`SMALLEST_ABSMAX`], instead of multiplying with its inverse.
#[inline(always)]
pub fn quantise_block(format: Format, weights: &[f32], short: bool, codes: &mut [u8]) -> (f32, u8) {
    let absmax = weights.iter().fold(0f32, |max, x| max.max(x.abs()));
    match format {
        Format::Nf4 | Format::Fp4 => {
            let divisor = absmax.max(SMALLEST_ABSMAX);
            let inverse = 1.0 / divisor;
            for (code, x) in codes.iter_mut().zip(weights) {
                let scaled = if short { x / divisor } else { x * inverse };
                *code = nearest(format, scaled.clamp(-1.0, 1.0));
            }
            (if short { divisor } else { absmax }, 0)
        }
        Format::Int4Symmetric => {
            let scale = absmax / 7.0;
            for (code, x) in codes.iter_mut().zip(weights) {
                *code = (quotient(*x, scale, 7.0) + 8.0) as u8;
            }
            (scale, 0)
        }
        Format::Int4Affine => {
            let min = weights.iter().fold(0f32, |min, x| min.min(*x));
            let max = weights.iter().fold(0f32, |max, x| max.max(*x));
            // Their difference may be beyond f32.
            let scale = max / 15.0 - min / 15.0;
            let zero = quotient(-min, scale, 15.0);
            for (code, x) in codes.iter_mut().zip(weights) {
                *code = (quotient(*x, scale, 15.0) + zero).clamp(0.0, 15.0) as u8;
            }
            (scale, zero as u8)
        }
        Format::Int8 => {
            let scale = absmax / 127.0;
            for (code, x) in codes.iter_mut().zip(weights) {
                *code = quotient(*x, scale, 127.0) as i8 as u8;
            }
            (scale, 0)
        }
    }
}

/// x / scale as an integer of at most such a magnitude; 0 where the scale is.
#[inline(always)]
fn quotient(x: f32, scale: f32, most: f32) -> f32 {
    if scale == 0.0 {
        return 0.0;
    }
    (x / scale).round_ties_even().clamp(-most, most)
}

/// The code of the level nearest to a number in [-1, 1]; of two as near, the lower level's.
fn nearest(format: Format, scaled: f32) -> u8 {
    if format == Format::Nf4 {
        NF4_BORDERS
            .iter()
            .filter(|&&border| scaled > border)
            .count() as u8
    } else {
        FP4_ORDER[FP4_BORDERS
            .iter()
            .filter(|&&border| scaled > border)
            .count()]
    }
}

/// Codes of a matrix, one a byte, scales in f32, and zero points, one a byte.
///
/// # Panics
///
/// If there are not as many weights as the shape has.
pub fn quantise(weights: &[f32], shape: BlockwiseShape) -> (Vec<u8>, Vec<f32>, Vec<u8>) {
    assert_eq!(weights.len(), shape.elements(), "weights are [rows, cols]");
    let mut codes = vec![0; weights.len()];
    let (mut scales, mut zeros) = (Vec::new(), Vec::new());
    let blocks = codes.chunks_mut(shape.block);
    for (codes, weights) in blocks.zip(weights.chunks(shape.block)) {
        let short = weights.len() < shape.block;
        let (scale, zero) = quantise_block(shape.format, weights, short, codes);
        scales.push(scale);
        zeros.push(zero);
    }
    (codes, scales, zeros)
}

/// W' of one code.
pub fn dequantise(format: Format, code: u8, zero: u8, scale: f32) -> f32 {
    match format.levels() {
        Some(levels) => (levels[usize::from(code & 15)] - f32::from(zero)) * scale,
        None => f32::from(code as i8) * scale,
    }
}

/// x `[tokens, cols]` times W'ᵀ, `[tokens, rows]`, in f64. W' is `[rows, cols]`.
pub fn linear_f64(x: &[f32], weight: &[f32], [tokens, rows, cols]: [usize; 3]) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| -> f64 {
        let products = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        products.sum()
    };
    (0..tokens * rows)
        .map(|i| {
            let (token, row) = (i / rows, i % rows);
            dot(&x[token * cols..][..cols], &weight[row * cols..][..cols])
        })
        .collect()
}

/// dy `[tokens, rows]` times W', `[tokens, cols]`, in f64: the gradient with respect to x.
pub fn linear_dx_f64(dy: &[f32], weight: &[f32], [tokens, rows, cols]: [usize; 3]) -> Vec<f64> {
    (0..tokens * cols)
        .map(|i| {
            let (token, col) = (i / cols, i % cols);
            let product = |row: usize| {
                f64::from(dy[token * rows + row]) * f64::from(weight[row * cols + col])
            };
            (0..rows).map(product).sum()
        })
        .collect()
}
