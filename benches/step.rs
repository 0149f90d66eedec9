//! Time of one training step beside the limit it is held against.
//!
//!     cargo bench --bench step
//!
//! The limit is what this machine's matrix products reach on all cores, probed in the same process
//! on 1024 x 1024 x 1024 in f32; the share of it that a whole step reaches counts the FLOPs of the
//! model's matrix products alone: 6 per parameter and token, plus attention. Random data, medians.
//!
//! Then what ternary weights cost: steps of the dense model, the ternary one, and the ternary one with
//! integer products in the forward pass, in turn; the fastest of each, since other programs only add.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use firebrick::collective::SingleProcess;
use firebrick::config::{AdamWPlan, Architecture, Granularity, ModelShape, OptimizerPlan, Ternary};
use firebrick::data::Batch;
use firebrick::environment::Environment;
use firebrick::model::{Decoder, DecoderSpec};
use firebrick::objective::CrossEntropy;
use firebrick::optimizer::Optimizer;
use firebrick::train::{StepSettings, TrainState, train_step};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Case {
    name: &'static str,
    architecture: Architecture,
    rows: usize,
    cols: usize,
    vocab: usize,
    /// Hidden, feed-forward, layers, heads, key/value heads.
    shape: [usize; 5],
}

const CASES: [Case; 3] = [
    Case {
        name: "nanogpt-char",
        architecture: Architecture::Gpt2,
        rows: 12,
        cols: 64,
        vocab: 65,
        shape: [128, 512, 4, 4, 4],
    },
    Case {
        name: "llama-char",
        architecture: Architecture::Llama,
        rows: 12,
        cols: 64,
        vocab: 65,
        shape: [128, 344, 4, 4, 4],
    },
    Case {
        name: "quickstart",
        architecture: Architecture::Llama,
        rows: 16,
        cols: 128,
        vocab: 1024,
        shape: [192, 512, 4, 6, 2],
    },
];

/// Widths at which matrix products take most of the time.
const WIDE: [Case; 2] = [
    Case {
        name: "width 512",
        architecture: Architecture::Llama,
        rows: 8,
        cols: 256,
        vocab: 1024,
        shape: [512, 1376, 4, 8, 8],
    },
    Case {
        name: "width 1024",
        architecture: Architecture::Llama,
        rows: 8,
        cols: 256,
        vocab: 1024,
        shape: [1024, 2752, 2, 16, 16],
    },
];

/// Rounds of the ternary table, at least, and the time that a shape gets, at least.
const ROUNDS: usize = 16;
const ENOUGH: Duration = Duration::from_secs(30);

fn main() {
    let environment = Environment::detect();
    println!("{}, {} threads", environment.cpu, environment.threads);
    let peak = matmul_peak();
    println!(
        "limit: f32 matrix products of 1024^3 reach {:.0} GFLOP/s\n",
        peak / 1e9
    );
    println!(
        "{:<14} {:>9} {:>9} {:>9} {:>9} {:>11} {:>9}",
        "step", "params", "ms", "backward", "update", "tokens/s", "of limit"
    );
    for case in &CASES {
        let [backward, update] = step_seconds(case);
        let seconds = backward + update;
        let tokens = (case.rows * case.cols) as f64;
        println!(
            "{:<14} {:>9} {:>9.1} {:>9.1} {:>9.1} {:>11.0} {:>8.0}%",
            case.name,
            model(case, None).num_params(),
            1e3 * seconds,
            1e3 * backward,
            1e3 * update,
            tokens / seconds,
            100.0 * flops(case) / seconds / peak,
        );
    }
    println!(
        "\n{:<14} {:>9} {:>9} {:>9} {:>14}",
        "ternary step", "tokens", "dense ms", "ternary", "int8 forward"
    );
    for case in CASES.iter().skip(1).chain(&WIDE) {
        let [dense, ternary, integer] = ternary_seconds(case);
        println!(
            "{:<14} {:>9} {:>9.1} {:>8.3}x {:>13.3}x",
            case.name,
            case.rows * case.cols,
            1e3 * dense,
            ternary / dense,
            integer / dense,
        );
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// FLOP/s of large matrix products on all cores.
fn matmul_peak() -> f64 {
    let device = Device::flex();
    let random = || Tensor::<2>::random([1024, 1024], Distribution::Default, &device);
    let (a, b) = (random(), random());
    let seconds = (0..30).map(|_| {
        let started = Instant::now();
        black_box(a.clone().matmul(b.clone()));
        started.elapsed().as_secs_f64()
    });
    2.0 * 1024f64.powi(3) / median(seconds.collect())
}

fn model(case: &Case, ternary: Option<Ternary>) -> Decoder {
    let [
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        heads,
        kv_heads,
    ] = case.shape;
    let spec = DecoderSpec {
        shape: ModelShape {
            architecture: case.architecture,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: hidden_size / heads,
            max_position_embeddings: case.cols,
            tie_word_embeddings: true,
            bias: false,
            qkv_bias: false,
            qk_norm: false,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            sliding_window: None,
            initializer_range: 0.02,
            hidden_act: case.architecture.hidden_act(),
            output_activation: None,
            zero_init_output: false,
            ternary,
            blockwise: None,
        },
        vocab_size: case.vocab,
        eos_token_id: None,
        bos_token_id: None,
    };
    Decoder::new(&spec, 1, &Device::flex().autodiff()).expect("the shapes above are possible")
}

/// Forward and backward passes of the matrix products: weights, head, scores and mixing.
fn flops(case: &Case) -> f64 {
    let [hidden, _, layers, heads, _] = case.shape;
    let tokens = (case.rows * case.cols) as f64;
    // The tied embedding is multiplied with once, as the head; positions and norms never.
    let positions = if case.architecture == Architecture::Gpt2 {
        case.cols * hidden
    } else {
        0
    };
    let norms = (2 * layers + 1) * hidden;
    let weights = (model(case, None).num_params() - positions - norms) as f64;
    let scores = (layers * heads * case.cols * (hidden / heads)) as f64;
    6.0 * tokens * weights + 12.0 * tokens * scores
}

/// A model in training.
struct Training {
    state: TrainState,
    batch: Batch,
    settings: StepSettings,
}

impl Training {
    fn new(case: &Case, ternary: Option<Ternary>, int8_forward: bool) -> Self {
        let cells = case.rows * case.cols;
        // Arbitrary tokens: a linear congruential sequence.
        let token = |i: usize| ((i * 1_103_515_245 + 12_345) / 65_536 % case.vocab) as u32;
        let optimizer = Optimizer::new(&OptimizerPlan::AdamW(AdamWPlan::new(
            [0.9, 0.95],
            1e-8,
            0.1,
        )));
        Self {
            state: TrainState::new(model(case, ternary), optimizer),
            batch: Batch {
                rows: case.rows,
                cols: case.cols,
                tokens: (0..cells).map(token).collect(),
                targets: (1..=cells).map(token).collect(),
                weights: vec![1.0; cells],
                segment_ids: vec![0; cells],
                positions: (0..cells).map(|i| (i % case.cols) as u32).collect(),
            },
            settings: StepSettings {
                int8_forward,
                ..StepSettings::default()
            },
        }
    }

    /// Seconds of backward (loss, gradient, norm, clip) and of the update.
    fn step(&mut self) -> [f64; 2] {
        let batches = std::slice::from_ref(&self.batch);
        let (state, settings) = (&mut self.state, &self.settings);
        let report = train_step(state, batches, &CrossEntropy, settings, &SingleProcess);
        let time = report.expect("positions suffice").time;
        [time.backward + time.gradient, time.update].map(|time| time.as_secs_f64())
    }
}

/// Median seconds of backward and of the update.
fn step_seconds(case: &Case) -> [f64; 2] {
    let mut training = Training::new(case, None, false);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..40 {
        let [backward, update] = training.step();
        times[0].push(backward);
        times[1].push(update);
    }
    times.map(median)
}

/// Seconds of a step of a dense model, of the same with ternary weights, and of that with its forward products in
/// integers, in turn. The fastest of each: what else a machine does only ever adds time.
fn ternary_seconds(case: &Case) -> [f64; 3] {
    let ternary = Ternary {
        granularity: Granularity::Tensor,
        rounds_activations: true,
        packed: None,
    };
    let mut trainings = [(None, false), (Some(ternary), false), (Some(ternary), true)]
        .map(|(ternary, int8_forward)| Training::new(case, ternary, int8_forward));
    let mut fastest = [f64::INFINITY; 3];
    let started = Instant::now();
    let mut rounds = 0;
    while rounds < ROUNDS || started.elapsed() < ENOUGH {
        rounds += 1;
        for (training, fastest) in trainings.iter_mut().zip(&mut fastest) {
            *fastest = fastest.min(training.step().iter().sum());
        }
    }
    fastest
}
