//! Products with blockwise weights, forward and backward, on every device that is compiled in, against the scalar
//! reference. Kernels are compiled when first used and take sizes as arguments: many shapes cost little, and each test
//! takes all its devices in turn.
#![allow(missing_docs)]

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use firebrick_kernels::Way;
use firebrick_kernels::blockwise::{
    BlockwiseOps, BlockwiseShape, Format, Quantised, blockwise_linear, quantise, reference, ways,
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

fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= tolerance, "{what}, {i}: {found} for {expected}");
    }
}

/// Weights of a shape, no block like its neighbour.
fn quantised(random: &mut Random, shape: BlockwiseShape) -> Quantised {
    let mut weights = random.values(shape.elements());
    for (i, weights) in weights.chunks_mut(shape.block).enumerate() {
        let (size, shift) = ((i % 7 + 1) as f32 / 4.0, (i % 5) as f32 / 5.0 - 0.4);
        weights.iter_mut().for_each(|w| *w = size * (*w + shift));
    }
    quantise(&weights, shape).unwrap()
}

fn linear(x: Tensor<2>, weights: &Quantised) -> Tensor<2> {
    let (words, scales, side) = weights.operands().into_tensors(&x.device());
    blockwise_linear(x, words, scales, side, weights.shape())
}

fn shape(format: Format, rows: usize, cols: usize, block: usize, double: bool) -> BlockwiseShape {
    BlockwiseShape {
        rows,
        cols,
        format,
        block,
        double,
    }
}

/// All formats; blocks that rows are made of, that go across their ends, and that are rows; short last blocks.
fn shapes() -> Vec<BlockwiseShape> {
    let mut shapes = Vec::new();
    for format in Format::ALL {
        shapes.extend([
            shape(format, 40, 128, 64, false),
            shape(format, 40, 128, 64, true),
            shape(format, 21, 100, 64, true),
            shape(format, 3, 37, 10, false),
            shape(format, 70, 48, 48, false),
            // More than 256 blocks, so that scales have scales.
            shape(format, 33, 320, 32, true),
        ]);
    }
    shapes
}

#[test]
fn products_and_gradients_are_near_the_reference() {
    let mut random = Random(1);
    for shape in shapes() {
        let BlockwiseShape { rows, cols, .. } = shape;
        let weights = quantised(&mut random, shape);
        let dense = weights.dequantise();
        for tokens in [1, 3, 17, 70] {
            let (x, dy) = (random.values(tokens * cols), random.values(tokens * rows));
            let sizes = [tokens, rows, cols];
            let expected = reference::linear_f64(&x, &dense, sizes);
            let expected_dx = reference::linear_dx_f64(&dy, &dense, sizes);
            for (name, device) in devices() {
                let what = format!("{name} {tokens} {shape:?}");
                let device = device.autodiff();
                let x = matrix(&x, tokens, cols, &device).require_grad();
                let y = linear(x.clone(), &weights);
                assert_eq!(y.dims(), [tokens, rows], "{what}");
                let tolerance = 4e-6 * (cols + rows) as f64;
                assert_close(&floats(y.clone().inner()), &expected, tolerance, &what);
                let dy = matrix(&dy, tokens, rows, &device);
                let grads = (y * dy).sum().backward();
                let dx = floats(x.grad(&grads).expect("x is tracked"));
                assert_close(&dx, &expected_dx, tolerance, &what);
            }
        }
    }
}

/// dx of a token, against differences of y: the product is linear, so that they are exact but for rounding.
#[test]
fn gradients_are_differences() {
    let shape = shape(Format::Nf4, 20, 64, 64, true);
    let weights = quantised(&mut Random(2), shape);
    let x = Random(3).values(64);
    for (name, device) in devices() {
        let tracked = matrix(&x, 1, 64, &device.clone().autodiff()).require_grad();
        let grads = linear(tracked.clone(), &weights).sum().backward();
        let dx = floats(tracked.grad(&grads).expect("x is tracked"));
        let sum = |x: &[f32]| -> f64 {
            let y = floats(linear(matrix(x, 1, 64, &device), &weights));
            y.into_iter().map(f64::from).sum()
        };
        for i in [0, 7, 63] {
            let (mut up, mut down) = (x.clone(), x.clone());
            (up[i], down[i]) = (up[i] + 0.5, down[i] - 0.5);
            let expected = sum(&up) - sum(&down);
            assert!((f64::from(dx[i]) - expected).abs() < 1e-4, "{name} {i}");
        }
    }
}

/// The gradient's own gradient is the product.
#[test]
fn gradients_have_gradients() {
    let shape = shape(Format::Int4Affine, 20, 64, 32, false);
    let weights = quantised(&mut Random(4), shape);
    let (dy, z) = (Random(5).values(3 * 20), Random(6).values(3 * 64));
    for (name, device) in devices() {
        let device = device.autodiff();
        let dy = matrix(&dy, 3, 20, &device).require_grad();
        let (words, scales, side) = weights.operands().into_tensors(&device);
        let dx = Tensor::<2>::from_dispatch(Dispatch::blockwise_linear_dx(
            dy.clone().into_dispatch(),
            words.into_dispatch(),
            scales.into_dispatch(),
            side.into_dispatch(),
            shape,
        ));
        let grads = (dx * matrix(&z, 3, 64, &device)).sum().backward();
        let found = floats(dy.grad(&grads).expect("dy is tracked"));
        let expected = reference::linear_f64(&z, &weights.dequantise(), [3, 20, 64]);
        assert_close(&found, &expected, 1e-4, name);
    }
}

#[test]
fn half_precision_is_multiplied_in_f32_and_stored_as_it_came() {
    let shape = shape(Format::Nf4, 33, 128, 64, true);
    let weights = quantised(&mut Random(7), shape);
    for tokens in [1, 20] {
        let x = Random(8).values(tokens * 128);
        for (name, device) in devices() {
            for dtype in [FloatDType::BF16, FloatDType::F16] {
                if !device.supports_dtype(dtype) {
                    continue;
                }
                let what = format!("{name} {dtype:?}");
                let narrow = matrix(&x, tokens, 128, &device).cast(dtype);
                let wide = floats(narrow.clone().cast(FloatDType::F32));
                let y = linear(narrow, &weights);
                assert_eq!(y.dtype(), DType::from(dtype), "{what}");
                let expected =
                    reference::linear_f64(&wide, &weights.dequantise(), [tokens, 33, 128]);
                // bf16 has eight bits: half of the last of a sum below 32.
                assert_close(&floats(y), &expected, 0.0625 + 1e-3, &what);
            }
        }
    }
}

/// What comes in may be a view of something else, and what goes out is a tensor like any other.
#[test]
fn operations_take_views_and_stand_among_others() {
    let (tokens, rows, cols) = (6, 20, 64);
    let mut random = Random(11);
    let weights = quantised(&mut random, shape(Format::Nf4, rows, cols, 64, true));
    let wide = random.values(tokens * (cols + 3));
    let x: Vec<f32> = (0..tokens * cols)
        .map(|i| wide[i / cols * (cols + 3) + i % cols + 2])
        .collect();
    let expected = reference::linear_f64(&x, &weights.dequantise(), [tokens, rows, cols]);
    for (name, device) in devices() {
        let view = matrix(&wide, tokens, cols + 3, &device).slice([0..tokens, 2..cols + 2]);
        assert_close(&floats(linear(view, &weights)), &expected, 1e-3, name);
        let turned: Vec<f32> = (0..tokens * cols)
            .map(|i| x[i % tokens * cols + i / tokens])
            .collect();
        let view = matrix(&turned, cols, tokens, &device).transpose();
        assert_close(&floats(linear(view, &weights)), &expected, 1e-3, name);
        // Element-wise neighbours are fused where a device does that.
        let doubled = linear(matrix(&x, tokens, cols, &device) * 2.0, &weights) + 1.0;
        let expected: Vec<f64> = expected.iter().map(|y| 2.0 * y + 1.0).collect();
        assert_close(&floats(doubled), &expected, 2e-3, name);
    }
}

#[test]
fn no_tokens_are_no_outputs() {
    let weights = quantised(&mut Random(12), shape(Format::Nf4, 5, 16, 16, false));
    for (name, device) in devices() {
        let empty = Tensor::<2>::zeros([0, 16], &device.autodiff()).require_grad();
        let y = linear(empty.clone(), &weights);
        assert_eq!(y.dims(), [0, 5], "{name}");
        let dx = empty.grad(&y.sum().backward()).expect("x is tracked");
        assert_eq!(dx.dims(), [0, 16], "{name}");
    }
}

#[test]
fn each_operation_says_how_it_runs() {
    for (name, device) in devices() {
        let found = ways(&device);
        let operations: Vec<&str> = found.iter().map(|(operation, _)| *operation).collect();
        assert_eq!(operations, ["blockwise_linear", "blockwise_linear_dx"]);
        for (operation, way) in found {
            match name {
                "flex" => assert!(matches!(way, Way::Simd(_)), "{operation}: {way}"),
                _ => assert_eq!(way, Way::CubeCl, "{name} {operation}"),
            }
        }
        assert_eq!(ways(&device.clone().autodiff()), ways(&device), "{name}");
    }
}

#[test]
#[should_panic(expected = "x is [tokens, 16]")]
fn x_of_another_width_is_refused() {
    let weights = quantised(&mut Random(13), shape(Format::Nf4, 5, 16, 16, false));
    linear(Tensor::<2>::zeros([2, 17], &Device::flex()), &weights);
}
