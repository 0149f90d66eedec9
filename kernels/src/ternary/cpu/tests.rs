use proptest::prelude::*;

use super::*;
use crate::ternary::layout::compute;
use crate::ternary::{Granularity, reference};

fn paths() -> impl Iterator<Item = Path> {
    Path::ALL.into_iter().filter(|path| path.available())
}

fn granularity() -> impl Strategy<Value = Granularity> {
    prop_oneof![
        Just(Granularity::Tensor),
        Just(Granularity::Row),
        (1usize..=9).prop_map(|blocks| Granularity::Group(16 * blocks)),
    ]
}

/// A product: shape `[tokens, rows, cols]`, activations, trits, scales.
#[derive(Debug, Clone)]
struct Case {
    shape: [usize; 3],
    granularity: Granularity,
    x: Vec<f32>,
    trits: Vec<i8>,
    scales: Vec<f32>,
}

fn cases(tokens: usize, rows: usize, cols: usize) -> impl Strategy<Value = Case> {
    (1..=tokens, 1..=rows, 0..=cols, granularity(), any::<u64>()).prop_map(
        |(tokens, rows, cols, granularity, seed)| case([tokens, rows, cols], granularity, seed),
    )
}

fn case(shape: [usize; 3], granularity: Granularity, seed: u64) -> Case {
    let [tokens, rows, cols] = shape;
    let mut state = seed | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    // Uneven magnitudes, and now and then the extremes of a code.
    let x = (0..tokens * cols).map(|_| match next() % 8 {
        0 => 1.0,
        1 => -1.0,
        2 => 0.0,
        _ => next() as f32 / (1u32 << 30) as f32 - 1.0,
    });
    let x = x.collect();
    let trits = (0..rows * cols).map(|_| (next() % 3) as i8 - 1).collect();
    let count = granularity.scales(rows, cols);
    let scales = (0..count)
        .map(|_| next() as f32 / (1u32 << 31) as f32 + 0.01)
        .collect();
    Case {
        shape,
        granularity,
        x,
        trits,
        scales,
    }
}

impl Case {
    fn run(&self, path: Path) -> Vec<f32> {
        let [tokens, rows, cols] = self.shape;
        let words = compute::pack(&self.trits, rows, cols).unwrap();
        let view = PackedView::new(&words, rows, cols, &self.scales, self.granularity).unwrap();
        let mut y = vec![f32::NAN; tokens * rows];
        packed_linear_on(path, &self.x, tokens, &view, &mut y).unwrap();
        y
    }

    fn check(&self) {
        let expected = reference::linear(
            &self.x,
            &self.trits,
            &self.scales,
            self.shape,
            self.granularity,
        );
        for path in paths() {
            let y = self.run(path);
            let same = y
                .iter()
                .zip(&expected)
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(
                same,
                "{path:?} {:?} {:?}: {y:?} {expected:?}",
                self.shape, self.granularity
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn few_tokens_equal_the_reference(case in cases(7, 70, 200)) {
        case.check();
    }

    #[test]
    fn many_tokens_equal_the_reference(case in cases(40, 70, 700)) {
        case.check();
    }
}

/// Whether f32 sums are as near to f64 ones as rounding allows.
fn assert_near(y: &[f32], expected: &[f64], summands: usize, case: &Case, path: Path) {
    for (i, (&y, &e)) in y.iter().zip(expected).enumerate() {
        let bound = 1e-6 * (summands as f64).sqrt() * (1.0 + summands as f64).sqrt();
        assert!(
            (f64::from(y) - e).abs() <= bound,
            "{path:?} {:?} {i}: {y} {e}",
            case.shape
        );
    }
}

fn check_f32(case: &Case) {
    let [tokens, rows, cols] = case.shape;
    let words = compute::pack(&case.trits, rows, cols).unwrap();
    let view = PackedView::new(&words, rows, cols, &case.scales, case.granularity).unwrap();
    let (trits, scales) = (&case.trits, &case.scales);
    let forward = reference::linear_f64(&case.x, trits, scales, case.shape, case.granularity);
    // Any numbers do for a gradient.
    let dy: Vec<f32> = forward.iter().map(|y| y.sin() as f32).collect();
    let backward = reference::linear_dx_f64(&dy, trits, scales, case.shape, case.granularity);
    for path in paths() {
        let mut y = vec![f32::NAN; tokens * rows];
        float_product(path, Direction::Forward, &case.x, tokens, &view, &mut y).unwrap();
        assert_near(&y, &forward, cols, case, path);
        let mut dx = vec![f32::NAN; tokens * cols];
        float_product(path, Direction::Backward, &dy, tokens, &view, &mut dx).unwrap();
        assert_near(&dx, &backward, rows, case, path);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn f32_products_are_near_the_reference(case in cases(33, 150, 150)) {
        check_f32(&case);
    }
}

#[test]
fn f32_products_of_every_tile_are_near_the_reference() {
    for tokens in 1..=30 {
        for granularity in [
            Granularity::Tensor,
            Granularity::Row,
            Granularity::Group(32),
        ] {
            check_f32(&case([tokens, 50, 77], granularity, tokens as u64));
        }
    }
}

#[test]
fn every_tile_of_tokens_equals_the_reference() {
    for tokens in 1..=30 {
        for granularity in [
            Granularity::Tensor,
            Granularity::Row,
            Granularity::Group(32),
        ] {
            case([tokens, 50, 77], granularity, tokens as u64).check();
        }
    }
}

/// Sums as large as they get, over more columns than one sum of plane 3 has bits for.
#[test]
fn the_longest_rows_do_not_overflow() {
    let cols = (1 << 18) + 5000;
    for sign in [1.0, -1.0] {
        let mut case = case([1, 16, cols], Granularity::Tensor, 1);
        case.x.fill(sign);
        case.trits.fill(1);
        case.check();
        case.shape = [8, 16, cols];
        case.x = vec![-sign; 8 * cols];
        case.check();
    }
}

#[test]
fn threads_do_not_change_outputs() {
    let case = case([20, 333, 400], Granularity::Row, 5);
    for path in paths() {
        let outputs: Vec<Vec<f32>> = [1, 2, 3]
            .iter()
            .map(|&threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                pool.build().unwrap().install(|| case.run(path))
            })
            .collect();
        assert_eq!(outputs[0], outputs[1]);
        assert_eq!(outputs[0], outputs[2]);
    }
}

#[test]
fn what_is_not_finite_makes_its_token_nan() {
    for path in paths() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 40, 76] {
                for tokens in [2, 20] {
                    let mut case = case([tokens, 33, 77], Granularity::Group(16), 9);
                    let good = case.run(path);
                    case.x[77 + at] = bad;
                    let y = case.run(path);
                    assert!(y[33..66].iter().all(|y| y.is_nan()), "{path:?} {bad} {at}");
                    assert_eq!(y[..33], good[..33], "{path:?} {bad} {at}");
                    assert_eq!(y[66..], good[66..], "{path:?} {bad} {at}");
                }
            }
        }
    }
}

#[test]
fn tiny_and_huge_activations_equal_the_reference() {
    for magnitude in [0.0, f32::MIN_POSITIVE, 1e-40, 9e-6, 1e30, f32::MAX] {
        let mut case = case([3, 20, 50], Granularity::Row, 3);
        case.x.iter_mut().for_each(|x| *x *= magnitude);
        case.check();
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let words = compute::pack(&[1; 12], 3, 4).unwrap();
    let view = PackedView::new(&words, 3, 4, &[1.0], Granularity::Tensor).unwrap();
    let error = packed_linear(&[0.0; 9], 2, &view, &mut [0.0; 6]).unwrap_err();
    assert_eq!(
        error,
        CpuError::Length {
            what: "x",
            expected: 8,
            found: 9
        }
    );
    let error = packed_linear(&[0.0; 8], 2, &view, &mut [0.0; 5]).unwrap_err();
    assert_eq!(
        error,
        CpuError::Length {
            what: "y",
            expected: 6,
            found: 5
        }
    );
}

fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols)
        .map(|i| values[i % rows * cols + i / rows])
        .collect()
}

/// Weights of all magnitudes around the threshold, ties among them.
fn latent(rows: usize, cols: usize, seed: u64) -> Vec<f32> {
    let case = case([1, rows, cols], Granularity::Tensor, seed);
    let noise = self::case([rows, 1, cols], Granularity::Tensor, seed ^ 77).x;
    case.trits
        .iter()
        .zip(noise)
        .map(|(&t, x)| 0.02 * (f32::from(t) + x))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn latent_weights_pack_to_the_reference(
        rows in 1usize..80, cols in 1usize..120, granularity in granularity(), seed: u64,
    ) {
        let weights = latent(rows, cols, seed);
        let (trits, scales) = reference::quantise_weights(&weights, rows, cols, granularity);
        let words = compute::pack(&trits, rows, cols).unwrap();
        let expected = compute::Packed::new(words, rows, cols, scales, granularity).unwrap();
        let packed = latent::pack_latent(&weights, [rows, cols], Order::RowMajor, granularity);
        prop_assert_eq!(&packed.unwrap(), &expected);
        let transposed = transpose(&weights, rows, cols);
        let packed = latent::pack_latent(&transposed, [rows, cols], Order::Transposed, granularity);
        prop_assert_eq!(&packed.unwrap(), &expected);
    }

    #[test]
    fn every_packer_gives_the_same_words(seed: u64, stride in 16usize..40) {
        let weights = latent(16, stride, seed);
        let thresholds = std::array::from_fn(|i| 0.001 * i as f32);
        let pack = |path| {
            let mut words = [0; 16];
            let largest = (kernel::pack(path).pack)(&weights, stride, &thresholds, &mut words);
            (words, largest)
        };
        for path in paths() {
            prop_assert_eq!(pack(path), pack(Path::Portable), "{:?}", path);
        }
    }

    #[test]
    fn quantised_operands_multiply_as_their_codes(case in cases(20, 70, 120)) {
        let [tokens, rows, cols] = case.shape;
        prop_assume!(cols > 0);
        let fake = |token: &[f32]| {
            let (q, s) = reference::quantise_token(token);
            q.into_iter().map(move |q| f32::from(q) * s)
        };
        let x: Vec<f32> = case.x.chunks(cols).flat_map(fake).collect();
        let weights: Vec<f32> = (0..rows * cols)
            .map(|i| {
                let scale = reference::scale_index(case.granularity, cols, i / cols, i % cols);
                f32::from(case.trits[i]) * case.scales[scale]
            })
            .collect();
        let expected: Vec<f64> = (0..tokens * rows)
            .map(|i| {
                let (x, w) = (&x[i / rows * cols..][..cols], &weights[i % rows * cols..][..cols]);
                x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
            })
            .collect();
        let mut y = vec![f32::NAN; tokens * rows];
        let w = transpose(&weights, rows, cols);
        int8_matmul(&x, tokens, cols, &w, rows, case.granularity, &mut y).unwrap();
        assert_near(&y, &expected, cols, &case, Path::detect());
    }
}

/// The least f32 above half a scale is 1, for every mantissa near the ends of the range.
#[test]
fn thresholds_are_divisions() {
    for bits in [
        0x3f80_0000u32,
        0x3f80_0001,
        0x3fff_ffff,
        0x3fff_fffe,
        0x3fc0_0000,
        0x3faa_aaab,
    ] {
        let scale = f32::from_bits(bits);
        let half = 0.5 * scale;
        for (weight, expected) in [(half, 0), (half.next_up(), 1), (half.next_down(), 0)] {
            assert_eq!(
                reference::trit(weight, scale),
                expected,
                "{weight} / {scale}"
            );
            assert_eq!(
                reference::trit(-weight, scale),
                -expected,
                "{weight} / {scale}"
            );
            assert_eq!(i8::from(weight > half), expected);
        }
    }
}

#[test]
fn a_nan_among_weights_reaches_its_outputs() {
    let mut weights = latent(20, 40, 1);
    weights[7 * 40 + 3] = f32::NAN;
    let x = vec![1.0; 40];
    for order in [Order::RowMajor, Order::Transposed] {
        let weights = match order {
            Order::RowMajor => weights.clone(),
            Order::Transposed => transpose(&weights, 20, 40),
        };
        for pack in [latent::pack_latent, latent::pack_quantised] {
            let packed = pack(&weights, [20, 40], order, Granularity::Row).unwrap();
            let mut y = vec![0.0; 20];
            packed_linear(&x, 1, &packed.view(), &mut y).unwrap();
            for (row, y) in y.iter().enumerate() {
                assert_eq!(y.is_nan(), row == 7, "{order:?} {row}");
            }
        }
    }
}

/// Quotients at and next to the halves where codes round, for scales all over f32's range.
#[test]
fn codes_round_as_a_division_does() {
    let mut seed = 1u32;
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed
    };
    for round in 0..2_000 {
        let exponent = (next() % 140) as i32 - 16;
        let largest = (1.0 + (next() >> 9) as f32 / (1 << 23) as f32) * 2f32.powi(exponent);
        let s = largest / 127.0;
        let mut x = vec![largest];
        for half in 0..127 {
            let near = (half as f32 + 0.5) * s;
            let around =
                (-4i32..=4).map(|by| f32::from_bits(near.to_bits().wrapping_add_signed(by)));
            x.extend(around.filter(|x| *x <= largest).flat_map(|x| [x, -x]));
        }
        let (expected, scale) = reference::quantise_token(&x);
        for path in paths() {
            let kernel = kernel::integer(path).unwrap();
            let mut words = vec![0u32; x.len().div_ceil(16) * 4];
            let sum = (kernel.quantise)(&x, scale, &mut words, 1);
            let codes = words.iter().flat_map(|word| word.to_le_bytes());
            for ((code, &expected), x) in codes.zip(&expected).zip(&x) {
                assert_eq!(code as i8, expected, "{path:?} {round}: {x} / {scale}");
            }
            assert_eq!(sum, expected.iter().map(|&q| i32::from(q)).sum::<i32>());
        }
    }
}

#[test]
fn no_tokens_no_outputs() {
    for granularity in [
        Granularity::Tensor,
        Granularity::Row,
        Granularity::Group(16),
    ] {
        let case = case([0, 33, 48], granularity, 1);
        let words = compute::pack(&case.trits, 33, 48).unwrap();
        let view = PackedView::new(&words, 33, 48, &case.scales, granularity).unwrap();
        for path in paths() {
            packed_linear_on(path, &[], 0, &view, &mut []).unwrap();
            for direction in [Direction::Forward, Direction::Backward] {
                float_product(path, direction, &[], 0, &view, &mut []).unwrap();
            }
        }
    }
}
