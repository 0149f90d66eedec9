//! The estimated peak memory of a run beside the measured one (R13).
//!
//! `cargo bench --bench memory`: for each shape, with and without gradient checkpointing, asks
//! `runner estimate`, runs `runner train` for a few steps in a process of its own, and prints both
//! with their ratio. Run it while nothing else runs: cores that are taken away do not reach their
//! peaks together.

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

fn main() {
    println!(
        "{:<14} {:<14} {:>12} {:>12} {:>7}",
        "shape", "checkpointing", "estimate MB", "measured MB", "ratio"
    );
    for (name, config, sets) in SHAPES {
        for checkpointing in ["false", "true"] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let checkpointed = format!("train.gradient_checkpointing={checkpointing}");
            let sets = [sets.concat(), SHORT.to_vec(), vec![checkpointed.as_str()]].concat();
            let run = folder.path().join("run");
            let estimate = runner("estimate", &["--json"], config, &sets, &run);
            let estimate: Value = serde_json::from_str(&estimate).expect("JSON");
            runner("train", &["--quiet"], config, &sets, &run);
            let record = std::fs::read_to_string(run.join("run.json")).expect("a record");
            let record: Value = serde_json::from_str(&record).expect("JSON");
            let estimated = estimate["peak_bytes"].as_f64().expect("a number");
            let measured = record["final"]["peak_rss_bytes"]
                .as_f64()
                .expect("a number");
            println!(
                "{name:<14} {checkpointing:<14} {:>12.1} {:>12.1} {:>7.3}",
                estimated / 1e6,
                measured / 1e6,
                estimated / measured
            );
        }
    }
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
