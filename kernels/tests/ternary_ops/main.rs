//! Every ternary operation, forward and backward, on every device that is compiled in, against the
//! scalar reference. Kernels are compiled when first used and take sizes as arguments: many shapes
//! cost little, and each test takes all its devices in turn.
#![allow(missing_docs)]

mod products;
mod rounding;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_kernels::ternary::layout::compute;
use firebrick_kernels::ternary::{Granularity, PackedShape, Way, reference, ternary_linear, ways};

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
