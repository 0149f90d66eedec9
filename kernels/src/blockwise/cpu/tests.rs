use proptest::prelude::*;

use super::*;
use crate::blockwise::{BlockwiseShape, Format, Quantised, quantise, reference};

fn paths() -> impl Iterator<Item = Path> {
    Path::ALL.into_iter().filter(|path| path.available())
}

/// A product: shape `[tokens, rows, cols]`, activations, gradients, weights.
#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    x: Vec<f32>,
    dy: Vec<f32>,
    weights: Quantised,
}

fn case(tokens: usize, shape: BlockwiseShape, seed: u64) -> Case {
    let mut state = seed | 1;
    let mut values = |count: usize| -> Vec<f32> {
        let next = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    };
    let mut weights = values(shape.elements());
    // Blocks of uneven size and sign, so that none has the scale or zero point of its neighbour.
    for (i, weights) in weights.chunks_mut(shape.block).enumerate() {
        let (size, shift) = ((i % 7 + 1) as f32 / 4.0, (i % 5) as f32 / 5.0 - 0.4);
        weights.iter_mut().for_each(|w| *w = size * (*w + shift));
    }
    Case {
        tokens,
        x: values(tokens * shape.cols),
        dy: values(tokens * shape.rows),
        weights: quantise(&weights, shape).unwrap(),
    }
}

fn shapes(rows: usize, cols: usize) -> impl Strategy<Value = BlockwiseShape> {
    let format = prop::sample::select(&Format::ALL[..]);
    let block = prop_oneof![
        Just(16usize),
        Just(64),
        Just(128),
        1usize..150,
        // A row, and more.
        Just(0),
        Just(1000),
    ];
    // Columns that blocks divide, and others.
    let cols = prop_oneof![0..=cols, (0..=cols / 64).prop_map(|n| 64 * n)];
    (1..=rows, cols, format, block, any::<bool>()).prop_map(
        |(rows, cols, format, block, double)| BlockwiseShape {
            rows,
            cols,
            format,
            block: if block == 0 { cols.max(1) } else { block },
            double,
        },
    )
}

/// Whether f32 sums are as near to f64 ones as rounding allows.
fn assert_near(found: &[f32], expected: &[f64], summands: usize, what: &str) {
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let bound = 4e-6 * (1.0 + summands as f64);
        assert!(
            (f64::from(found) - expected).abs() <= bound,
            "{what} {i}: {found} {expected}"
        );
    }
}

impl Case {
    fn check(&self) {
        let shape = self.weights.shape();
        let BlockwiseShape { rows, cols, .. } = shape;
        let weights = self.weights.dequantise();
        let sizes = [self.tokens, rows, cols];
        let forward = reference::linear_f64(&self.x, &weights, sizes);
        let backward = reference::linear_dx_f64(&self.dy, &weights, sizes);
        let operands = self.weights.operands();
        for path in paths() {
            let what = format!("{path:?} {} {shape:?}", self.tokens);
            let mut y = vec![f32::NAN; self.tokens * rows];
            linear_on(path, &self.x, self.tokens, &operands.view(), &mut y).unwrap();
            assert_near(&y, &forward, cols, &what);
            let mut dx = vec![f32::NAN; self.tokens * cols];
            linear_dx_on(path, &self.dy, self.tokens, &operands.view(), &mut dx).unwrap();
            assert_near(&dx, &backward, rows, &what);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn few_tokens_are_near_the_reference(
        tokens in 1usize..6, shape in shapes(70, 400), seed: u64,
    ) {
        case(tokens, shape, seed).check();
    }

    #[test]
    fn many_tokens_are_near_the_reference(
        tokens in 6usize..40, shape in shapes(70, 300), seed: u64,
    ) {
        case(tokens, shape, seed).check();
    }
}

/// More tokens and summands than a block of activations has.
#[test]
fn blocks_of_activations_add_up() {
    for (tokens, rows, cols) in [
        (700, 20, 40),
        (5, 33, 5000),
        (600, 600, 33),
        (530, 17, 1200),
    ] {
        let shape = BlockwiseShape {
            rows,
            cols,
            format: Format::Nf4,
            block: 64,
            double: true,
        };
        case(tokens, shape, 3).check();
    }
}

#[test]
fn every_tile_of_tokens_is_near_the_reference() {
    for tokens in 0..=30 {
        for format in Format::ALL {
            let shape = BlockwiseShape {
                rows: 50,
                cols: 128,
                format,
                block: 64,
                double: tokens % 2 == 0,
            };
            case(tokens, shape, tokens as u64).check();
        }
    }
}

#[test]
fn threads_do_not_change_outputs() {
    let shape = BlockwiseShape {
        rows: 333,
        cols: 448,
        format: Format::Nf4,
        block: 64,
        double: true,
    };
    for tokens in [1, 3, 20] {
        let case = case(tokens, shape, 5);
        let operands = case.weights.operands();
        for path in paths() {
            let outputs = [1, 2, 3].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                pool.build().unwrap().install(|| {
                    let mut y = vec![f32::NAN; tokens * 333];
                    linear_on(path, &case.x, tokens, &operands.view(), &mut y).unwrap();
                    let mut dx = vec![f32::NAN; tokens * 448];
                    linear_dx_on(path, &case.dy, tokens, &operands.view(), &mut dx).unwrap();
                    (y, dx)
                })
            });
            assert_eq!(outputs[0], outputs[1]);
            assert_eq!(outputs[0], outputs[2]);
        }
    }
}

/// One summand, and a token of which only one value is not 0: products are the weights themselves.
#[test]
fn weights_in_products_are_those_that_are_dequantised() {
    for format in Format::ALL {
        for (block, double) in [(64, false), (64, true), (48, true), (10, false)] {
            let shape = BlockwiseShape {
                rows: 37,
                cols: 192,
                format,
                block,
                double,
            };
            let case = case(1, shape, 9);
            let weights = case.weights.dequantise();
            let operands = case.weights.operands();
            let mut unit = vec![0.0; 192 * 192];
            (0..192).for_each(|i| unit[i * 193] = 1.0);
            for path in paths() {
                let mut y = vec![f32::NAN; 192 * 37];
                linear_on(path, &unit, 192, &operands.view(), &mut y).unwrap();
                let mut dx = vec![f32::NAN; 37 * 192];
                let ones: Vec<f32> = (0..37 * 37)
                    .map(|i| f32::from(u8::from(i % 38 == 0)))
                    .collect();
                linear_dx_on(path, &ones, 37, &operands.view(), &mut dx).unwrap();
                for (i, weight) in weights.iter().enumerate() {
                    assert_eq!(y[i % 192 * 37 + i / 192], *weight, "{path:?} {shape:?} {i}");
                    assert_eq!(dx[i], *weight, "{path:?} {shape:?} {i}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_token() {
    let shape = BlockwiseShape {
        rows: 33,
        cols: 64,
        format: Format::Nf4,
        block: 64,
        double: false,
    };
    for path in paths() {
        for tokens in [3, 20] {
            let mut case = case(tokens, shape, 9);
            let operands = case.weights.operands();
            let mut good = vec![0.0; tokens * 33];
            linear_on(path, &case.x, tokens, &operands.view(), &mut good).unwrap();
            case.x[64 + 40] = f32::NAN;
            let mut y = vec![0.0; tokens * 33];
            linear_on(path, &case.x, tokens, &operands.view(), &mut y).unwrap();
            assert!(y[33..66].iter().all(|y| y.is_nan()), "{path:?}");
            assert_eq!(y[..33], good[..33], "{path:?}");
            assert_eq!(y[66..], good[66..], "{path:?}");
        }
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let shape = BlockwiseShape {
        rows: 3,
        cols: 4,
        format: Format::Nf4,
        block: 4,
        double: false,
    };
    let operands = case(1, shape, 1).weights.operands();
    let error = linear(&[0.0; 9], 2, &operands.view(), &mut [0.0; 6]).unwrap_err();
    let length = |what, expected, found| BlockwiseError::Length {
        what,
        expected,
        found,
    };
    assert_eq!(error, length("x", 8, 9));
    let error = linear(&[0.0; 8], 2, &operands.view(), &mut [0.0; 5]).unwrap_err();
    assert_eq!(error, length("y", 6, 5));
    let error = linear_dx(&[0.0; 5], 2, &operands.view(), &mut [0.0; 8]).unwrap_err();
    assert_eq!(error, length("dy", 6, 5));
    let error = linear_dx(&[0.0; 6], 2, &operands.view(), &mut [0.0; 9]).unwrap_err();
    assert_eq!(error, length("dx", 8, 9));
}
