//! Kernels that round: weights to g T, activations to s q, in f32 whatever the tensors hold.
//!
//! Magnitudes are compared as the bits of their floats, which are in the same order: a maximum of
//! floats may drop a NaN, and which devices do is not specified.

use cubecl::prelude::*;

use super::UNITS;
use crate::ternary::{SMALLEST_ACTIVATION, SMALLEST_MEAN};

/// Columns that a cube of [`round_columns`] takes, next to each other in memory.
pub const STRIP: usize = 32;

/// The bits of +inf: those of a NaN are above, those of finite magnitudes below.
const INFINITY_BITS: u32 = 0x7f80_0000;

/// The bit that makes a NaN quiet.
const QUIET_BIT: u32 = 0x0040_0000;

/// Σ of a value of each unit, in an order that depends on the number of units alone.
#[cube]
fn sum_over_cube(value: f32) -> f32 {
    let unit = UNIT_POS as usize;
    let mut values = Shared::<[f32]>::new_slice(UNITS);
    values[unit] = value;
    sync_cube();
    #[unroll]
    for level in 0..comptime!(UNITS.ilog2() as usize) {
        let half = comptime!(UNITS >> (level + 1));
        if unit < half {
            let sum = values[unit] + values[unit + half];
            values[unit] = sum;
        }
        sync_cube();
    }
    values[0]
}

/// The largest of a value of each unit.
#[cube]
fn max_over_cube(value: u32) -> u32 {
    let unit = UNIT_POS as usize;
    let mut values = Shared::<[u32]>::new_slice(UNITS);
    values[unit] = value;
    sync_cube();
    #[unroll]
    for level in 0..comptime!(UNITS.ilog2() as usize) {
        let half = comptime!(UNITS >> (level + 1));
        if unit < half {
            let (left, right) = (values[unit], values[unit + half]);
            values[unit] = select(left < right, right, left);
        }
        sync_cube();
    }
    values[0]
}

/// A scale, or NaN if it is of a maximum or mean that is not finite, whose bits these are.
#[cube]
fn scale_of_finite(scale: f32, bits: u32) -> f32 {
    let not_finite = f32::reinterpret(bits | comptime!(INFINITY_BITS | QUIET_BIT));
    select(bits < INFINITY_BITS, scale, not_finite)
}

/// g of weights whose magnitudes have this mean; NaN if one is not finite.
#[cube]
fn weight_scale(mean: f32) -> f32 {
    let smallest = f32::new(SMALLEST_MEAN);
    let scale = select(mean < smallest, smallest, mean);
    scale_of_finite(scale, u32::reinterpret(mean))
}

/// g T. round(W / g) is 0 exactly where |W| is not above g / 2, and no division is as exact on every
/// device as this comparison. A NaN scale is passed on.
#[cube]
fn rounded_weight(weight: f32, scale: f32) -> f32 {
    let magnitude = select(weight.abs() <= 0.5 * scale, f32::new(0.0), scale);
    select(weight < 0.0, -magnitude, magnitude)
}

/// Σ |W| of the weights that each cube takes: cube i of n takes every n-th stretch.
#[cube(launch, address_type = "dynamic")]
pub fn sum_magnitudes<F: Float>(weight: &[F], sums: &mut [f32], #[define(F)] _dtype: ElemType) {
    let mut sum = 0f32;
    let mut i = ABSOLUTE_POS;
    let stride = CUBE_COUNT * UNITS;
    while i < weight.len() {
        sum += f32::cast_from(weight[i]).abs();
        i += stride;
    }
    let sum = sum_over_cube(sum);
    if UNIT_POS == 0 {
        sums[CUBE_POS] = sum;
    }
}

/// g T with one g for the matrix, from the sums of [`sum_magnitudes`].
#[cube(launch, address_type = "dynamic")]
pub fn round_matrix<F: Float>(
    weight: &[F],
    sums: &[f32],
    output: &mut [F],
    count: f32,
    #[define(F)] _dtype: ElemType,
) {
    // Every cube adds the sums anew: there are few, and no cube waits for another.
    let mut sum = 0f32;
    let mut i = UNIT_POS as usize;
    while i < sums.len() {
        sum += sums[i];
        i += comptime!(UNITS);
    }
    let scale = weight_scale(sum_over_cube(sum) / count);
    let mut i = ABSOLUTE_POS;
    let stride = CUBE_COUNT * UNITS;
    while i < weight.len() {
        output[i] = F::cast_from(rounded_weight(f32::cast_from(weight[i]), scale));
        i += stride;
    }
}

/// g T of `[inputs, outputs]` with one g for every `size` weights of an output. A cube takes one
/// group of each output of a strip; the units of a row of the cube read next to each other.
#[cube(launch, address_type = "dynamic")]
pub fn round_columns<F: Float>(
    weight: &[F],
    output: &mut [F],
    inputs: usize,
    outputs: usize,
    size: usize,
    #[define(F)] _dtype: ElemType,
) {
    let strips = outputs.div_ceil(STRIP);
    let first = CUBE_POS / strips * size;
    if first >= inputs {
        terminate!();
    }
    let last = select(first + size < inputs, first + size, inputs);
    let lane = UNIT_POS as usize % STRIP;
    let part = UNIT_POS as usize / STRIP;
    let parts = comptime!(UNITS / STRIP);
    let column = CUBE_POS % strips * STRIP + lane;
    let inside = column < outputs;

    let mut sum = 0f32;
    if inside {
        let mut row = first + part;
        while row < last {
            sum += f32::cast_from(weight[row * outputs + column]).abs();
            row += parts;
        }
    }
    let mut sums = Shared::<[f32]>::new_slice(UNITS);
    sums[UNIT_POS as usize] = sum;
    sync_cube();
    let mut sum = 0f32;
    #[unroll]
    for part in 0..parts {
        sum += sums[part * STRIP + lane];
    }
    let scale = weight_scale(sum / f32::cast_from(last - first));
    if inside {
        let mut row = first + part;
        while row < last {
            let i = row * outputs + column;
            output[i] = F::cast_from(rounded_weight(f32::cast_from(weight[i]), scale));
            row += parts;
        }
    }
}

/// s of the token that starts at `first`: max(max |x|, 1e-5) / 127; NaN if a value is not finite.
#[cube]
fn token_scale<F: Float>(x: &[F], first: usize, width: usize) -> f32 {
    let mut max = 0u32;
    let mut i = UNIT_POS as usize;
    while i < width {
        let bits = u32::reinterpret(f32::cast_from(x[first + i])) & 0x7fff_ffff;
        max = select(max < bits, bits, max);
        i += comptime!(UNITS);
    }
    let bits = max_over_cube(max);
    let max = f32::reinterpret(bits);
    let smallest = f32::new(SMALLEST_ACTIVATION);
    let scale = select(max < smallest, smallest, max) / 127.0;
    scale_of_finite(scale, bits)
}

/// round(x / s). Not a product with 1 / s: that rounds to another code now and then.
#[cube]
fn activation_code(value: f32, scale: f32) -> f32 {
    clamp((value / scale).round(), f32::new(-128.0), f32::new(127.0))
}

/// s q of x `[tokens, width]`, a cube for each token.
#[cube(launch, address_type = "dynamic")]
pub fn round_tokens<F: Float>(
    x: &[F],
    output: &mut [F],
    width: usize,
    #[define(F)] _dtype: ElemType,
) {
    let first = CUBE_POS * width;
    if first >= x.len() {
        terminate!();
    }
    let scale = token_scale::<F>(x, first, width);
    let mut i = first + UNIT_POS as usize;
    while i < first + width {
        let code = activation_code(f32::cast_from(x[i]), scale);
        output[i] = F::cast_from(scale * code);
        i += comptime!(UNITS);
    }
}

/// q of x `[tokens, width]`, four codes a word, and s, a cube for each token. A token has
/// `words_per_token` words; what is behind its last column is zero.
#[cube(launch, address_type = "dynamic")]
pub fn quantize_tokens<F: Float>(
    x: &[F],
    words: &mut [u32],
    scales: &mut [f32],
    width: usize,
    words_per_token: usize,
    #[define(F)] _dtype: ElemType,
) {
    let token = CUBE_POS;
    if token >= scales.len() {
        terminate!();
    }
    let first = token * width;
    let scale = token_scale::<F>(x, first, width);
    if UNIT_POS == 0 {
        scales[token] = scale;
    }
    let mut i = UNIT_POS as usize;
    while i < words_per_token {
        let mut word = 0u32;
        #[unroll]
        for byte in 0..4usize {
            let column = 4 * i + byte;
            if column < width {
                let code = activation_code(f32::cast_from(x[first + column]), scale);
                let code = u32::reinterpret(i32::cast_from(code)) & 0xff;
                word |= code << comptime!(8 * byte as u32);
            }
        }
        words[token * words_per_token + i] = word;
        i += comptime!(UNITS);
    }
}

/// x `[tokens, width]` as the bits of f32, each token with zeros up to `words_per_token`.
#[cube(launch, address_type = "dynamic")]
pub fn widen_tokens<F: Float>(
    x: &[F],
    words: &mut [u32],
    width: usize,
    words_per_token: usize,
    #[define(F)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i < words.len() {
        let token = i / words_per_token;
        let column = i % words_per_token;
        let mut value = 0f32;
        if column < width {
            value = f32::cast_from(x[token * width + column]);
        }
        words[i] = u32::reinterpret(value);
    }
}
