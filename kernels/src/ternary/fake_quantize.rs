//! Fake quantisation on the CPU: the quantised value where the original stood, in f32.
//!
//! All of it is bound by memory. A pass is compiled once for each instruction set (`pulp`) and the
//! compiler vectorises it; threads take fixed pieces, and sums are added piece by piece in order, so
//! that the number of threads changes no bit.

use pulp::Arch;
use rayon::prelude::*;

use super::reference::mean_scale;
use super::{Granularity, SMALLEST_ACTIVATION};

/// Elements that one task takes: 128 KiB of f32 stay in the cache of a core.
const PIECE: usize = 1 << 15;

/// The name of the instructions that passes use here, for records.
pub fn instructions() -> &'static str {
    match Arch::new() {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => "avx512",
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) => "avx2",
        _ => "portable",
    }
}

/// W' = g T in place of W, `[inputs, outputs]` row by row.
///
/// `round` in T = clamp(round(W / g), -1, 1) is halves to even, so that T is not 0 exactly where
/// |W| > g / 2: no division is needed. A NaN or an infinity in W makes the whole matrix NaN (per row or
/// group, its own row or group).
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
    let scale = mean_scale(sum_of_magnitudes(values), values.len());
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
            let scales: Vec<f32> = sums.iter().map(|&sum| mean_scale(sum, count)).collect();
            for row in group.chunks_mut(outputs) {
                Arch::new().dispatch(|| round_each(&mut row[strip.clone()], &scales));
            }
        }
    });
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

#[inline(always)]
fn token_scale(token: &[f32]) -> f32 {
    // As integers, magnitudes are in order and NaN lies above infinity; and the maximum of integers
    // is one instruction.
    let bits = token
        .iter()
        .fold(0, |max: u32, value| max.max(value.to_bits() & 0x7fff_ffff));
    scale_of_magnitude(bits)
}

/// s of a token whose largest magnitude has these bits: max(max |x|, 1e-5) / 127; NaN if that is not
/// finite.
#[inline(always)]
pub(super) fn scale_of_magnitude(bits: u32) -> f32 {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ternary::reference;

    const GRANULARITIES: [Granularity; 4] = [
        Granularity::Tensor,
        Granularity::Row,
        Granularity::Group(16),
        Granularity::Group(48),
    ];

    fn granularity() -> impl Strategy<Value = Granularity> {
        prop_oneof![
            Just(Granularity::Tensor),
            Just(Granularity::Row),
            (1usize..=80).prop_map(Granularity::Group),
        ]
    }

    /// Multiples of 2^-20 below 4, whose sums in f64 are exact in any order; now and then a zero or a value that
    /// many share, for ties.
    fn values(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let value = |_| match next() % 6 {
            0 => 0.0,
            1 => 0.5,
            2 => -1.0,
            _ => (next() % (1 << 23)) as f32 / (1 << 20) as f32 - 4.0,
        };
        (0..count).map(value).collect()
    }

    /// `[rows, cols]` to `[cols, rows]`.
    fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        let at = |i: usize| values[i % rows * cols + i / rows];
        (0..rows * cols).map(at).collect()
    }

    /// W' of the reference, in the order of W `[inputs, outputs]`.
    fn expected(w: &[f32], inputs: usize, outputs: usize, granularity: Granularity) -> Vec<f32> {
        let rows = transposed(w, inputs, outputs);
        let (trits, scales) = reference::quantise_weights(&rows, outputs, inputs, granularity);
        let scale =
            |i: usize| scales[reference::scale_index(granularity, inputs, i / inputs, i % inputs)];
        let dense: Vec<f32> = (trits.iter().enumerate())
            .map(|(i, &trit)| f32::from(trit) * scale(i))
            .collect();
        transposed(&dense, outputs, inputs)
    }

    /// Equal, and NaN where the other is.
    fn assert_same(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (i, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!(
                a == b || a.is_nan() && b.is_nan(),
                "{i}: {a} instead of {b}"
            );
        }
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    fn on_threads<R: Send>(threads: usize, run: impl FnOnce() -> R + Send) -> R {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(run)
    }

    proptest! {
        #[test]
        fn weights_equal_the_reference(
            inputs in 1usize..=90,
            outputs in 1usize..=70,
            granularity in granularity(),
            seed in any::<u64>(),
        ) {
            let mut w = values(inputs * outputs, seed);
            let expected = expected(&w, inputs, outputs, granularity);
            weight(&mut w, outputs, granularity);
            assert_same(&w, &expected);
        }

        #[test]
        fn a_weight_that_is_not_finite_spreads_over_what_shares_its_scale(
            inputs in 1usize..=90,
            outputs in 1usize..=70,
            granularity in granularity(),
            seed in any::<u64>(),
            bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
        ) {
            let mut w = values(inputs * outputs, seed);
            let at = seed as usize % w.len();
            let good = expected(&w, inputs, outputs, granularity);
            w[at] = bad;
            assert_same(
                &expected(&w, inputs, outputs, granularity),
                &{
                    let mut w = w.clone();
                    weight(&mut w, outputs, granularity);
                    w
                },
            );
            weight(&mut w, outputs, granularity);
            let index = |i: usize| {
                reference::scale_index(granularity, inputs, i % outputs, i / outputs)
            };
            for (i, (found, good)) in w.iter().zip(good).enumerate() {
                if index(i) == index(at) {
                    prop_assert!(found.is_nan(), "{i}: {found}");
                } else {
                    prop_assert_eq!(*found, good);
                }
            }
        }

        #[test]
        fn activations_equal_the_reference(
            tokens in 1usize..=9,
            width in 1usize..=200,
            exponent in -60i32..60,
            seed in any::<u64>(),
            bad in prop::option::of(prop::sample::select(vec![
                f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY,
            ])),
        ) {
            let mut x: Vec<f32> = values(tokens * width, seed);
            x.iter_mut().for_each(|x| *x *= 2f32.powi(exponent));
            let at = seed as usize % x.len();
            if let Some(bad) = bad {
                x[at] = bad;
            }
            let expected: Vec<f32> = (x.chunks(width))
                .flat_map(|token| {
                    let (q, s) = reference::quantise_token(token);
                    q.into_iter().map(move |q| s * f32::from(q))
                })
                .collect();
            activations(&mut x, width);
            assert_same(&x, &expected);
            let nan = |token: usize| bad.is_some() && token == at / width;
            for (i, x) in x.iter().enumerate() {
                prop_assert_eq!(x.is_nan(), nan(i / width));
            }
        }
    }

    /// Sizes at which matrices are cut into pieces and strips.
    #[test]
    fn threads_change_no_bit() {
        for (inputs, outputs) in [(700, 61), (33, 2_100), (1, 70_001), (70_001, 1)] {
            // Sums of these do round, and so their order would show.
            let w: Vec<f32> = values(inputs * outputs, 3)
                .iter()
                .map(|w| w.exp())
                .collect();
            let exact = values(inputs * outputs, 4);
            for granularity in GRANULARITIES {
                let run = |threads: usize, w: &[f32]| {
                    let mut w = w.to_vec();
                    on_threads(threads, || weight(&mut w, outputs, granularity));
                    w
                };
                let one = run(1, &w);
                for threads in [2, 5] {
                    assert_eq!(
                        bits(&run(threads, &w)),
                        bits(&one),
                        "{inputs} {granularity:?}"
                    );
                }
                assert_same(
                    &run(3, &exact),
                    &expected(&exact, inputs, outputs, granularity),
                );
            }
            let run = |threads: usize| {
                let mut x = w.clone();
                on_threads(threads, || activations(&mut x, outputs));
                bits(&x)
            };
            assert_eq!(run(1), run(5));
        }
    }

    #[test]
    fn nothing_stays_nothing() {
        for granularity in GRANULARITIES {
            weight(&mut [], 3, granularity);
            weight(&mut [], 0, granularity);
        }
        activations(&mut [], 0);
    }

    /// The latent matrix packed, and the fake-quantised one packed, are the same words and scales.
    #[test]
    fn packing_sees_the_same_trits() {
        use crate::ternary::cpu::latent::{Order, pack_latent, pack_quantised};
        let (inputs, outputs) = (96, 37);
        let latent = values(inputs * outputs, 9);
        for granularity in GRANULARITIES {
            let mut fake = latent.clone();
            weight(&mut fake, outputs, granularity);
            let shape = [outputs, inputs];
            let a = pack_latent(&latent, shape, Order::Transposed, granularity).unwrap();
            let b = pack_quantised(&fake, shape, Order::Transposed, granularity).unwrap();
            assert_eq!(a.view().words(), b.view().words());
            assert_eq!(bits(a.view().scales()), bits(b.view().scales()));
        }
    }
}
