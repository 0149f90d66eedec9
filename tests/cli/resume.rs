//! Interrupted, killed, finished and foreign runs.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use super::bench::{Bench, json};

#[test]
fn r10_an_interrupted_run_goes_on_bit_for_bit() {
    let bench = Bench::new();
    let long = [
        "--set",
        "train.max_steps=300",
        "--set",
        "eval.eval_steps=100",
    ];
    bench.train(&[&long[..], &["--output-dir", "whole"]].concat());
    let mut interrupted = 0;
    for (signal, code) in [("-INT", Some(130)), ("-TERM", Some(143)), ("-KILL", None)] {
        let run = &format!("cut{signal}");
        let arguments = [
            &["train", "x.toml", "--quiet", "--output-dir", run],
            &long[..],
        ]
        .concat();
        let mut child = bench.spawn(&arguments);
        let metrics = bench.path(run).join("metrics.jsonl");
        let waiting = Instant::now();
        while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 20 {
            assert!(
                waiting.elapsed() < Duration::from_secs(60),
                "the run never started"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        let kill = Command::new("kill")
            .args([signal, &child.id().to_string()])
            .status()
            .unwrap();
        assert!(kill.success());
        let status = child.wait().unwrap();
        // On a fast machine the run may be over before the signal comes.
        interrupted += u32::from(status.code() == code);
        assert!(status.success() || status.code() == code, "{status}");
        bench.expect(0, &arguments);
        assert_eq!(bench.checkpoint(run, 300), bench.checkpoint("whole", 300));
        assert_eq!(bench.metrics(run), bench.metrics("whole"));
    }
    assert!(interrupted > 0, "no run was interrupted in time");
}

#[test]
fn r10_a_killed_run_goes_on_bit_for_bit_and_step_goes_back() {
    let bench = Bench::new();
    bench.train(&["--output-dir", "whole"]);
    // What a kill -9 after the save of step 4 leaves: later lines in the metrics, no later save.
    bench.train(&["--output-dir", "cut"]);
    fs::remove_dir_all(bench.path("cut/checkpoints/step-000006")).unwrap();
    bench.train(&["--output-dir", "cut"]);
    assert_eq!(bench.checkpoint("cut", 6), bench.checkpoint("whole", 6));
    assert_eq!(bench.metrics("cut"), bench.metrics("whole"));

    bench.train(&["--output-dir", "cut", "--resume", "2"]);
    assert_eq!(bench.checkpoint("cut", 6), bench.checkpoint("whole", 6));
    assert_eq!(bench.metrics("cut"), bench.metrics("whole"));
    let (_, stderr) = bench.expect(
        1,
        &["train", "x.toml", "--output-dir", "cut", "--resume", "5"],
    );
    assert!(
        stderr.contains("has no checkpoint of step 5; there are: 2, 3, 4, 6"),
        "{stderr}"
    );
}

#[test]
fn o1_every_rule_goes_on_bit_for_bit_from_both_forms_of_checkpoint() {
    let ramps = [
        "--set",
        "optimizer.beta2_warmup_steps=5",
        "--set",
        "optimizer.beta2_start=0.8",
        "--set",
        "optimizer.cautious_weight_decay=true",
    ];
    let momentum = [
        "--set",
        "optimizer.momentum_warmup_steps=5",
        "--set",
        "optimizer.momentum_start=0.8",
    ];
    let often = ["--set", "optimizer.precondition_frequency=2"];
    let rules: [(&str, &[&[&str]]); 10] = [
        ("adamw", &[&ramps]),
        ("adamw8bit", &[&ramps]),
        ("adam", &[]),
        ("sgd", &[]),
        ("lion", &[]),
        ("adafactor", &[]),
        ("muon", &[&ramps, &momentum]),
        ("normuon", &[&ramps, &momentum]),
        ("soap", &[&ramps, &often]),
        ("velvet", &[&ramps]),
    ];
    for (rule, sets) in rules {
        for format in ["full", "delta"] {
            let bench = Bench::new();
            let name = format!("optimizer.name={rule}");
            let format = format!("checkpoint.format={format}");
            let own = ["--set", &name, "--set", &format];
            // A checkpoint of every step, so that steps are predicted.
            let every = [
                "--set",
                "checkpoint.save_steps=1",
                "--set",
                "checkpoint.save_total_limit=0",
            ];
            let fixed = [&own[..], &every, &sets.concat()].concat();
            bench.train(&[&fixed[..], &["--output-dir", "whole"]].concat());
            let cut = [&fixed[..], &["--output-dir", "cut"]].concat();
            bench.train(&cut);
            for step in [5, 6] {
                let step = format!("cut/checkpoints/step-{step:06}");
                fs::remove_dir_all(bench.path(&step)).unwrap();
            }
            bench.train(&cut);
            let [whole, again] = ["whole", "cut"].map(|run| bench.checkpoint(run, 6));
            assert_eq!(again, whole, "{rule} {format}");
            let [whole, again] = ["whole", "cut"].map(|run| bench.metrics(run));
            assert_eq!(again, whole, "{rule} {format}");
            let first = whole[0]["loss"].as_f64().unwrap();
            assert_ne!(whole[5]["loss"].as_f64().unwrap(), first, "{rule}");
        }
    }
}

#[test]
fn r10_a_finished_run_is_complete_and_a_longer_one_goes_on() {
    let bench = Bench::new();
    bench.train(&[]);
    let before = bench.metrics("out");
    let (stdout, _) = bench.train(&[]);
    assert!(stdout.contains("out is already complete"), "{stdout}");
    assert_eq!(bench.metrics("out"), before);
    bench.train(&[
        "--set",
        "train.max_steps=8",
        "--set",
        "lr_scheduler.name=cosine",
    ]);
    assert_eq!(bench.metrics("out").len(), 8);
}

#[test]
fn r10_another_config_in_the_folder_is_refused_with_the_difference() {
    let bench = Bench::new();
    bench.train(&[]);
    let (_, stderr) = bench.expect(
        2,
        &["train", "x.toml", "--set", "optimizer.learning_rate=0.5"],
    );
    assert!(
        stderr.contains("optimizer.learning_rate: 0.001 there, 0.5 here"),
        "{stderr}"
    );
    assert!(stderr.contains("--output-dir"), "{stderr}");
    let (_, stderr) = bench.expect(2, &["train", "x.toml", "--resume", "never"]);
    assert!(stderr.contains("not empty"), "{stderr}");
    bench.expect(
        0,
        &[
            "train",
            "x.toml",
            "--resume",
            "never",
            "--output-dir",
            "fresh",
            "-q",
        ],
    );
}

#[test]
fn r10_a_run_whose_data_has_changed_is_refused() {
    let bench = Bench::new();
    bench.train(&[]);
    let mut text = fs::read_to_string(bench.path("text.txt")).unwrap();
    text.push_str("another line\n");
    fs::write(bench.path("text.txt"), text).unwrap();
    let longer = ["train", "x.toml", "--set", "train.max_steps=9"];
    let (_, stderr) = bench.expect(3, &longer);
    assert!(stderr.contains("text.txt has changed"), "{stderr}");
    // A complete run stays complete.
    bench.train(&[]);
}

#[test]
fn r10_a_crash_between_the_last_save_and_the_export_is_made_good() {
    let bench = Bench::new();
    bench.train(&[]);
    fs::remove_file(bench.path("out/model.safetensors")).unwrap();
    let mut record = json(&bench.path("out/run.json"));
    record.as_object_mut().unwrap().remove("final");
    fs::write(bench.path("out/run.json"), record.to_string()).unwrap();
    bench.train(&[]);
    assert!(bench.path("out/model.safetensors").is_file());
    assert_eq!(json(&bench.path("out/run.json"))["final"]["step"], 6);
}

#[test]
fn r10_going_back_discards_the_future_and_says_so() {
    let bench = Bench::new();
    bench.train(&[]);
    let back = [
        "train",
        "x.toml",
        "--resume",
        "2",
        "--set",
        "train.max_steps=3",
    ];
    let (_, stderr) = bench.expect(0, &back);
    assert!(
        stderr.contains("deleted the checkpoint of step 6"),
        "{stderr}"
    );
    assert!(!bench.path("out/checkpoints/step-000006").exists());
}

#[test]
fn r10_the_exported_model_is_the_best_one_whatever_a_crash_left_behind() {
    let bench = Bench::new();
    bench.train(&["--set", "checkpoint.save_total_limit=0"]);
    let best = json(&bench.path("out/run.json"))["exported_step"]
        .as_u64()
        .unwrap();
    let other = if best == 2 {
        "step-000004"
    } else {
        "step-000002"
    };
    fs::write(bench.path("out/checkpoints/best"), other).unwrap();
    let longer = [
        "--set",
        "checkpoint.save_total_limit=0",
        "--set",
        "train.max_steps=7",
    ];
    bench.train(&longer);
    let record = json(&bench.path("out/run.json"));
    let state = bench.path("out/checkpoints/step-000007/state.json");
    let progress = &json(&state)["progress"];
    assert_eq!(record["exported_step"], progress["best"]["step"]);
    assert_eq!(
        record["final"]["best_val_loss"],
        progress["best"]["val_loss"]
    );
}

#[test]
fn r10_a_run_that_is_past_its_end_is_evaluated_there() {
    let bench = Bench::new();
    bench.train(&[]);
    bench.train(&["--resume", "2", "--set", "train.max_steps=2"]);
    let record = json(&bench.path("out/run.json"));
    assert_eq!(record["final"]["step"], 2);
    assert!(record["final"]["val_loss"].is_f64(), "{record}");
    let last = fs::read_to_string(bench.path("out/checkpoints/last")).unwrap();
    assert_eq!(last.trim(), "step-000002");
}
