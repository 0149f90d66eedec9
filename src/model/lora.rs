//! A low-rank update beside a linear layer: LoRA (Hu et al., 2021) and DoRA (Liu et al., 2024).
//!
//! y = x W + s (x' A) B + b, where W and b stay as they are, A `[in, r]` and B `[r, out]` are
//! trained, and x' is x with dropout. A B is never formed. Layers that read the same x, such as
//! queries, keys and values, multiply it with all their A side by side in one product.
//!
//! DoRA trains the length m of each output's weights apart from their direction:
//!
//! ```text
//! y = m / n (x W + s (x A) B) + b        n = the norms of the columns of W + s A B, `[out]`
//! ```
//!
//! n is taken for a constant in the backward pass (section 4.3 of the paper). It takes no dense
//! matrix either: n² = Σ W² + 2 s Σ (WᵀA)ᵀ B + s² Σ B (AᵀA B), where W appears in a product of r
//! rows with the layer itself, whatever the form of its weights.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor, TensorData};
use firebrick_kernels::layers::add_product;
use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};

use super::init::Init;
use crate::config::LoraShape;
use crate::device::is_cpu;

/// The low-rank update of one layer.
#[derive(Module, Debug)]
pub struct Lora {
    /// A, `[in, r]`; files hold `[r, in]`.
    pub lora_a: Param<Tensor<2>>,
    /// B, `[r, out]`; files hold `[out, r]`.
    pub lora_b: Param<Tensor<2>>,
    /// m, `[out]`, DoRA only.
    pub magnitude: Option<Param<Tensor<1>>>,
    #[module(skip)]
    pub(crate) scale: f64,
    #[module(skip)]
    dropout: f64,
    /// What names its random numbers.
    #[module(skip)]
    path: String,
    /// Σ W² of each output `[out]`, off the autodiff device; DoRA only.
    #[module(skip)]
    squares: Option<Tensor<1>>,
    /// n `[out]`, off the autodiff device, where it was computed beforehand.
    #[module(skip)]
    norms: Option<Tensor<1>>,
}

impl Lora {
    /// For the layer at `path` of so many inputs and outputs. A is uniform within ±1 / sqrt(in)
    /// (Kaiming with a = sqrt(5), as in the authors' code), B is zero, m is one until it is
    /// [set](Self::measure).
    pub(super) fn new(init: &Init, path: &str, dims: [usize; 2], shape: LoraShape) -> Self {
        let [inputs, outputs] = dims;
        let bound = (inputs.max(1) as f64).powf(-0.5);
        Self {
            lora_a: init.uniform(&format!("{path}.lora_A"), [inputs, shape.rank], bound),
            lora_b: init.full([shape.rank, outputs], 0.0),
            magnitude: shape.magnitude.then(|| init.full([outputs], 1.0)),
            scale: shape.scale,
            dropout: shape.dropout,
            path: path.to_string(),
            squares: None,
            norms: None,
        }
    }

    /// r.
    pub fn rank(&self) -> usize {
        self.lora_a.lazy_shape()[1]
    }

    /// What it was made from.
    pub(crate) fn shape(&self) -> LoraShape {
        LoraShape {
            rank: self.rank(),
            scale: self.scale,
            dropout: self.dropout,
            magnitude: self.magnitude.is_some(),
        }
    }

    /// What layers that read the same x `[rows, in]` have in common: x', where anything is dropped,
    /// and x' A of each, `[rows, r]`. The first adapter says what is dropped, for all of them.
    pub(super) fn narrow<const N: usize>(
        adapters: [Option<&Self>; N],
        x: &Tensor<2>,
        dropout: Option<&Dropout>,
    ) -> (Option<Tensor<2>>, [Option<Tensor<2>>; N]) {
        let present: Vec<&Self> = adapters.into_iter().flatten().collect();
        let Some(first) = present.first() else {
            return (None, adapters.map(|_| None));
        };
        let dropped = first.mask(x, dropout).map(|mask| x.clone() * mask);
        let x = dropped.clone().unwrap_or_else(|| x.clone());
        let down: Vec<Tensor<2>> = present.iter().map(|lora| lora.lora_a.val()).collect();
        let together = match <[Tensor<2>; 1]>::try_from(down) {
            Ok([only]) => x.matmul(only),
            Err(several) => x.matmul(Tensor::cat(several, 1)),
        };
        let mut start = 0;
        let low = adapters.map(|adapter| {
            let rank = adapter?.rank();
            start += rank;
            Some(together.clone().narrow(1, start - rank, rank))
        });
        (dropped, low)
    }

    /// y + s (x' A) B of y `[rows, out]` and x' A `[rows, r]`.
    pub(super) fn add(&self, y: Tensor<2>, low: Tensor<2>) -> Tensor<2> {
        if is_cpu(&y.device()) {
            return add_product(y, low.mul_scalar(self.scale), self.lora_b.val());
        }
        y + self.widen(low)
    }

    /// s (x' A) B of x' A `[rows, r]`: `[rows, out]`.
    pub(super) fn widen(&self, low: Tensor<2>) -> Tensor<2> {
        low.mul_scalar(self.scale).matmul(self.lora_b.val())
    }

    /// What x is multiplied with in training, `[rows, in]`: zeros, and one over the share that is
    /// kept. None where nothing is dropped.
    fn mask(&self, x: &Tensor<2>, dropout: Option<&Dropout>) -> Option<Tensor<2>> {
        let dropout = dropout.filter(|_| self.dropout > 0.0)?;
        let values = dropout.mask(self.dropout, &self.path, x.dims()[1]);
        let data = TensorData::new(values, x.dims());
        let mask = Tensor::<2>::from_data(data, &x.device().inner());
        Some(mask.cast(x.dtype()))
    }

    /// m / n `[1, out]` in f32, which has a gradient with respect to m; none without DoRA. `product`
    /// is x W of the layer that this belongs to, off the autodiff device.
    pub(super) fn stretch(
        &self,
        product: impl FnOnce(Tensor<2>) -> Tensor<2>,
    ) -> Option<Tensor<2>> {
        let magnitude = self.magnitude.as_ref()?.val();
        let norms = match &self.norms {
            Some(norms) => norms.clone(),
            None => self.column_norms(product),
        };
        Some(ratio(magnitude, norms).unsqueeze())
    }

    /// Computes n once, for all passes until A or B changes.
    pub(super) fn fix_norms(&mut self, product: impl FnOnce(Tensor<2>) -> Tensor<2>) {
        if self.magnitude.is_some() {
            self.norms = Some(self.column_norms(product));
        }
    }

    /// Takes up Σ W² of each output, `[out]`.
    pub(super) fn set_squares(&mut self, squares: Tensor<1>) {
        self.squares = Some(squares);
    }

    /// Sets m to n: the update begins as nothing.
    pub(super) fn measure(&mut self, product: impl FnOnce(Tensor<2>) -> Tensor<2>) {
        if let Some(magnitude) = self.magnitude.take() {
            let norms = self.column_norms(product);
            let tracked = magnitude.lazy_device().is_autodiff();
            let value = if tracked {
                Tensor::from_inner(norms).require_grad()
            } else {
                norms
            };
            self.magnitude = Some(Param::initialized(magnitude.id, value));
        }
    }

    /// n `[out]`, f32, off the autodiff device.
    fn column_norms(&self, product: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<1> {
        let plain = |x: Tensor<2>| x.inner().cast(DType::F32);
        let (a, b) = (plain(self.lora_a.val()), plain(self.lora_b.val()));
        let crossed = product(a.clone().transpose()).cast(DType::F32);
        let gram = a.clone().transpose().matmul(a);
        let own = gram.matmul(b.clone());
        let update = b * (crossed * 2.0 + own * self.scale) * self.scale;
        let update: Tensor<1> = update.sum_dim(0).squeeze_dim(0);
        // Σ W² is taken when the adapter is attached to its layer.
        let squares = self.squares.clone().expect("an attached adapter");
        // Rounding may take a sum of squares below zero.
        (squares + update).clamp_min(0.0).sqrt()
    }
}

/// m / n of each output; one where n is zero: weights without a length have no direction to stretch.
pub(super) fn ratio(magnitude: Tensor<1>, norms: Tensor<1>) -> Tensor<1> {
    let nothing = norms.clone().equal_elem(0.0);
    let ratio = magnitude / norms.mask_fill(nothing.clone(), 1.0);
    ratio.mask_fill(nothing, 1.0)
}

/// Which inputs of adapters are dropped in a pass over some sequences of a training step: a function
/// of the seed, the number of the sequence within the step, and the layer, so that neither the
/// grouping into micro-batches nor the order of computation changes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dropout {
    /// Of the run and the step.
    pub(crate) seed: [u64; 2],
    /// Number of the first sequence.
    pub(crate) first: u64,
    /// Sequences, and tokens of each.
    pub(crate) dims: [usize; 2],
}

impl Dropout {
    /// `[sequences x tokens, width]`: 0 with probability `share`, else 1 / (1 - share).
    fn mask(&self, share: f64, path: &str, width: usize) -> Vec<f32> {
        let mut key = blake3::Hasher::new_derive_key("firebrick adapter dropout v1");
        self.seed.iter().for_each(|part| {
            key.update(&part.to_le_bytes());
        });
        key.update(path.as_bytes());
        let mut rng = ChaCha8Rng::from_seed(*key.finalize().as_bytes());
        let [rows, cols] = self.dims;
        let (dropped, kept) = ((share * 65536.0) as u32, (1.0 / (1.0 - share)) as f32);
        let mut mask = vec![0.0; rows * cols * width];
        for (row, values) in mask.chunks_mut((cols * width).max(1)).enumerate() {
            rng.set_stream(self.first + row as u64);
            rng.set_word_pos(0);
            for values in values.chunks_mut(2) {
                let bits = rng.next_u32();
                for (value, bits) in values.iter_mut().zip([bits & 0xffff, bits >> 16]) {
                    if bits >= dropped {
                        *value = kept;
                    }
                }
            }
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a1_dropout_is_a_function_of_seed_sequence_and_layer() {
        let whole = Dropout {
            seed: [7, 1],
            first: 0,
            dims: [4, 50],
        };
        let mask = whole.mask(0.25, "layers.0.mlp.up_proj", 33);
        for row in 0..4 {
            let one = Dropout {
                first: row as u64,
                dims: [1, 50],
                ..whole
            };
            let cells = row * 50 * 33..(row + 1) * 50 * 33;
            assert_eq!(one.mask(0.25, "layers.0.mlp.up_proj", 33), mask[cells]);
        }
        assert_ne!(mask, whole.mask(0.25, "layers.1.mlp.up_proj", 33));
        let other = Dropout {
            seed: [7, 2],
            ..whole
        };
        assert_ne!(mask, other.mask(0.25, "layers.0.mlp.up_proj", 33));
        let dropped = mask.iter().filter(|&&value| value == 0.0).count();
        let share = dropped as f64 / mask.len() as f64;
        assert!((share - 0.25).abs() < 0.02, "{share}");
        let mean: f32 = mask.iter().sum::<f32>() / mask.len() as f32;
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
    }
}
