//! Fake quantisation on the CPU: the quantised value where the original stood, in f32.
//!
//! All of it is bound by memory. A pass is compiled once for each instruction set (`pulp`) and the
//! compiler vectorises it; threads take fixed pieces, and sums are added piece by piece in order, so
//! that the number of threads changes no bit.

use pulp::Arch;
use rayon::prelude::*;

use super::{Granularity, SMALLEST_ACTIVATION, SMALLEST_MEAN};

/// Elements that one task takes: 128 KiB of f32 stay in the cache of a core.
const PIECE: usize = 1 << 15;

/// W' = g T in place of W, `[inputs, outputs]` row by row.
///
/// `round` in T = clamp(round(W / g), -1, 1) is halves to even, so that T is not 0 exactly where
/// |W| > g / 2: no division is needed. A NaN in W makes the whole matrix NaN (per row or group, its
/// own row or group).
pub fn weight(values: &mut [f32], outputs: usize, granularity: Granularity) {
    if values.is_empty() {
        return;
    }
    match granularity {
        Granularity::Tensor => tensor(values),
        Granularity::Row => groups(values, outputs, values.len() / outputs),
        Granularity::Group(size) => groups(values, outputs, size),
    }
}

fn tensor(values: &mut [f32]) {
    let scale = scale(sum_of_magnitudes(values), values.len());
    values
        .par_chunks_mut(PIECE)
        .for_each(|piece| Arch::new().dispatch(|| round_all(piece, scale)));
}

/// Every `size` rows of `[inputs, outputs]` hold one group of each output.
fn groups(values: &mut [f32], outputs: usize, size: usize) {
    values.par_chunks_mut(size * outputs).for_each(|group| {
        let count = group.len() / outputs;
        let columns = PIECE.div_ceil(count).min(outputs);
        // Rows of a group are far apart: a strip of columns is read, and read again, from the cache.
        for first in (0..outputs).step_by(columns) {
            let strip = first..(first + columns).min(outputs);
            let mut sums = vec![0.0f64; strip.len()];
            for row in group.chunks(outputs) {
                Arch::new().dispatch(|| add_magnitudes(&mut sums, &row[strip.clone()]));
            }
            let scales: Vec<f32> = sums.iter().map(|&sum| scale(sum, count)).collect();
            for row in group.chunks_mut(outputs) {
                Arch::new().dispatch(|| round_each(&mut row[strip.clone()], &scales));
            }
        }
    });
}

/// g of so many weights with magnitudes that add up to `sum`.
pub(super) fn scale(sum: f64, count: usize) -> f32 {
    let mean = (sum / count as f64) as f32;
    // `f32::max` would turn a NaN into a scale.
    if mean < SMALLEST_MEAN {
        SMALLEST_MEAN
    } else {
        mean
    }
}

fn sum_of_magnitudes(values: &[f32]) -> f64 {
    let pieces: Vec<f64> = values
        .par_chunks(PIECE)
        .map(|piece| Arch::new().dispatch(|| sum_piece(piece)))
        .collect();
    pieces.iter().sum()
}

#[inline(always)]
fn sum_piece(piece: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0f64; LANES];
    let chunks = piece.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().map(|w| f64::from(w.abs())).sum();
    for chunk in chunks {
        for (sum, weight) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(weight.abs());
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[inline(always)]
fn add_magnitudes(sums: &mut [f64], row: &[f32]) {
    for (sum, weight) in sums.iter_mut().zip(row) {
        *sum += f64::from(weight.abs());
    }
}

#[inline(always)]
fn round_all(values: &mut [f32], scale: f32) {
    for value in values {
        *value = rounded(*value, scale);
    }
}

#[inline(always)]
fn round_each(values: &mut [f32], scales: &[f32]) {
    for (value, &scale) in values.iter_mut().zip(scales) {
        *value = rounded(*value, scale);
    }
}

/// g T of one weight. A NaN scale is passed on: nothing compares to it.
#[inline(always)]
fn rounded(weight: f32, scale: f32) -> f32 {
    let magnitude = if weight.abs() <= 0.5 * scale {
        0.0
    } else {
        scale
    };
    magnitude.copysign(weight)
}

/// x' = s q in place of x, token by token, `width` elements each. A token with an element that is not
/// finite becomes NaN.
pub fn activations(values: &mut [f32], width: usize) {
    if values.is_empty() {
        return;
    }
    let rows = (PIECE / width).max(1);
    values.par_chunks_mut(rows * width).for_each(|tokens| {
        for token in tokens.chunks_mut(width) {
            Arch::new().dispatch(|| quantize_token(token));
        }
    });
}

#[inline(always)]
fn quantize_token(token: &mut [f32]) {
    let scale = token_scale(token);
    for value in token {
        // Not a product with 1 / s: that rounds to another code now and then.
        *value = scale * round_ties_even(*value / scale);
    }
}

/// s of a token: max(max |x|, 1e-5) / 127; NaN when an element is not finite.
#[inline(always)]
pub(super) fn token_scale(token: &[f32]) -> f32 {
    // As integers, magnitudes are in order and NaN lies above infinity; and the maximum of integers
    // is one instruction.
    let bits = token
        .iter()
        .fold(0, |max: u32, value| max.max(value.to_bits() & 0x7fff_ffff));
    let max = f32::from_bits(bits);
    match max {
        _ if !max.is_finite() => f32::NAN,
        _ if max < SMALLEST_ACTIVATION => SMALLEST_ACTIVATION / 127.0,
        _ => max / 127.0,
    }
}

/// To the nearest integer, halves to even, for |x| < 2^22. On the baseline x86-64 there is no
/// instruction for it, and two additions are what every instruction set has.
#[inline(always)]
pub(super) fn round_ties_even(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 x 2^23
    (x + SHIFT) - SHIFT
}
