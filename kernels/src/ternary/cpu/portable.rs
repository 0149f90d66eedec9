//! Plain Rust, in shapes that compilers vectorise.
//!
//! A line of a panel holds the codes of four columns, `[column][16 rows]`, so that a row is a lane.

use super::kernel::{FloatKernel, IntegerKernel, Line, PackKernel};
use crate::panel::{self, PORTABLE, by_tokens};
use crate::ternary::layout::compute::{self, BLOCK, ZERO_WORD};

pub(super) static INTEGER: IntegerKernel = IntegerKernel {
    groups: 1,
    tile: 4,
    stream_tokens: 0,
    absmax,
    quantise,
    unpack,
    multiply,
    stream: |_, _, _, _, _| unreachable!("this kernel unpacks for any number of tokens"),
};

pub(super) static FLOAT: FloatKernel = FloatKernel {
    panel: &PORTABLE,
    unpack_columns,
    unpack_rows,
};

pub(super) static PACK: PackKernel = PackKernel { pack };

/// Quads whose products, at most 2 * 128 in magnitude, 16 bits can add up: 4 * 31 * 256 < 2^15.
const NARROW_QUADS: usize = 31;

#[inline(always)]
pub(super) fn absmax(x: &[f32]) -> u32 {
    let mut lanes = [0u32; 16];
    let mut chunks = x.chunks_exact(16);
    for chunk in &mut chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = (*lane).max(value.to_bits() & !(1 << 31));
        }
    }
    for (lane, value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = (*lane).max(value.to_bits() & !(1 << 31));
    }
    lanes.into_iter().fold(0, u32::max)
}

/// Added to a small number, this rounds it to an integer, halves to even, which then stands in the low bits.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
pub(super) fn quantise(x: &[f32], scale: f32, out: &mut [u32], stride: usize) -> i32 {
    let mut sum = 0;
    let mut padded = [0f32; BLOCK];
    for (block, x) in x.chunks(BLOCK).enumerate() {
        padded[..x.len()].copy_from_slice(x);
        padded[x.len()..].fill(0.0);
        let mut codes = [0i32; BLOCK];
        for (code, value) in codes.iter_mut().zip(&padded) {
            // |x / s| is 127 at most, but for rounding: there is nothing to clamp.
            *code = (value / scale + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
        }
        sum += codes.iter().sum::<i32>();
        for (i, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
            out[(4 * block + i) * stride] = u32::from_le_bytes(codes.map(|code| code as u8));
        }
    }
    sum
}

#[inline(always)]
pub(super) fn unpack(words: &[u32], panel: &mut [Line], stride: usize) {
    for (block, words) in words.as_chunks::<BLOCK>().0.iter().enumerate() {
        for plane in 0..4 {
            let line = &mut panel[(4 * block + plane) * stride].0;
            for (column, codes) in line.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
                let shift = 8 * column + 2 * plane;
                for (code, word) in codes.iter_mut().zip(words) {
                    *code = (word >> shift & 3) as u8;
                }
            }
        }
    }
}

fn multiply(panel: &[Line], activations: &[u32], tokens: usize, sums: &mut [i32]) {
    by_tokens!(tokens, multiply_tile(panel, activations, sums), 1 2 3 4)
}

#[inline(always)]
fn multiply_tile<const T: usize>(panel: &[Line], activations: &[u32], sums: &mut [i32]) {
    let activations = activations.as_chunks::<T>().0;
    let sums = &mut sums.as_chunks_mut::<BLOCK>().0[..T];
    for (panel, activations) in panel
        .chunks(NARROW_QUADS)
        .zip(activations.chunks(NARROW_QUADS))
    {
        let mut narrow = [[0i16; BLOCK]; T];
        for (line, quads) in panel.iter().zip(activations) {
            for (column, codes) in line.0.as_chunks::<BLOCK>().0.iter().enumerate() {
                for (narrow, quad) in narrow.iter_mut().zip(quads) {
                    let q = i16::from(quad.to_le_bytes()[column] as i8);
                    for (sum, &code) in narrow.iter_mut().zip(codes) {
                        // Wraps only for codes that are no trits.
                        *sum = sum.wrapping_add(i16::from(code).wrapping_mul(q));
                    }
                }
            }
        }
        for (sums, narrow) in sums.iter_mut().zip(&narrow) {
            for (sum, &narrow) in sums.iter_mut().zip(narrow) {
                *sum = sum.wrapping_add(i32::from(narrow));
            }
        }
    }
}

#[inline(always)]
pub(super) fn unpack_columns(
    words: &[u32; BLOCK],
    scales: &[f32; BLOCK],
    panel: &mut [panel::Line],
    stride: usize,
) {
    for (line, shift) in panel.iter_mut().step_by(stride).zip(SHIFTS) {
        for lane in 0..BLOCK {
            line.0[lane] = trit(words[lane], shift) * scales[lane];
        }
    }
}

#[inline(always)]
pub(super) fn unpack_rows(
    words: &[u32; BLOCK],
    scales: &[f32; BLOCK],
    panel: &mut [panel::Line],
    stride: usize,
) {
    for (row, line) in panel.iter_mut().step_by(stride).take(BLOCK).enumerate() {
        for (weight, shift) in line.0.iter_mut().zip(SHIFTS) {
            *weight = trit(words[row], shift) * scales[row];
        }
    }
}

#[inline(always)]
fn trit(word: u32, shift: u32) -> f32 {
    (word >> shift & 3) as i32 as f32 - 1.0
}

/// Where in its word the code of each column is.
pub(super) const SHIFTS: [u32; BLOCK] = {
    let mut shifts = [0; BLOCK];
    let mut col = 0;
    while col < BLOCK {
        shifts[col] = compute::shift(col);
        col += 1;
    }
    shifts
};

#[inline(always)]
pub(super) fn pack(
    columns: &[f32],
    stride: usize,
    thresholds: &[f32; BLOCK],
    words: &mut [u32],
) -> [u32; BLOCK] {
    let mut packed = [ZERO_WORD; BLOCK];
    let mut largest = [0u32; BLOCK];
    for (col, shift) in SHIFTS.into_iter().enumerate() {
        let weights: &[f32; BLOCK] = columns[col * stride..]
            .first_chunk()
            .expect("a column has 16 rows");
        for lane in 0..BLOCK {
            // From the code 1 to 2 or 0.
            let change = if weights[lane] > thresholds[lane] {
                3
            } else {
                0
            } | if weights[lane] < -thresholds[lane] {
                1
            } else {
                0
            };
            packed[lane] ^= change << shift;
            largest[lane] = largest[lane].max(weights[lane].to_bits() & !(1 << 31));
        }
    }
    words[..BLOCK].copy_from_slice(&packed);
    largest
}
