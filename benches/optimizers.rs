//! Time of each optimizer's update in a training step.
//!
//!     cargo bench --bench optimizers [-- name ...]
//!
//! Every rule trains a model of its own on the same random data, one step at a time in turn. The fastest of each
//! is printed, since other programs only add time: milliseconds of the whole step, milliseconds of the update, and the
//! update's share of the step, and the state's bytes a weight. A rule that does more work in some steps, as SOAP does,
//! also has the mean of its updates.

use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Device;
use firebrick::collective::SingleProcess;
use firebrick::config::{
    AdamWPlan, Architecture, LionPlan, ModelShape, MuonPlan, NewtonSchulz, OptimizerPlan, SoapPlan,
    VelvetPlan,
};
use firebrick::data::Batch;
use firebrick::environment::Environment;
use firebrick::model::{Decoder, DecoderSpec};
use firebrick::objective::CrossEntropy;
use firebrick::optimizer::Optimizer;
use firebrick::train::{StepSettings, TrainState, train_step};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Steps of each rule, at least, and the time that a shape gets, at least.
const ROUNDS: usize = 40;
const ENOUGH: Duration = Duration::from_secs(20);

/// A model's name, rows and columns of its batch, vocabulary, and hidden, feed-forward, layers, heads, key/value heads.
const SHAPES: [(&str, [usize; 3], [usize; 5]); 3] = [
    ("llama-char", [12, 64, 65], [128, 344, 4, 4, 4]),
    ("quickstart", [16, 128, 1024], [192, 512, 4, 6, 2]),
    ("width 512", [8, 256, 1024], [512, 1376, 4, 8, 8]),
];

fn plans() -> Vec<(&'static str, OptimizerPlan)> {
    let adamw = AdamWPlan::new([0.9, 0.95], 1e-8, 0.1);
    let muon = MuonPlan::new(0.95, adamw);
    let polar_express = MuonPlan {
        newton_schulz: NewtonSchulz::PolarExpress,
        ..muon
    };
    vec![
        ("adamw", OptimizerPlan::AdamW(adamw)),
        ("muon", OptimizerPlan::Muon(muon)),
        ("polar-express", OptimizerPlan::Muon(polar_express)),
        (
            "normuon",
            OptimizerPlan::NorMuon {
                neuron_beta: 0.95,
                muon,
            },
        ),
        ("soap", OptimizerPlan::Soap(SoapPlan::new(adamw))),
        (
            "velvet",
            OptimizerPlan::Velvet {
                velvet: VelvetPlan::default(),
                adamw,
            },
        ),
        ("lion", OptimizerPlan::Lion(LionPlan::new([0.9, 0.99], 0.1))),
        ("adamw8bit", OptimizerPlan::AdamW8bit(adamw)),
    ]
}

struct Training {
    name: &'static str,
    state: TrainState,
    /// Seconds of the whole step and of the update, of every step so far.
    times: Vec<[f64; 2]>,
}

fn main() {
    let environment = Environment::detect();
    println!("{}, {} threads", environment.cpu, environment.threads);
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|name| !name.starts_with('-'))
        .collect();
    for (shape, [rows, cols, vocab], dims) in SHAPES {
        println!(
            "\n{shape:<14} {:>9} {:>9} {:>9} {:>12} {:>9} {:>9}",
            "step ms", "update ms", "share", "mean update", "steps", "bytes"
        );
        let batch = batch(rows, cols, vocab);
        let plans = plans().into_iter();
        let plans = plans
            .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name));
        let mut trainings: Vec<Training> = plans
            .map(|(name, plan)| Training {
                name,
                state: TrainState::new(model(cols, vocab, dims), Optimizer::new(&plan)),
                times: Vec::new(),
            })
            .collect();
        let started = Instant::now();
        let mut round = 0;
        while round < ROUNDS || started.elapsed() < ENOUGH {
            round += 1;
            for training in &mut trainings {
                training.step(&batch);
            }
        }
        for training in trainings {
            training.print();
        }
    }
}

impl Training {
    fn step(&mut self, batch: &Batch) {
        let (batches, settings) = (std::slice::from_ref(batch), StepSettings::default());
        let report = train_step(
            &mut self.state,
            batches,
            &CrossEntropy,
            &settings,
            &SingleProcess,
        );
        let time = report.expect("positions suffice").time;
        let all = time.backward + time.gradient + time.update;
        self.times
            .push([all, time.update].map(|time| time.as_secs_f64()));
    }

    /// Bytes of optimizer state for each weight.
    fn state_bytes(&self) -> f64 {
        let model = self.state.model();
        let tensors = self.state.optimizer.state(model).tensors;
        let bytes: usize = tensors.values().map(|data| data.as_bytes().len()).sum();
        bytes as f64 / model.num_params() as f64
    }

    fn print(self) {
        // The first steps fault in the memory that the later ones reuse.
        let times = &self.times[self.times.len().min(5)..];
        let fastest = |i: usize| times.iter().map(|t| t[i]).fold(f64::INFINITY, f64::min);
        let [step, update] = [fastest(0), fastest(1)];
        let mean = times.iter().map(|t| t[1]).sum::<f64>() / times.len() as f64;
        println!(
            "{:<14} {:>9.2} {:>9.2} {:>8.1}% {:>12.2} {:>9} {:>9.2}",
            self.name,
            1e3 * step,
            1e3 * update,
            100.0 * update / step,
            1e3 * mean,
            self.times.len(),
            self.state_bytes(),
        );
    }
}

fn batch(rows: usize, cols: usize, vocab: usize) -> Batch {
    let cells = rows * cols;
    // Arbitrary tokens: a linear congruential sequence.
    let token = |i: usize| ((i * 1_103_515_245 + 12_345) / 65_536 % vocab) as u32;
    Batch {
        rows,
        cols,
        tokens: (0..cells).map(token).collect(),
        targets: (1..=cells).map(token).collect(),
        weights: vec![1.0; cells],
        segment_ids: vec![0; cells],
        positions: (0..cells).map(|i| (i % cols) as u32).collect(),
    }
}

fn model(cols: usize, vocab_size: usize, dims: [usize; 5]) -> Decoder {
    let [hidden_size, intermediate_size, layers, heads, kv_heads] = dims;
    let spec = DecoderSpec {
        shape: ModelShape {
            architecture: Architecture::Llama,
            hidden_size,
            intermediate_size,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: hidden_size / heads,
            max_position_embeddings: cols,
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
        vocab_size,
        eos_token_id: None,
        bos_token_id: None,
    };
    Decoder::new(&spec, 1, &Device::flex().autodiff()).expect("the shapes above are possible")
}
