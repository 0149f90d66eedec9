//! The estimated peak memory of a run beside the measured one (R13).
//!
//! `cargo bench --bench memory`: for each shape, with and without gradient checkpointing, asks
//! `runner estimate`, runs `runner train` for a few steps in a process of its own, and prints both
//! with their ratio. Then the same for the files of `configs/` that have phases, if FIREBRICK_DATA names a
//! folder with what they train on; those that fine-tune get a base model of 24 layers that is made here. With
//! `-- phases` only these files run. Run it while nothing else runs: cores that are taken away do not reach their peaks together.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// A config, and what is set on top of it.
const SHAPES: [(&str, &str, &[&[&str]]); 11] = [
    ("quickstart", "configs/quickstart.toml", &[]),
    ("llama-char", "configs/llama-char.toml", &[]),
    ("nanogpt-char", "configs/nanogpt-char.toml", &[]),
    ("ternary-char", "configs/ternary-char.toml", &[]),
    ("30M at 512", "configs/quickstart.toml", &[&WIDE]),
    ("30M bitnet", "configs/quickstart.toml", &[&WIDE, &BITNET]),
    (
        "30M bf16",
        "configs/quickstart.toml",
        &[&WIDE, &["model.dtype=bf16"]],
    ),
    (
        "30M muon",
        "configs/quickstart.toml",
        &[&WIDE, &["optimizer.name=muon"]],
    ),
    (
        "30M normuon",
        "configs/quickstart.toml",
        &[&WIDE, &["optimizer.name=normuon"]],
    ),
    (
        "30M soap",
        "configs/quickstart.toml",
        &[&WIDE, &["optimizer.name=soap"]],
    ),
    ("2 x 4096", "configs/quickstart.toml", &[&LONG]),
];

const WIDE: [&str; 8] = [
    "model.hidden_size=512",
    "model.intermediate_size=1376",
    "model.num_hidden_layers=9",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=8",
    "tokenizer.vocab_size=4096",
    "data.sequence_len=512",
    "train.micro_batch_size=4",
];

const LONG: [&str; 7] = [
    "model.hidden_size=256",
    "model.intermediate_size=688",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=4096",
    "data.sequence_len=4096",
    "train.micro_batch_size=2",
];

const BITNET: [&str; 2] = [
    "model.architecture=\"bitnet\"",
    "quantization.weights=\"ternary\"",
];

/// Every part of a run, evaluation, samples and saves included, in a few steps.
const SHORT: [&str; 6] = [
    "train.max_steps=6",
    "lr_scheduler.warmup_steps=1",
    "eval.eval_steps=3",
    "eval.sample_tokens=4",
    "checkpoint.save_steps=3",
    "data.datasets.0.path=[\"src/**/*.rs\", \"docs/**/*.md\"]",
];

/// Files with phases that train a model from random weights.
const PHASES: [&str; 5] = [
    "sequence-growth",
    "batch-growth",
    "wsd",
    "dense-to-ternary",
    "pretrain-then-sft",
];

/// Files with phases that train a base model.
const PHASES_OF_A_BASE: [&str; 3] = ["gradual-freezing", "lora-to-full", "relora"];

/// The base model of those.
const BASE: [&str; 8] = [
    "model.hidden_size=256",
    "model.intermediate_size=688",
    "model.num_hidden_layers=24",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=4",
    "model.max_position_embeddings=512",
    "tokenizer.vocab_size=4096",
    "data.sequence_len=64",
];

fn main() {
    println!(
        "{:<18} {:<14} {:>12} {:>12} {:>7}",
        "shape", "checkpointing", "estimate MB", "measured MB", "ratio"
    );
    let folder = tempfile::tempdir().expect("a temporary folder");
    let only_phases = std::env::args().any(|argument| argument == "phases");
    for (name, config, sets) in SHAPES.into_iter().filter(|_| !only_phases) {
        for checkpointing in ["false", "true"] {
            let checkpointed = format!("train.gradient_checkpointing={checkpointing}");
            let sets = [sets.concat(), SHORT.to_vec(), vec![checkpointed.as_str()]].concat();
            row(
                (name, checkpointing),
                config,
                &sets,
                &folder.path().join("run"),
            );
        }
    }
    let Some(data) = std::env::var_os("FIREBRICK_DATA") else {
        println!("FIREBRICK_DATA is not set: the files with phases are left out");
        return;
    };
    let data = Path::new(&data);
    let base = folder.path().join("base");
    let sets = [&BASE[..], &SHORT[1..], &["train.max_steps=1"]].concat();
    runner(
        "train",
        &["--quiet"],
        "configs/quickstart.toml",
        &sets,
        &base,
    );
    let base = format!("model.base_model={}", base.display());
    let text = data.join("text/tinyshakespeare.txt");
    let rows = data.join("gsm8k/train.jsonl");
    for name in PHASES {
        let config = format!("configs/{name}.toml");
        let text = format!("data.datasets.0.path={}", text.display());
        let answers = format!("phase.1.data.datasets.0.path={}", rows.display());
        let mut sets = vec![text.as_str(), length_of(&config), PHASED[0], PHASED[1]];
        if name == "pretrain-then-sft" {
            sets.push(&answers);
        } else {
            sets.push("eval.sample_tokens=4");
        }
        row((name, "false"), &config, &sets, &folder.path().join("run"));
    }
    for name in PHASES_OF_A_BASE {
        let config = format!("configs/{name}.toml");
        let rows = format!("data.datasets.0.path={}", rows.display());
        let own = [rows.as_str(), base.as_str(), "data.overlong=drop"];
        let sets = [&own[..], &[length_of(&config)], &PHASED].concat();
        row((name, "false"), &config, &sets, &folder.path().join("run"));
    }
}

/// How often a short run evaluates and saves.
const PHASED: [&str; 2] = ["eval.eval_steps=6", "checkpoint.save_steps=3"];

/// A short length, in the unit that the file uses, with steps in every phase.
fn length_of(config: &str) -> &'static str {
    let text = std::fs::read_to_string(config).expect("a file of configs/");
    let has = |key: &str| text.lines().any(|line| line.starts_with(key));
    if has("max_tokens") {
        "train.max_tokens=12000"
    } else if has("num_epochs") {
        "train.num_epochs=0.01"
    } else {
        "train.max_steps=12"
    }
}

/// Prints the estimate and the measurement of one run.
fn row((name, checkpointing): (&str, &str), config: &str, sets: &[&str], run: &Path) {
    let estimate = runner("estimate", &["--json"], config, sets, run);
    let estimate: Value = serde_json::from_str(&estimate).expect("JSON");
    runner(
        "train",
        &["--quiet", "--resume", "never"],
        config,
        sets,
        run,
    );
    let record = std::fs::read_to_string(run.join("run.json")).expect("a record");
    let record: Value = serde_json::from_str(&record).expect("JSON");
    let estimated = estimate["peak_bytes"].as_f64().expect("a number");
    let measured = record["final"]["peak_rss_bytes"]
        .as_f64()
        .expect("a number");
    println!(
        "{name:<18} {checkpointing:<14} {:>12.1} {:>12.1} {:>7.3}",
        estimated / 1e6,
        measured / 1e6,
        estimated / measured
    );
    std::fs::remove_dir_all(run).expect("a folder that can be removed");
}

fn runner(verb: &str, flags: &[&str], config: &str, sets: &[&str], folder: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_runner"))
        .args([verb, config, "--output-dir"])
        .arg(folder)
        .args(flags)
        .args(sets.iter().flat_map(|set| ["--set", set]))
        .output()
        .expect("the runner starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}
