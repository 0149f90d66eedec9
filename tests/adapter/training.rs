//! What an adapter changes in training: nothing but itself.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use firebrick::adapter::Adapter;
use firebrick::config::{AdamWPlan, AdapterPlan, Architecture, LoraShape, OptimizerPlan};
use firebrick::data::Batch;
use firebrick::model::{folder, parameters};
use firebrick::objective::{CrossEntropy, Precision, backward, backward_with};
use firebrick::optimizer::Optimizer;

use super::{
    DORA, LORA, adamw, bases, floats, is_adapter, linear_layers, logits, plan, trainable, trained,
};
use crate::support::{batch, distance, tiny};

#[test]
fn a1_a2_a_new_adapter_changes_nothing_and_learns_without_touching_the_base() {
    for shape in [LORA, DORA] {
        for (name, base) in bases() {
            let (spec, batch) = (base.spec().clone(), batch(3, 8, 13));
            let before = logits(&base, &batch);
            let weights = parameters(&base);
            let model = base.adapted(&plan(&spec, shape), 9).unwrap();
            let error = distance(&before, &logits(&model, &batch));
            assert!(error < 2e-5, "{name} {shape:?}: {error}");

            let mut optimizer = adamw();
            let mut seen: BTreeMap<String, bool> = BTreeMap::new();
            let mut model = model;
            for _ in 0..2 {
                let result = backward(&model, std::slice::from_ref(&batch)).unwrap();
                for (path, gradient) in result.gradient.to_tensors() {
                    assert!(is_adapter(&path), "{name}: {path} is the base's");
                    let moves = floats(&gradient).iter().any(|&value| value != 0.0);
                    *seen.entry(path).or_default() |= moves;
                }
                model = optimizer.step(model, result.gradient, 1e-2);
            }
            let leaves = if shape.magnitude { 3 } else { 2 };
            assert_eq!(seen.len(), leaves * linear_layers(&spec).len(), "{name}");
            let still: Vec<_> = seen.iter().filter(|(_, moves)| !**moves).collect();
            assert!(still.is_empty(), "{name}: no gradient for {still:?}");

            let after = parameters(&model);
            for (path, data) in &weights {
                assert_eq!(data, &after[path], "{name}: {path} has moved");
            }
            assert!(
                distance(&before, &logits(&model, &batch)) > 1e-3,
                "{name}: nothing learned"
            );
        }
    }
}

#[test]
fn a1_the_model_that_was_adapted_can_still_be_trained() {
    let spec = tiny(Architecture::Llama);
    // Nothing of it has been drawn yet.
    let base = trainable(&spec);
    let model = base.clone().adapted(&plan(&spec, LORA), 9).unwrap();
    let batch = [batch(2, 8, 13)];
    let found = backward(&base, &batch).unwrap().gradient.to_tensors();
    assert_eq!(found.len(), parameters(&base).len());
    let found = backward(&model, &batch).unwrap().gradient.to_tensors();
    assert!(found.keys().all(|path| is_adapter(path)));
}

#[test]
fn a1_gradients_are_those_of_a_dense_update() {
    // y = x (W + s A B): the gradient of the dense weight gives those of A and B.
    let spec = tiny(Architecture::Llama);
    let path = "layers.1.mlp.down_proj";
    let only = AdapterPlan {
        layers: BTreeMap::from([(path.to_string(), LORA)]),
        ..plan(&spec, LORA)
    };
    let batch = batch(2, 8, 13);
    let model = trained(trainable(&spec).adapted(&only, 3).unwrap(), &batch, 3);
    let result = backward(&model, std::slice::from_ref(&batch)).unwrap();
    let found = result.gradient.to_tensors();

    let adapter = Adapter::of(&model);
    let update = &adapter.layers[path];
    // The merged model, all of whose weights are trained.
    let dense = folder::hf_tensors(&model.clone().merged());
    let dense = folder::decoder_from_hf(&spec, dense, &Device::flex().autodiff()).unwrap();
    let all = backward(&dense, &[batch]).unwrap();
    let dw = &all.gradient.to_tensors()[&format!("{path}.weight")];
    let matrix = |data: &TensorData| Tensor::<2>::from_data(data.clone(), &Device::flex());
    let (dw, a, b) = (matrix(dw), matrix(&update.a), matrix(&update.b));
    let da = dw.clone().matmul(b.transpose()) * LORA.scale;
    let db = a.transpose().matmul(dw) * LORA.scale;
    for (name, expected) in [("lora_a", da), ("lora_b", db)] {
        let expected = floats(&expected.into_data());
        let found = floats(&found[&format!("{path}.adapter.{name}")]);
        let largest = expected
            .iter()
            .fold(0f32, |max, value| max.max(value.abs()));
        let error = distance(&expected, &found);
        assert!(error < 1e-5 * largest.max(1.0), "{name}: {error}");
    }
}

#[test]
fn a1_checkpointing_stops_below_the_first_adapter_and_gives_the_same() {
    let mut spec = tiny(Architecture::Llama);
    spec.shape.num_hidden_layers = 4;
    let mut upper = plan(&spec, DORA);
    upper
        .layers
        .retain(|path, _| path.starts_with("layers.2") || path.starts_with("layers.3"));
    let batch = batch(4, 8, 13);
    for plan in [upper, plan(&spec, LORA)] {
        let model = trained(trainable(&spec).adapted(&plan, 3).unwrap(), &batch, 2);
        let whole = backward(&model, std::slice::from_ref(&batch)).unwrap();
        let precision = Precision {
            gradient_checkpointing: true,
            ..Precision::default()
        };
        let blockwise = backward_with(
            &model,
            std::slice::from_ref(&batch),
            &CrossEntropy,
            precision,
        )
        .unwrap();
        assert!((whole.sums.loss - blockwise.sums.loss).abs() < 1e-4);
        let (whole, blockwise) = (whole.gradient.to_tensors(), blockwise.gradient.to_tensors());
        assert_eq!(whole.len(), blockwise.len());
        for (path, gradient) in &whole {
            let error = distance(&floats(gradient), &floats(&blockwise[path]));
            assert!(error < 1e-6, "{path}: {error}");
        }
    }
}

#[test]
fn a1_dropout_does_not_depend_on_micro_batches_or_checkpointing() {
    for magnitude in [false, true] {
        let spec = tiny(Architecture::Qwen2);
        let shape = LoraShape {
            dropout: 0.3,
            magnitude,
            ..LORA
        };
        let batch = batch(4, 8, 13);
        let model = trained(
            trainable(&spec).adapted(&plan(&spec, shape), 3).unwrap(),
            &batch,
            2,
        );
        let loss = |batches: &[Batch], seed: Option<[u64; 2]>, gradient_checkpointing| {
            let precision = Precision {
                dropout_seed: seed,
                gradient_checkpointing,
                ..Precision::default()
            };
            backward_with(&model, batches, &CrossEntropy, precision)
                .unwrap()
                .sums
                .loss
        };
        let rows: Vec<Batch> = (0..4).map(|row| batch.rows(row..row + 1)).collect();
        let whole = std::slice::from_ref(&batch);
        let (plain, dropped) = (loss(whole, None, false), loss(whole, Some([1, 1]), false));
        assert!((plain - dropped).abs() > 1e-4, "nothing was dropped");
        assert!((dropped - loss(&rows, Some([1, 1]), false)).abs() < 1e-4);
        assert!((dropped - loss(whole, Some([1, 1]), true)).abs() < 1e-5);
        assert!((dropped - loss(whole, Some([1, 2]), false)).abs() > 1e-4);
        assert!((plain - loss(whole, None, true)).abs() < 1e-4);
    }
}

#[test]
fn a3_lora_plus_is_another_learning_rate_for_b() {
    let spec = tiny(Architecture::Llama);
    let batch = batch(2, 8, 13);
    let step = |ratio: f64| {
        let model = trainable(&spec).adapted(&plan(&spec, LORA), 3).unwrap();
        let result = backward(&model, std::slice::from_ref(&batch)).unwrap();
        // Without decay AdamW's first update is the learning rate with a sign.
        let mut optimizer = Optimizer::new(&OptimizerPlan::AdamW(AdamWPlan::new(
            [0.9, 0.99],
            1e-12,
            0.0,
        )))
        .with_lora_plus(ratio);
        Adapter::of(&optimizer.step(model, result.gradient, 1e-3))
    };
    let (one, sixteen) = (step(1.0), step(16.0));
    for (path, update) in &one.layers {
        assert_eq!(update.a, sixteen.layers[path].a, "{path}");
        let (b, faster) = (floats(&update.b), floats(&sixteen.layers[path].b));
        for (b, faster) in b.iter().zip(faster) {
            assert!((b * 16.0 - faster).abs() < 1e-6, "{path}: {b} {faster}");
        }
    }
}
