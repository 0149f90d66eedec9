//! Tests of saving, reading, marking and deleting the steps of a run.

use std::fs;

use super::*;

#[test]
fn a_snapshot_comes_back_as_it_was() {
    let (_folder, store) = store();
    save(&store, 7);
    let back = store.load(7).unwrap();
    assert_eq!(back.model, snapshot(7).model);
    assert_eq!(back.optimizer.tensors, snapshot(7).optimizer.tensors);
    assert_eq!(back.optimizer.scalars, snapshot(7).optimizer.scalars);
    assert_eq!(back.optimizer.families, families());
    assert_eq!(back.progress, snapshot(7).progress);
}

#[test]
fn r11_rotation_keeps_best_and_last_and_reports_what_it_deletes() {
    let (_folder, store) = store();
    for step in [1, 2, 3, 4, 5] {
        save(&store, step);
    }
    store.mark_best(1).unwrap();
    assert_eq!(rotate(&store, 0), Vec::<u64>::new());
    assert_eq!(rotate(&store, 1), vec![2, 3]);
    assert_eq!(store.steps().unwrap(), vec![1, 4, 5]);
    assert_eq!((store.best(), store.latest().unwrap()), (Some(1), Some(5)));
}

#[test]
fn r11_the_trial_of_step_0_goes_with_the_next_save() {
    let (_folder, store) = store();
    save(&store, 0);
    assert_eq!(rotate(&store, 3), Vec::<u64>::new());
    assert_eq!(store.load(0).unwrap().progress.step, 0);
    for keep in [0, 3] {
        save(&store, 1);
        assert_eq!(rotate(&store, keep), vec![0]);
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
    let again = store.save(
        &snapshot(2).progress,
        Tensors::new,
        OptimizerState::default,
        Extras::new,
    );
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

/// Checkpoints from before extra state must remain readable.
#[test]
fn a_state_without_later_fields_has_the_checksum_it_always_had() {
    let (folder, store) = store();
    let mut unmarked = snapshot(1).optimizer;
    unmarked.families.clear();
    let model = || snapshot(1).model.tensors();
    let saved = store.save(&snapshot(1).progress, model, || unmarked, Extras::new);
    saved.unwrap();
    let mut unmarked = capture(2);
    unmarked.optimizer.families.clear();
    let saved = store.save_delta(&at(2), &unmarked, &ChainOptions::exact(3));
    saved.unwrap();
    for step in [1, 2] {
        let text = fs::read_to_string(step_folder(folder.path(), step).join(STATE)).unwrap();
        let state: serde_json::Value = serde_json::from_str(&text).unwrap();
        let keys: Vec<&String> = state.as_object().unwrap().keys().collect();
        let covered = [&state["progress"], &state["optimizer"], &state["delta"]];
        let covered = match step {
            1 => serde_json::to_vec(&covered[..2]).unwrap(),
            _ => serde_json::to_vec(&covered).unwrap(),
        };
        let expected = blake3::hash(&covered).to_hex().to_string();
        assert_eq!(state["blake3"]["state"], expected.as_str());
        match step {
            1 => assert_eq!(keys, ["version", "progress", "optimizer", "blake3"]),
            _ => assert_eq!(
                keys,
                ["version", "progress", "optimizer", "delta", "blake3"]
            ),
        }
    }
}

#[test]
fn a_field_of_a_newer_version_is_an_error_and_is_not_lost() {
    let (folder, store) = store();
    save(&store, 1);
    save_delta(&store, 2);
    for step in [1, 2] {
        let path = step_folder(folder.path(), step).join(STATE);
        let text = fs::read_to_string(&path).unwrap();
        let state: serde_json::Value = serde_json::from_str(&text).unwrap();
        for place in ["", "/progress", "/blake3", "/delta"] {
            let mut newer = state.clone();
            let Some(place) = newer.pointer_mut(place).filter(|place| place.is_object()) else {
                continue;
            };
            place["later"] = serde_json::json!({"a": 1});
            fs::write(&path, newer.to_string()).unwrap();
            let errors = [
                store.load(step).map(drop),
                store.verify(step),
                store.renew(&at(step)),
            ];
            for error in errors {
                let error = error.unwrap_err();
                assert!(
                    error.to_string().contains("unknown field `later`"),
                    "{error}"
                );
                assert!(error.help().unwrap().contains("newer version"), "{error}");
            }
            assert_eq!(fs::read_to_string(&path).unwrap(), newer.to_string());
        }
        // A missing field is an error and gets no default.
        for key in ["progress", "optimizer", "blake3", "version"] {
            let mut older = state.clone();
            older.as_object_mut().unwrap().remove(key);
            fs::write(&path, older.to_string()).unwrap();
            assert!(
                store.renew(&at(step)).is_err() && store.load(step).is_err(),
                "{key}"
            );
        }
        fs::write(&path, text).unwrap();
        store.verify(step).unwrap();
    }
}
