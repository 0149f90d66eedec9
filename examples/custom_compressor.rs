//! A custom gradient compressor. Four ranks, which are threads of this process, train one model.
//! Each of them sends one element in sixteen of every gradient.
//!
//!     cargo run --release --example custom_compressor
//!
//! All ranks choose the same elements at random, from a seed that they share, so the indices need
//! not be sent (random-k; Stich, Cordonnier and Jaggi, 2018). Error feedback adds the elements that
//! were not sent to the gradient of the next step.

use std::error::Error;
use std::thread;
use std::time::Duration;

use burn::tensor::Device;
use firebrick::collective::{Collective, ThreadRank};
use firebrick::config::{OptimizerPlan, Preset};
use firebrick::data::Batch;
use firebrick::gradient::Pipeline;
use firebrick::gradient::compress::{
    CompressError, Compression, CompressionSettings, Compressor, TensorContext,
};
use firebrick::model::{Decoder, DecoderSpec, Tensors, parameters};
use firebrick::objective::CrossEntropy;
use firebrick::optimizer::Optimizer;
use firebrick::train::{StepReport, StepSettings, TrainState, train_step};

const RANKS: usize = 4;

/// Sends one random element in `one_in`.
#[derive(Debug, Clone, Copy)]
struct RandomElements {
    one_in: u64,
}

impl RandomElements {
    /// The indices of the elements that a step sends. They are the same on every rank.
    fn places(self, tensor: &TensorContext, len: usize) -> impl Iterator<Item = usize> {
        let seed = tensor.seed;
        (0..len).filter(move |place| seed.word(*place as u64).is_multiple_of(self.one_in))
    }
}

impl Compressor for RandomElements {
    fn encode(
        &self,
        tensor: &TensorContext,
        values: &mut [f32],
        bytes: &mut Vec<u8>,
    ) -> Result<(), CompressError> {
        for place in self.places(tensor, values.len()) {
            bytes.extend(values[place].to_le_bytes());
            // The element was sent whole, so its error is 0.
            values[place] = 0.0;
        }
        Ok(())
    }

    fn add_decoded(
        &self,
        tensor: &TensorContext,
        bytes: &[u8],
        sum: &mut [f32],
    ) -> Result<(), CompressError> {
        let mut values = bytes.as_chunks::<4>().0.iter();
        for place in self.places(tensor, sum.len()) {
            let value = values.next();
            let value = value.ok_or_else(|| CompressError::Damaged("too short".to_string()))?;
            sum[place] += f32::from_le_bytes(*value);
        }
        match values.next() {
            None => Ok(()),
            Some(_) => Err(CompressError::Damaged("too long".to_string())),
        }
    }
}

/// The final weights of one rank, and the report of each of its steps.
type EndOfRank = (Tensors, Vec<StepReport>);

fn main() -> Result<(), Box<dyn Error>> {
    let ranks = run(200)?;
    let reports = &ranks[0].1;
    for (step, report) in reports.iter().enumerate().step_by(40) {
        println!("step {step:>4}  loss {:.3}", report.loss);
    }
    if let Some(exchange) = reports.last().and_then(|report| report.exchange) {
        let ratio = exchange.gradient_bytes as f64 / exchange.sent_bytes as f64;
        println!(
            "each rank sends {} bytes a step, {ratio:.1} times less",
            exchange.sent_bytes
        );
    }
    Ok(())
}

/// Trains all ranks for `steps` steps.
pub fn run(steps: u64) -> Result<Vec<EndOfRank>, Box<dyn Error>> {
    let group = ThreadRank::group(RANKS, Duration::from_secs(60));
    let threads: Vec<_> = group
        .into_iter()
        .map(|rank| thread::spawn(move || train(&rank, steps).map_err(|error| error.to_string())))
        .collect();
    let ends = threads.into_iter().map(|thread| match thread.join() {
        Ok(end) => Ok(end?),
        Err(_) => Err("a rank has panicked".into()),
    });
    ends.collect()
}

fn train(rank: &ThreadRank, steps: u64) -> Result<EndOfRank, Box<dyn Error>> {
    let spec = DecoderSpec {
        shape: Preset::Stories260K.shape(),
        vocab_size: 64,
        eos_token_id: None,
        bos_token_id: None,
    };
    // The same seed, and so the same weights, on every rank.
    let model = Decoder::new(&spec, 42, &Device::flex().autodiff())?;
    let plan = OptimizerPlan::Sgd {
        momentum: 0.9,
        nesterov: false,
        weight_decay: 0.0,
    };
    let mut state = TrainState::new(model, Optimizer::new(&plan));
    let compressor = RandomElements { one_in: 16 };
    let compression = Compression::new(Box::new(compressor), CompressionSettings::default())?;
    state.pipeline = Pipeline::default().with_exchange(Box::new(compression));

    let mut reports = Vec::new();
    for step in 0..steps {
        // Sequences that count up in steps of 1 to 8; each rank has its own.
        let first = step as usize * RANKS + rank.rank();
        let row: Vec<u32> = (0..33)
            .map(|i| ((first + i * (1 + first % 8)) % 64) as u32)
            .collect();
        let settings = StepSettings {
            learning_rate: 0.05,
            ..StepSettings::default()
        };
        let batch = [Batch::of_row(&row)];
        reports.push(train_step(
            &mut state,
            &batch,
            &CrossEntropy,
            &settings,
            rank,
        )?);
    }
    Ok((parameters(state.model()), reports))
}
