//! `[average]` as a user meets it: errors, the terminal, what the verbs open, what it takes.

use serde_json::Value;

use super::bench::{Bench, json};

const AVERAGE: [&str; 4] = ["--set", "average.decay=0.5", "--set", "average.start=2"];

fn with_average<'a>(verb: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [verb, &AVERAGE, more].concat()
}

/// The part of a run's standard error that says what `generate` makes of a model.
fn completion(bench: &Bench, model: &str) -> String {
    let prompt = ["--prompt", "the river", "--temperature", "0"];
    let arguments = [&["generate", "--model", model][..], &prompt].concat();
    bench.expect(0, &arguments).0
}

fn val_loss(bench: &Bench, model: &str) -> f64 {
    let arguments = ["eval", "--model", model, "--data", "text.txt", "--json"];
    let (stdout, _) = bench.expect(0, &arguments);
    let found: Value = serde_json::from_str(&stdout).unwrap();
    found["val_loss"].as_f64().unwrap()
}

#[test]
fn a_run_says_which_weights_it_measured_and_exported() {
    let bench = Bench::new();
    let evaluations = ["--set", "eval.eval_steps=2"];
    let arguments = with_average(&["train", "x.toml"], &evaluations);
    let (stdout, stderr) = bench.expect(0, &arguments);
    for part in [
        "the average of the weights begins with those of step 3",
        "of the current weights, ",
        "step 4: val loss ",
        " of the average, ",
    ] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    assert!(stdout.contains(", the average of the weights)"), "{stdout}");
    assert_eq!(
        json(&bench.path("out/run.json"))["exported_weights"],
        "average"
    );
    // It goes on as it was, and not otherwise.
    let (stdout, _) = bench.expect(0, &arguments);
    assert!(stdout.contains("is already complete"), "{stdout}");
    let (_, stderr) = bench.expect(2, &["train", "x.toml"]);
    assert!(
        stderr.contains("average.decay: 0.5 there, (absent) here"),
        "{stderr}"
    );
}

#[test]
fn what_a_verb_opens_is_the_average() {
    let bench = Bench::new();
    // The weights of the last steps differ by much.
    let fast = [
        "--set",
        "optimizer.learning_rate=0.05",
        "--set",
        "eval.eval_steps=0",
    ];
    bench.expect(0, &with_average(&["train", "x.toml", "--quiet"], &fast));
    let step = json(&bench.path("out/run.json"))["exported_step"].to_string();
    let restore = |out: &str, more: &[&str]| {
        let arguments = ["ckpt", "restore", "out", "--step", &step, "--out", out];
        bench.expect(0, &[&arguments[..], more].concat()).0
    };
    let said = restore("whole", &[]);
    assert!(said.contains("--average writes their average"), "{said}");
    restore("average", &["--average"]);
    let [run, average, whole] = ["out", "average", "whole"].map(|name| val_loss(&bench, name));
    assert_eq!(run, average);
    assert_ne!(run, whole);
    assert_eq!(completion(&bench, "out"), completion(&bench, "average"));
    // A checkpoint is what the run goes on from; the other folder is a model and no more.
    assert!(bench.path("whole/extra.safetensors").is_file());
    assert!(!bench.path("average/state.json").exists());
    let (_, stderr) = bench.expect(
        1,
        &[
            "ckpt",
            "restore",
            "out",
            "--step",
            "2",
            "--average",
            "--out",
            "x",
        ],
    );
    assert!(
        stderr.contains("the checkpoint of step 2 has no average"),
        "{stderr}"
    );
    assert!(!bench.path("x").exists());
    let whole = ["--output-dir", "full", "--set", "checkpoint.format=full"];
    bench.expect(0, &with_average(&["train", "x.toml", "--quiet"], &whole));
    let arguments = ["ckpt", "restore", "full", "--average", "--out", "x"];
    let (_, stderr) = bench.expect(1, &arguments);
    assert!(stderr.contains("is a whole checkpoint: "), "{stderr}");
    assert!(!bench.path("x").exists());
}

#[test]
fn mistakes_point_at_their_line() {
    let bench = Bench::new();
    let config = std::fs::read_to_string(bench.path("x.toml")).unwrap();
    let lines = config.lines().count();
    for (section, message, line) in [
        (
            "[average]\nstart = 6",
            "would begin at step 7, and the run has 6 steps",
            2,
        ),
        (
            "[average]\ndecay = 0.9\nevery = 7",
            "would begin at step 7, and the run has 6 steps",
            3,
        ),
        (
            "[average]\ndecay = 0",
            "must be greater than 0 and at most 1",
            2,
        ),
        (
            "[average]\nstart = \"2M tokens\"",
            "begins after some steps or a share",
            2,
        ),
        ("[ema]\ndecay = 0.9", "unknown section [ema]", 1),
        (
            "[average]\nmodel_ema_decay = 0.9",
            "unknown key `model_ema_decay`",
            2,
        ),
        (
            "[[phase]]\nlength = \"rest\"\naverage = { decay = 0.9 }",
            "unknown key `average` in [[phase]]",
            3,
        ),
    ] {
        std::fs::write(bench.path("y.toml"), format!("{config}{section}\n")).unwrap();
        let (_, stderr) = bench.expect(2, &["validate", "y.toml"]);
        let place = format!("y.toml:{}:", lines + line);
        assert!(
            stderr.contains(message) && stderr.contains(&place),
            "{section}: {stderr}"
        );
    }
    // How many steps these are is known once the data is read.
    let tokens = [
        "--set",
        "train={max_tokens=640, micro_batch_size=4}",
        "--set",
        "average.start=10",
    ];
    bench.expect(0, &[&["validate", "x.toml"], &tokens[..]].concat());
    let (_, stderr) = bench.expect(2, &[&["train", "x.toml"], &tokens[..]].concat());
    assert!(
        stderr.contains("would begin at step 11, and the run has 10 steps"),
        "{stderr}"
    );
}

#[test]
fn an_estimate_counts_the_average() {
    let bench = Bench::new();
    let estimate = |sets: &[&str]| -> Value {
        let (stdout, _) = bench.expect(0, &[&["estimate", "x.toml", "--json"], sets].concat());
        serde_json::from_str(&stdout).unwrap()
    };
    let term = |estimate: &Value, name: &str| {
        let terms = estimate["memory"]["terms"].as_array().unwrap();
        let found = terms.iter().find(|term| term["name"] == name);
        found.map_or(0, |term| term["bytes"].as_u64().unwrap())
    };
    let (plain, average) = (estimate(&[]), estimate(&AVERAGE));
    let bytes = 4 * plain["trainable"].as_u64().unwrap();
    assert_eq!(
        (term(&plain, "average"), term(&average, "average")),
        (0, bytes)
    );
    let copied = |found: &Value| term(found, "copy being saved");
    assert_eq!(copied(&average), copied(&plain) + bytes);
    // What the process held before differs from one to the next.
    let peak = |found: &Value| found["peak_bytes"].as_u64().unwrap() - term(found, "process");
    assert_eq!(peak(&average), peak(&plain) + 2 * bytes);
    let whole = ["--set", "checkpoint.format=\"full\""];
    let [plain, average] = [&whole[..], &[&AVERAGE[..], &whole].concat()].map(estimate);
    assert!(peak(&average) >= peak(&plain) + bytes);

    // A phase that freezes layers keeps their average; layers that are never trained have none.
    let config = std::fs::read_to_string(bench.path("x.toml")).unwrap();
    let phases = |first: &str| {
        let second = "[[phase]]\nlength = \"rest\"\nmicro_batch_size = 16\nfreeze = [\"layers\"]\n";
        let text = format!("{config}[average]\n[[phase]]\nlength = 2\n{first}\n{second}");
        std::fs::write(bench.path("y.toml"), text).unwrap();
        let (stdout, _) = bench.expect(0, &["estimate", "y.toml", "--json"]);
        serde_json::from_str::<Value>(&stdout).unwrap()
    };
    let (kept, none) = (phases(""), phases("freeze = [\"layers\"]"));
    assert_eq!(kept["phase"], "phase-2");
    assert_eq!(term(&kept, "average"), bytes);
    // The embedding, which is the head too, and the last norm.
    assert_eq!(term(&none, "average"), 4 * (257 * 16 + 16));
}
