//! Selects the elements of a block that are kept.

use super::{Kept, narrowed};
use crate::panel::Path;
use crate::vector::vectorised;

/// The elements of a block that are kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Choice {
    /// Elements of a magnitude above this are kept, by the bits of the magnitude.
    pub threshold: u32,
    /// How many of those that equal it are kept, the first ones.
    pub ties: usize,
    /// How many are kept in all.
    pub count: usize,
    /// Their level, in bf16.
    pub level: u16,
}

/// The bits of a magnitude.
const MAGNITUDE: u32 = 0x7fff_ffff;

impl Choice {
    /// Selects at most `keep` elements. `near` is a first guess of the threshold, such as the previous
    /// block's. Returns `None` if an element is not finite.
    pub fn of(path: Path, values: &[f32], (kept, keep): (Kept, usize), near: u32) -> Option<Self> {
        let largest = largest_magnitude(path, values);
        if largest > f32::MAX.to_bits() {
            return None;
        }
        if kept == Kept::Values {
            let (threshold, ties) = threshold(path, values, keep, [near, largest]);
            return Some(Self {
                threshold,
                ties,
                count: keep,
                level: 0,
            });
        }
        if largest == 0 {
            return Some(Self {
                threshold: MAGNITUDE,
                ties: 0,
                count: 0,
                level: 0,
            });
        }
        let scale = power_near_inverse(largest);
        let (threshold, ties) = threshold(path, values, keep, [near, largest]);
        let [sum, squares] = sums(path, values, scale, threshold);
        let at_threshold = f32::from_bits(threshold) * scale;
        let sum = sum + ties as f32 * at_threshold;
        let level = sum / keep as f32;
        // The block keeps the share that `delta` promises, and its smallest kept element is not far below the mean.
        if sum * level >= squares * share(values.len(), keep) && 2.0 * at_threshold >= level {
            return Some(Self {
                threshold,
                ties,
                count: keep,
                level: narrowed(level / scale),
            });
        }
        Some(Self::of_least_error(values, keep, scale))
    }

    /// Finds the number of elements, at most `keep`, that leaves the least error. Sorts the block.
    fn of_least_error(values: &[f32], keep: usize, scale: f32) -> Self {
        let mut magnitudes: Vec<u32> = values.iter().map(|x| x.to_bits() & MAGNITUDE).collect();
        magnitudes.sort_unstable_by(|a, b| b.cmp(a));
        let (mut sum, mut best, mut best_kept, mut level) = (0.0f64, 1, 0.0, 0.0);
        for (place, bits) in magnitudes[..keep].iter().enumerate() {
            let count = place + 1;
            sum += f64::from(f32::from_bits(*bits) * scale);
            let kept = sum * sum / count as f64;
            if kept > best_kept {
                (best, best_kept, level) = (count, kept, sum / count as f64);
            }
        }
        let threshold = magnitudes[best - 1];
        let above = magnitudes.partition_point(|bits| *bits > threshold);
        Self {
            threshold,
            ties: best - above,
            count: best,
            level: narrowed(level as f32 / scale),
        }
    }
}

/// The share of the squared norm that the best choice of at most `keep` of `n` elements keeps.
///
/// Let c be the most that any j keeps: (Σ of the j largest)² <= c j for all j. Sums of squares are
/// largest where each of these is an equation, so the k largest hold at most c (1 + H(k-1)/4); each
/// of the others is at most √(c/k), so they hold at most c (n/k - 1).
pub(super) fn share(n: usize, keep: usize) -> f32 {
    // H(k-1) < ln k + 1
    let harmonic = (keep as f32).ln() + 1.0;
    1.0 / (n as f32 / keep as f32 + harmonic / 4.0)
}

/// The power of two that brings a magnitude near 1.
fn power_near_inverse(magnitude: u32) -> f32 {
    let exponent = 254u32.saturating_sub(magnitude >> 23);
    f32::from_bits(exponent.max(1) << 23)
}

/// Finds a magnitude above which there are at most `keep` elements. Returns it with the number of
/// elements of exactly that magnitude that make them `keep`.
fn threshold(path: Path, values: &[f32], keep: usize, [near, largest]: [u32; 2]) -> (u32, usize) {
    /// Changes a number by about 3 %, added to its bits.
    const FIRST_STEP: u32 = 1 << 18;
    let at_least = |bits: u32| count_at_least(path, values, bits);
    // At least `keep` elements are as large as `low`, fewer are as large as `high`.
    let (mut low, mut high) = (0, largest + 1);
    let (mut step, mut next) = (FIRST_STEP, near.clamp(1, largest.max(1)));
    while high - low > 1 {
        let count = at_least(next);
        if count == keep {
            return (next - 1, 0);
        }
        // Growing steps away from where it may be near, then halves.
        if count > keep {
            low = next;
            next = next.saturating_add(step);
        } else {
            high = next;
            next = next.saturating_sub(step);
        }
        step = step.saturating_mul(2);
        if next <= low || next >= high {
            next = low + (high - low) / 2;
            step = 0;
        }
    }
    (low, keep - at_least(low + 1))
}

vectorised! {
    fn largest_magnitude(values: &[f32]) -> u32 {
        values.iter().map(|x| x.to_bits() & MAGNITUDE).fold(0, |a, b| if b > a { b } else { a })
    }

    fn count_at_least(values: &[f32], magnitude: u32) -> usize {
        let at_least = |x: &f32| u32::from(x.to_bits() & MAGNITUDE >= magnitude);
        values.iter().map(at_least).sum::<u32>() as usize
    }

    /// Σ |x| of the elements above a magnitude, and Σ x² of all, of elements times `scale`.
    fn sums(values: &[f32], scale: f32, magnitude: u32) -> [f32; 2] {
        // A sum of its own for each lane, so that the order is the same whatever the width of registers.
        let (mut above, mut squares) = ([0.0f32; 16], [0.0f32; 16]);
        let mut line = |line: &[f32]| {
            for (i, x) in line.iter().enumerate() {
                let bits = x.to_bits() & MAGNITUDE;
                let scaled = f32::from_bits(bits) * scale;
                above[i] += if bits > magnitude { scaled } else { 0.0 };
                squares[i] += scaled * scaled;
            }
        };
        let (lines, rest) = values.as_chunks::<16>();
        lines.iter().for_each(|x| line(x));
        line(rest);
        [above.iter().sum(), squares.iter().sum()]
    }

    /// Marks which of up to 64 elements are above a magnitude, and which are equal to it.
    pub(super) fn marks(values: &[f32], magnitude: u32) -> [u64; 2] {
        let (mut above, mut equal) = (0, 0);
        for (i, x) in values.iter().enumerate() {
            let bits = x.to_bits() & MAGNITUDE;
            above |= u64::from(bits > magnitude) << i;
            equal |= u64::from(bits == magnitude) << i;
        }
        [above, equal]
    }
}
