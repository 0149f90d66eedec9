//! Ternary weights in training, named by the rows of the design they hold up.
#![allow(missing_docs)]

mod support;

use burn::module::{Module, Param};
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use firebrick::config::{Architecture, Granularity, OptimizerPlan, Ternary};
use firebrick::gradient::{Gradient, Precision, backward, backward_with};
use firebrick::model::{
    Decoder, DecoderSpec, Tensors, VisitParameters, parameters, visit_parameters,
};
use firebrick::optimizer::Optimizer;
use firebrick_kernels::ternary::fake_quantize_weight;
use support::{batch, distance, ternary, tiny};

fn trainable(spec: &DecoderSpec) -> Decoder {
    Decoder::new(spec, 5, &Device::flex().autodiff()).unwrap()
}

fn gradients(model: &Decoder, gradient: &Gradient) -> Tensors {
    struct Collect<'a>(&'a Gradient, Tensors);
    impl VisitParameters for Collect<'_> {
        fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            let gradient = self.0.get(param).expect("every parameter has a gradient");
            self.1.insert(path.to_string(), gradient.into_data());
        }
    }
    let mut collect = Collect(gradient, Tensors::new());
    visit_parameters(model, &mut collect);
    collect.1
}

fn floats(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

fn is_ternary_layer(path: &str) -> bool {
    path.ends_with("_proj.weight")
}

#[test]
fn t1_a_step_with_weights_rounded_once_is_the_step_that_rounds_in_every_pass() {
    for spec in ternary() {
        let model = trainable(&spec);
        let batch = batch(3, 8, 13);
        // The graph of the latent weights, with rounding in it.
        let loss = model.loss(&batch, 1.0 / 24.0).unwrap();
        let through = Gradient::backward(&loss.objective, &model);
        let through = gradients(&model, &through);
        let once = backward(&model, &[batch]).unwrap();
        let once = gradients(&model, &once.gradient);
        for (path, data) in &through {
            let error = distance(&floats(data), &floats(&once[path]));
            assert!(error < 1e-6, "{path}: {error}");
        }
    }
}

#[test]
fn t1_latent_weights_move_and_keep_values_that_are_not_ternary() {
    for spec in ternary() {
        let mut model = trainable(&spec);
        let before = parameters(&model);
        let mut optimizer = Optimizer::new(&OptimizerPlan::AdamW {
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.0,
        });
        for _ in 0..2 {
            let gradient = backward(&model, &[batch(3, 8, 13)]).unwrap().gradient;
            model = optimizer.step(model, gradient, 1e-3);
        }
        for (path, data) in parameters(&model) {
            let moved = floats(&data)
                .iter()
                .zip(floats(&before[&path]))
                .filter(|(after, before)| **after != *before)
                .count();
            assert!(moved > 0, "{path} did not move");
            if is_ternary_layer(&path) {
                let mut values = floats(&data);
                values.sort_by(f32::total_cmp);
                values.dedup();
                assert!(values.len() > 3, "{path} has only {values:?}");
            }
        }
    }
}

#[test]
fn t1_only_the_blocks_linear_layers_are_rounded_and_to_three_values() {
    for mut spec in ternary() {
        spec.shape.tie_word_embeddings = false;
        let model = Decoder::new(&spec, 5, &Device::flex()).unwrap();
        let latent = parameters(&model);
        let rounded = parameters(&model.rounded());
        for (path, data) in rounded {
            if !is_ternary_layer(&path) {
                assert_eq!(data, latent[&path], "{path}");
                continue;
            }
            assert_ne!(data, latent[&path], "{path}");
            if spec.shape.ternary.unwrap().granularity == Granularity::Tensor {
                let mut values = floats(&data);
                values.iter_mut().for_each(|value| *value += 0.0);
                values.sort_by(f32::total_cmp);
                values.dedup();
                assert_eq!(values.len(), 3, "{path}: {values:?}");
                assert_eq!(values[0], -values[2]);
                assert_eq!(values[1], 0.0);
            }
        }
    }
}

#[test]
fn t1_the_straight_through_gradient_is_that_of_the_dense_model_with_rounded_weights() {
    let mut spec = tiny(Architecture::Llama);
    spec.shape.ternary = Some(Ternary {
        granularity: Granularity::Row,
        rounds_activations: false,
        packed: None,
    });
    let model = trainable(&spec);
    let found = backward(&model, &[batch(3, 8, 13)]).unwrap();
    let mut dense = spec.clone();
    dense.shape.ternary = None;
    let rounded = parameters(&model.clone().valid().rounded());
    let device = Device::flex().autodiff();
    let dense = Decoder::new(&dense, 5, &device).unwrap();
    let dense = firebrick::model::with_parameters(dense, rounded, &device).unwrap();
    let expected = backward(&dense, &[batch(3, 8, 13)]).unwrap();
    assert_eq!(found.nats, expected.nats);
    assert_eq!(
        gradients(&model, &found.gradient),
        gradients(&dense, &expected.gradient)
    );
}

#[test]
fn t1_rounding_activations_changes_the_loss_a_little() {
    let loss = |rounds_activations| {
        let mut spec = tiny(Architecture::Bitnet);
        spec.shape.ternary = Some(Ternary {
            granularity: Granularity::Tensor,
            rounds_activations,
            packed: None,
        });
        backward(&trainable(&spec), &[batch(3, 8, 13)])
            .unwrap()
            .loss()
    };
    let difference = (loss(true) - loss(false)).abs();
    assert!(difference > 1e-6 && difference < 0.05, "{difference}");
}

#[test]
fn t1_checkpointing_and_half_precision_work_on_rounded_weights() {
    for spec in ternary() {
        let model = trainable(&spec);
        let run = |precision| backward_with(&model, &[batch(4, 8, 13)], precision).unwrap();
        let plain = run(Precision::default());
        let blockwise = run(Precision {
            gradient_checkpointing: true,
            ..Precision::default()
        });
        assert!((plain.nats - blockwise.nats).abs() < 1e-6 * plain.nats);
        let expected = gradients(&model, &plain.gradient);
        for (path, data) in gradients(&model, &blockwise.gradient) {
            let error = distance(&floats(&data), &floats(&expected[&path]));
            assert!(error < 1e-5, "{path}: {error}");
        }
        let half = run(Precision {
            dtype: FloatDType::BF16,
            ..Precision::default()
        });
        let difference = (half.loss() - plain.loss()).abs();
        assert!(difference < 0.05, "bf16 is off by {difference}");
    }
}

#[test]
fn t1_the_hand_case() {
    let device = Device::flex();
    let weight = Tensor::<2>::from_data([[1.0], [-1.0], [0.5], [-0.5]], &device);
    let rounded = fake_quantize_weight(weight, Granularity::Tensor);
    assert_eq!(floats(&rounded.into_data()), [0.75, -0.75, 0.75, -0.75]);
}
