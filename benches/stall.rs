//! What saving costs a run: `cargo bench --bench stall -- [ROUNDS]`.
//!
//! The same run without saves, with saves in the background, with saves at once, and with whole checkpoints, in turns. The
//! stall of a save is what the first half of the steps up to the next save takes longer than the second half: copying, and
//! all that steps lose to the thread that codes it. The run without saves shows what chance makes of this. Beside it stands
//! one copy of weights and moments in memory.
#![allow(missing_docs, reason = "a program, not an interface")]

use std::hint::black_box;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use firebrick::checkpoint::CheckpointStore;
use firebrick::config::load;
use firebrick::train::{Event, Observer, Options, Run, TrainError};

// As the runner has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Saves, and steps after each: enough for the background to come to its end in the first half of them.
const SAVES: usize = 4;
const BETWEEN: usize = 12;
const STEPS: usize = (SAVES + 1) * BETWEEN;

/// A state that is large beside the arithmetic of a step.
const SETS: [&str; 15] = [
    "model.hidden_size=512",
    "model.intermediate_size=1376",
    "model.num_hidden_layers=8",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=8",
    "tokenizer={type=\"byte\"}",
    "data.sequence_len=64",
    "data.datasets.0.path=[\"src/**/*.rs\", \"docs/**/*.md\"]",
    "train.micro_batch_size=4",
    "lr_scheduler.warmup_steps=1",
    "eval.eval_steps=0",
    "eval.sample_prompts=[]",
    "checkpoint.save_total_limit=2",
    "checkpoint.keyframe_every=100",
    "logging.report_to=[]",
];

const VARIANTS: [(&str, &[&str]); 4] = [
    ("no saves", &[]),
    ("in the background", &["checkpoint.background=true"]),
    ("at once", &["checkpoint.background=false"]),
    ("whole, at once", &["checkpoint.format=\"full\""]),
];

/// When each step ended.
#[derive(Clone, Default)]
struct Watch(Arc<Mutex<Vec<Instant>>>);

impl Observer for Watch {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        if matches!(event, Event::Step(_)) {
            self.0
                .lock()
                .expect("no one panics with it")
                .push(Instant::now());
        }
        Ok(())
    }
}

fn main() {
    let rounds = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse().ok());
    let rounds: usize = rounds.unwrap_or(3);
    let environment = firebrick::environment::Environment::detect();
    println!(
        "{}, {} threads; {STEPS} steps, {SAVES} saves",
        environment.cpu, environment.threads
    );
    let mut stalls = vec![Vec::new(); VARIANTS.len()];
    let mut step = Vec::new();
    let mut state = 0;
    for _ in 0..rounds {
        for (i, (name, sets)) in VARIANTS.iter().enumerate() {
            let folder = tempfile::tempdir().expect("a folder");
            let (steps, bytes) = train(folder.path(), i > 0, sets);
            state = bytes;
            step.extend(&steps);
            let of_saves = (1..=SAVES).map(|save| {
                // The save at the end of step n is a part of what comes before the end of step n + 1.
                let after = &steps[save * BETWEEN - 1..(save + 1) * BETWEEN - 1];
                let (first, second) = after.split_at(BETWEEN / 2);
                first.iter().sum::<f64>() - second.iter().sum::<f64>()
            });
            let of_saves: Vec<f64> = of_saves.collect();
            println!("{name:<20}{of_saves:>8.3?} s");
            stalls[i].extend(of_saves);
        }
    }
    let median = |values: &[f64]| {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (from, mut to) = (vec![1u8; state], vec![2u8; state]);
    let copies: Vec<f64> = (0..5)
        .map(|_| {
            let started = Instant::now();
            to.copy_from_slice(black_box(&from));
            black_box(&to);
            started.elapsed().as_secs_f64()
        })
        .collect();
    let copy = median(&copies);
    println!(
        "\na state of {} MB, steps of {:.3} s; medians of {} saves",
        state / 1_000_000,
        median(&step),
        rounds * SAVES
    );
    println!("{:<20}{:>11}{:>10}", "", "for a save", "copies");
    for ((name, _), stalls) in VARIANTS.iter().zip(&stalls) {
        let stall = median(stalls);
        println!("{name:<20}{stall:>10.3}s{:>10.1}", stall / copy);
    }
    println!("{:<20}{copy:>10.3}s", "a copy, one thread");
}

/// Seconds of each step but the first, what follows the one before included, and bytes of the state.
fn train(folder: &Path, saves: bool, sets: &[&str]) -> (Vec<f64>, usize) {
    let run = folder.join("run");
    let places = [
        format!("output_dir={run:?}"),
        format!("train.max_steps={STEPS}"),
    ];
    let every = format!("checkpoint.save_steps={}", if saves { BETWEEN } else { 0 });
    let all: Vec<String> = SETS
        .iter()
        .chain(sets)
        .map(ToString::to_string)
        .chain(places)
        .chain([every])
        .collect();
    let plan = load(Path::new("configs/quickstart.toml"), &all).expect("a config");
    let watch = Watch::default();
    let options = Options {
        observers: vec![Box::new(watch.clone())],
        ..Options::default()
    };
    let prepared = Run::prepare(&plan, options).expect("a run");
    prepared.expect("a new run").train().expect("it trains");
    let steps = watch.0.lock().expect("no one panics with it");
    let took = steps
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64());
    let took = took.collect();
    let list = CheckpointStore::new(&run).list().expect("checkpoints");
    let details = list[0].details.as_ref().expect("a checkpoint");
    (took, details.tensor_bytes as usize)
}
