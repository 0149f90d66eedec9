//! The definitions of [`super`] in scalar Rust. Every other path is tested against this one.

use rayon::prelude::*;

use super::{Granularity, SMALLEST_ACTIVATION, SMALLEST_MEAN};

/// Values that are added up on one thread, whatever the number of threads.
const CHUNK: usize = 1 << 16;

/// Sums kept side by side, so that the additions do not wait for each other.
const LANES: usize = 16;

/// g of so many weights whose magnitudes add up to `sum`: at least [`SMALLEST_MEAN`]; NaN if the sum is not finite.
pub(super) fn mean_scale(sum: f64, count: usize) -> f32 {
    let mean = (sum / count as f64) as f32;
    match mean {
        // An infinite scale would round every weight to 0, and nothing would show.
        _ if !mean.is_finite() => f32::NAN,
        _ if mean < SMALLEST_MEAN => SMALLEST_MEAN,
        _ => mean,
    }
}

/// g of some weights: their mean magnitude, at least [`SMALLEST_MEAN`]; NaN if one of them is not finite.
///
/// Summed in f64 in an order that depends on the number of weights alone.
pub fn absmean(weights: &[f32]) -> f32 {
    if weights.is_empty() {
        return SMALLEST_MEAN;
    }
    let sums: Vec<f64> = if weights.len() <= CHUNK {
        vec![magnitudes(weights)]
    } else {
        weights.par_chunks(CHUNK).map(magnitudes).collect()
    };
    mean_scale(sums.iter().sum(), weights.len())
}

fn magnitudes(weights: &[f32]) -> f64 {
    let mut sums = [0f64; LANES];
    let mut lanes = weights.chunks_exact(LANES);
    for values in &mut lanes {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += f64::from(value.abs());
        }
    }
    for (sum, value) in sums.iter_mut().zip(lanes.remainder()) {
        *sum += f64::from(value.abs());
    }
    sums.iter().sum()
}

/// T of one weight whose scale is g.
///
/// A NaN, or a weight whose scale is one, becomes 0: its scale carries the NaN on.
pub fn trit(weight: f32, scale: f32) -> i8 {
    (weight / scale).round_ties_even().clamp(-1.0, 1.0) as i8
}

/// The scales of a row-major matrix `[rows, cols]`, as many as [`Granularity::scales`] says.
///
/// # Panics
///
/// If `weights` is not of `rows * cols` values.
pub fn scales(weights: &[f32], rows: usize, cols: usize, granularity: Granularity) -> Vec<f32> {
    assert_eq!(weights.len(), rows * cols, "weights are [rows, cols]");
    match granularity {
        Granularity::Tensor => vec![absmean(weights)],
        Granularity::Row => (weights.chunks(cols.max(1)).map(absmean)).collect(),
        Granularity::Group(size) => (weights.chunks(cols.max(1)))
            .flat_map(|row| row.chunks(size).map(absmean))
            .collect(),
    }
}

/// Trits and scales of a row-major matrix `[rows, cols]`.
///
/// # Panics
///
/// If `weights` is not of `rows * cols` values.
pub fn quantise_weights(
    weights: &[f32],
    rows: usize,
    cols: usize,
    granularity: Granularity,
) -> (Vec<i8>, Vec<f32>) {
    let scales = scales(weights, rows, cols, granularity);
    let trits = weights.iter().enumerate().map(|(i, &weight)| {
        trit(
            weight,
            scales[scale_index(granularity, cols, i / cols, i % cols)],
        )
    });
    (trits.collect(), scales)
}

/// Where the scale of the weight in `row` and `col` is.
pub fn scale_index(granularity: Granularity, cols: usize, row: usize, col: usize) -> usize {
    match granularity {
        Granularity::Tensor => 0,
        Granularity::Row => row,
        Granularity::Group(size) => row * cols.div_ceil(size) + col / size,
    }
}

/// q and s of one token. If a value is not finite, s is NaN and q all zero.
pub fn quantise_token(x: &[f32]) -> (Vec<i8>, f32) {
    if x.iter().any(|value| !value.is_finite()) {
        return (vec![0; x.len()], f32::NAN);
    }
    let absmax = x.iter().fold(0f32, |max, value| max.max(value.abs()));
    let scale = absmax.max(SMALLEST_ACTIVATION) / 127.0;
    let code = |value: &f32| (value / scale).round_ties_even().clamp(-128.0, 127.0) as i8;
    (x.iter().map(code).collect(), scale)
}

/// Σ q T.
pub fn dot(q: &[i8], trits: &[i8]) -> i32 {
    q.iter()
        .zip(trits)
        .map(|(&q, &t)| i32::from(q) * i32::from(t))
        .sum()
}

/// x `[tokens, cols]` times W'ᵀ, `[tokens, rows]`, with activations quantised.
///
/// # Panics
///
/// If a slice is not of the length its shape says.
pub fn linear(
    x: &[f32],
    trits: &[i8],
    scales: &[f32],
    [tokens, rows, cols]: [usize; 3],
    granularity: Granularity,
) -> Vec<f32> {
    assert_eq!(x.len(), tokens * cols, "x is [tokens, cols]");
    assert_eq!(trits.len(), rows * cols, "trits are [rows, cols]");
    assert_eq!(scales.len(), granularity.scales(rows, cols), "scales");
    let mut y = Vec::with_capacity(tokens * rows);
    for token in 0..tokens {
        let (q, s) = quantise_token(&x[token * cols..][..cols]);
        for row in 0..rows {
            let trits = &trits[row * cols..][..cols];
            let scale = |col| scales[scale_index(granularity, cols, row, col)];
            y.push(match granularity {
                Granularity::Tensor | Granularity::Row => dot(&q, trits) as f32 * (s * scale(0)),
                Granularity::Group(size) => {
                    let mut sum = 0f32;
                    for (group, (q, trits)) in q.chunks(size).zip(trits.chunks(size)).enumerate() {
                        sum += dot(q, trits) as f32 * scale(group * size);
                    }
                    sum * s
                }
            });
        }
    }
    y
}

/// W' at a row and column.
fn weight_f64(
    trits: &[i8],
    scales: &[f32],
    cols: usize,
    granularity: Granularity,
) -> impl Fn(usize, usize) -> f64 {
    move |row, col| {
        let scale = scales[scale_index(granularity, cols, row, col)];
        f64::from(trits[row * cols + col]) * f64::from(scale)
    }
}

/// x `[tokens, cols]` times W'ᵀ, `[tokens, rows]`, with activations as they are, in f64.
pub fn linear_f64(
    x: &[f32],
    trits: &[i8],
    scales: &[f32],
    [tokens, rows, cols]: [usize; 3],
    granularity: Granularity,
) -> Vec<f64> {
    let weight = weight_f64(trits, scales, cols, granularity);
    (0..tokens * rows)
        .map(|i| {
            let (token, row) = (i / rows, i % rows);
            (0..cols)
                .map(|col| f64::from(x[token * cols + col]) * weight(row, col))
                .sum()
        })
        .collect()
}

/// dy `[tokens, rows]` times W', `[tokens, cols]`, in f64: the gradient with respect to x.
pub fn linear_dx_f64(
    dy: &[f32],
    trits: &[i8],
    scales: &[f32],
    [tokens, rows, cols]: [usize; 3],
    granularity: Granularity,
) -> Vec<f64> {
    let weight = weight_f64(trits, scales, cols, granularity);
    (0..tokens * cols)
        .map(|i| {
            let (token, col) = (i / cols, i % cols);
            (0..rows)
                .map(|row| f64::from(dy[token * rows + row]) * weight(row, col))
                .sum()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hand_case() {
        let (trits, scales) = quantise_weights(&[1.0, -1.0, 0.5, -0.5], 1, 4, Granularity::Tensor);
        assert_eq!(scales, [0.75]);
        assert_eq!(trits, [1, -1, 1, -1]);
    }

    #[test]
    fn halves_round_to_even() {
        assert_eq!(trit(0.5, 1.0), 0);
        assert_eq!(trit(-0.5, 1.0), 0);
        assert_eq!(trit(0.500_000_06, 1.0), 1);
        assert_eq!(trit(1.5, 1.0), 1);
        // s = 1: codes are the values, halves to even.
        let (q, s) = quantise_token(&[127.0, 0.5, 1.5, -2.5, -0.5]);
        assert_eq!((s, q), (1.0, vec![127, 0, 2, -2, 0]));
    }

    #[test]
    fn an_all_zero_matrix_and_token_have_scales() {
        assert_eq!(absmean(&[0.0; 7]), SMALLEST_MEAN);
        assert_eq!(quantise_token(&[0.0, -0.0]), (vec![0, 0], 1e-5 / 127.0));
    }

    #[test]
    fn what_is_not_finite_shows() {
        assert!(absmean(&[1.0, f32::NAN]).is_nan());
        assert!(absmean(&[1.0, f32::INFINITY]).is_nan());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let y = linear(
                &[1.0, bad],
                &[1, 0, 0, 0],
                &[1.0],
                [1, 2, 2],
                Granularity::Tensor,
            );
            assert!(y.iter().all(|y| y.is_nan()), "{bad}: {y:?}");
        }
    }

    /// In f32, adding one weight at a time stops growing at 2^24 of them.
    #[test]
    fn the_mean_of_many_weights_is_exact_enough() {
        let weights = vec![0.1f32; (1 << 25) + 3];
        assert_eq!(absmean(&weights), 0.1);
    }

    #[test]
    fn the_mean_does_not_depend_on_threads() {
        let weights: Vec<f32> = (0..500_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) as f32).sqrt())
            .collect();
        let means: Vec<f32> = [1, 2, 5]
            .iter()
            .map(|&threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                pool.build().unwrap().install(|| absmean(&weights))
            })
            .collect();
        assert!(
            means.iter().all(|m| m.to_bits() == means[0].to_bits()),
            "{means:?}"
        );
    }
}
