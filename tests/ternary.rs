//! Ternary weights in training, named by the rows of the design they hold up.
#![allow(missing_docs)]

mod support;

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use firebrick::config::{
    AdamWPlan, Architecture, Granularity, OptimizerPlan, PackedLayout, SaveDtype, Ternary,
};
use firebrick::generate::{Request, Sampling, generate};
use firebrick::gradient::Gradient;
use firebrick::model::folder::{self, SaveOptions};
use firebrick::model::{Decoder, DecoderSpec, ModelError, parameters};
use firebrick::objective::{CrossEntropy, Precision, backward, backward_with};
use firebrick::optimizer::Optimizer;
use firebrick_kernels::ternary::fake_quantize_weight;
use support::{batch, distance, ternary, tiny};

fn trainable(spec: &DecoderSpec) -> Decoder {
    Decoder::new(spec, 5, &Device::flex().autodiff()).unwrap()
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
        let through = through.to_tensors();
        let once = backward(&model, &[batch]).unwrap();
        let once = once.gradient.to_tensors();
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
        let mut optimizer = Optimizer::new(&OptimizerPlan::AdamW(AdamWPlan::new(
            [0.9, 0.95],
            1e-8,
            0.0,
        )));
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
    assert_eq!(found.sums.loss, expected.sums.loss);
    let expected = expected.gradient.to_tensors();
    assert_eq!(found.gradient.to_tensors(), expected);
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
        let run = |precision| {
            backward_with(&model, &[batch(4, 8, 13)], &CrossEntropy, precision).unwrap()
        };
        let plain = run(Precision::default());
        let blockwise = run(Precision {
            gradient_checkpointing: true,
            ..Precision::default()
        });
        assert!((plain.sums.loss - blockwise.sums.loss).abs() < 1e-6 * plain.sums.loss);
        let expected = plain.gradient.to_tensors();
        for (path, data) in blockwise.gradient.to_tensors() {
            let error = distance(&floats(&data), &floats(&expected[&path]));
            assert!(error < 1e-5, "{path}: {error}");
        }
        let half = run(Precision {
            dtype: FloatDType::BF16,
            ..Precision::default()
        });
        for (path, data) in half.gradient.to_tensors() {
            let expected = floats(&expected[&path]);
            let largest = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
            let error = distance(&floats(&data), &expected) / largest;
            assert!(error < 0.2, "{path} in bf16: {error} of its largest");
        }
    }
}

#[test]
fn t1_the_hand_case() {
    let device = Device::flex();
    let weight = Tensor::<2>::from_data([[1.0], [-1.0], [0.5], [-0.5]], &device);
    let rounded = fake_quantize_weight(weight, Granularity::Tensor);
    assert_eq!(floats(&rounded.into_data()), [0.75, -0.75, 0.75, -0.75]);
}

/// How far two ways to compute the same may be apart. Where activations are rounded, a sum that is
/// off by its last bit turns into the next code now and then, and a code is 1/127 of the largest.
fn tolerance(spec: &DecoderSpec) -> f32 {
    let rounds = spec.shape.ternary.unwrap().rounds_activations;
    if rounds { 0.05 } else { 1e-5 }
}

fn prompt() -> Request {
    Request {
        prompt: vec![1, 5, 2],
        max_new_tokens: 12,
        sampling: Sampling::default(),
        seed: 0,
        vocabulary: None,
    }
}

#[test]
fn t3_a_packed_model_computes_what_the_fake_quantised_one_does() {
    for spec in ternary() {
        let latent = Decoder::new(&spec, 5, &Device::flex()).unwrap();
        let packed = latent.clone().packed(PackedLayout::Compute).unwrap();
        let [expected, found] = [&latent, &packed].map(|model| {
            let logits = model.forward(&batch(3, 8, 13)).unwrap().into_data();
            let tokens = generate(model, &prompt(), |_| ControlFlow::Continue(())).unwrap();
            (floats(&logits), tokens.tokens)
        });
        let error = distance(&expected.0, &found.0);
        assert!(error < tolerance(&spec), "{:?}: {error}", spec.shape);
        assert_eq!(expected.1, found.1, "{:?}", spec.shape);
    }
}

#[test]
fn t3_gradients_pass_through_a_packed_model_to_what_is_not_packed() {
    for spec in ternary() {
        let model = trainable(&spec);
        let packed = model.clone().packed(PackedLayout::Compute).unwrap();
        let [expected, found] = [&model, &packed].map(|model| {
            let loss = model.loss(&batch(3, 8, 13), 1.0 / 24.0).unwrap();
            let gradient = Gradient::backward(&loss.objective, model);
            let embedding = gradient.get::<2>("embed_tokens.weight");
            floats(&embedding.expect("the embedding has one").into_data())
        });
        let error = distance(&expected, &found);
        assert!(error < tolerance(&spec), "{:?}: {error}", spec.shape);
    }
}

#[test]
fn t2_packed_weights_take_two_bits_or_one_and_three_fifths() {
    let mut spec = tiny(Architecture::Llama);
    // Multiples of 16 and of 5: no padding.
    spec.shape.hidden_size = 80;
    spec.shape.num_attention_heads = 5;
    spec.shape.num_key_value_heads = 5;
    spec.shape.head_dim = 16;
    spec.shape.intermediate_size = 240;
    spec.shape.ternary = Some(Ternary {
        granularity: Granularity::Row,
        rounds_activations: true,
        packed: None,
    });
    let weights = spec.shape.block_parameters() as usize;
    let latent = Decoder::new(&spec, 5, &Device::flex()).unwrap();
    for (layout, fifths_of_a_bit) in [(PackedLayout::Compute, 10), (PackedLayout::Storage, 8)] {
        let model = latent.clone().packed(layout).unwrap();
        let tensors = folder::hf_tensors(&model);
        let of = |ending: &str| -> usize {
            let tensors = tensors.iter().filter(|(name, _)| name.ends_with(ending));
            tensors.map(|(_, data)| data.as_bytes().len()).sum()
        };
        assert_eq!(of("_proj.weight"), weights * fifths_of_a_bit / 5 / 8);
        // One scale of four bytes for each output: q, k, v, o and down 80, gate and up 240.
        assert_eq!(of("_proj.weight_scale"), 2 * 4 * (5 * 80 + 2 * 240));
    }
}

#[test]
fn t2_packed_folders_come_back_in_both_layouts_and_in_half_precision() {
    for spec in ternary() {
        let latent = Decoder::new(&spec, 5, &Device::flex()).unwrap();
        let packed = latent.packed(PackedLayout::Compute).unwrap();
        let words = parameters(&packed);
        for layout in [PackedLayout::Compute, PackedLayout::Storage] {
            let model = packed.clone().packed(layout).unwrap();
            for dtype in [SaveDtype::F32, SaveDtype::Bf16] {
                let path = tempfile::tempdir().unwrap();
                let options = SaveOptions {
                    dtype,
                    // Several files.
                    max_shard_bytes: 3_000,
                };
                let tensors = folder::hf_tensors(&model);
                folder::save(path.path(), model.spec(), &tensors, &options).unwrap();
                let back = folder::load(path.path(), &Device::flex()).unwrap();
                assert_eq!(back.spec(), model.spec());
                for (name, data) in parameters(&back) {
                    let exact = dtype == SaveDtype::F32 || name.contains("_proj.weight");
                    if exact {
                        assert_eq!(data, words[&name], "{name}");
                    }
                }
            }
        }
    }
}

#[test]
fn t2_a_dense_model_is_not_packed() {
    let model = Decoder::new(&tiny(Architecture::Llama), 5, &Device::flex()).unwrap();
    let error = model.packed(PackedLayout::Compute).unwrap_err();
    assert!(matches!(error, ModelError::NotTernary));
}

#[test]
fn t4_products_of_integers_give_the_same_loss_and_gradients() {
    for spec in ternary() {
        let model = trainable(&spec);
        let [plain, integers] = [false, true].map(|int8_forward| {
            let precision = Precision {
                int8_forward,
                ..Precision::default()
            };
            let found =
                backward_with(&model, &[batch(4, 8, 13)], &CrossEntropy, precision).unwrap();
            (found.loss(), found.gradient.to_tensors())
        });
        assert!((plain.0 - integers.0).abs() < f64::from(tolerance(&spec)));
        // The last bits differ where there are activations to multiply as integers.
        let rounds = spec.shape.ternary.unwrap().rounds_activations;
        assert_eq!(plain.1 != integers.1, rounds);
        for (path, data) in &plain.1 {
            let error = distance(&floats(data), &floats(&integers.1[path]));
            assert!(error < tolerance(&spec), "{path}: {error}");
        }
    }
}
