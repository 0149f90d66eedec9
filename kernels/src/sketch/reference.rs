//! The rotation in plain scalar Rust and f64. The loops are tested against it.

use crate::vsa::Seed;

/// The orthonormal Walsh-Hadamard transform of 2^k values, by its definition:
/// y_i = Σ_j (-1)^(bits that i and j share) x_j / √n.
pub fn hadamard(values: &[f32]) -> Vec<f64> {
    let n = values.len();
    let element = |i: usize| {
        let terms = values.iter().enumerate().map(|(j, x)| {
            let sign = if (i & j).count_ones().is_multiple_of(2) {
                1.0
            } else {
                -1.0
            };
            sign * f64::from(*x)
        });
        terms.sum::<f64>() / (n as f64).sqrt()
    };
    (0..n).map(element).collect()
}

/// The sign of an element under a seed: bit i % 64 of word i / 64, 1 where it is set.
pub fn sign(seed: Seed, place: usize) -> f32 {
    let word = seed.word((place / 64) as u64);
    if word >> (place % 64) & 1 == 1 {
        1.0
    } else {
        -1.0
    }
}

/// The lengths of the blocks of a vector: `block` as long as possible, then the powers of two that the rest is the sum of,
/// the largest first.
pub fn blocks(len: usize, block: usize) -> Vec<usize> {
    let mut lengths = vec![block; len / block];
    let rest = len % block;
    let powers = (0..usize::BITS).rev().map(|bit| 1usize << bit);
    lengths.extend(powers.filter(|power| rest & power != 0));
    lengths
}
