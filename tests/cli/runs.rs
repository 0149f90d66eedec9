//! Runs that go well, and what they leave behind.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::bench::{Bench, json};

#[test]
fn a_run_leaves_a_complete_folder_and_says_what_to_do_next() {
    let bench = Bench::new();
    let (stdout, _) = bench.train(&[]);
    for line in [
        "trained 6 steps",
        "val loss ",
        "bigram ",
        "model    out (step ",
    ] {
        assert!(stdout.contains(line), "{stdout}");
    }
    assert!(
        stdout
            .trim_end()
            .ends_with(r#"runner generate --model out --prompt "the ""#),
        "{stdout}"
    );
    for name in [
        "config.toml",
        "resolved.toml",
        "run.json",
        "metrics.jsonl",
        "metrics.csv",
        "logs/train.log",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "checkpoints/last",
        "checkpoints/best",
    ] {
        assert!(bench.path("out").join(name).is_file(), "{name}");
    }
    let record = json(&bench.path("out/run.json"));
    assert_eq!(record["final"]["step"], 6);
    assert_eq!(record["final"]["tokens"], 6 * 4 * 16);
    assert!(record["final"]["best_val_loss"].as_f64().unwrap() > 0.0);
    assert_eq!(record["data"][0]["path"], "text.txt");
    let rows = bench.metrics("out");
    assert_eq!(rows.len(), 6);
    assert_eq!(
        (&rows[0]["step"], &rows[0]["tokens"]),
        (&Value::from(1), &Value::from(64))
    );
    assert!(rows[2]["val_loss"].is_f64() && rows[2]["bits_per_byte"].is_f64());
    for key in ["loss", "lr", "grad_norm"] {
        assert!(rows[5][key].is_f64(), "{key}");
    }
}

#[test]
fn generate_writes_the_completion_alone() {
    let bench = Bench::new();
    bench.train(&[]);
    let generate = |extra: &[&str]| {
        let fixed = [
            "generate",
            "--model",
            "out",
            "--prompt",
            "the ",
            "--max-new-tokens",
            "12",
        ];
        bench.expect(0, &[&fixed[..], extra].concat())
    };
    let (text, stderr) = generate(&["--temperature", "0"]);
    assert!(!text.is_empty() && stderr.is_empty());
    assert_eq!(generate(&["--temperature", "0"]).0, text);
    let as_json: Value =
        serde_json::from_str(&generate(&["--temperature", "0", "--json"]).0).unwrap();
    assert_eq!(as_json["text"], text);
    assert_eq!(as_json["tokens"].as_array().unwrap().len(), 12);
    assert_eq!(as_json["finish"], "length");
    let seeded = |seed: &str| generate(&["--temperature", "1", "--seed", seed]).0;
    assert_eq!(seeded("1"), seeded("1"));
    assert_ne!(seeded("1"), seeded("2"));
    let first: String = text.chars().take(1).collect();
    assert_eq!(generate(&["--temperature", "0", "--stop", &first]).0, "");
}

#[test]
fn r2_the_resolved_config_gives_the_same_run() {
    let bench = Bench::new();
    bench.train(&[
        "--set",
        "optimizer.name=lion",
        "--set",
        "lr_scheduler.warmup_ratio=0.5",
    ]);
    bench.expect(
        0,
        &[
            "train",
            "out/resolved.toml",
            "--output-dir",
            "again",
            "--quiet",
        ],
    );
    assert_eq!(bench.checkpoint("again", 6), bench.checkpoint("out", 6));
    assert_eq!(bench.metrics("again"), bench.metrics("out"));
}

#[test]
fn r6_the_order_of_data_does_not_depend_on_the_micro_batch() {
    let bench = Bench::new();
    bench.train(&["--output-dir", "one"]);
    let split = [
        "--set",
        "train.micro_batch_size=1",
        "--set",
        "train.gradient_accumulation_steps=4",
    ];
    bench.train(&[&split[..], &["--output-dir", "four"]].concat());
    for (one, four) in bench.metrics("one").iter().zip(bench.metrics("four")) {
        let difference = one["loss"].as_f64().unwrap() - four["loss"].as_f64().unwrap();
        assert!(difference.abs() < 1e-4, "{one} {four}");
    }
}

#[test]
fn dry_run_and_validate_write_nothing() {
    let bench = Bench::new();
    let (stdout, _) = bench.expect(0, &["train", "x.toml", "--dry-run"]);
    assert!(
        stdout.contains("parameters; 6 steps of 4 x 16 tokens"),
        "{stdout}"
    );
    let (stdout, _) = bench.expect(0, &["train", "x.toml", "--dry-run", "--json"]);
    let summary: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (&summary["steps"], &summary["tokens_per_step"]),
        (&Value::from(6), &Value::from(64))
    );
    bench.expect(0, &["validate", "x.toml"]);
    assert!(!bench.path("out").exists());
}

#[test]
fn json_events_are_one_object_a_line() {
    let bench = Bench::new();
    let (stdout, _) = bench.expect(0, &["train", "x.toml", "--json"]);
    let events: Vec<Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let count = |name: &str| events.iter().filter(|event| event["event"] == name).count();
    assert_eq!(
        (count("started"), count("step"), count("finished")),
        (1, 6, 1)
    );
    assert_eq!((count("evaluated"), count("sample")), (2, 2));
    assert!(count("saved") >= 3 && count("note") > 0);
}

#[test]
fn r11_rotation_is_announced() {
    let bench = Bench::new();
    let (_, stderr) = bench.expect(
        0,
        &[
            "train",
            "x.toml",
            "--set",
            "checkpoint.save_total_limit=1",
            "--set",
            "checkpoint.save_steps=1",
        ],
    );
    assert!(
        stderr.contains("deleted the checkpoint of step 1\n"),
        "{stderr}"
    );
    let steps = fs::read_dir(bench.path("out/checkpoints"))
        .unwrap()
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .starts_with("step-")
        });
    assert!(steps.count() <= 3);
}

#[test]
fn every_config_in_the_repository_runs() {
    let bench = Bench::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::create_dir(bench.path("data")).unwrap();
    fs::copy(
        bench.path("text.txt"),
        bench.path("data/tinyshakespeare.txt"),
    )
    .unwrap();
    let text = fs::read_to_string(bench.path("text.txt")).unwrap();
    for (name, times) in [("train", 40), ("val", 4)] {
        let path = bench.path(&format!("data/gcide-{name}.txt"));
        fs::write(path, text.repeat(times)).unwrap();
    }
    for entry in fs::read_dir(root.join("configs")).unwrap() {
        let config = entry.unwrap().path();
        let name = config.file_stem().unwrap().to_str().unwrap();
        let text = fs::read_to_string(&config).unwrap();
        if name == "gsm8k-qlora" || text.contains("[[phase]]") {
            // Tested in recipes.rs, which has a base model, and in phases.rs.
            continue;
        }
        let quickstart = name == "quickstart";
        let mut command = bench.command(&["train", config.to_str().unwrap(), "--quiet"]);
        let out = bench.path(name);
        command.args(["--output-dir", out.to_str().unwrap()]);
        for set in [
            "train.max_steps=2",
            "train.micro_batch_size=2",
            "eval.sample_tokens=2",
            "eval.eval_steps=1",
        ] {
            command.args(["--set", set]);
        }
        if text.contains("warmup_steps") {
            command.args(["--set", "lr_scheduler.warmup_steps=1"]);
        }
        // The quickstart trains on the repository it lies in, the others on data/.
        if quickstart {
            command.current_dir(root);
        } else {
            command.args(["--set", "eval.sample_prompts=[\"the \"]"]);
        }
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {stderr}");
        assert!(out.join("model.safetensors").is_file(), "{name}");
    }
}

#[test]
fn the_small_verbs_answer() {
    let bench = Bench::new();
    let (stdout, _) = bench.expect(0, &["env", "--json"]);
    let environment: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(environment["devices"][0]["backend"], "cpu");
    let operations = environment["operations"].as_array().unwrap();
    let linear = operations
        .iter()
        .find(|found| found["operation"] == "ternary_linear" && found["backend"] == "cpu");
    assert_eq!(linear.unwrap()["way"], "simd");
    let said = bench.expect(0, &["env"]).0;
    assert!(said.contains("threads"), "{said}");
    let mut lines = said.lines();
    assert!(
        lines.any(|line| line.contains("ternary_linear ") && line.contains("cpu: SIMD (")),
        "{said}"
    );
    let schema: Value = serde_json::from_str(&bench.expect(0, &["schema"]).0).unwrap();
    assert!(schema["properties"]["train"].is_object());
    bench.expect(0, &["init", "-o", "new.toml"]);
    bench.expect(0, &["validate", "new.toml"]);
    let (_, stderr) = bench.expect(1, &["init", "-o", "new.toml"]);
    assert!(stderr.contains("choose another name"), "{stderr}");
    assert!(bench.expect(0, &["--help"]).0.contains("generate"));
}

#[test]
fn r11_a_base_model_with_more_rows_than_tokens_is_sampled_from() {
    let bench = Bench::new();
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/reference/qwen2");
    let base = format!("model={{base_model=\"{base}\"}}");
    bench.train(&["--set", &base, "--set", "eval.sample_tokens=32"]);
    let journal = std::fs::read_to_string(bench.path("out/logs/events.jsonl")).unwrap();
    assert!(journal.contains("\"completion\""), "{journal}");
    assert!(!journal.contains("no sample of"), "{journal}");
}

#[test]
fn r11_without_a_validation_split_the_last_step_is_sampled_and_saved_once() {
    let bench = Bench::new();
    let (stdout, _) = bench.expect(
        0,
        &["train", "x.toml", "--json", "--set", "data.val_fraction=0"],
    );
    let count = |event: &str| {
        let rows = stdout.lines().map(|l| serde_json::from_str(l).unwrap());
        rows.filter(|row: &Value| row["event"] == event && row["step"] == 6)
            .count()
    };
    assert_eq!((count("sample"), count("saved")), (1, 1));
}

#[test]
fn r12_going_back_trims_the_reports_that_are_not_written_any_more() {
    let bench = Bench::new();
    bench.train(&[]);
    let none = ["--resume", "4", "--set", "logging.report_to=[]"];
    bench.train(&[&none[..], &["--set", "train.max_steps=5"]].concat());
    let steps: Vec<u64> = bench
        .metrics("out")
        .iter()
        .map(|row| row["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4]);
}
