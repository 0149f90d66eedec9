//! R9: half-precision compute with f32 masters, and gradient checkpointing by block.

use burn::module::Module;
use burn::tensor::{Device, FloatDType, TensorData};
use firebrick::config::{Architecture, Preset};
use firebrick::data::Batch;
use firebrick::gradient::Gradient;
use firebrick::model::{Decoder, DecoderSpec, Tensors, parameters};
use firebrick::objective::{CrossEntropy, Precision, backward, backward_with};

fn spec(architecture: Architecture, tied: bool) -> DecoderSpec {
    let mut shape = Preset::Stories260K.shape();
    shape.architecture = architecture;
    shape.num_key_value_heads = 4;
    if architecture == Architecture::Gpt2 {
        shape.num_key_value_heads = shape.num_attention_heads;
        shape.bias = true;
    }
    shape.tie_word_embeddings = tied;
    shape.hidden_act = architecture.hidden_act();
    DecoderSpec {
        shape,
        vocab_size: 61,
        eos_token_id: None,
        bos_token_id: None,
    }
}

fn model(architecture: Architecture, tied: bool) -> Decoder {
    Decoder::new(&spec(architecture, tied), 7, &Device::flex().autodiff()).unwrap()
}

/// Two micro-batches of ragged rows.
fn batches() -> Vec<Batch> {
    let row = |length: u32, step: u32| -> Vec<u32> {
        (0..length).map(|i| (i * step + i * i) % 61).collect()
    };
    vec![Batch::of_row(&row(33, 5)), Batch::of_row(&row(20, 11))]
}

/// The gradient's tensors, after checking that every parameter has one.
fn tensors(model: &Decoder, gradient: &Gradient) -> Tensors {
    let tensors = gradient.to_tensors();
    assert_eq!(tensors.len(), parameters(model).len());
    tensors
}

fn with(dtype: FloatDType, loss_scale: f64, gradient_checkpointing: bool) -> Precision {
    Precision {
        dtype,
        loss_scale,
        gradient_checkpointing,
        ..Precision::default()
    }
}

#[test]
fn r9_a_checkpointed_gradient_is_the_full_one() {
    for (architecture, tied) in [
        (Architecture::Llama, true),
        (Architecture::Llama, false),
        (Architecture::Gpt2, true),
    ] {
        let model = model(architecture, tied);
        let full = backward(&model, &batches()).unwrap();
        let recomputed = backward_with(
            &model,
            &batches(),
            &CrossEntropy,
            with(FloatDType::F32, 1.0, true),
        )
        .unwrap();
        // Not bit for bit: off the autodiff device burn has another layer norm, and where three paths meet
        // it adds their gradients in another order.
        let error = (full.sums.loss - recomputed.sums.loss).abs() / full.sums.loss;
        assert!(error < 1e-7, "{} {}", full.sums.loss, recomputed.sums.loss);
        let (full, recomputed) = (
            tensors(&model, &full.gradient),
            tensors(&model, &recomputed.gradient),
        );
        let whole = norm(full.values());
        for (name, tensor) in &full {
            let limit = 1e-6 * norm([tensor]).max(1e-3 * whole);
            let difference = distance(tensor, &recomputed[name]);
            assert!(difference < limit, "{name}: {difference}");
        }
    }
}

fn distance(a: &TensorData, b: &TensorData) -> f64 {
    let squares = a
        .iter::<f64>()
        .zip(b.iter::<f64>())
        .map(|(a, b)| (a - b).powi(2));
    squares.sum::<f64>().sqrt()
}

fn norm<'a>(tensors: impl IntoIterator<Item = &'a TensorData>) -> f64 {
    let squares = tensors
        .into_iter()
        .flat_map(|data| data.iter::<f64>().map(|x| x * x));
    squares.sum::<f64>().sqrt()
}

/// ‖a - b‖ / ‖a‖ over all tensors.
fn relative_difference(a: &Tensors, b: &Tensors) -> f64 {
    let squares = a.iter().map(|(name, a)| distance(a, &b[name]).powi(2));
    squares.sum::<f64>().sqrt() / norm(a.values())
}

#[test]
fn r9_half_precision_gradients_are_f32_and_close_to_the_full_ones() {
    for architecture in [Architecture::Llama, Architecture::Gpt2] {
        let model = model(architecture, true);
        let full = tensors(&model, &backward(&model, &batches()).unwrap().gradient);
        // One rounding is 2^-9 for bf16 and 2^-12 for f16; a few layers add some up.
        for (dtype, scale, limit) in [
            (FloatDType::BF16, 1.0, 0.03),
            (FloatDType::F16, 65536.0, 0.004),
        ] {
            for checkpointing in [false, true] {
                let precision = with(dtype, scale, checkpointing);
                let half = backward_with(&model, &batches(), &CrossEntropy, precision).unwrap();
                let half = tensors(&model, &half.gradient);
                assert!(
                    half.values()
                        .all(|data| data.dtype() == burn::tensor::DType::F32)
                );
                let difference = relative_difference(&full, &half);
                assert!(difference < limit, "{dtype:?}: {difference}");
                assert!(difference > 1e-6, "{dtype:?} did not round anything");
            }
        }
    }
}

#[test]
fn r9_without_a_loss_scale_small_gradients_vanish_in_f16() {
    let model = model(Architecture::Llama, true);
    let full = tensors(&model, &backward(&model, &batches()).unwrap().gradient);
    let error = |scale: f64| {
        // As if the step had ten thousand times as many tokens: gradients come near 6e-8.
        let precision = with(FloatDType::F16, scale * 1e-4, false);
        let half = backward_with(&model, &batches(), &CrossEntropy, precision).unwrap();
        relative_difference(&full, &tensors(&model, &half.gradient))
    };
    assert!(error(1.0) > 5.0 * error(65536.0));
}

#[test]
fn r9_logits_in_chunks_give_the_gradient_of_all_logits_at_once() {
    let mut spec = spec(Architecture::Llama, false);
    spec.shape.num_hidden_layers = 1;
    // 64 tokens at a time: three chunks, the last one ragged.
    spec.vocab_size = 150_000;
    let model = Decoder::new(&spec, 7, &Device::flex().autodiff()).unwrap();
    let tokens: Vec<u32> = (0..=133u32).map(|i| i * i * 1009 % 150_000).collect();
    let batch = Batch::of_row(&tokens);

    let chunked = backward(&model, std::slice::from_ref(&batch)).unwrap();
    let at_once = model.loss(&batch, 1.0 / batch.weight()).unwrap();
    let nats = f64::from(at_once.sum.into_scalar::<f32>());
    let at_once = Gradient::backward(&at_once.objective, &model);
    assert!((chunked.sums.loss - nats).abs() < 1e-6 * nats);
    let difference = relative_difference(
        &tensors(&model, &at_once),
        &tensors(&model, &chunked.gradient),
    );
    assert!(difference < 1e-6, "{difference}");
    let evaluated = model.valid().evaluate(&batch).unwrap().into_scalar::<f32>();
    assert!((f64::from(evaluated) - nats).abs() < 1e-6 * nats);
}
