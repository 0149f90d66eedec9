//! Every ternary operation, forward and backward, on every device that is compiled in, against the
//! scalar reference. Kernels are compiled when first used and take sizes as arguments: many shapes
//! cost little, and each test takes all its devices in turn.
#![allow(missing_docs)]

use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use firebrick_kernels::ternary::layout::compute;
use firebrick_kernels::ternary::{Granularity, PackedShape, Way, reference, ways};
use firebrick_kernels::ternary::{
    fake_quantize_activations, fake_quantize_weight, int8_matmul, ternary_linear,
};

/// The CPU, and a GPU for each feature: one that is compiled in has to be there.
fn devices() -> Vec<(&'static str, Device)> {
    #[cfg_attr(
        not(any(feature = "wgpu", feature = "cuda")),
        expect(unused_mut, reason = "the CPU alone")
    )]
    let mut devices = vec![("flex", Device::flex())];
    #[cfg(feature = "wgpu")]
    {
        use std::sync::OnceLock;
        // A process sets up wgpu once.
        static WGPU: OnceLock<Device> = OnceLock::new();
        let open = || Device::wgpu_options().init().expect("a wgpu adapter");
        devices.push(("wgpu", WGPU.get_or_init(open).clone()));
    }
    #[cfg(feature = "cuda")]
    {
        let found = Device::enumerate(burn::tensor::DeviceType::Cuda).into_iter();
        devices.push(("cuda", found.into_iter().next().expect("an NVIDIA GPU")));
    }
    devices
}

/// Numbers that look random, in [-1, 1).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }

    fn below(&mut self, end: usize) -> usize {
        ((self.next() + 1.0) / 2.0 * end as f32) as usize % end
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn matrix(values: &[f32], rows: usize, cols: usize, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values.to_vec(), [rows, cols]), device)
}

fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols)
        .map(|i| values[i % rows * cols + i / rows])
        .collect()
}

/// The same bits; any NaN is as good as another, and a zero has no sign.
fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found == expected || found.is_nan() && expected.is_nan();
        assert!(same, "{what}, {i}: {found} for {expected}");
    }
}

fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= tolerance, "{what}, {i}: {found} for {expected}");
    }
}

/// W' of row-major W `[outputs, inputs]`.
fn rounded_weight(weight: &[f32], rows: usize, cols: usize, granularity: Granularity) -> Vec<f32> {
    let (trits, scales) = reference::quantise_weights(weight, rows, cols, granularity);
    let weight = trits.iter().enumerate().map(|(i, &trit)| {
        f32::from(trit) * scales[reference::scale_index(granularity, cols, i / cols, i % cols)]
    });
    weight.collect()
}

/// Weights whose magnitudes add up without rounding: each is on the border of two trits, or clear of it.
fn exact_weights(
    random: &mut Random,
    rows: usize,
    cols: usize,
    granularity: Granularity,
) -> Vec<f32> {
    let mut weight: Vec<f32> = random.values(rows * cols);
    weight
        .iter_mut()
        .for_each(|w| *w = (*w * 256.0).round() / 256.0);
    let scales = reference::scales(&weight, rows, cols, granularity);
    for (i, w) in weight.iter().enumerate() {
        let scale = scales[reference::scale_index(granularity, cols, i / cols, i % cols)];
        let border = (w.abs() / scale - 0.5).abs();
        assert!(border == 0.0 || border > 1e-6, "choose another seed");
    }
    weight
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

/// A packed matrix, and what it was packed from.
struct Packed {
    trits: Vec<i8>,
    scales: Vec<f32>,
    shape: PackedShape,
}

impl Packed {
    fn random(
        random: &mut Random,
        rows: usize,
        cols: usize,
        granularity: Granularity,
        rounds_activations: bool,
    ) -> Self {
        let scales = granularity.scales(rows, cols);
        Self {
            trits: (0..rows * cols)
                .map(|_| random.below(3) as i8 - 1)
                .collect(),
            scales: (0..scales).map(|_| random.next().abs() + 0.01).collect(),
            shape: PackedShape {
                rows,
                cols,
                granularity,
                rounds_activations,
            },
        }
    }

    fn linear(&self, x: Tensor<2>) -> Tensor<2> {
        let PackedShape { rows, cols, .. } = self.shape;
        let words = compute::pack(&self.trits, rows, cols).unwrap();
        let groups = rows.div_ceil(compute::BLOCK);
        let words = TensorData::new(words.clone(), [groups, words.len() / groups]);
        let device = x.device();
        let words = Tensor::<2, Int>::from_data(words, (&device, DType::U32));
        let scales = Tensor::from_data(&self.scales[..], &device);
        ternary_linear(x, words, scales, self.shape)
    }

    fn sizes(&self, tokens: usize) -> [usize; 3] {
        [tokens, self.shape.rows, self.shape.cols]
    }

    /// y against the reference: its bits where activations are rounded.
    fn check(&self, x: &[f32], tokens: usize, what: &str, found: Tensor<2>) {
        let PackedShape {
            rows,
            cols,
            granularity,
            rounds_activations,
        } = self.shape;
        assert_eq!(found.dims(), [tokens, rows], "{what}");
        let found = floats(found);
        let sizes = self.sizes(tokens);
        if rounds_activations {
            let expected = reference::linear(x, &self.trits, &self.scales, sizes, granularity);
            assert_same(&found, &expected, what);
        } else {
            let expected = reference::linear_f64(x, &self.trits, &self.scales, sizes, granularity);
            assert_close(&found, &expected, 2e-7 * cols as f64, what);
        }
    }
}

/// One and few tokens, which have kernels of their own, and tiles, whole and not.
#[test]
fn packed_products_and_their_gradients_are_those_of_the_reference() {
    let mut random = Random(8);
    for (tokens, rows, cols) in [
        (1, 37, 83),
        (3, 64, 400),
        (17, 5, 16),
        (16, 70, 700),
        (70, 130, 200),
    ] {
        for granularity in [
            Granularity::Tensor,
            Granularity::Row,
            Granularity::Group(16),
            Granularity::Group(48),
        ] {
            for rounds_activations in [true, false] {
                let packed =
                    Packed::random(&mut random, rows, cols, granularity, rounds_activations);
                let x = random.values(tokens * cols);
                let dy = random.values(tokens * rows);
                let dx = reference::linear_dx_f64(
                    &dy,
                    &packed.trits,
                    &packed.scales,
                    packed.sizes(tokens),
                    granularity,
                );
                for (name, device) in devices() {
                    let what = format!("{name} {tokens} {:?}", packed.shape);
                    let plain = packed.linear(matrix(&x, tokens, cols, &device));
                    packed.check(&x, tokens, &what, plain);
                    let device = device.autodiff();
                    let tracked = matrix(&x, tokens, cols, &device).require_grad();
                    let y = packed.linear(tracked.clone());
                    packed.check(&x, tokens, &what, y.clone());
                    let grads = (y * matrix(&dy, tokens, rows, &device)).sum().backward();
                    let found = tracked.grad(&grads).expect("x is tracked");
                    assert_eq!(found.dims(), [tokens, cols], "{what}");
                    assert_close(&floats(found), &dx, 2e-7 * rows as f64, &what);
                }
            }
        }
    }
}

#[test]
fn half_precision_is_multiplied_in_f32_and_stored_as_it_came() {
    let mut random = Random(13);
    let (rows, cols) = (21, 50);
    for (tokens, rounds_activations) in [(2, true), (2, false), (20, true)] {
        let packed = Packed::random(
            &mut random,
            rows,
            cols,
            Granularity::Row,
            rounds_activations,
        );
        let x = random.values(tokens * cols);
        let dy = random.values(tokens * rows);
        for (name, device) in devices() {
            for dtype in [FloatDType::BF16, FloatDType::F16] {
                if !device.supports_dtype(dtype) {
                    continue;
                }
                let what = format!("{name} {dtype:?} {tokens} {rounds_activations}");
                let device = device.clone().autodiff();
                let narrow = matrix(&x, tokens, cols, &device).cast(dtype);
                let dy = matrix(&dy, tokens, rows, &device).cast(dtype);
                let [narrow, wide] = [narrow.clone(), narrow.cast(FloatDType::F32)].map(|x| {
                    let x = x.require_grad();
                    let dy = dy.clone().cast(x.dtype());
                    let y = packed.linear(x.clone());
                    let grads = (y.clone() * dy).sum().backward();
                    let dx = x.grad(&grads).expect("x is tracked");
                    assert_eq!([y.dtype(), dx.dtype()], [x.dtype(); 2], "{what}");
                    [y.inner(), dx]
                });
                for (narrow, wide) in narrow.into_iter().zip(wide) {
                    let wide = wide.cast(dtype);
                    assert_same(&floats(narrow), &floats(wide), &what);
                }
            }
        }
    }
}

/// Of operands that were rounded already; a device without a kernel for it multiplies floats.
#[test]
fn products_of_rounded_operands_and_their_gradients_are_those_of_the_reference() {
    let mut random = Random(14);
    let (tokens, inputs, outputs) = (5, 48, 19);
    for granularity in [
        Granularity::Tensor,
        Granularity::Row,
        Granularity::Group(16),
    ] {
        let x = random.values(tokens * inputs);
        let weight = exact_weights(&mut random, outputs, inputs, granularity);
        let dy = random.values(tokens * outputs);
        let sizes = [tokens, outputs, inputs];
        let (trits, scales) = reference::quantise_weights(&weight, outputs, inputs, granularity);
        let linear = reference::linear(&x, &trits, &scales, sizes, granularity);
        let linear: Vec<f64> = linear.into_iter().map(f64::from).collect();
        let dx = reference::linear_dx_f64(&dy, &trits, &scales, sizes, granularity);
        for (name, device) in devices() {
            let what = format!("{name} {granularity:?}");
            let device = device.autodiff();
            let x = matrix(&x, tokens, inputs, &device).require_grad();
            let weight = matrix(
                &transposed(&weight, outputs, inputs),
                inputs,
                outputs,
                &device,
            );
            let weight = weight.require_grad();
            let rounded = fake_quantize_activations(x.clone());
            let y = int8_matmul(
                rounded.clone(),
                fake_quantize_weight(weight.clone(), granularity),
                granularity,
            );
            assert_close(&floats(y.clone().inner()), &linear, 1e-5, &what);
            let dy = matrix(&dy, tokens, outputs, &device);
            let grads = (y * dy.clone()).sum().backward();
            let found = floats(x.grad(&grads).expect("x is tracked"));
            assert_close(&found, &dx, 1e-5, &what);
            let found = floats(weight.grad(&grads).expect("W is tracked"));
            let [rounded, dy] = [rounded, dy].map(|values| floats(values.inner()));
            let dw: Vec<f64> = (0..inputs * outputs)
                .map(|i| {
                    let terms = (0..tokens).map(|t| {
                        let (x, dy) = (
                            rounded[t * inputs + i / outputs],
                            dy[t * outputs + i % outputs],
                        );
                        f64::from(x) * f64::from(dy)
                    });
                    terms.sum()
                })
                .collect();
            assert_close(&found, &dw, 1e-5, &what);
        }
    }
}

#[test]
fn each_operation_says_how_it_runs() {
    for (name, device) in devices() {
        let found = ways(&device);
        let operations: Vec<&str> = found.iter().map(|(operation, _)| *operation).collect();
        let expected = [
            "ternary_fake_quantize_activations",
            "ternary_fake_quantize_weight",
            "ternary_int8_matmul",
            "ternary_linear",
            "ternary_linear_dx",
        ];
        assert_eq!(operations, expected, "{name}");
        for (operation, way) in found {
            match (name, operation) {
                ("flex", _) => assert!(matches!(way, Way::Simd(_)), "{operation}: {way}"),
                (_, "ternary_int8_matmul") => assert_eq!(way, Way::Composed, "{name}"),
                _ => assert_eq!(way, Way::CubeCl, "{name} {operation}"),
            }
        }
        assert_eq!(ways(&device.clone().autodiff()), ways(&device), "{name}");
    }
}

/// With integers whose largest is 127, the scale of a token is 1 and y is Σ q T itself.
#[test]
fn sums_of_integers_are_exact() {
    let mut random = Random(9);
    let granularity = Granularity::Tensor;
    for (tokens, rows, cols) in [(1, 33, 4111), (5, 18, 1000), (65, 66, 333)] {
        let mut packed = Packed::random(&mut random, rows, cols, granularity, true);
        packed.scales = vec![1.0];
        let mut x: Vec<f32> = (0..tokens * cols)
            .map(|_| random.below(255) as f32 - 127.0)
            .collect();
        x.chunks_mut(cols).for_each(|token| token[0] = 127.0);
        let expected: Vec<f32> = (0..tokens * rows)
            .map(|i| {
                let codes: Vec<i8> = x[i / rows * cols..][..cols]
                    .iter()
                    .map(|&x| x as i8)
                    .collect();
                reference::dot(&codes, &packed.trits[i % rows * cols..][..cols]) as f32
            })
            .collect();
        for (name, device) in devices() {
            let found = floats(packed.linear(matrix(&x, tokens, cols, &device)));
            assert_same(
                &found,
                &expected,
                &format!("{name} {tokens} x {rows} x {cols}"),
            );
        }
    }
}

/// So many columns that a sum does not fit the 24 bits of an f32: it is rounded once, at its end.
#[test]
fn sums_that_f32_does_not_hold_are_added_as_integers() {
    let (rows, cols) = (2, (1 << 17) + 100);
    let mut random = Random(10);
    for granularity in [Granularity::Row, Granularity::Group((1 << 17) + 16)] {
        let mut packed = Packed::random(&mut random, rows, cols, granularity, true);
        // All of one sign, so that the sums are large, and odd.
        packed.trits.iter_mut().for_each(|trit| *trit = 1);
        for tokens in [1, 2, 17] {
            let mut x: Vec<f32> = (0..tokens * cols)
                .map(|_| 120.0 + random.below(8) as f32)
                .collect();
            x.chunks_mut(cols).for_each(|token| token[0] = 127.0);
            for (name, device) in devices() {
                let what = format!("{name} {tokens} {granularity:?}");
                packed.check(
                    &x,
                    tokens,
                    &what,
                    packed.linear(matrix(&x, tokens, cols, &device)),
                );
            }
        }
    }
}

/// What comes in may be a view of something else, and what goes out is a tensor like any other.
#[test]
fn operations_take_views_and_stand_among_others() {
    let mut random = Random(11);
    let (tokens, rows, cols) = (6, 20, 48);
    let packed = Packed::random(&mut random, rows, cols, Granularity::Group(16), true);
    let wide = random.values(tokens * (cols + 3));
    let x: Vec<f32> = (0..tokens * cols)
        .map(|i| wide[i / cols * (cols + 3) + i % cols + 2])
        .collect();
    for (name, device) in devices() {
        let view = matrix(&wide, tokens, cols + 3, &device).slice([0..tokens, 2..cols + 2]);
        packed.check(&x, tokens, name, packed.linear(view.clone()));
        let turned = transposed(&x, tokens, cols);
        let view = matrix(&turned, cols, tokens, &device).transpose();
        packed.check(&x, tokens, name, packed.linear(view.clone()));
        assert_same(
            &floats(fake_quantize_activations(view.clone())),
            &floats(fake_quantize_activations(matrix(&x, tokens, cols, &device))),
            name,
        );
        assert_same(
            &floats(fake_quantize_weight(view, Granularity::Row)),
            &floats(fake_quantize_weight(
                matrix(&x, tokens, cols, &device),
                Granularity::Row,
            )),
            name,
        );
        // Element-wise neighbours are fused where a device does that.
        let doubled = packed.linear(matrix(&x, tokens, cols, &device) * 2.0) + 1.0;
        let plain = packed.linear(matrix(&x, tokens, cols, &device));
        let expected: Vec<f32> = floats(plain).iter().map(|y| 2.0 * y + 1.0).collect();
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        assert_close(&floats(doubled), &expected, 1e-4, name);
    }
}

#[test]
fn no_tokens_are_no_outputs() {
    for rounds_activations in [true, false] {
        let packed = Packed::random(&mut Random(12), 5, 16, Granularity::Row, rounds_activations);
        for (name, device) in devices() {
            let empty = Tensor::<2>::zeros([0, 16], &device.clone().autodiff()).require_grad();
            let y = packed.linear(empty.clone());
            assert_eq!(y.dims(), [0, 5], "{name}");
            let dx = empty.grad(&y.sum().backward()).expect("x is tracked");
            assert_eq!(dx.dims(), [0, 16], "{name}");
            assert_eq!(fake_quantize_activations(empty).dims(), [0, 16], "{name}");
            let nothing = Tensor::<2>::zeros([0, 3], &device);
            let rounded = fake_quantize_weight(nothing, Granularity::Tensor);
            assert_eq!(rounded.dims(), [0, 3], "{name}");
        }
    }
}
