//! What a run saves, where it has room to, and what it makes of a folder with damaged or missing
//! pieces.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use super::bench::{Bench, json};

fn steps(bench: &Bench, run: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(bench.path(run).join("checkpoints")).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("step-"))
        .collect()
}

#[test]
fn r11_a_new_run_saves_at_step_0_and_deletes_it_with_the_next_save() {
    let bench = Bench::new();
    let at_once = ["--set", "checkpoint.background=false"];
    let (stdout, _) = bench.expect(0, &[&["train", "x.toml", "--json"], &at_once[..]].concat());
    let events: Vec<serde_json::Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let course: Vec<(&str, u64)> = events
        .iter()
        .filter_map(|event| Some((event["event"].as_str()?, event["step"].as_u64()?)))
        .filter(|(name, _)| ["started", "step", "saved", "deleted"].contains(name))
        .collect();
    let expected = [
        ("started", 0),
        ("saved", 0),
        ("step", 1),
        ("step", 2),
        ("saved", 2),
        ("deleted", 0),
    ];
    assert_eq!(course[..6], expected, "{course:?}");
    assert!(!steps(&bench, "out").contains("step-000000"));

    // A resumed run has shown that it can save.
    let (stdout, _) = bench.expect(0, &["train", "x.toml", "--json", "--resume", "2"]);
    assert!(!stdout.contains(r#"{"event":"saved","step":2"#), "{stdout}");

    // The one of step 0 goes also where all are kept.
    bench.train(&[
        "--set",
        "checkpoint.save_total_limit=0",
        "--output-dir",
        "all",
    ]);
    let all = ["step-000002", "step-000003", "step-000004", "step-000006"];
    let kept = steps(&bench, "all");
    assert!(!kept.contains("step-000000"), "{kept:?}");
    assert!(
        ["step-000002", "step-000004", "step-000006"]
            .iter()
            .all(|name| kept.contains(*name))
    );
    assert!(
        kept.iter().all(|name| all.contains(&name.as_str())),
        "{kept:?}"
    );
}

#[test]
fn r10_the_checkpoint_of_step_0_is_the_beginning() {
    let bench = Bench::new();
    bench.train(&["--output-dir", "whole"]);
    // A run that can save nothing but its first checkpoint: there is no validation, and no later one
    // is due before the signal comes.
    for sets in [&[][..], &["--set", "model.dtype=f16"]] {
        let whole = &format!("whole{}", sets.len());
        bench.train(&[sets, &["--output-dir", whole]].concat());
        let long = [
            &["train", "x.toml", "--quiet", "--output-dir", "out"],
            sets,
            &[
                "--set",
                "checkpoint.save_steps=0",
                "--set",
                "train.max_steps=1000000",
            ],
            &["--set", "eval.eval_steps=0"],
        ]
        .concat();
        let mut child = bench.spawn(&long);
        while !bench.path("out/checkpoints/last").exists() {
            assert!(child.try_wait().unwrap().is_none(), "the run never saved");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(
            steps(&bench, "out"),
            BTreeSet::from(["step-000000".to_string()])
        );
        let (_, stderr) = bench.expect(
            0,
            &[&["train", "x.toml", "--output-dir", "out"], sets].concat(),
        );
        assert!(
            stderr.contains("resumed from the checkpoint of step 0"),
            "{stderr}"
        );
        assert!(
            stderr.contains("deleted the checkpoint of step 0"),
            "{stderr}"
        );
        assert_eq!(bench.checkpoint("out", 6), bench.checkpoint(whole, 6));
        assert_eq!(bench.metrics("out"), bench.metrics(whole));
        fs::remove_dir_all(bench.path("out")).unwrap();
    }
}

#[test]
fn r11_a_run_that_will_not_fit_on_the_disk_is_refused_before_the_first_step() {
    let bench = Bench::new();
    // A million checkpoints of fifty megabytes.
    let huge = [
        "train",
        "x.toml",
        "--set",
        "model.hidden_size=512",
        "--set",
        "model.intermediate_size=1024",
        "--set",
        "train.max_steps=2000000",
        "--set",
        "checkpoint.save_steps=1",
        "--set",
        "checkpoint.save_total_limit=1000000",
    ];
    let (_, stderr) = bench.expect(1, &huge);
    for part in [
        "error[disk]: out needs ",
        "up to 1000004 checkpoints of ",
        "is free",
        "set checkpoint.save_total_limit = ",
        "--output-dir on a larger disk",
    ] {
        assert!(stderr.contains(part), "{part} in {stderr}");
    }
    assert!(!bench.path("out/checkpoints").exists());
    let said = stderr.split("save_total_limit = ").nth(1).unwrap();
    let limit: u64 = said.split(',').next().unwrap().parse().unwrap();
    assert!((1..1_000_000).contains(&limit), "{stderr}");
}

#[test]
fn r10_pointers_that_point_nowhere_and_leftovers_of_a_crash_are_put_right() {
    let bench = Bench::new();
    bench.train(&["--output-dir", "whole"]);
    bench.train(&[]);
    let checkpoints = bench.path("out/checkpoints");
    for (last, best) in [
        ("step-000099\n", "step-000098\n"),
        ("", "\u{fffd}\0"),
        ("../../elsewhere", "step-x"),
    ] {
        // What a kill after the save of step 4 leaves, and worse.
        fs::remove_dir_all(checkpoints.join("step-000006")).unwrap();
        fs::write(checkpoints.join("last"), last).unwrap();
        fs::write(checkpoints.join("best"), best).unwrap();
        // Leftovers of killed processes, on every level.
        for folder in [".step-000005.tmp", ".step-000001.deleted.tmp"] {
            fs::create_dir_all(checkpoints.join(folder).join("deep")).unwrap();
            fs::write(checkpoints.join(folder).join("model.safetensors"), "half").unwrap();
        }
        for name in [
            ".model.safetensors.1234-5.tmp",
            ".report.html.1-2.tmp",
            "checkpoints/.last.99-0.tmp",
            "logs/.events.jsonl.7-7.tmp",
        ] {
            fs::write(bench.path("out").join(name), "half").unwrap();
        }
        // Lines past the checkpoint, lines cut short, and the zeros of a power failure.
        for name in ["metrics.jsonl", "metrics.csv", "logs/events.jsonl"] {
            let path = bench.path("out").join(name);
            let mut text = fs::read(&path).unwrap();
            let lines = String::from_utf8(text.clone()).unwrap();
            let first = lines.lines().last().unwrap();
            let later = first
                .replace("\"step\":4", "\"step\":5")
                .replacen("4,", "5,", 1);
            text.extend(
                format!(
                    "{later}\n{{\"step\":\n\0\0\0\0\n{}",
                    &first[..first.len() / 2]
                )
                .bytes(),
            );
            fs::write(&path, text).unwrap();
        }
        bench.train(&[]);
        assert_eq!(bench.checkpoint("out", 6), bench.checkpoint("whole", 6));
        assert_eq!(bench.metrics("out"), bench.metrics("whole"));
        let table = |run: &str| {
            let text = fs::read_to_string(bench.path(run).join("metrics.csv")).unwrap();
            let steps = text
                .lines()
                .map(|line| line.split(',').next().unwrap().to_string());
            steps.collect::<Vec<_>>()
        };
        assert_eq!(table("out"), table("whole"));
        for name in ["checkpoints/last", "checkpoints/best", "model.safetensors"] {
            let read = |run: &str| fs::read(bench.path(run).join(name)).unwrap();
            assert!(read("out") == read("whole"), "{name}");
        }
        for folder in ["out", "out/checkpoints", "out/logs"] {
            for entry in fs::read_dir(bench.path(folder)).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                assert!(!name.ends_with(".tmp"), "{folder}/{name}");
            }
        }
    }
}

#[test]
fn r10_a_best_checkpoint_that_is_gone_leaves_the_last_to_export() {
    let bench = Bench::new();
    bench.train(&[]);
    let best = json(&bench.path("out/run.json"))["exported_step"].clone();
    let best = best.as_u64().unwrap();
    fs::remove_dir_all(bench.path(&format!("out/checkpoints/step-{best:06}"))).unwrap();
    bench.train(&["--set", "train.max_steps=7", "--set", "eval.eval_steps=0"]);
    let record = json(&bench.path("out/run.json"));
    let exported = record["exported_step"].as_u64().unwrap();
    assert!(
        bench
            .path(&format!("out/checkpoints/step-{exported:06}"))
            .exists()
    );
    let weights = |path: &str| fs::read(bench.path(path)).unwrap();
    let step = exported.to_string();
    bench.expect(
        0,
        &[
            "ckpt", "restore", "out", "--step", &step, "--out", "restored",
        ],
    );
    assert_eq!(
        weights("out/model.safetensors"),
        weights("restored/model.safetensors")
    );
}

#[test]
#[cfg(target_os = "linux")]
fn r10_a_run_that_was_started_to_outlive_its_terminal_does() {
    let bench = Bench::new();
    let runner = env!("CARGO_BIN_EXE_runner");
    // What nohup does, and then a terminal that goes away while the run trains.
    let line = format!(
        "trap '' HUP; '{runner}' train x.toml --quiet --set train.max_steps=40 & \
         while [ ! -e out/checkpoints/last ]; do sleep 0.01; done; kill -HUP $!; wait $!"
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &line]).current_dir(bench.folder.path());
    shell.env("FIREBRICK_CACHE", bench.path("cache"));
    shell.stdout(Stdio::null()).stderr(Stdio::null());
    assert!(shell.status().unwrap().success());
    assert_eq!(json(&bench.path("out/run.json"))["final"]["step"], 40);
}
