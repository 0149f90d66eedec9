//! Run folders of an older version: they are read bit for bit, and their runs can be resumed.
//! `tests/data/older-run` was made by the last commit before checkpoints had extra state, events
//! named their metrics, and run.json recorded the inputs that decide tokens. `pretrain-step-4` is a
//! step of a chain, restored by that commit's `runner ckpt restore`.
#![allow(missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};

use firebrick::checkpoint::{CheckpointStore, Progress};
use firebrick::config::{Plan, load};
use firebrick::model::Tensors;
use firebrick::model::folder::read_tensors;
use firebrick::optimizer::StateScalar;
use firebrick::train::{Options, Resume, Run};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new("tests/data/older-run").join(name)
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn check_scalars(found: &std::collections::BTreeMap<String, StateScalar>, state: &Value) {
    let saved = state["optimizer"].as_object().unwrap();
    assert_eq!(found.len(), saved.len());
    for (name, scalar) in found {
        assert_eq!(serde_json::json!(scalar), saved[name], "{name}");
    }
}

fn check_progress(found: &Progress, state: &Value) {
    let saved: Progress = serde_json::from_value(state["progress"].clone()).unwrap();
    assert_eq!(*found, saved);
    assert_eq!((saved.phase, saved.step), (0, 4));
}

/// All content of the files, read without the checkpoint code.
fn files(folder: &Path) -> (Tensors, Tensors) {
    let read = |name: &str| read_tensors(&folder.join(name)).unwrap();
    (read("model.safetensors"), read("optimizer.safetensors"))
}

#[test]
fn v6_a_checkpoint_of_an_older_chain_is_read_bit_for_bit() {
    let folder = fixture("pretrain");
    let store = CheckpointStore::new(&folder);
    let snapshot = store.load(4).unwrap();
    let state = json(&folder.join("checkpoints/step-000004/state.json"));
    check_progress(&snapshot.progress, &state);
    check_scalars(&snapshot.optimizer.scalars, &state);
    assert!(snapshot.extra.is_empty() && snapshot.optimizer.families.is_empty());
    let restored = fixture("pretrain-step-4");
    let (weights, moments) = files(&restored);
    let spec = json(&restored.join("config.json"));
    let spec = firebrick::config::DecoderSpec::from_config_json(&spec).unwrap();
    assert_eq!(snapshot.model.files(&spec), weights);
    assert_eq!(snapshot.optimizer.tensors, moments);
    for step in store.steps().unwrap() {
        store.verify(step).unwrap();
    }
}

#[test]
fn v6_an_older_whole_checkpoint_is_read_bit_for_bit() {
    let folder = fixture("adapter");
    let snapshot = CheckpointStore::new(&folder).load(4).unwrap();
    let step = folder.join("checkpoints/step-000004");
    let state = json(&step.join("state.json"));
    check_progress(&snapshot.progress, &state);
    check_scalars(&snapshot.optimizer.scalars, &state);
    assert!(snapshot.progress.loss_scale.is_some());
    let (weights, moments) = files(&step);
    assert_eq!(snapshot.model.tensors(), weights);
    assert_eq!(snapshot.optimizer.tensors, moments);
}

/// The plan of a fixture's run, with its folder copied to `to`.
fn plan(name: &str, to: &Path, more: &[&str]) -> Plan {
    let config = fixture(&format!("{name}.toml"));
    let mut sets = vec![format!("output_dir={to:?}")];
    sets.extend(more.iter().map(ToString::to_string));
    load(&config, &sets).unwrap()
}

fn losses(run: &Path) -> Vec<(u64, f64, Option<f64>)> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows = text.lines().map(|line| {
        let row: Value = serde_json::from_str(line).unwrap();
        let number = |name: &str| row[name].as_f64();
        (
            row["step"].as_u64().unwrap(),
            number("loss").unwrap(),
            number("val_loss"),
        )
    });
    rows.collect()
}

#[test]
fn v6_an_older_run_goes_on_as_it_did_then() {
    for name in ["pretrain", "adapter"] {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        copy_folder(&fixture(name), &run);
        let options = Options {
            resume: Resume::Step(4),
            ..Options::default()
        };
        let plan = plan(name, &run, &[]);
        let outcome = Run::prepare(&plan, options).unwrap().unwrap().train();
        assert_eq!(outcome.unwrap().progress.step, 8);
        let (then, now) = (losses(&fixture(name)), losses(&run));
        assert_eq!(then.len(), now.len());
        for (then, now) in then.iter().zip(&now) {
            assert_eq!(then.0, now.0);
            let near = |a: f64, b: f64| (a - b).abs() < 1e-5 * a.abs();
            assert!(near(then.1, now.1), "{name}: {then:?} {now:?}");
            match (then.2, now.2) {
                (Some(then), Some(now)) => assert!(near(then, now), "{name}: {then} {now}"),
                (then, now) => assert_eq!(then, now),
            }
        }
        // Older versions counted no cost: that of their steps is taken from the plan, and said.
        let passes = plan.phases[0].gradient_accumulation_steps as u64;
        let rows = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let rows: Vec<Value> = rows
            .lines()
            .map(|row| serde_json::from_str(row).unwrap())
            .collect();
        let new = rows.iter().filter(|row| row["backward_passes"].is_u64());
        let steps = new.clone().map(|row| row["step"].as_u64().unwrap());
        assert!(steps.eq(5..=8));
        for row in new {
            let step = row["step"].as_u64().unwrap();
            assert_eq!(row["backward_passes"], step * passes);
            let per_step = row["flops"].as_f64().unwrap() / step as f64;
            let first = rows.last().unwrap()["flops"].as_f64().unwrap() / 8.0;
            assert!(per_step > 0.0 && (per_step / first - 1.0).abs() < 1e-9);
        }
        let log = fs::read_to_string(run.join("logs/train.log")).unwrap();
        assert!(
            log.contains("an older version took the first 4 steps and counted no cost"),
            "{log}"
        );
        // The table keeps its old columns and gets those of the cost, and no row appears twice.
        let table = fs::read_to_string(run.join("metrics.csv")).unwrap();
        let old = fs::read_to_string(fixture(name).join("metrics.csv")).unwrap();
        let columns = format!(
            "{},backward_passes,flops,train_seconds",
            old.lines().next().unwrap()
        );
        assert_eq!(table.lines().next(), Some(columns.as_str()));
        assert_eq!(table.lines().count(), old.lines().count());
        let cells = |line: &str| line.split(',').count();
        assert!(table.lines().all(|line| cells(line) == 15), "{table}");
    }
}

#[test]
fn v6_an_older_finished_run_is_complete_and_another_config_is_another_run() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    copy_folder(&fixture("pretrain"), &run);
    let prepare = |more: &[&str]| Run::prepare(&plan("pretrain", &run, more), Options::default());
    assert!(prepare(&[]).unwrap().is_none());
    let error = prepare(&["optimizer.eps=1e-6"]).err().unwrap().to_string();
    assert!(
        error.contains("optimizer.eps: 0.00000001 there, 0.000001 here"),
        "{error}"
    );

    // A key that the older version did not write has the default of that time.
    let path = run.join("resolved.toml");
    let text = fs::read_to_string(&path).unwrap();
    let without: String = text
        .lines()
        .filter(|line| !line.starts_with("eps =") && !line.starts_with("betas ="))
        .map(|line| format!("{line}\n"))
        .collect();
    assert_ne!(text, without);
    fs::write(&path, &without).unwrap();
    assert!(prepare(&[]).unwrap().is_none());
    let error = prepare(&["optimizer.eps=1e-6"]).err().unwrap().to_string();
    assert!(
        error.contains("optimizer.eps: 0.00000001 there, 0.000001 here"),
        "{error}"
    );

    // A key that this version does not know was written by a newer version.
    fs::write(&path, format!("colour = \"red\"\n{text}")).unwrap();
    let error = prepare(&[]).err().unwrap().to_string();
    assert!(
        error.contains("resolved.toml") && error.contains("colour"),
        "{error}"
    );
}
