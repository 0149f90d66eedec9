//! Direct preference optimisation: the gradient, and what it does not depend on.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, TensorData};
use firebrick::adapter::Adapter;
use firebrick::config::{
    AdamWPlan, AdapterInit, AdapterPlan, Architecture, LoraShape, OptimizerPlan,
};
use firebrick::data::Batch;
use firebrick::gradient::Gradient;
use firebrick::model::Decoder;
use firebrick::objective::{
    Backward, Objective, PairLoss, Precision, Preference, Sums, backward_with,
};
use firebrick::optimizer::Optimizer;
use support::{batch, distance, tiny};

const LOSS: PairLoss = PairLoss {
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

fn gradients(gradient: &Gradient) -> BTreeMap<String, Vec<f32>> {
    let tensors = gradient.to_tensors().into_iter();
    tensors.map(|(path, data)| (path, floats(&data))).collect()
}

fn objective(reference: &Decoder) -> Preference {
    Preference {
        loss: LOSS,
        reference: reference.clone(),
    }
}

fn backward(
    model: &Decoder,
    reference: &Decoder,
    batches: &[Batch],
    precision: Precision,
) -> Backward {
    backward_with(model, batches, &objective(reference), precision).unwrap()
}

fn trained(steps: usize) -> (Decoder, Decoder) {
    let (reference, mut model) = adapted();
    let mut optimizer = Optimizer::new(&OptimizerPlan::AdamW(AdamWPlan::new(
        [0.9, 0.99],
        1e-8,
        0.0,
    )));
    for _ in 0..steps {
        let result = backward(&model, &reference, &[pairs()], Precision::default());
        model = optimizer.step(model, result.gradient, 2e-2);
    }
    (reference, model)
}

/// Σ r(chosen) - r(rejected).
fn margin(sums: &Sums) -> f64 {
    sums.others[1]
}

#[test]
fn dpo_begins_at_ln_2_and_learns_to_prefer() {
    let (reference, model) = trained(0);
    let first = backward(&model, &reference, &[pairs()], Precision::default());
    assert!((first.loss() - std::f64::consts::LN_2).abs() < 1e-6);
    assert!(margin(&first.sums).abs() < 1e-4);
    let (reference, model) = trained(60);
    let last = backward(&model, &reference, &[pairs()], Precision::default());
    assert!(last.loss() < 0.5, "{}", last.loss());
    assert_eq!(last.weight, 3.0);
    let objective = objective(&reference);
    let metrics = objective.step_metrics(&last.sums, last.weight);
    assert_eq!(metrics.get("reward_accuracy"), Some(1.0));
    assert_eq!(metrics.get("reward_margin"), Some(margin(&last.sums) / 3.0));
    let measured = objective.measure(&model.valid(), &pairs()).unwrap();
    assert!((measured.loss - last.sums.loss).abs() < 1e-4);
    assert!((margin(&measured) - margin(&last.sums)).abs() < 1e-4);
    let evaluated = objective.evaluation_metrics(&measured, 3.0, 0);
    assert_eq!(evaluated.get("val_reward_accuracy"), Some(1.0));
}

#[test]
fn dpo_gradient_is_that_of_the_loss() {
    let (reference, model) = trained(3);
    let result = backward(&model, &reference, &[pairs()], Precision::default());
    let found = gradients(&result.gradient);
    let loss = |adapter: &Adapter| {
        let model = adapter.attach(reference.clone()).unwrap();
        let measured = objective(&reference).measure(&model, &pairs());
        measured.unwrap().loss / 3.0
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
        let result = backward(&model, &reference, batches, precision);
        (result.loss(), gradients(&result.gradient))
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
