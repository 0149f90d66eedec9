//! What happens between products, element by element. Scores are `[piece of DEPTH keys][query][DEPTH]`.

use std::ops::Range;

use crate::panel::DEPTH;
use crate::vector::{exp, max, sum_of_changed, sum2, vectorised};

vectorised! {
    /// exp(s - the largest s) in place of the scores that each query sees, 0 in place of the others in `present`, and
    /// the sum of each query.
    pub fn softmax(scores: &mut [f32], seen: &[Range<usize>], present: &Range<usize>, sums: &mut [f32]) {
        let queries = seen.len();
        for (query, (seen, sum)) in seen.iter().zip(sums).enumerate() {
            let mut most = f32::NEG_INFINITY;
            for (piece, within) in pieces(seen) {
                most = max(&scores[at(piece, queries, query)..][within], most);
            }
            *sum = 0.0;
            for (piece, within) in pieces(seen) {
                let scores = &mut scores[at(piece, queries, query)..][within];
                *sum += sum_of_changed(scores, |s| exp(s - most));
            }
            for unseen in [present.start..seen.start, seen.end..present.end] {
                for (piece, within) in pieces(&unseen) {
                    scores[at(piece, queries, query)..][within].fill(0.0);
                }
            }
        }
    }

    /// p in place of exp(s), and ds in place of dp: p (dp - Σ p dp).
    pub fn scores_gradient(
        weights: &mut [f32],
        gradients: &mut [f32],
        seen: &[Range<usize>],
        present: &Range<usize>,
        sums: &[f32],
    ) {
        let queries = seen.len();
        for (query, (seen, sum)) in seen.iter().zip(sums).enumerate() {
            let (mut mean, normalised) = (0.0, 1.0 / sum);
            for (piece, within) in pieces(seen) {
                let at = at(piece, queries, query);
                let weights = &mut weights[at..][within.clone()];
                weights.iter_mut().for_each(|p| *p *= normalised);
                mean += sum2(weights, &gradients[at..][within], |p, dp| p * dp);
            }
            for (piece, within) in pieces(seen) {
                let at = at(piece, queries, query);
                let weights = &weights[at..][within.clone()];
                let gradients = &mut gradients[at..][within];
                for (ds, p) in gradients.iter_mut().zip(weights) {
                    *ds = p * (*ds - mean);
                }
            }
            for unseen in [present.start..seen.start, seen.end..present.end] {
                for (piece, within) in pieces(&unseen) {
                    gradients[at(piece, queries, query)..][within].fill(0.0);
                }
            }
        }
    }

    /// Each element of a row times `factor`.
    pub fn scale(row: &mut [f32], factor: f32) {
        row.iter_mut().for_each(|x| *x *= factor);
    }

    /// `factor` x of a row, turned by the angles with these cosines and sines, or back by them.
    pub fn turn(x: &[f32], angles: (&[f32], &[f32]), back: bool, factor: f32, out: &mut [f32]) {
        let half = x.len() / 2;
        let sign = if back { -factor } else { factor };
        let ((first, second), (cosines, sines)) = (x.split_at(half), angles);
        let (out_first, out_second) = out[..2 * half].split_at_mut(half);
        let (cosines, sines) = (&cosines[..half], &sines[..half]);
        let second = &second[..half];
        for i in 0..half {
            let (cos, sin) = (factor * cosines[i], sign * sines[i]);
            out_first[i] = first[i] * cos - second[i] * sin;
            out_second[i] = second[i] * cos + first[i] * sin;
        }
    }

    /// Adds a row to another.
    pub fn add(to: &mut [f32], row: &[f32]) {
        to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
    }
}

/// The pieces that a range reaches into, and the part of each.
#[inline(always)]
pub fn pieces(range: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
    let Range { start, end } = *range;
    let last = if start < end { end.div_ceil(DEPTH) } else { 0 };
    (start / DEPTH..last).map(move |piece| {
        let first = piece * DEPTH;
        (
            piece,
            start.max(first) - first..end.min(first + DEPTH) - first,
        )
    })
}

/// Where the scores of a query in a piece begin.
#[inline(always)]
fn at(piece: usize, queries: usize, query: usize) -> usize {
    (piece * queries + query) * DEPTH
}
