//! What adapters begin as, other than nothing.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use firebrick_kernels::blockwise::{BlockwiseShape, Quantised, quantise};

use super::{Adapter, AdapterError};
use crate::config::{AdapterInit, AdapterPlan, Blockwise, DecoderSpec, LoraShape};
use crate::model::folder::{load_quantising, transpose};
use crate::model::{Decoder, ModelError};
use crate::svd::largest_factors;

/// Gives every adapter the largest singular directions of its layer's weights, and leaves the rest to
/// the weights (PiSSA: Meng et al., 2024): W = W' + s A B, where s A B is the best approximation of W
/// of that rank, and A and B share its singular values evenly. What the model computes stays the
/// same. Returns the adapter as it begins, which [`Adapter::since`] needs.
pub(crate) fn pissa(mut model: Decoder, plan: &AdapterPlan, seed: u64) -> (Decoder, Adapter) {
    for (path, shape) in &plan.layers {
        let Some(layer) = model.linear_mut(path) else {
            continue;
        };
        let w = layer.dense_weight();
        let factors = scaled_factors(&w, shape, seed);
        layer.set_weight(w - product(&factors, shape));
        layer.set_factors(factors);
    }
    let beginning = Adapter::of(&model);
    (model, beginning)
}

/// Loads a base model's dense weights as the codes that `spec` says, with the adapters of `plan`
/// beside them, which begin as it says.
///
/// # Errors
/// As [`load_quantising`]; a weight that is not finite.
pub(crate) fn quantised(
    spec: &DecoderSpec,
    blockwise: Blockwise,
    folder: &Path,
    (plan, seed): (&AdapterPlan, u64),
    device: &Device,
) -> Result<Decoder, AdapterError> {
    let mut factors: BTreeMap<String, [Tensor<2>; 2]> = BTreeMap::new();
    let mut quantiser = |path: &str, weights: &[f32], [outputs, inputs]: [usize; 2]| {
        let of = Blocks {
            path,
            shape: blockwise.of_matrix([inputs, outputs]),
        };
        let rounds = match plan.init {
            AdapterInit::Default => 0,
            AdapterInit::Pissa => 1,
            AdapterInit::Loftq => plan.loftq_iterations,
        };
        let Some(lora) = plan.layers.get(path).filter(|_| rounds > 0) else {
            return of.codes(weights);
        };
        let w = of.matrix(weights);
        if plan.init == AdapterInit::Pissa {
            let own = scaled_factors(&w, lora, seed);
            let codes = of.codes_of(w - product(&own, lora))?;
            factors.insert(path.to_string(), own);
            return Ok(codes);
        }
        // Li et al., 2023, algorithm 1.
        let mut codes = of.codes(weights)?;
        for round in 1..=rounds {
            let lost = w.clone() - of.matrix(&codes.dequantise());
            let own = scaled_factors(&lost, lora, seed);
            if round < rounds {
                codes = of.codes_of(w.clone() - product(&own, lora))?;
            }
            factors.insert(path.to_string(), own);
        }
        Ok(codes)
    };
    let base = load_quantising(spec, folder, device, &mut quantiser)?;
    let mut model = base.adapted(plan, seed)?;
    for (path, factors) in factors {
        if let Some(layer) = model.linear_mut(&path) {
            layer.set_factors(factors);
        }
    }
    Ok(model)
}

/// A matrix that becomes codes.
struct Blocks<'a> {
    path: &'a str,
    shape: BlockwiseShape,
}

impl Blocks<'_> {
    /// Of weights `[out, in]`, row after row.
    fn codes(&self, weights: &[f32]) -> Result<Quantised, ModelError> {
        quantise(weights, self.shape).map_err(|source| ModelError::Quantised {
            name: self.path.to_string(),
            source,
        })
    }

    /// Of weights `[in, out]`.
    fn codes_of(&self, weights: Tensor<2>) -> Result<Quantised, ModelError> {
        let values: Vec<f32> = weights.transpose().into_data().iter::<f32>().collect();
        self.codes(&values)
    }

    /// Weights `[out, in]`, row after row, as `[in, out]` on the CPU.
    fn matrix(&self, weights: &[f32]) -> Tensor<2> {
        let BlockwiseShape { rows, cols, .. } = self.shape;
        let turned = transpose(weights, rows, cols);
        Tensor::from_data(TensorData::new(turned, [cols, rows]), &Device::flex())
    }
}

/// A and B whose product, times the adapter's scale, is the best approximation of W of its rank.
fn scaled_factors(w: &Tensor<2>, shape: &LoraShape, seed: u64) -> [Tensor<2>; 2] {
    let share = shape.scale.sqrt().recip();
    largest_factors(w, shape.rank, seed).map(|factor| factor * share)
}

/// s A B.
fn product([a, b]: &[Tensor<2>; 2], shape: &LoraShape) -> Tensor<2> {
    a.clone().matmul(b.clone()) * shape.scale
}

impl Adapter {
    /// This adapter as an update of the weights before [`pissa`] took its directions out of them:
    /// s (A B - A0 B0), of twice the rank.
    ///
    /// # Errors
    /// As [`Adapter::mix`].
    pub(crate) fn since(&self, beginning: &Adapter) -> Result<Self, AdapterError> {
        let bare = |adapter: &Adapter| Adapter {
            layers: adapter.layers.clone(),
            ..Adapter::default()
        };
        let change = Adapter::mix(&[(&bare(self), 1.0), (&bare(beginning), -1.0)])?;
        Ok(Self {
            layers: change.layers,
            ..self.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use burn::module::Module;
    use burn::tensor::Device;

    use super::*;
    use crate::config::{AdapterInit, DecoderSpec, LoraShape, Preset};
    use crate::data::Batch;

    fn values(x: burn::tensor::Tensor<2>) -> Vec<f32> {
        x.into_data().iter::<f32>().collect()
    }

    fn distance(a: &[f32], b: &[f32]) -> f32 {
        let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, f32::max)
    }

    #[test]
    fn a3_pissa_takes_out_of_the_weights_what_it_begins_with() {
        let spec = DecoderSpec {
            shape: Preset::Stories260K.shape(),
            vocab_size: 32,
            eos_token_id: None,
            bos_token_id: None,
        };
        let shape = LoraShape {
            rank: 4,
            scale: 2.5,
            dropout: 0.0,
            magnitude: false,
        };
        let layers = spec.shape.linear_layers(32).into_iter();
        let plan = AdapterPlan {
            layers: layers
                .map(|layer| (layer.path, shape))
                .collect::<BTreeMap<_, _>>(),
            saved: Vec::new(),
            init: AdapterInit::Pissa,
            loftq_iterations: 1,
            lora_plus_ratio: 1.0,
        };
        let base = Decoder::new(&spec, 3, &Device::flex().autodiff()).unwrap();
        let batch = Batch::of_row(&[1, 2, 3, 30, 4, 5]);
        let before = values(base.valid().forward(&batch).unwrap());
        let model = base.clone().adapted(&plan, 1).unwrap();
        let (model, beginning) = pissa(model, &plan, 1);
        assert!(distance(&before, &values(model.valid().forward(&batch).unwrap())) < 1e-4);
        for (path, update) in &beginning.layers {
            let w = values(base.linear(path).unwrap().dense_weight());
            let rest = model.linear(path).unwrap().dense_weight();
            let [a, b] = [&update.a, &update.b]
                .map(|data| burn::tensor::Tensor::<2>::from_data(data.clone(), &Device::flex()));
            let whole = values(rest.clone() + a.matmul(b) * update.scale);
            assert!(distance(&w, &whole) < 1e-6, "{path}");
            // The largest directions are gone.
            let norm = |values: &[f32]| values.iter().map(|v| v * v).sum::<f32>();
            assert!(norm(&values(rest)) < 0.95 * norm(&w), "{path}");
        }
        // As an adapter of the base model it is nothing yet, and moves with what is learned.
        let change = beginning.since(&beginning).unwrap();
        let same = change.attach(base.valid()).unwrap();
        assert!(distance(&before, &values(same.forward(&batch).unwrap())) < 1e-4);
        assert_eq!(change.layers.values().next().unwrap().rank(), 8);
    }
}
