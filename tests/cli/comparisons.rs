//! `runner compare` and `runner sweep`.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::bench::{Bench, json};

/// Writes y.toml: x.toml with a higher learning rate.
fn bench() -> Bench {
    let bench = Bench::new();
    let text = fs::read_to_string(bench.path("x.toml")).unwrap();
    let other = format!("{text}\n[optimizer]\nlearning_rate = 1e-2\n");
    fs::write(bench.path("y.toml"), other).unwrap();
    bench
}

const COMPARE: [&str; 6] = ["compare", "x.toml", "y.toml", "--out", "out", "--slice=0"];

fn results(bench: &Bench) -> Value {
    json(&bench.path("out/comparison.json"))
}

/// The results without what depends on the machine's speed.
fn without_time(value: &Value) -> Value {
    match value {
        Value::Object(entries) => {
            let kept = entries.iter().filter(|(key, _)| key.as_str() != "seconds");
            kept.map(|(key, value)| (key.clone(), without_time(value)))
                .collect()
        }
        Value::Array(items) => items.iter().map(without_time).collect(),
        other => other.clone(),
    }
}

/// Every file below a folder, with the time of its last change.
fn files(folder: &Path) -> Vec<(PathBuf, SystemTime)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push((entry.path(), entry.metadata().unwrap().modified().unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn p3_a_comparison_writes_its_results_and_a_second_start_changes_no_run() {
    let bench = bench();
    let (stdout, _) = bench.expect(0, &[&COMPARE[..], &["--seeds", "2"]].concat());
    let found = results(&bench);
    assert_eq!(
        found["keys"],
        serde_json::json!(["optimizer.learning_rate"])
    );
    assert_eq!(found["seeds"], serde_json::json!([3, 4]));
    for candidate in found["candidates"].as_array().unwrap() {
        assert_eq!(candidate["val_loss"]["n"], 2);
        for run in candidate["runs"].as_array().unwrap() {
            assert_eq!(run["state"], "finished");
            assert_eq!(
                (&run["costs"]["steps"], &run["costs"]["backward_passes"]),
                (&6.0.into(), &6.0.into())
            );
            let folder = bench.path(run["folder"].as_str().unwrap());
            let end = json(&folder.join("run.json"))["final"].clone();
            assert_eq!(
                (&end["val_loss"], &end["flops"]),
                (&run["val_loss"], &run["costs"]["flops"])
            );
            let last = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
            let last: Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
            assert_eq!(
                (&last["backward_passes"], &last["flops"]),
                (&6.into(), &end["flops"])
            );
            assert!(
                fs::read_to_string(folder.join("config.toml"))
                    .unwrap()
                    .contains("hidden_size")
            );
        }
    }
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(lines[0].starts_with("name  learning_rate  n"), "{stdout}");
    assert!(lines[1].starts_with("y     0.01           2"), "{stdout}");
    assert!(stdout.contains("best     runner train y.toml"), "{stdout}");
    // One row for each run, and as many cells as columns.
    let csv = fs::read_to_string(bench.path("out/comparison.csv")).unwrap();
    let cells: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
    assert_eq!(cells, vec![cells[0]; 5], "{csv}");
    let html = fs::read_to_string(bench.path("out/comparison.html")).unwrap();
    assert_eq!(html.matches("<figure>").count(), 3);
    assert!(!html.contains("http://") && !html.contains("https://"));

    let before = files(&bench.path("out/runs"));
    bench.expect(0, &[&COMPARE[..], &["--seeds", "2"]].concat());
    assert_eq!(results(&bench), found);
    assert_eq!(files(&bench.path("out/runs")), before);
    // One more seed runs that seed only.
    let (_, stderr) = bench.expect(0, &[&COMPARE[..], &["--seeds", "3"]].concat());
    assert!(
        stderr.contains("y seed 5") && !stderr.contains("seed 4"),
        "{stderr}"
    );
    assert_eq!(results(&bench)["candidates"][0]["val_loss"]["n"], 3);
}

#[test]
fn p3_a_comparison_that_was_killed_goes_on_and_ends_as_one_that_was_not() {
    let bench = bench();
    let length = ["--set", "train.max_steps=24", "--seeds", "2"];
    let arguments = [&COMPARE[..], &length].concat();
    let whole: Vec<&str> = arguments
        .iter()
        .map(|&part| if part == "out" { "whole" } else { part })
        .collect();
    bench.expect(0, &whole);

    let mut child = bench.spawn(&arguments);
    // Killed while the runs of the second seed train.
    let begun = Instant::now();
    let seed_4 = |name: &str| {
        let runs = fs::read_dir(bench.path("out/runs"))
            .into_iter()
            .flatten()
            .map(Result::unwrap);
        let mut own = runs.filter(|run| run.file_name().to_string_lossy().contains("seed4"));
        own.any(|run| run.path().join(name).exists())
    };
    while !seed_4("checkpoints/step-000002") && begun.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        !bench.path("out/comparison.json").exists(),
        "the kill came too late"
    );
    let finished = |file: &(PathBuf, SystemTime)| file.0.display().to_string().contains("seed3");
    let of_first: Vec<_> = files(&bench.path("out/runs"))
        .into_iter()
        .filter(finished)
        .collect();
    assert!(of_first.len() > 10);

    bench.expect(0, &arguments);
    let now: Vec<_> = files(&bench.path("out/runs"))
        .into_iter()
        .filter(finished)
        .collect();
    assert_eq!(now, of_first);
    let text = |name: &str| {
        let found = without_time(&json(&bench.path(&format!("{name}/comparison.json"))));
        found.to_string().replace(&format!("{name}/"), "")
    };
    assert_eq!(text("out"), text("whole"));
}

const GRID: &str = r#"
base = "x.toml"
seeds = [1, 2]
budget = "steps:8"

[grid]
optimizer.learning_rate = [1e-3, 1e-2]

[[pairs]]
lr_scheduler.name = "cosine"
lr_scheduler.warmup_steps = 2
[[pairs]]
lr_scheduler.name = "linear"
"#;

#[test]
fn o5_a_sweep_runs_every_combination_and_says_how_to_train_the_best() {
    let bench = Bench::new();
    fs::write(bench.path("grid.toml"), GRID).unwrap();
    let (stdout, _) = bench.expect(0, &["sweep", "grid.toml", "--out", "out", "--slice=0"]);
    let found = results(&bench);
    let candidates = found["candidates"].as_array().unwrap();
    assert_eq!(candidates.len(), 4);
    let mut sets: Vec<String> = candidates
        .iter()
        .map(|one| one["sets"].to_string())
        .collect();
    sets.sort();
    let expected = [
        r#"["optimizer.learning_rate=0.001","lr_scheduler.name=\"cosine\"","lr_scheduler.warmup_steps=2"]"#,
        r#"["optimizer.learning_rate=0.001","lr_scheduler.name=\"linear\""]"#,
        r#"["optimizer.learning_rate=0.01","lr_scheduler.name=\"cosine\"","lr_scheduler.warmup_steps=2"]"#,
        r#"["optimizer.learning_rate=0.01","lr_scheduler.name=\"linear\""]"#,
    ];
    assert_eq!(sets, expected);
    assert!(
        candidates
            .iter()
            .all(|one| one["val_loss"]["n"] == 2 && one["steps"] == 8)
    );
    let means: Vec<f64> = candidates
        .iter()
        .map(|one| one["val_loss"]["mean"].as_f64().unwrap())
        .collect();
    assert!(means.is_sorted(), "{means:?}");
    // The command of the best, as it is printed, is the run of the sweep.
    let command = stdout
        .lines()
        .find_map(|line| line.strip_prefix("best     "))
        .unwrap();
    let best = &candidates[0];
    assert!(
        command.starts_with("runner train x.toml --set optimizer.learning_rate=0.01"),
        "{command}"
    );
    let quoted = command.replace("runner", env!("CARGO_BIN_EXE_runner"));
    let script = format!("{quoted} --set seed=2 --output-dir alone --quiet");
    let status = std::process::Command::new("sh")
        .args(["-c", &script])
        .current_dir(bench.folder.path())
        .env("FIREBRICK_CACHE", bench.path("cache"))
        .output()
        .unwrap();
    assert!(status.status.success(), "{status:?}");
    assert_eq!(
        json(&bench.path("alone/run.json"))["final"]["val_loss"],
        best["runs"][1]["val_loss"]
    );
}

#[test]
fn o5_paired_lists_are_taken_position_by_position() {
    let bench = Bench::new();
    let grid = "base = \"x.toml\"\n[[pairs]]\noptimizer.name = [\"adamw\", \"lion\"]\noptimizer.learning_rate = [1e-3, 1e-4]\n";
    fs::write(bench.path("grid.toml"), grid).unwrap();
    let set = "train.max_steps=2";
    let (stdout, _) = bench.expect(
        0,
        &["sweep", "grid.toml", "--out", "out", "--set", set, "--json"],
    );
    let found: Value = serde_json::from_str(&stdout).unwrap();
    let mut sets: Vec<String> = found["candidates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["sets"].to_string())
        .collect();
    sets.sort();
    assert_eq!(
        sets,
        [
            r#"["train.max_steps=2","optimizer.name=\"adamw\"","optimizer.learning_rate=0.001"]"#,
            r#"["train.max_steps=2","optimizer.name=\"lion\"","optimizer.learning_rate=0.0001"]"#,
        ]
    );
}

#[test]
fn o5_everything_wrong_with_a_sweep_is_said_at_once() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for name in ["sweep-file", "sweep-values", "sweep-base"] {
        let bench = bench();
        let text = fs::read_to_string(golden.join(format!("{name}.toml"))).unwrap();
        fs::write(bench.path("grid.toml"), text).unwrap();
        let broken = fs::read_to_string(bench.path("x.toml")).unwrap();
        fs::write(
            bench.path("broken.toml"),
            broken.replace("hidden_size", "hiden_size"),
        )
        .unwrap();
        let (_, stderr) = bench.expect(2, &["sweep", "grid.toml", "--out", "out"]);
        let path = golden.join(format!("{name}.txt"));
        if std::env::var_os("FIREBRICK_BLESS").is_some() {
            fs::write(&path, &stderr).unwrap();
        }
        assert_eq!(stderr, fs::read_to_string(path).unwrap());
        assert!(!bench.path("out").exists());
    }
}

#[test]
fn p3_bad_arguments_and_files_that_cannot_be_compared_are_exit_2() {
    let bench = bench();
    let text = fs::read_to_string(bench.path("x.toml")).unwrap();
    fs::write(
        bench.path("short.toml"),
        text.replace("sequence_len = 16", "sequence_len = 8"),
    )
    .unwrap();
    fs::write(
        bench.path("long.toml"),
        text.replace("max_steps = 6", "max_steps = 60"),
    )
    .unwrap();
    for (arguments, part) in [
        (&["compare", "x.toml"][..], "at least two files"),
        (
            &["compare", "x.toml", "short.toml"],
            "data.sequence_len is 16 and 8",
        ),
        (&["compare", "x.toml", "x.toml"], "the same configuration"),
        (
            &["compare", "x.toml", "long.toml", "--budget", "steps:4"],
            "the same configuration",
        ),
        (
            &["compare", "x.toml", "y.toml", "--budget", "hours:3"],
            "is not a budget such as",
        ),
        (
            &["compare", "x.toml", "y.toml", "--seeds", "1,1"],
            "different numbers",
        ),
        (
            &["compare", "x.toml", "y.toml", "--seeds", "0"],
            "neither a number of seeds",
        ),
        (
            &["compare", "x.toml", "y.toml", "--budget", "tokens:10"],
            "is used up before the first step",
        ),
        (
            &[
                "compare",
                "x.toml",
                "y.toml",
                "--budget",
                "steps:1",
                "--set",
                "lr_scheduler.warmup_steps=3",
            ],
            "a warm-up of 3 steps in a run of 1",
        ),
        (
            &["compare", "x.toml", "missing.toml"],
            "cannot read missing.toml",
        ),
    ] {
        let (_, stderr) = bench.expect(2, arguments);
        assert!(stderr.contains(part), "{arguments:?}\n{stderr}");
    }
    assert!(!bench.path("outputs/x-vs-short").exists());
}

#[test]
fn p3_what_a_budget_means_for_phases_is_said_or_refused() {
    let bench = Bench::new();
    let config = fs::read_to_string(bench.path("x.toml")).unwrap();
    let fixed = "[[phase]]\nlength = 2\n[[phase]]\nlength = 4\n";
    fs::write(bench.path("fixed.toml"), format!("{config}{fixed}")).unwrap();
    let compare = |file: &str| {
        let out = format!("out-{file}");
        let arguments = [
            "compare", "x.toml", file, "--budget", "steps:4", "--out", &out,
        ];
        let output = bench.run(&arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), said)
    };
    let (code, said) = compare("fixed.toml");
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("ends the phases at 6 of the run's 7 steps"),
        "{said}"
    );
    let shares =
        "[[phase]]\nlength = \"50%\"\n[[phase]]\nlength = \"rest\"\nmicro_batch_size = 2\n";
    let tokens = config.replace("max_steps = 6", "max_tokens = 384");
    fs::write(bench.path("tokens.toml"), format!("{tokens}{shares}")).unwrap();
    let (code, said) = compare("tokens.toml");
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("shares of phases are of the run's steps"),
        "{said}"
    );
}
