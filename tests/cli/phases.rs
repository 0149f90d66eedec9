//! P1: a few steps of every file in configs/ that has phases, and going on across their boundaries.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::bench::{Bench, json as read_json};
use super::recipes::bench as recipes_bench;

/// Every file with phases, and how many it has.
const FILES: [(&str, usize); 8] = [
    ("batch-growth", 3),
    ("dense-to-ternary", 3),
    ("gradual-freezing", 3),
    ("lora-to-full", 2),
    ("pretrain-then-sft", 2),
    ("relora", 3),
    ("sequence-growth", 3),
    ("wsd", 2),
];

/// Steps that each run takes, and the tokens of so many steps of `batch-growth`.
const SETS: [&str; 8] = [
    "train.threads=2",
    "eval.eval_steps=3",
    "eval.sample_prompts=[]",
    "checkpoint.save_steps=1",
    "checkpoint.save_total_limit=0",
    "checkpoint.keyframe_every=3",
    "logging.logging_steps=1",
    "logging.report_to=[\"jsonl\"]",
];

fn bench() -> Bench {
    let bench = recipes_bench();
    let text = fs::read_to_string(bench.path("text.txt")).unwrap();
    fs::write(bench.path("data/tinyshakespeare.txt"), text.repeat(3)).unwrap();
    bench
}

/// The arguments that train a file of configs/ for a few steps.
fn arguments(name: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = root.join(format!("configs/{name}.toml"));
    let text = fs::read_to_string(&config).unwrap();
    let mut arguments = vec!["train".to_string(), config.display().to_string()];
    let mut set = |value: &str| arguments.extend(["--set".to_string(), value.to_string()]);
    SETS.iter().for_each(|value| set(value));
    match text.contains("max_tokens") {
        true => set("train.max_tokens=4000"),
        false => set("train.max_steps=9"),
    }
    if text.contains("models/SmolLM2-135M") {
        set("model.base_model=models/base");
        set("data.sequence_len=64");
    }
    if name == "pretrain-then-sft" {
        set("data.sequence_len=64");
        set("phase.1.sequence_len=128");
    }
    for argument in ["--quiet", "--output-dir", name] {
        arguments.push(argument.to_string());
    }
    arguments
}

fn train(bench: &Bench, name: &str, extra: &[&str]) {
    let arguments = arguments(name);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    bench.expect(0, &[&arguments[..], extra].concat());
}

/// The metrics that two runs share, and the exported weights.
fn end_of(bench: &Bench, name: &str) -> (Vec<Value>, Vec<u8>) {
    let folder = bench.path(name);
    let weights = fs::read(folder.join("model.safetensors"))
        .or_else(|_| fs::read(folder.join("adapter_model.safetensors")));
    (bench.metrics(name), weights.unwrap())
}

fn starts(bench: &Bench, name: &str) -> Vec<u64> {
    let record = read_json(&bench.path(name).join("run.json"));
    let starts = record["phase_starts"].as_array().unwrap();
    starts.iter().map(|start| start.as_u64().unwrap()).collect()
}

#[test]
fn p1_every_file_with_phases_runs_and_goes_on_from_both_sides_of_every_boundary() {
    let bench = bench();
    for (name, phases) in FILES {
        train(&bench, name, &[]);
        let starts = starts(&bench, name);
        assert_eq!(starts.len(), phases, "{name}: {starts:?}");
        let uninterrupted = end_of(&bench, name);
        let names: Vec<&str> = uninterrupted
            .0
            .iter()
            .filter_map(|row| row["phase"].as_str())
            .collect();
        let mut distinct = names.clone();
        distinct.dedup();
        assert_eq!(distinct.len(), phases, "{name}: {names:?}");
        if name == "dense-to-ternary" {
            blended_evaluations_are_never_the_best(&bench, name, starts[2]);
        }
        for start in &starts[1..] {
            for step in [start - 1, *start, start + 1] {
                train(&bench, name, &["--resume", &step.to_string()]);
                let resumed = end_of(&bench, name);
                assert_eq!(resumed.0, uninterrupted.0, "{name} from step {step}");
                assert!(resumed.1 == uninterrupted.1, "{name} from step {step}");
            }
        }
    }
}

/// The exported model is ternary, so the evaluations before the blend has ended do not count.
fn blended_evaluations_are_never_the_best(bench: &Bench, name: &str, ternary_since: u64) {
    let journal = fs::read_to_string(bench.path(name).join("logs/events.jsonl")).unwrap();
    let events = journal
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let evaluated: Vec<(u64, bool)> = events
        .filter(|event| event["event"] == "evaluated")
        .map(|event| (event["step"].as_u64().unwrap(), event["best"] == true))
        .collect();
    assert!(
        evaluated.iter().any(|(step, _)| *step < ternary_since),
        "{evaluated:?}"
    );
    for (step, best) in &evaluated {
        assert!(!best || *step >= ternary_since, "{evaluated:?}");
    }
    assert!(evaluated.iter().any(|(_, best)| *best), "{evaluated:?}");
}

#[test]
fn p1_every_file_with_phases_is_tested_and_no_other_has_any() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut with_phases = Vec::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if fs::read_to_string(&path).unwrap().contains("[[phase]]") {
            with_phases.push(path.file_stem().unwrap().to_str().unwrap().to_string());
        }
    }
    with_phases.sort();
    assert_eq!(with_phases, FILES.map(|(name, _)| name));
}

#[cfg(unix)]
#[test]
fn p1_a_run_that_is_killed_in_the_step_at_a_boundary_goes_on_in_the_next_phase() {
    let bench = bench();
    for name in ["sequence-growth", "lora-to-full"] {
        train(&bench, name, &[]);
        let uninterrupted = end_of(&bench, name);
        let boundary = starts(&bench, name)[1];
        let folder = bench.path(name);
        fs::remove_dir_all(&folder).unwrap();
        let arguments = arguments(name);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut child = bench.spawn(&arguments);
        let saved = folder.join(format!("checkpoints/step-{boundary:06}/state.json"));
        let begun = Instant::now();
        while !saved.exists() && begun.elapsed() < Duration::from_secs(60) {
            if child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(saved.exists(), "{name} was never at its boundary");
        train(&bench, name, &[]);
        let resumed = end_of(&bench, name);
        assert_eq!(resumed.0, uninterrupted.0, "{name}");
        assert!(resumed.1 == uninterrupted.1, "{name}");
    }
}

#[test]
fn p1_inspect_shows_the_phase_that_is_asked_for() {
    let bench = bench();
    let config = fs::read_to_string(bench.path("x.toml")).unwrap();
    let phases =
        "[[phase]]\nname = \"short\"\nlength = 2\nsequence_len = 8\n[[phase]]\nlength = \"rest\"\n";
    fs::write(bench.path("x.toml"), format!("{config}{phases}")).unwrap();
    let inspect = |extra: &[&str]| {
        let arguments = [&["inspect", "x.toml", "--rows", "1", "--json"], extra].concat();
        bench.expect(0, &arguments).0
    };
    let lengths = |text: &str| -> Vec<u64> {
        let rows = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        rows.map(|row| row["sequence_len"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(lengths(&inspect(&[])), [8, 16]);
    assert_eq!(lengths(&inspect(&["--phase", "short"])), [8]);
    assert_eq!(lengths(&inspect(&["--phase", "2"])), [16]);
    let (_, said) = bench.expect(2, &["inspect", "x.toml", "--phase", "long"]);
    assert!(said.contains("the phases are short, phase-2"), "{said}");
}

#[test]
fn p1_the_estimate_and_the_terminal_name_the_phase() {
    let bench = bench();
    let config = fs::read_to_string(bench.path("x.toml")).unwrap();
    let phases = "[[phase]]\nname = \"short\"\nlength = 2\nsequence_len = 8\n[[phase]]\nname = \"long\"\nlength = \"rest\"\n";
    fs::write(bench.path("x.toml"), format!("{config}{phases}")).unwrap();
    let (out, _) = bench.expect(0, &["estimate", "x.toml"]);
    assert!(out.contains("in phase long"), "{out}");
    let (_, said) = bench.expect(0, &["train", "x.toml"]);
    assert!(
        said.contains("short: loss") && said.contains("long: loss"),
        "{said}"
    );
    assert!(said.contains("% of its tokens are seen again"), "{said}");
}

#[test]
fn p1_a_finished_run_whose_phases_have_moved_is_refused_and_not_called_complete() {
    let bench = Bench::new();
    let config = fs::read_to_string(bench.path("x.toml")).unwrap();
    let phases = "[[phase]]\nlength = 2\nsequence_len = 8\n[[phase]]\nlength = \"rest\"\n";
    fs::write(bench.path("x.toml"), format!("{config}{phases}")).unwrap();
    bench.train(&[]);
    let (_, said) = bench.expect(0, &["train", "x.toml"]);
    assert!(
        said.contains("already complete") || !said.contains("error"),
        "{said}"
    );
    let moved = ["train", "x.toml", "--set", "phase.0.length=3"];
    let (_, said) = bench.expect(2, &moved);
    assert!(said.contains("phase `phase-2` began at step 2"), "{said}");
    let other = ["train", "x.toml", "--set", "phase.0.micro_batch_size=2"];
    let (_, said) = bench.expect(2, &other);
    assert!(said.contains("phase.0.micro_batch_size"), "{said}");
    let evaluated = ["train", "x.toml", "--set", "eval.sequence_len=4"];
    let (_, said) = bench.expect(2, &evaluated);
    assert!(said.contains("eval.sequence_len"), "{said}");
}
