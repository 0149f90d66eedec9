//! Initial weights: a function of (seed, parameter path), nothing else.
//!
//! Each parameter draws from its own ChaCha stream, so neither the order of construction nor the
//! device changes a value, and adding a layer leaves the others as they were.

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal, StandardUniform};

/// Where initial values come from.
#[derive(Debug, Clone)]
pub(super) struct Init {
    seed: u64,
    device: Device,
}

impl Init {
    pub(super) fn new(seed: u64, device: &Device) -> Self {
        Self {
            seed,
            device: device.clone(),
        }
    }

    /// N(0, std²), drawn when first used, so that counting parameters costs nothing.
    pub(super) fn normal<const D: usize>(
        &self,
        path: &str,
        shape: [usize; D],
        std: f64,
    ) -> Param<Tensor<D>> {
        let (seed, path) = (self.seed, path.to_string());
        self.lazy(shape, move |device| {
            let mut rng = stream(seed, &path);
            let values: Vec<f32> = StandardNormal
                .sample_iter(&mut rng)
                .take(shape.iter().product())
                .map(|unit: f32| unit * std as f32)
                .collect();
            Tensor::from_data(TensorData::new(values, shape), device)
        })
    }

    /// Uniform within ±`bound`, drawn when first used.
    pub(super) fn uniform<const D: usize>(
        &self,
        path: &str,
        shape: [usize; D],
        bound: f64,
    ) -> Param<Tensor<D>> {
        let (seed, path) = (self.seed, path.to_string());
        self.lazy(shape, move |device| {
            let mut rng = stream(seed, &path);
            let values: Vec<f32> = StandardUniform
                .sample_iter(&mut rng)
                .take(shape.iter().product())
                .map(|unit: f32| (2.0 * unit - 1.0) * bound as f32)
                .collect();
            Tensor::from_data(TensorData::new(values, shape), device)
        })
    }

    /// The same value everywhere.
    pub(super) fn full<const D: usize>(&self, shape: [usize; D], value: f32) -> Param<Tensor<D>> {
        self.lazy(shape, move |device| Tensor::full(shape, value, device))
    }

    /// Packed weights that are to be loaded: their bytes have no random values of their own.
    pub(super) fn words<const D: usize>(&self, shape: [usize; D]) -> Param<Tensor<D, Int>> {
        Param::uninitialized(
            ParamId::new(),
            move |device, _| Tensor::zeros(shape, (device, DType::U32)),
            self.device.clone(),
            false,
            shape.into(),
        )
    }

    fn lazy<const D: usize>(
        &self,
        shape: [usize; D],
        value: impl FnOnce(&Device) -> Tensor<D> + Send + Sync + 'static,
    ) -> Param<Tensor<D>> {
        Param::uninitialized(
            ParamId::new(),
            move |device, require_grad| {
                let tensor = value(device);
                if require_grad {
                    tensor.require_grad()
                } else {
                    tensor
                }
            },
            self.device.clone(),
            true,
            shape.into(),
        )
    }
}

fn stream(seed: u64, path: &str) -> ChaCha8Rng {
    let mut key = blake3::Hasher::new_derive_key("firebrick initial weights v1");
    key.update(&seed.to_le_bytes());
    key.update(path.as_bytes());
    ChaCha8Rng::from_seed(*key.finalize().as_bytes())
}
