//! What a step costs when lower layers are frozen, beside what the count of FLOPs says.
//!
//!     cargo bench --bench frozen
//!
//! The same model with more and more frozen layers takes steps in turns, two at a time, in one
//! process. The second one is timed: the first finds its memory given back to the system by smaller
//! steps before it, and takes up to a quarter longer. The figure of each is its fastest time, since
//! other programs only ever add time. The limit is the share of the FLOPs that `runner estimate`
//! counts for the phase.

use std::time::Instant;

use burn::tensor::Device;
use firebrick::collective::SingleProcess;
use firebrick::config::{
    AdamWPlan, Architecture, Config, DatasetConfig, OptimizerPlan, PhaseConfig, PhaseLengthKey,
    PhaseModel, Plan,
};
use firebrick::data::Batch;
use firebrick::environment::Environment;
use firebrick::forecast::flops_of_phase;
use firebrick::model::{Decoder, DecoderSpec};
use firebrick::objective::CrossEntropy;
use firebrick::optimizer::Optimizer;
use firebrick::train::{StepSettings, TrainState, train_step};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROWS: usize = 8;
const COLS: usize = 256;
const VOCAB: usize = 1024;
const TURNS: usize = 8;

/// The selectors of each phase.
const FROZEN: [&[&str]; 5] = [
    &[],
    &["embed_tokens"],
    &["embed_tokens", "layers.0-1"],
    &["embed_tokens", "layers.0-3"],
    &["embed_tokens", "layers.0-6"],
];

fn main() {
    let environment = Environment::detect();
    println!("{}, {} threads", environment.cpu, environment.threads);
    println!("llama, width 512, 8 layers, {ROWS} x {COLS} tokens, least of {TURNS} turns\n");
    for checkpointing in [false, true] {
        table(checkpointing);
    }
}

fn table(checkpointing: bool) {
    let plan = plan(checkpointing);
    let spec = DecoderSpec {
        shape: plan.shape.clone(),
        vocab_size: VOCAB,
        eos_token_id: None,
        bos_token_id: None,
    };
    let cells = ROWS * COLS;
    // Arbitrary tokens: a linear congruential sequence.
    let token = |i: usize| ((i * 1_103_515_245 + 12_345) / 65_536 % VOCAB) as u32;
    let batch = [Batch {
        rows: ROWS,
        cols: COLS,
        tokens: (0..cells).map(token).collect(),
        targets: (1..=cells).map(token).collect(),
        weights: vec![1.0; cells],
        segment_ids: vec![0; cells],
        positions: (0..cells).map(|i| (i % COLS) as u32).collect(),
    }];
    let device = Device::flex().autodiff();
    let mut states: Vec<TrainState> = plan
        .phases
        .iter()
        .map(|phase| {
            let model = Decoder::new(&spec, 1, &device).expect("the shape above is possible");
            let model = model
                .with_frozen(&phase.freeze)
                .expect("the model has these layers");
            let adamw = AdamWPlan::new([0.9, 0.95], 1e-8, 0.1);
            TrainState::new(model, Optimizer::new(&OptimizerPlan::AdamW(adamw)))
        })
        .collect();
    let settings = StepSettings {
        gradient_checkpointing: checkpointing,
        ..StepSettings::default()
    };
    let mut least = [[f64::INFINITY; 2]; FROZEN.len()];
    for _ in 0..TURNS {
        for (state, least) in states.iter_mut().zip(&mut least) {
            let mut step = || {
                let begun = Instant::now();
                let report = train_step(state, &batch, &CrossEntropy, &settings, &SingleProcess);
                (report.expect("the batch fits the model"), begun.elapsed())
            };
            step();
            let (report, whole) = step();
            least[0] = least[0].min(report.time.backward.as_secs_f64());
            least[1] = least[1].min(whole.as_secs_f64());
        }
    }
    let models = PhaseModel::of_plan(&plan);
    let flops: Vec<f64> = plan
        .phases
        .iter()
        .zip(models)
        .map(|(phase, model)| {
            flops_of_phase((&plan, phase, model), &spec)
                .expect("as above")
                .step
        })
        .collect();
    println!(
        "{}\n{:<28} {:>12} {:>10} {:>12} {:>10} {:>12}",
        if checkpointing {
            "gradient checkpointing"
        } else {
            "every activation kept"
        },
        "frozen",
        "passes ms",
        "of all",
        "step ms",
        "of all",
        "FLOPs of all"
    );
    for (number, frozen) in FROZEN.iter().enumerate() {
        let [passes, step] = least[number];
        println!(
            "{:<28} {:>12.1} {:>10.3} {:>12.1} {:>10.3} {:>12.3}",
            if frozen.is_empty() {
                "nothing".to_string()
            } else {
                frozen.join(", ")
            },
            1e3 * passes,
            passes / least[0][0],
            1e3 * step,
            step / least[0][1],
            flops[number] / flops[0],
        );
    }
    println!();
}

fn plan(checkpointing: bool) -> Plan {
    let mut config = Config::default();
    config.model.architecture = Some(Architecture::Llama);
    config.model.hidden_size = Some(512);
    config.model.intermediate_size = Some(1376);
    config.model.num_hidden_layers = Some(8);
    config.model.num_attention_heads = Some(8);
    config.data.sequence_len = COLS;
    config.data.datasets.push(DatasetConfig::new("data/*.txt"));
    config.train.micro_batch_size = ROWS;
    config.train.gradient_checkpointing = checkpointing;
    config.phase = FROZEN
        .iter()
        .map(|frozen| {
            let mut phase = PhaseConfig::new(PhaseLengthKey::Steps(10));
            phase.freeze = frozen.iter().map(|selector| selector.to_string()).collect();
            phase
        })
        .collect();
    Plan::from_config(config).unwrap_or_else(|error| panic!("{error}"))
}
