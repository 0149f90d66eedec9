//! What adapters begin as, other than nothing.

use super::svd::largest_factors;
use super::{Adapter, AdapterError};
use crate::config::AdapterPlan;
use crate::model::Decoder;

/// Gives every adapter the largest singular directions of its layer's weights, and leaves the rest to
/// the weights (PiSSA: Meng et al., 2024): W = W' + s A B, where s A B is the best approximation of W
/// of that rank, and A and B share its singular values evenly. What the model computes stays the
/// same. Returns the adapter as it begins, which [`Adapter::since`] needs.
///
/// # Errors
/// [`AdapterError::Model`] for a plan of another model.
pub(crate) fn pissa(
    mut model: Decoder,
    plan: &AdapterPlan,
    seed: u64,
) -> Result<(Decoder, Adapter), AdapterError> {
    for (path, shape) in &plan.layers {
        let Some(layer) = model.linear_mut(path) else {
            continue;
        };
        let w = layer.dense_weight();
        let [a, b] = largest_factors(&w, shape.rank, seed);
        let share = shape.scale.sqrt().recip();
        let (a, b) = (a * share, b * share);
        let rest = w - a.clone().matmul(b.clone()) * shape.scale;
        layer.set_weight(rest);
        layer.set_factors([a, b]);
    }
    let beginning = Adapter::of(&model);
    Ok((model, beginning))
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
            lora_plus_ratio: 1.0,
        };
        let base = Decoder::new(&spec, 3, &Device::flex().autodiff()).unwrap();
        let batch = Batch::of_row(&[1, 2, 3, 30, 4, 5]);
        let before = values(base.valid().forward(&batch).unwrap());
        let model = base.clone().adapted(&plan, 1).unwrap();
        let (model, beginning) = pissa(model, &plan, 1).unwrap();
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
