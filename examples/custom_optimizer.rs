//! An update rule of your own: LAMB (You et al., 2020), which scales Adam's update of each parameter
//! to the norm of the parameter.
//!
//!     cargo run --release --example custom_optimizer

use std::error::Error;

use burn::tensor::{Device, Tensor};
use firebrick::collective::SingleProcess;
use firebrick::config::Preset;
use firebrick::data::{Batch, Tokenizer};
use firebrick::model::{Decoder, DecoderSpec, Tensors, parameters};
use firebrick::objective::CrossEntropy;
use firebrick::optimizer::{CustomRule, Optimizer, OptimizerError, TensorState};
use firebrick::train::{StepSettings, TrainState, train_step};

/// LAMB with its parameters.
#[derive(Clone, Copy)]
struct Lamb {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
}

impl CustomRule for Lamb {
    fn family(&self) -> &'static str {
        "examples/lamb"
    }

    fn state_tensors(&self, dims: &[usize]) -> Vec<(&'static str, Vec<usize>)> {
        vec![("mean", dims.to_vec()), ("square", dims.to_vec())]
    }

    fn update<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        state: &mut TensorState,
    ) -> Tensor<D> {
        let [beta_1, beta_2] = self.betas;
        let zeros = || gradient.zeros_like();
        let mean = state.take("mean").unwrap_or_else(zeros);
        let square = state.take("square").unwrap_or_else(zeros);
        let mean = mean * beta_1 + gradient.clone() * (1.0 - beta_1);
        let square = square * beta_2 + gradient.square() * (1.0 - beta_2);
        let (mean, square) = (state.put("mean", mean), state.put("square", square));
        let updates = state.updates() as i32;
        let mean = mean / (1.0 - beta_1.powi(updates));
        let square = square / (1.0 - beta_2.powi(updates));
        let update = mean / (square.sqrt() + self.eps) + value.clone() * self.weight_decay;
        let norm = |x: &Tensor<D>| f64::from(x.clone().square().sum().sqrt().into_scalar::<f32>());
        let (of_value, of_update) = (norm(&value), norm(&update));
        let trust = match of_value > 0.0 && of_update > 0.0 {
            true => of_value / of_update,
            false => 1.0,
        };
        value - update * (learning_rate * trust)
    }
}

fn lamb() -> Result<Optimizer, OptimizerError> {
    let matrices = Lamb {
        betas: [0.9, 0.99],
        eps: 1e-6,
        weight_decay: 0.01,
    };
    let vectors = Lamb {
        weight_decay: 0.0,
        ..matrices
    };
    Optimizer::custom(matrices, vectors)
}

fn main() -> Result<(), Box<dyn Error>> {
    let (losses, _, _) = run(60)?;
    println!(
        "{:.3} nats per token before, {:.3} after",
        losses[0], losses[1]
    );
    Ok(())
}

/// Trains for so many steps, once in one go and once with a save in the middle. Returns the first
/// and the last loss, and the weights of both.
pub fn run(steps: u64) -> Result<([f64; 2], Tensors, Tensors), Box<dyn Error>> {
    let tokenizer = Tokenizer::bytes()?;
    let text = "the river is older than its bed, and the bed is older than the bridge";
    let batch = [Batch::of_row(&tokenizer.encode(text)?)];
    let spec = DecoderSpec {
        shape: Preset::Stories260K.shape(),
        vocab_size: tokenizer.vocab_size(),
        eos_token_id: None,
        bos_token_id: None,
    };
    let device = Device::flex();
    let new = || Decoder::new(&spec, 1, &device.clone().autodiff());
    let settings = StepSettings {
        learning_rate: 0.02,
        ..StepSettings::default()
    };
    let train = |state: &mut TrainState, steps: u64| -> Result<[f64; 2], Box<dyn Error>> {
        let mut losses = Vec::new();
        for _ in 0..steps {
            let report = train_step(state, &batch, &CrossEntropy, &settings, &SingleProcess)?;
            losses.push(report.loss);
        }
        Ok([losses[0], losses[losses.len() - 1]])
    };

    let mut whole = TrainState::new(new()?, lamb()?);
    let losses = train(&mut whole, steps)?;

    let mut first = TrainState::new(new()?, lamb()?);
    train(&mut first, steps / 2)?;
    let saved = first.optimizer.state(first.model());
    let model = first.into_model();
    let mut optimizer = lamb()?;
    optimizer.load_state(&model, saved, &device)?;
    let mut second = TrainState::new(model, optimizer);
    train(&mut second, steps - steps / 2)?;
    Ok((
        losses,
        parameters(whole.model()),
        parameters(second.model()),
    ))
}
