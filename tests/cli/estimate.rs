//! R13: what a run will need, before it starts.

use serde_json::Value;

use super::bench::{Bench, json};

fn estimate(bench: &Bench, sets: &[&str]) -> Value {
    let (stdout, _) = bench.expect(0, &[&["estimate", "x.toml", "--json"], sets].concat());
    serde_json::from_str(&stdout).unwrap()
}

fn term(estimate: &Value, name: &str) -> u64 {
    let terms = estimate["memory"]["terms"].as_array().unwrap();
    let found = terms.iter().find(|term| term["name"] == name);
    found.map_or(0, |term| term["bytes"].as_u64().unwrap())
}

#[test]
fn r13_the_estimate_is_a_sum_that_can_be_followed() {
    let bench = Bench::new();
    let found = estimate(&bench, &[]);
    // 257 x 16 embedding, 2 blocks of 4 x 16 x 16 + 3 x 16 x 32 + 2 x 16, a norm of 16.
    let parameters = 257 * 16 + 2 * (4 * 256 + 3 * 512 + 32) + 16;
    assert_eq!(found["parameters"], parameters);
    assert_eq!(found["trainable"], parameters);
    // Per block and direction: 2 for each weight, 4 x 16 x 16 keys for attention; the head on top.
    let flops = 3 * (2 * (2 * (1024 + 1536) + 4 * 16 * 16) + 2 * 257 * 16);
    assert_eq!(found["flops_per_token"], flops as f64);
    assert_eq!(term(&found, "weights"), 4 * parameters);
    assert_eq!(term(&found, "optimizer"), 8 * parameters);
    let terms = found["memory"]["terms"].as_array().unwrap();
    let sum: u64 = terms
        .iter()
        .map(|term| term["bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(found["peak_bytes"], sum);
    assert_eq!(found["steps"], 6);
    assert!(found["seconds_per_step"].is_null());

    let (stdout, _) = bench.expect(0, &["estimate", "x.toml", "--time"]);
    for line in [
        "9,312 parameters; 6 steps",
        "compute  ",
        "memory   ",
        "  weights ",
        "time     ",
    ] {
        assert!(stdout.contains(line), "{line}: {stdout}");
    }
    // A run says it too, and a dry run is an estimate.
    let (_, stderr) = bench.expect(0, &["train", "x.toml"]);
    assert!(stderr.contains("memory: up to "), "{stderr}");
    let (stdout, _) = bench.expect(0, &["train", "x.toml", "--dry-run", "--output-dir", "y"]);
    assert!(stdout.contains("  weights "), "{stdout}");
    assert!(!bench.path("y").exists());
    // An estimate is about a config, whatever is in its folder; a dry run is about the run.
    let other = ["x.toml", "--set", "train.micro_batch_size=2"];
    bench.expect(0, &[&["estimate"], &other[..]].concat());
    bench.expect(2, &[&["train", "--dry-run"], &other[..]].concat());
}

#[test]
fn r13_what_the_estimate_counts_follows_the_config() {
    let bench = Bench::new();
    let sets = |sets: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        estimate(&bench, &sets)
    };
    let plain = sets(&["train.micro_batch_size=64"]);
    let checkpointed = sets(&[
        "train.micro_batch_size=64",
        "train.gradient_checkpointing=true",
    ]);
    assert!(term(&checkpointed, "activations") < term(&plain, "activations"));
    assert!(checkpointed["flops_per_token"].as_f64() > plain["flops_per_token"].as_f64());
    let half = sets(&["train.micro_batch_size=64", "model.dtype=bf16"]);
    assert_eq!(2 * term(&half, "rounded weights"), term(&half, "weights"));
    assert!(term(&half, "activations") < term(&plain, "activations"));
    let summed = sets(&[
        "train.micro_batch_size=64",
        "train.gradient_accumulation_steps=2",
    ]);
    assert_eq!(term(&summed, "summed gradient"), term(&summed, "weights"));
}

#[test]
fn r13_what_does_not_fit_is_exit_4_with_the_change_that_makes_it_fit() {
    let bench = Bench::new();
    // Hundreds of gigabytes of activations, and a few kilobytes for one row.
    let wide = [
        "--set",
        "train.micro_batch_size=1048576",
        "--set",
        "data.sequence_len=64",
    ];
    for verb in [
        &["train", "x.toml"][..],
        &["train", "x.toml", "--dry-run"],
        &["estimate", "x.toml"],
    ] {
        let (_, stderr) = bench.expect(4, &[verb, &wide].concat());
        assert!(stderr.contains("error[memory]: needs "), "{stderr}");
        assert!(stderr.contains("activations "), "{stderr}");
        assert!(
            stderr.contains("train.gradient_accumulation_steps = "),
            "{stderr}"
        );
        assert!(stderr.contains("(fits)"), "{stderr}");
    }
    assert!(
        !bench.path("out").exists(),
        "a run that does not fit leaves nothing behind"
    );
    let huge = [
        "--set",
        "model.hidden_size=65536",
        "--set",
        "model.num_hidden_layers=100",
    ];
    let (_, stderr) = bench.expect(4, &[&["train", "x.toml"], &huge[..]].concat());
    assert!(stderr.contains("no batch size makes it fit"), "{stderr}");
}

/// The quickstart's shape in a few steps, on a text of its own. `cargo bench --bench memory` holds the
/// estimate to ten percent where nothing else runs; here the cores may be taken away at any time,
/// and then do not reach their peaks together.
#[test]
#[ignore = "takes seconds"]
fn r13_the_estimate_is_near_the_quickstarts_peak() {
    let bench = Bench::new();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/quickstart.toml");
    for checkpointing in ["false", "true"] {
        let checkpointing = format!("train.gradient_checkpointing={checkpointing}");
        let sets = [
            "--set",
            &checkpointing,
            "--set",
            "data.datasets.0.path=text.txt",
            "--set",
            "tokenizer={type=\"byte\"}",
            "--set",
            "data.sequence_len=128",
            "--set",
            "train.max_steps=4",
            "--set",
            "lr_scheduler.warmup_steps=1",
            "--set",
            "eval.sample_tokens=4",
        ];
        let text = "the river is older than its bed. ".repeat(4000);
        std::fs::write(bench.path("text.txt"), text).unwrap();
        let (stdout, _) = bench.expect(0, &[&["estimate", config, "--json"], &sets[..]].concat());
        let estimate: Value = serde_json::from_str(&stdout).unwrap();
        let run = format!("out-{}", checkpointing.len());
        bench.expect(
            0,
            &[&["train", config, "-q", "--output-dir", &run], &sets[..]].concat(),
        );
        let peak = json(&bench.path(&run).join("run.json"))["final"]["peak_rss_bytes"].as_f64();
        let ratio = estimate["peak_bytes"].as_f64().unwrap() / peak.unwrap();
        assert!((0.8..=1.25).contains(&ratio), "{checkpointing}: {ratio}");
    }
}

#[test]
fn r13_absurd_shapes_are_numbers_too() {
    let bench = Bench::new();
    let sets = [
        "model.num_hidden_layers=4096",
        "model.num_attention_heads=4096",
        "model.hidden_size=1048576",
        "model.intermediate_size=4194304",
        "data.sequence_len=200",
        "train.micro_batch_size=1048576",
    ];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let (_, stderr) = bench.expect(4, &[&["estimate", "x.toml"], &sets[..]].concat());
    assert!(stderr.contains("error[memory]"), "{stderr}");
}
