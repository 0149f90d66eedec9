//! Products with packed weights, and of rounded operands.

use burn::tensor::{FloatDType, Tensor};
use firebrick_kernels::ternary::{
    Granularity, fake_quantize_activations, fake_quantize_weight, int8_matmul, reference,
};

use super::{
    Packed, Random, assert_close, assert_same, devices, exact_weights, floats, matrix, transposed,
};

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
