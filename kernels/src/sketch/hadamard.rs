//! The Walsh-Hadamard transform, in place, and the rotation that is made of it.

use std::array::from_fn;

use crate::panel::Path;
use crate::vector::vectorised;
use crate::vsa::Seed;

/// The number of elements of a line. A line fits one register of 512 bits.
const LANES: usize = 16;

/// The number of lines that one pass holds in registers.
const LINES: usize = 16;

type Line = [f32; LANES];

/// The orthonormal Walsh-Hadamard transform of 2^k values, in place; the same transform undoes it.
/// Every path gives the same bits.
///
/// y_i = Σ_j (-1)^(bits that i and j share) x_j / √n, by k n additions (Fino and Algazi, 1976).
///
/// # Panics
/// If the number of values is not a power of two.
pub fn hadamard(path: Path, values: &mut [f32]) {
    let n = values.len();
    assert!(n.is_power_of_two(), "{n} values are not 2^k");
    transform(path, values, 1.0 / (n as f32).sqrt());
}

/// Flips the signs of the values by the bits of a seed, and transforms each block of `block`
/// elements by [`hadamard`]. The rest of a vector that is no multiple of the block is cut into
/// powers of two, the largest first. The Euclidean norm stays.
///
/// # Panics
/// If the block is not a power of two.
pub fn rotate(path: Path, seed: Seed, block: usize, values: &mut [f32]) {
    rotate_piece(path, seed, 0, block, values);
}

/// Undoes [`rotate`].
///
/// # Panics
/// As [`rotate`].
pub fn rotate_back(path: Path, seed: Seed, block: usize, values: &mut [f32]) {
    rotate_piece_back(path, seed, 0, block, values);
}

/// [`rotate`] of a part of a vector that begins at `first`, a multiple of the block.
pub(super) fn rotate_piece(path: Path, seed: Seed, first: usize, block: usize, values: &mut [f32]) {
    for (place, values) in blocks(values, block) {
        flip(path, seed, first + place, values);
        hadamard(path, values);
    }
}

/// Undoes [`rotate_piece`].
pub(super) fn rotate_piece_back(
    path: Path,
    seed: Seed,
    first: usize,
    block: usize,
    values: &mut [f32],
) {
    for (place, values) in blocks(values, block) {
        hadamard(path, values);
        flip(path, seed, first + place, values);
    }
}

/// Iterates over the blocks of a vector and the index of the first element of each.
fn blocks(values: &mut [f32], block: usize) -> impl Iterator<Item = (usize, &mut [f32])> {
    assert!(block.is_power_of_two(), "a block of {block} elements");
    let (mut rest, mut place) = (values, 0);
    std::iter::from_fn(move || {
        let largest = rest.len().checked_ilog2().map(|power| 1 << power)?;
        let (block, after) = std::mem::take(&mut rest).split_at_mut(block.min(largest));
        let at = place;
        (rest, place) = (after, place + block.len());
        Some((at, block))
    })
}

/// Computes the butterflies (a + b, a - b) of elements that are `D` places apart in a line.
#[inline(always)]
fn within<const D: usize>(line: Line) -> Line {
    from_fn(|i| {
        if i & D == 0 {
            line[i] + line[i | D]
        } else {
            line[i ^ D] - line[i]
        }
    })
}

/// Computes all butterflies among `R` lines, element by element.
#[inline(always)]
fn across<const R: usize>(lines: &mut [Line; R]) {
    let mut distance = 1;
    while distance < R {
        for low in (0..R).filter(|low| low & distance == 0) {
            let (a, b) = (lines[low], lines[low | distance]);
            lines[low] = from_fn(|i| a[i] + b[i]);
            lines[low | distance] = from_fn(|i| a[i] - b[i]);
        }
        distance *= 2;
    }
}

/// Transforms each run of `R` consecutive lines.
#[inline(always)]
fn pieces<const R: usize>(lines: &mut [Line]) {
    for piece in lines.as_chunks_mut::<R>().0 {
        let mut held = *piece;
        for line in &mut held {
            *line = within::<8>(within::<4>(within::<2>(within::<1>(*line))));
        }
        across(&mut held);
        *piece = held;
    }
}

/// Computes the butterflies among lines that are `distance` lines apart, `R` of them at a time.
#[inline(always)]
fn apart<const R: usize>(lines: &mut [Line], distance: usize, scale: f32) {
    for group in lines.chunks_exact_mut(R * distance) {
        for first in 0..distance {
            let mut held: [Line; R] = from_fn(|r| group[first + r * distance]);
            across(&mut held);
            for (r, line) in held.iter().enumerate() {
                group[first + r * distance] = line.map(|x| x * scale);
            }
        }
    }
}

vectorised! {
    fn transform(values: &mut [f32], scale: f32) {
        let (lines, few) = values.as_chunks_mut::<LANES>();
        if !few.is_empty() {
            let mut distance = 1;
            while distance < few.len() {
                for i in (0..few.len()).filter(|i| i & distance == 0) {
                    (few[i], few[i | distance]) = (few[i] + few[i | distance], few[i] - few[i | distance]);
                }
                distance *= 2;
            }
            few.iter_mut().for_each(|x| *x *= scale);
            return;
        }
        match lines.len() {
            1 => pieces::<1>(lines),
            2 => pieces::<2>(lines),
            4 => pieces::<4>(lines),
            8 => pieces::<8>(lines),
            _ => pieces::<LINES>(lines),
        }
        let mut distance = LINES;
        if distance >= lines.len() {
            lines.iter_mut().for_each(|line| *line = line.map(|x| x * scale));
            return;
        }
        while distance < lines.len() {
            let left = lines.len() / distance;
            let now = left.min(LINES);
            let scale = if now == left { scale } else { 1.0 };
            match now {
                2 => apart::<2>(lines, distance, scale),
                4 => apart::<4>(lines, distance, scale),
                8 => apart::<8>(lines, distance, scale),
                _ => apart::<LINES>(lines, distance, scale),
            }
            distance *= now;
        }
    }

    /// Multiplies the values by their signs. `place` is the index of the first value in the whole vector.
    fn flip(seed: Seed, place: usize, values: &mut [f32]) {
        for (i, values) in values.chunks_mut(64).enumerate() {
            // Blocks begin at multiples of their length, so one may begin within a word.
            let first = place + i * 64;
            let word = seed.word((first / 64) as u64) >> (first % 64);
            for (bit, value) in values.iter_mut().enumerate() {
                let sign = (!(word >> bit) as u32) << 31;
                *value = f32::from_bits(value.to_bits() ^ sign);
            }
        }
    }
}
