//! Runs that end because validation has stopped improving.

use std::fs;

use serde_json::Value;

use super::bench::{Bench, json};

/// A learning rate that changes no weight: the first evaluation stays the best, and the second
/// one after it is the last.
const STALLED: [&str; 8] = [
    "--set",
    "optimizer.learning_rate=1e-30",
    "--set",
    "eval.eval_steps=1",
    "--set",
    "eval.early_stopping_patience=2",
    "--set",
    "train.max_steps=9",
];

fn record(bench: &Bench) -> Value {
    json(&bench.path("out/run.json"))
}

#[test]
fn r11_a_run_that_stops_improving_ends_early_with_its_best_model() {
    let bench = Bench::new();
    let (stdout, stderr) = bench.train(&STALLED);
    let said = "stopped early: no improvement in 2 evaluations";
    assert!(
        stdout.contains("trained 3 steps") && stdout.contains(said),
        "{stdout}"
    );
    assert!(stderr.contains(&format!("{said} since step 1")), "{stderr}");
    let record = record(&bench);
    assert_eq!(record["final"]["stopped_early"], true);
    assert_eq!(record["final"]["step"], 3);
    assert_eq!(record["exported_step"], 1);
    assert!(bench.path("out/model.safetensors").is_file());
    let report = fs::read_to_string(bench.path("out/report.html")).unwrap();
    assert!(
        report.contains(">stopped early</strong> step 3 of 9"),
        "{report}"
    );

    // It is over, however often it is asked.
    let (stdout, _) = bench.train(&STALLED);
    assert!(stdout.contains("out is already complete"), "{stdout}");
    assert_eq!(self::record(&bench), record);
}

#[test]
fn r11_a_run_that_improves_is_not_stopped() {
    let bench = Bench::new();
    let (stdout, _) = bench.train(&[
        "--set",
        "eval.eval_steps=1",
        "--set",
        "eval.early_stopping_patience=5",
    ]);
    assert!(
        stdout.contains("trained 6 steps") && !stdout.contains("stopped early"),
        "{stdout}"
    );
    assert_eq!(record(&bench)["final"]["stopped_early"], false);
}

#[test]
fn r11_the_count_of_evaluations_survives_a_resume() {
    let bench = Bench::new();
    let every = [
        "--set",
        "checkpoint.save_steps=1",
        "--set",
        "checkpoint.save_total_limit=0",
    ];
    let stalled = [&STALLED[..], &every].concat();
    bench.train(&[&stalled[..], &["--output-dir", "whole"]].concat());
    // What a kill -9 after the save of step 2 leaves, and one before the export.
    for left in [2, 3] {
        bench.train(&stalled);
        let mut record = record(&bench);
        record.as_object_mut().unwrap().remove("final");
        fs::write(bench.path("out/run.json"), record.to_string()).unwrap();
        fs::remove_file(bench.path("out/model.safetensors")).unwrap();
        if left == 2 {
            fs::remove_dir_all(bench.path("out/checkpoints/step-000003")).unwrap();
        }
        let (stdout, _) = bench.train(&stalled);
        assert!(stdout.contains("trained 3 steps"), "{stdout}");
        assert_eq!(bench.checkpoint("out", 3), bench.checkpoint("whole", 3));
        assert_eq!(bench.metrics("out"), bench.metrics("whole"));
        assert_eq!(self::record(&bench)["final"]["stopped_early"], true);
        assert!(bench.path("out/model.safetensors").is_file());
        fs::remove_dir_all(bench.path("out")).unwrap();
    }
}

#[test]
fn r11_patience_and_length_may_change_on_resume() {
    let bench = Bench::new();
    bench.train(&STALLED);
    let step_after = |changes: &[&str]| {
        bench.train(&[&STALLED[..], changes].concat());
        record(&bench)["final"]["step"].as_u64().unwrap()
    };
    // The two evaluations in vain still count.
    assert_eq!(step_after(&["--set", "eval.early_stopping_patience=3"]), 4);
    assert_eq!(step_after(&["--set", "eval.early_stopping_patience=2"]), 4);
    // Asked for more steps, it goes on with its patience anew.
    assert_eq!(step_after(&["--set", "train.max_steps=10"]), 6);
    assert_eq!(step_after(&["--set", "eval.early_stopping_patience=0"]), 9);
    assert_eq!(record(&bench)["final"]["stopped_early"], false);
    let (stdout, _) = bench.train(&STALLED);
    assert!(stdout.contains("already complete"), "{stdout}");
}
