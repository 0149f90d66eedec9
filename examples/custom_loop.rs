//! A training loop of your own over the same parts that `runner train` is made of.
//!
//!     cargo run --release --example custom_loop
//!
//! What it does that no key of the TOML does: the learning rate is halved whenever the validation
//! loss has stopped falling.

use std::error::Error;

use burn::module::Module;
use burn::tensor::Device;
use firebrick::collective::SingleProcess;
use firebrick::config::{
    AdamWPlan, Architecture, DataConfig, DatasetConfig, ModelShape, OptimizerPlan, Sampling,
    TokenizerConfig, TokenizerKind,
};
use firebrick::data::{Corpus, Sampler, TokenCache};
use firebrick::generate::{Sampling as Choice, TextRequest, complete};
use firebrick::model::{Decoder, DecoderSpec};
use firebrick::objective::{CrossEntropy, evaluate_text};
use firebrick::optimizer::Optimizer;
use firebrick::train::{StepSettings, TrainState, train_step};

// As in the runner: worth a third of the training speed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SEED: u64 = 1;
const SEQUENCE_LEN: usize = 64;
const BATCH: usize = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let (model, losses) = train(300, 50)?;
    println!(
        "val loss {:.3} -> {:.3}",
        losses[0],
        losses[losses.len() - 1]
    );
    println!("{} parameters", model.num_params());
    Ok(())
}

/// Trains for `steps` steps, validating every `eval_every`; returns the model and the validation
/// losses, the one before training first.
pub fn train(steps: u64, eval_every: u64) -> Result<(Decoder, Vec<f64>), Box<dyn Error>> {
    // Data: files -> token ids. Tokens are cached between runs.
    let data = DataConfig {
        sequence_len: SEQUENCE_LEN,
        val_fraction: 0.1,
        datasets: vec![DatasetConfig::new("src/model/*.rs")],
        ..DataConfig::default()
    };
    let tokenizer = TokenizerConfig {
        kind: TokenizerKind::Byte,
        ..TokenizerConfig::default()
    };
    let corpus = Corpus::load(&data, &tokenizer, &TokenCache::from_environment())?;
    let sampler = Sampler::new(&corpus, Sampling::Random, SEQUENCE_LEN, SEED)?;
    let val = corpus.val.as_ref().ok_or("there is a validation split")?;

    // A model with random weights, on a device that records gradients.
    let spec = DecoderSpec {
        shape: ModelShape {
            architecture: Architecture::Llama,
            hidden_size: 64,
            intermediate_size: 176,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            max_position_embeddings: 2 * SEQUENCE_LEN,
            tie_word_embeddings: true,
            bias: false,
            qkv_bias: false,
            qk_norm: false,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            sliding_window: None,
            initializer_range: 0.02,
            hidden_act: Architecture::Llama.hidden_act(),
            output_activation: None,
            zero_init_output: false,
            ternary: None,
            blockwise: None,
        },
        vocab_size: corpus.tokenizer.vocab_size(),
        eos_token_id: corpus.tokenizer.eos().map(|token| token.id),
        bos_token_id: None,
    };
    let model = Decoder::new(&spec, SEED, &Device::flex().autodiff())?;
    let optimizer = Optimizer::new(&OptimizerPlan::AdamW(AdamWPlan::new(
        [0.9, 0.95],
        1e-8,
        0.1,
    )));
    // The state that a step changes: weights, moments and progress.
    let mut state = TrainState::new(model, optimizer);

    // `valid()` leaves the autodiff device: validation must not record anything.
    let validate =
        |model: &Decoder| evaluate_text(&model.valid(), val, corpus.val_bytes, SEQUENCE_LEN, BATCH);
    let mut losses = vec![validate(state.model())?.val_loss];
    let mut learning_rate = 3e-3;
    for step in 0..steps {
        // A batch is a function of the seed and the sequence number: nothing to save or to lose.
        let batch = sampler.batch(step * BATCH as u64, BATCH);
        // Takes one step as the runner does: backward pass, clipping, update.
        let settings = StepSettings {
            max_grad_norm: 1.0,
            learning_rate,
            ..StepSettings::default()
        };
        train_step(
            &mut state,
            &[batch],
            &CrossEntropy,
            &settings,
            &SingleProcess,
        )?;

        if (step + 1) % eval_every == 0 {
            let val_loss = validate(state.model())?.val_loss;
            if val_loss > losses[losses.len() - 1] - 0.01 {
                learning_rate /= 2.0;
            }
            println!(
                "step {:>4}  val loss {val_loss:.3}  lr {learning_rate:.1e}",
                step + 1
            );
            losses.push(val_loss);
        }
    }

    let request = TextRequest {
        prompt: "pub fn ",
        max_new_tokens: 60,
        sampling: Choice {
            temperature: 0.8,
            ..Choice::default()
        },
        seed: SEED,
        stop: &[],
    };
    let model = state.into_model();
    let (text, _) = complete(&model.valid(), &corpus.tokenizer, &request, |_| {})?;
    println!("pub fn {text}");
    Ok((model, losses))
}
