use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;

use super::chain::DELTA;
use super::state::STATE;
use super::whole::{MODEL, OPTIMIZER};
use super::*;
use crate::optimizer::StateScalar;

fn snapshot(step: u64) -> Snapshot {
    let tensors =
        |value: f32| Tensors::from([("a.b".to_string(), TensorData::new(vec![value, -0.0], [2]))]);
    let scalars = [("a.b.time".to_string(), StateScalar::Uint(step))];
    Snapshot {
        model: Weights::Files(tensors(step as f32)),
        optimizer: OptimizerState {
            tensors: tensors(0.5),
            scalars: scalars.into(),
            ..OptimizerState::default()
        },
        progress: Progress {
            step,
            seconds: 0.1 + 0.2,
            ..Progress::default()
        },
        extra: Default::default(),
    }
}

fn save(store: &CheckpointStore, step: u64) -> PathBuf {
    let Snapshot {
        model,
        optimizer,
        progress,
        extra: _,
    } = snapshot(step);
    store
        .save(&progress, || model.tensors(), || optimizer)
        .unwrap()
}

fn store() -> (tempfile::TempDir, CheckpointStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(folder.path());
    (folder, store)
}

#[test]
fn a_snapshot_comes_back_as_it_was() {
    let (_folder, store) = store();
    save(&store, 7);
    let back = store.load(7).unwrap();
    assert_eq!(back.model, snapshot(7).model);
    assert_eq!(back.optimizer.tensors, snapshot(7).optimizer.tensors);
    assert_eq!(back.optimizer.scalars, snapshot(7).optimizer.scalars);
    assert_eq!(back.progress, snapshot(7).progress);
}

#[test]
fn r11_rotation_keeps_best_and_last_and_reports_what_it_deletes() {
    let (_folder, store) = store();
    for step in [1, 2, 3, 4, 5] {
        save(&store, step);
    }
    store.mark_best(1).unwrap();
    assert_eq!(store.rotate(0).unwrap(), Vec::<u64>::new());
    assert_eq!(store.rotate(1).unwrap(), vec![2, 3]);
    assert_eq!(store.steps().unwrap(), vec![1, 4, 5]);
    assert_eq!((store.best(), store.latest().unwrap()), (Some(1), Some(5)));
}

#[test]
fn r11_the_trial_of_step_0_goes_with_the_next_save() {
    let (_folder, store) = store();
    save(&store, 0);
    assert_eq!(store.rotate(3).unwrap(), Vec::<u64>::new());
    assert_eq!(store.load(0).unwrap().progress.step, 0);
    for keep in [0, 3] {
        save(&store, 1);
        assert_eq!(store.rotate(keep).unwrap(), vec![0]);
        assert_eq!(store.steps().unwrap(), vec![1]);
        store.remove(1).unwrap();
        save(&store, 0);
    }
}

#[test]
fn r10_a_saved_step_takes_on_an_evaluation_and_nothing_else() {
    let (_folder, store) = store();
    let folder = save(&store, 2);
    let weights = fs::read(folder.join(MODEL)).unwrap();
    let again = store.save(&snapshot(2).progress, Tensors::new, OptimizerState::default);
    assert!(matches!(again, Err(CheckpointError::StepExists { .. })));
    let progress = Progress {
        val_loss: Some(0.25),
        ..snapshot(2).progress
    };
    store.renew(&progress).unwrap();
    assert_eq!(store.load(2).unwrap().progress, progress);
    assert_eq!(fs::read(folder.join(MODEL)).unwrap(), weights);
    assert!(store.renew(&snapshot(3).progress).is_err());
}

#[test]
fn every_flipped_bit_and_every_truncation_is_noticed() {
    let (folder, store) = store();
    let step = save(&store, 1);
    for name in [MODEL, OPTIMIZER] {
        let path = step.join(name);
        let good = fs::read(&path).unwrap();
        for byte in 0..good.len() {
            let mut bad = good.clone();
            bad[byte] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(matches!(
                store.load(1),
                Err(CheckpointError::Damaged { .. })
            ));
            fs::write(&path, &good[..byte]).unwrap();
            assert!(matches!(
                store.load(1),
                Err(CheckpointError::Damaged { .. })
            ));
        }
        fs::write(&path, &good).unwrap();
    }
    assert!(store.load(1).is_ok());
    let state = fs::read_to_string(step.join(STATE)).unwrap();
    for (good, bad) in [
        ("\"version\": 1", "\"version\": 2"),
        ("\"step\": 1", "\"step\": 2"),
        ("\"tokens\": 0", "\"tokens\": 1"),
        ("\"uint\": 1", "\"uint\": 9"),
    ] {
        assert!(state.contains(good), "{good} in {state}");
        fs::write(step.join(STATE), state.replace(good, bad)).unwrap();
        assert!(store.load(1).is_err(), "{bad}");
    }
    fs::write(step.join(STATE), "{\"version\": 1").unwrap();
    assert!(matches!(
        store.load(1),
        Err(CheckpointError::Malformed { .. })
    ));
    drop(folder);
}

#[test]
fn pointers_left_behind_by_a_crash_are_put_right() {
    let (folder, store) = store();
    for step in [1, 2, 3] {
        save(&store, step);
    }
    store.mark_best(1).unwrap();
    let best = crate::checkpoint::BestEvaluation {
        step: 2,
        val_loss: 0.1 + 0.2,
    };
    let progress = Progress {
        step: 2,
        best: Some(best),
        ..Progress::default()
    };
    assert_eq!(store.discard_after(2).unwrap(), vec![3]);
    store.repoint(&progress).unwrap();
    let said = |name: &str| fs::read_to_string(folder.path().join("checkpoints").join(name));
    assert_eq!(
        (store.best(), said("last").unwrap().trim()),
        (Some(2), "step-000002")
    );
    store
        .repoint(&Progress {
            step: 2,
            ..Progress::default()
        })
        .unwrap();
    assert_eq!(store.best(), None);
    assert!(said("best").is_err());
}

#[test]
fn an_unfinished_save_is_not_a_checkpoint() {
    let (folder, store) = store();
    save(&store, 1);
    let unfinished = folder.path().join("checkpoints/.step-000002.tmp");
    fs::create_dir(&unfinished).unwrap();
    fs::write(unfinished.join(MODEL), b"half").unwrap();
    assert_eq!(store.steps().unwrap(), vec![1]);
    save(&store, 2);
    assert_eq!(store.load(2).unwrap().progress.step, 2);
}

#[test]
fn a_missing_step_names_those_there_are() {
    let (_folder, store) = store();
    save(&store, 3);
    let message = store.load(4).unwrap_err().to_string();
    assert!(
        message.ends_with("has no checkpoint of step 4; there are: 3"),
        "{message}"
    );
}

/// A state of some size that moves a little from step to step.
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
            ..OptimizerState::default()
        },
        steps: Default::default(),
        config: serde_json::Value::Null,
    }
}

fn save_delta(store: &CheckpointStore, step: u64) -> PathBuf {
    let progress = Progress {
        step,
        ..Progress::default()
    };
    store
        .save_delta(&progress, &capture(step), &ChainOptions::exact(3))
        .unwrap()
}

fn check(store: &CheckpointStore, step: u64) {
    let Snapshot {
        model,
        optimizer,
        progress,
        extra: _,
    } = store.load(step).unwrap();
    let expected = capture(step);
    assert_eq!(model, Weights::Own(expected.weights.clone()));
    assert_eq!(
        store.load_model(step).unwrap(),
        Weights::Own(expected.weights)
    );
    assert_eq!(optimizer.tensors, expected.optimizer.tensors);
    assert_eq!(optimizer.scalars, expected.optimizer.scalars);
    assert_eq!(progress.step, step);
    store.verify(step).unwrap();
}

fn stored(store: &CheckpointStore) -> Vec<(u64, Stored)> {
    let list = store.list().unwrap().into_iter();
    list.map(|listed| (listed.step, listed.stored)).collect()
}

#[test]
fn d5_every_third_stands_alone_and_every_step_comes_back() {
    let (_folder, store) = store();
    for step in 1..=7 {
        save_delta(&store, step);
    }
    use Stored::{Alone, Beside};
    let expected = [
        Alone,
        Beside(1),
        Beside(2),
        Alone,
        Beside(4),
        Beside(5),
        Alone,
    ];
    assert_eq!(stored(&store), (1..).zip(expected).collect::<Vec<_>>());
    for step in [7, 1, 3, 6, 2, 5, 4] {
        check(&store, step);
    }
    let list = store.list().unwrap();
    assert!(list.iter().all(|listed| listed.tensor_bytes == 24_000));
    assert!(
        list[1].bytes < list[0].bytes && list[0].bytes < 25_500,
        "{list:?}"
    );
}

#[test]
fn d5_what_is_needed_stands_alone_before_what_it_needs_is_deleted() {
    let (_folder, store) = store();
    for step in 1..=3 {
        save_delta(&store, step);
    }
    store.mark_best(2).unwrap();
    save_delta(&store, 4);
    assert_eq!(store.rotate(1).unwrap(), [1]);
    use Stored::{Alone, Beside};
    assert_eq!(stored(&store), [(2, Alone), (3, Beside(2)), (4, Alone)]);
    save_delta(&store, 5);
    assert_eq!(store.rotate(1).unwrap(), [3]);
    assert_eq!(stored(&store), [(2, Alone), (4, Alone), (5, Beside(4))]);
    store.squash(5).unwrap();
    store.squash(4).unwrap();
    assert_eq!(stored(&store), [(2, Alone), (4, Alone), (5, Alone)]);
    assert_eq!(store.discard_after(2).unwrap(), [5, 4]);
    save_delta(&store, 6);
    assert_eq!(stored(&store), [(2, Alone), (6, Beside(2))]);
    check(&store, 2);
    check(&store, 6);
}

#[test]
fn d5_whole_checkpoints_and_chains_go_together() {
    let (_folder, store) = store();
    save(&store, 1);
    save_delta(&store, 2);
    save_delta(&store, 3);
    save(&store, 4);
    save_delta(&store, 5);
    use Stored::{Alone, Beside, Whole};
    let expected = [
        (1, Whole),
        (2, Alone),
        (3, Beside(2)),
        (4, Whole),
        (5, Alone),
    ];
    assert_eq!(stored(&store), expected);
    assert_eq!(store.load(4).unwrap().progress.step, 4);
    check(&store, 3);
    assert!(store.squash(1).is_ok());
}

#[test]
fn d5_a_broken_chain_says_where_it_is_broken() {
    let (folder, store) = store();
    for step in 1..=3 {
        save_delta(&store, step);
    }
    let step = |step: u64| folder.path().join(format!("checkpoints/step-{step:06}"));
    let error = |of: u64| store.load(of).unwrap_err().to_string();
    // Of another run.
    let other = tempfile::tempdir().unwrap();
    let strangers = CheckpointStore::new(other.path());
    let strange = Capture {
        weights: capture(9).weights,
        ..capture(2)
    };
    let progress = Progress {
        step: 2,
        ..Progress::default()
    };
    let strange = strangers
        .save_delta(&progress, &strange, &ChainOptions::exact(3))
        .unwrap();
    let hidden = folder.path().join("hidden");
    fs::rename(step(2), &hidden).unwrap();
    assert!(
        error(3).ends_with("step-000003 is the difference from step 2, which is gone"),
        "{}",
        error(3)
    );
    fs::rename(&strange, step(2)).unwrap();
    assert!(
        error(3).contains("step-000003/delta.safetensors is damaged, or of another run"),
        "{}",
        error(3)
    );
    // Damaged.
    fs::remove_dir_all(step(2)).unwrap();
    fs::rename(&hidden, step(2)).unwrap();
    check(&store, 3);
    let path = step(1).join(DELTA);
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 200;
    bytes[last] ^= 4;
    fs::write(&path, bytes).unwrap();
    assert!(
        error(3).contains("step-000001/delta.safetensors"),
        "{}",
        error(3)
    );
    assert!(store.verify(2).is_err());
    let later = Progress {
        step: 4,
        ..Progress::default()
    };
    assert!(
        store
            .save_delta(&later, &capture(4), &ChainOptions::exact(9))
            .is_err(),
        "no one builds on what is damaged"
    );
    assert_eq!(store.steps().unwrap(), [1, 2, 3]);
    assert!(
        store
            .save_delta(&later, &capture(4), &ChainOptions::exact(1))
            .is_ok(),
        "what stands alone needs no other"
    );
}

#[test]
fn d7_a_restored_step_is_a_whole_checkpoint() {
    let (_folder, store) = store();
    save_delta(&store, 1);
    save_delta(&store, 2);
    let run = tempfile::tempdir().unwrap();
    let out = run.path().join("checkpoints/step-000002");
    fs::create_dir(run.path().join("checkpoints")).unwrap();
    store.restore(2, &out).unwrap();
    let whole = CheckpointStore::new(run.path());
    assert_eq!(stored(&whole), [(2, Stored::Whole)]);
    let snapshot = whole.load(2).unwrap();
    assert_eq!(snapshot.model.tensors(), capture(2).weights);
    assert_eq!(snapshot.optimizer.tensors, capture(2).optimizer.tensors);
    assert_eq!(names_in(&out), [MODEL, OPTIMIZER, STATE]);
    assert!(store.restore(3, &run.path().join("x")).is_err());
    assert_eq!(names_in(run.path()), ["checkpoints"]);
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn d3_lossy_weights_are_labelled_and_moments_are_exact_unless_asked_for() {
    let (_folder, store) = store();
    for (step, lossy_moments) in [(1, false), (2, false), (3, true)] {
        let progress = Progress {
            step,
            ..Progress::default()
        };
        let options = ChainOptions {
            lossy: Some(Method::Int4),
            lossy_moments,
            ..ChainOptions::exact(9)
        };
        let mut capture = capture(step);
        // Not a pair of Adam's.
        let squares = capture.optimizer.tensors["w.momentum.moment_2"].clone();
        let other = &mut capture.optimizer.tensors;
        other.insert("v.momentum.row_avg".to_string(), squares.clone());
        store.save_delta(&progress, &capture, &options).unwrap();
        store.verify(step).unwrap();
        let read = store.load(step).unwrap();
        let weights = read.model.tensors();
        assert_eq!(
            weights == capture.weights,
            step == 1,
            "the first stands alone"
        );
        assert_eq!(read.optimizer.tensors["v.momentum.row_avg"], squares);
        let moments = capture.optimizer.tensors;
        assert_eq!(read.optimizer.tensors == moments, !lossy_moments);
        for (name, moment) in &moments {
            let read = read.optimizer.tensors[name].iter::<f32>();
            let mut pairs = read.zip(moment.iter::<f32>());
            assert!(
                pairs.all(|(read, saved)| (read - saved).abs() < 1e-5),
                "{name}"
            );
        }
    }
    let labels: Vec<_> = store
        .list()
        .unwrap()
        .iter()
        .map(|listed| listed.lossy)
        .collect();
    assert_eq!(labels, [None, Some(Method::Int4), Some(Method::Int4)]);
    assert_eq!(store.lossy(2).unwrap(), Some(Method::Int4));

    // It goes on standing for what was saved, alone or not.
    let before = store.load(3).unwrap();
    store.squash(3).unwrap();
    let after = store.load(3).unwrap();
    assert_eq!(before.model, after.model);
    assert_eq!(store.lossy(3).unwrap(), Some(Method::Int4));
}
