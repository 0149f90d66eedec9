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
