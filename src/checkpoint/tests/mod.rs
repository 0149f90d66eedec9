//! A checkpoint is loaded exactly as it was saved, or loading it is an error.

mod chain;
mod damage;
mod extra;
mod replace;
mod rotation;
mod store;

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;

use super::chain::DELTA;
use super::state::STATE;
use super::whole::{EXTRA, MODEL, OPTIMIZER};
use super::*;
use crate::optimizer::StateScalar;

/// The family of each parameter's optimizer state.
fn families() -> BTreeMap<String, String> {
    [("w".to_string(), "adam".to_string())].into()
}

fn snapshot(step: u64) -> Snapshot {
    let tensors =
        |value: f32| Tensors::from([("a.b".to_string(), TensorData::new(vec![value, -0.0], [2]))]);
    let scalars = [("a.b.time".to_string(), StateScalar::Uint(step))];
    Snapshot {
        model: Weights::Files(tensors(step as f32)),
        optimizer: OptimizerState {
            tensors: tensors(0.5),
            scalars: scalars.into(),
            families: families(),
        },
        extra: Extras::new(),
        progress: Progress {
            step,
            seconds: 0.1 + 0.2,
            ..Progress::default()
        },
    }
}

fn save(store: &CheckpointStore, step: u64) -> PathBuf {
    let Snapshot {
        model,
        optimizer,
        extra,
        progress,
    } = snapshot(step);
    store
        .save(&progress, || model.tensors(), || optimizer, || extra)
        .unwrap()
}

fn store() -> (tempfile::TempDir, CheckpointStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(folder.path());
    (folder, store)
}

/// A state of moderate size that changes a little from step to step.
fn capture(step: u64) -> Capture {
    let tensor = |scale: f32| {
        let value =
            |i: usize| ((i as f32) * 0.37).sin() * scale + step as f32 * 1e-5 * (i as f32).cos();
        TensorData::new((0..2000).map(value).collect::<Vec<f32>>(), [40, 50])
    };
    let moment = |kind: &str| (format!("w.momentum.moment_{kind}"), tensor(1e-3));
    Capture {
        weights: Tensors::from([("w".to_string(), tensor(0.02))]),
        optimizer: OptimizerState {
            tensors: [moment("1"), moment("2")].into(),
            scalars: [("w.momentum.time".to_string(), StateScalar::Uint(step))].into(),
            families: families(),
        },
        extra: Extras::new(),
        steps: Default::default(),
        config: serde_json::Value::Null,
    }
}

/// The progress of a run at a step.
fn at(step: u64) -> Progress {
    Progress {
        step,
        ..Progress::default()
    }
}

/// Saves [`capture`] in chains of three, and returns the warnings.
fn save_told(store: &CheckpointStore, step: u64) -> Vec<String> {
    let options = ChainOptions::exact(3);
    let saved = store.save_delta(&at(step), &capture(step), &options);
    told(&saved.unwrap().warnings)
}

fn told(warnings: &[Warning]) -> Vec<String> {
    warnings.iter().map(ToString::to_string).collect()
}

/// Saves and expects no warnings.
fn save_delta(store: &CheckpointStore, step: u64) {
    assert_eq!(save_told(store, step), Vec::<String>::new());
}

/// Rotates and expects no warnings. Returns the deleted steps.
fn rotate(store: &CheckpointStore, keep: usize) -> Vec<u64> {
    let Rotated { deleted, warnings } = store.rotate(keep).unwrap();
    assert_eq!(told(&warnings), Vec::<String>::new());
    deleted
}

fn step_folder(run: &Path, step: u64) -> PathBuf {
    run.join(format!("checkpoints/step-{step:06}"))
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

fn check(store: &CheckpointStore, step: u64) {
    let Snapshot {
        model,
        optimizer,
        extra,
        progress,
    } = store.load(step).unwrap();
    let expected = capture(step);
    assert_eq!(model, Weights::Own(expected.weights.clone()));
    assert_eq!(
        store.load_model(step).unwrap(),
        Weights::Own(expected.weights)
    );
    assert_eq!(optimizer.tensors, expected.optimizer.tensors);
    assert_eq!(optimizer.scalars, expected.optimizer.scalars);
    assert_eq!(optimizer.families, expected.optimizer.families);
    assert_eq!(extra, expected.extra);
    assert_eq!(progress.step, step);
    store.verify(step).unwrap();
}

fn stored(store: &CheckpointStore) -> Vec<(u64, Stored)> {
    let list = store.list().unwrap().into_iter();
    list.map(|listed| (listed.step, listed.details.unwrap().stored))
        .collect()
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
