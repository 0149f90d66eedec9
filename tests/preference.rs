//! Direct preference optimisation: the gradient, and what it does not depend on.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebrick::adapter::Adapter;
use firebrick::config::{AdapterInit, AdapterPlan, Architecture, LoraShape, OptimizerPlan};
use firebrick::data::Batch;
use firebrick::gradient::{
    Gradient, Precision, Preference, backward_preference, evaluate_preference,
};
use firebrick::model::{Decoder, VisitParameters, visit_parameters};
use firebrick::optimizer::Optimizer;
use support::{batch, distance, tiny};

const PREFERENCE: Preference = Preference {
    beta: 0.3,
    label_smoothing: 0.1,
};

fn adapted() -> (Decoder, Decoder) {
    let spec = tiny(Architecture::Llama);
    let base = Decoder::new(&spec, 5, &Device::flex().autodiff()).unwrap();
    let shape = LoraShape {
        rank: 3,
        scale: 2.0,
        dropout: 0.0,
        magnitude: false,
    };
    let paths = ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"];
    let plan = AdapterPlan {
        layers: paths
            .map(|path| (path.to_string(), shape))
            .into_iter()
            .collect(),
        saved: Vec::new(),
        init: AdapterInit::Default,
        loftq_iterations: 1,
        lora_plus_ratio: 1.0,
    };
    (base.valid(), base.adapted(&plan, 1).unwrap())
}

/// Three pairs; the first tokens are the prompt's and are not trained.
fn pairs() -> Batch {
    let mut batch = batch(6, 8, 13);
    for row in 0..6 {
        batch.weights[row * 8..row * 8 + 3].fill(0.0);
        // Answers of different lengths.
        batch.weights[row * 8 + 5 + row % 3..(row + 1) * 8].fill(0.0);
    }
    batch
}

fn floats(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

fn gradients(model: &Decoder, gradient: &Gradient) -> BTreeMap<String, Vec<f32>> {
    struct Collect<'a>(&'a Gradient, BTreeMap<String, Vec<f32>>);
    impl VisitParameters for Collect<'_> {
        fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.get(param) {
                self.1
                    .insert(path.to_string(), floats(&gradient.into_data()));
            }
        }
    }
    let mut collect = Collect(gradient, BTreeMap::new());
    visit_parameters(model, &mut collect);
    collect.1
}

fn trained(steps: usize) -> (Decoder, Decoder) {
    let (reference, mut model) = adapted();
    let mut optimizer = Optimizer::new(&OptimizerPlan::AdamW {
        betas: [0.9, 0.99],
        eps: 1e-8,
        weight_decay: 0.0,
    });
    for _ in 0..steps {
        let how = (PREFERENCE, Precision::default());
        let result = backward_preference(&model, &reference, &[pairs()], how).unwrap();
        model = optimizer.step(model, result.gradient, 2e-2);
    }
    (reference, model)
}

#[test]
fn dpo_begins_at_ln_2_and_learns_to_prefer() {
    let (reference, model) = trained(0);
    let how = (PREFERENCE, Precision::default());
    let first = backward_preference(&model, &reference, &[pairs()], how).unwrap();
    assert!((first.loss() - std::f64::consts::LN_2).abs() < 1e-6);
    assert!(first.margin.abs() < 1e-4);
    let (reference, model) = trained(60);
    let last = backward_preference(&model, &reference, &[pairs()], how).unwrap();
    assert!(last.loss() < 0.5, "{}", last.loss());
    assert_eq!((last.won, last.pairs), (3.0, 3.0));
    let [nats, won, margin] =
        evaluate_preference(&model.valid(), &reference, &pairs(), PREFERENCE).unwrap();
    assert!((nats - last.nats).abs() < 1e-4 && won == last.won);
    assert!((margin - last.margin).abs() < 1e-4);
}

#[test]
fn dpo_gradient_is_that_of_the_loss() {
    let (reference, model) = trained(3);
    let how = (PREFERENCE, Precision::default());
    let result = backward_preference(&model, &reference, &[pairs()], how).unwrap();
    let found = gradients(&model, &result.gradient);
    let loss = |adapter: &Adapter| {
        let model = adapter.attach(reference.clone()).unwrap();
        let score = evaluate_preference(&model, &reference, &pairs(), PREFERENCE).unwrap();
        score[0] / 3.0
    };
    let adapter = Adapter::of(&model);
    let path = "layers.1.mlp.down_proj";
    let gradient = &found[&format!("{path}.adapter.lora_b")];
    // Along the gradient itself, where rounding matters least.
    let length = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
    let moved = |step: f32| {
        let mut moved = adapter.clone();
        let update = moved.layers.get_mut(path).unwrap();
        let b = floats(&update.b);
        let b: Vec<f32> = b
            .iter()
            .zip(gradient)
            .map(|(b, g)| b + step * g / length)
            .collect();
        update.b = TensorData::new(b, update.b.shape().clone());
        loss(&moved)
    };
    let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
    assert!(
        (slope / f64::from(length) - 1.0).abs() < 1e-2,
        "{slope} {length}"
    );
}

#[test]
fn dpo_does_not_depend_on_micro_batches_or_checkpointing() {
    let (reference, model) = trained(3);
    let all = pairs();
    let gradient = |batches: &[Batch], gradient_checkpointing| {
        let precision = Precision {
            gradient_checkpointing,
            ..Precision::default()
        };
        let how = (PREFERENCE, precision);
        let result = backward_preference(&model, &reference, batches, how).unwrap();
        (result.loss(), gradients(&model, &result.gradient))
    };
    let single: Vec<Batch> = (0..3)
        .map(|pair| all.rows(2 * pair..2 * pair + 2))
        .collect();
    let (loss, whole) = gradient(std::slice::from_ref(&all), false);
    for (other, found) in [gradient(&single, false), gradient(&[all], true)] {
        assert!((loss - other).abs() < 1e-6);
        assert_eq!(whole.len(), found.len());
        for (path, gradient) in &whole {
            assert!(distance(gradient, &found[path]) < 1e-6, "{path}");
        }
    }
}
