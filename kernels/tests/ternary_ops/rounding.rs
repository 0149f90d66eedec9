//! Rounding of weights and activations.

use burn::tensor::{DType, FloatDType};
use firebrick_kernels::ternary::{
    Granularity, fake_quantize_activations, fake_quantize_weight, reference,
};

use super::{Packed, Random, assert_same, devices, exact_weights, floats, matrix, transposed};

/// W' of row-major W `[outputs, inputs]`.
fn rounded_weight(weight: &[f32], rows: usize, cols: usize, granularity: Granularity) -> Vec<f32> {
    let (trits, scales) = reference::quantise_weights(weight, rows, cols, granularity);
    let weight = trits.iter().enumerate().map(|(i, &trit)| {
        f32::from(trit) * scales[reference::scale_index(granularity, cols, i / cols, i % cols)]
    });
    weight.collect()
}

#[test]
fn weights_are_rounded_as_the_reference_says() {
    let mut random = Random(1);
    for (inputs, outputs) in [(1usize, 1usize), (48, 37), (288, 65), (96, 300)] {
        let granularities = [
            Granularity::Tensor,
            Granularity::Row,
            Granularity::Group(inputs.div_ceil(3)),
        ];
        for granularity in granularities {
            let weight = exact_weights(&mut random, outputs, inputs, granularity);
            let expected = rounded_weight(&weight, outputs, inputs, granularity);
            let expected = transposed(&expected, outputs, inputs);
            let weight = transposed(&weight, outputs, inputs);
            for (name, device) in devices() {
                let what = format!("{name} {inputs} x {outputs} {granularity:?}");
                let weight = matrix(&weight, inputs, outputs, &device);
                let found = floats(fake_quantize_weight(weight, granularity));
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    // The quotient that is g may be rounded once more on a GPU.
                    let error = (found - expected).abs();
                    assert!(
                        error <= 1e-6 * expected.abs(),
                        "{what}, {i}: {found} for {expected}"
                    );
                }
            }
        }
    }
}

/// More weights than a launch has units, several times over.
#[test]
fn the_scale_of_a_large_matrix_is_the_mean_of_its_magnitudes() {
    let (inputs, outputs) = (1031, 1021);
    let values = Random(2).values(inputs * outputs);
    let expected = reference::absmean(&values);
    for (name, device) in devices() {
        let weight = matrix(&values, inputs, outputs, &device);
        let found = floats(fake_quantize_weight(weight, Granularity::Tensor));
        let scale = found.iter().fold(0f32, |max, w| max.max(w.abs()));
        assert!(
            (scale / expected - 1.0).abs() < 1e-6,
            "{name}: {scale} for {expected}"
        );
        for (found, value) in found.iter().zip(&values) {
            let size = value.abs() / expected;
            if (size - 0.5).abs() > 1e-5 {
                let trit = if size > 0.5 { value.signum() } else { 0.0 };
                assert_eq!(*found, trit * scale, "{name}: {value}");
            }
        }
    }
}

#[test]
fn activations_are_rounded_as_the_reference_says() {
    let mut random = Random(3);
    for (tokens, width) in [(1, 1), (3, 37), (5, 1000), (301, 20)] {
        let mut x = random.values(tokens * width);
        // Each token at another scale, one of them zero.
        for (token, x) in x.chunks_mut(width).enumerate() {
            let scale = if token == 1 {
                0.0
            } else {
                10f32.powi(token as i32 % 9 - 4)
            };
            x.iter_mut().for_each(|x| *x *= scale);
        }
        let expected: Vec<f32> = x
            .chunks(width)
            .flat_map(|token| {
                let (codes, scale) = reference::quantise_token(token);
                codes.into_iter().map(move |code| scale * f32::from(code))
            })
            .collect();
        for (name, device) in devices() {
            let found = fake_quantize_activations(matrix(&x, tokens, width, &device));
            assert_same(
                &floats(found),
                &expected,
                &format!("{name} {tokens} x {width}"),
            );
        }
    }
}

#[test]
fn half_precision_is_rounded_in_f32_and_stored_as_it_came() {
    let (tokens, width) = (3, 70);
    let x = Random(4).values(tokens * width);
    for (name, device) in devices() {
        for dtype in [FloatDType::BF16, FloatDType::F16] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let what = format!("{name} {dtype:?}");
            let narrow = matrix(&x, tokens, width, &device).cast(dtype);
            let wide = narrow.clone().cast(FloatDType::F32);
            for rounds in [fake_quantize_activations, |x| {
                fake_quantize_weight(x, Granularity::Row)
            }] {
                let found = rounds(narrow.clone());
                assert_eq!(found.dtype(), DType::from(dtype), "{what}");
                let expected = rounds(wide.clone()).cast(dtype);
                assert_same(&floats(found), &floats(expected), &what);
            }
        }
    }
}

#[test]
fn what_is_not_finite_shows() {
    let mut random = Random(5);
    let (tokens, width) = (4, 40);
    let mut x = random.values(tokens * width);
    for (token, bad) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY]
        .into_iter()
        .enumerate()
    {
        x[token * width + 7 * token + 1] = bad;
    }
    let bad = |values: &[f32], what: &str| {
        for (token, values) in values.chunks(values.len() / tokens).enumerate() {
            let all = values.iter().all(|value| value.is_nan() == (token < 3));
            assert!(all, "{what}: {values:?}");
        }
    };
    let packed = Packed::random(&mut random, 21, width, Granularity::Row, true);
    for (name, device) in devices() {
        let found = fake_quantize_activations(matrix(&x, tokens, width, &device));
        bad(&floats(found), name);
        let found = packed.linear(matrix(&x, tokens, width, &device));
        bad(&floats(found), name);
        // A weight that is not finite makes the column of its output NaN, or the matrix.
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weight = vec![1f32; 2 * 3];
            weight[4] = bad;
            let found = [Granularity::Row, Granularity::Group(1), Granularity::Tensor].map(|g| {
                let found = fake_quantize_weight(matrix(&weight, 2, 3, &device), g);
                let found = floats(found);
                found.iter().map(|w| w.is_nan()).collect::<Vec<bool>>()
            });
            let [row, group, whole] = found;
            assert_eq!(row, [false, true, false, false, true, false], "{name}");
            assert_eq!(group, [false, false, false, false, true, false], "{name}");
            assert_eq!(whole, [true; 6], "{name}");
        }
    }
}

#[test]
fn the_gradient_of_rounding_goes_straight_through() {
    let gradient = Random(6).values(32 * 9);
    for (name, device) in devices() {
        let device = device.autodiff();
        for granularity in [
            None,
            Some(Granularity::Tensor),
            Some(Granularity::Group(16)),
        ] {
            let x = matrix(&Random(7).values(32 * 9), 32, 9, &device).require_grad();
            let y = match granularity {
                None => fake_quantize_activations(x.clone()),
                Some(granularity) => fake_quantize_weight(x.clone(), granularity),
            };
            let grads = (y * matrix(&gradient, 32, 9, &device)).sum().backward();
            let found = floats(x.grad(&grads).expect("x is tracked"));
            assert_same(&found, &gradient, &format!("{name} {granularity:?}"));
        }
    }
}
