//! Tests of deletion when some steps cannot be read.

use std::fs;

use super::*;

/// A chain of nine steps that contains the best step; a tensor of step 2 has a flipped bit.
fn broken_before_the_best() -> (tempfile::TempDir, CheckpointStore, Vec<u8>) {
    let (folder, store) = store();
    for step in 1..=5 {
        save(&store, step);
    }
    store.mark_best(3).unwrap();
    let path = step_folder(folder.path(), 2).join(DELTA);
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    let at = bad.len() - 900;
    bad[at] ^= 4;
    fs::write(path, bad).unwrap();
    (folder, store, good)
}

fn save(store: &CheckpointStore, step: u64) -> Vec<String> {
    let options = ChainOptions::exact(9);
    let saved = store.save_delta(&at(step), &capture(step), &options);
    told(&saved.unwrap().warnings)
}

#[test]
fn what_an_unreadable_step_may_be_mended_with_is_kept_and_that_is_said_once() {
    let (folder, store, good) = broken_before_the_best();
    let Rotated { deleted, warnings } = store.rotate(1).unwrap();
    assert_eq!(deleted, Vec::<u64>::new());
    let said = told(&warnings);
    assert_eq!(said.len(), 1, "{said:?}");
    let start = "the checkpoint of step 3 cannot be read; steps 1, 2 are kept with it. ";
    assert!(said[0].starts_with(start), "{said:?}");
    assert!(
        said[0].contains("step-000002/delta.safetensors"),
        "{said:?}"
    );

    let mut said = Vec::new();
    for step in 6..=13 {
        said.extend(save(&store, step));
        said.extend(told(&store.rotate(1).unwrap().warnings));
    }
    // Step 5 cannot be read either, and is deleted soon.
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].contains("that of step 6 is stored without it")
            && said[0].contains("step 5 cannot be read"),
        "{said:?}"
    );
    assert_eq!(store.steps().unwrap(), [1, 2, 3, 12, 13]);
    check(&store, 13);
    check(&store, 12);
    // A new store, as in a later session, keeps the same steps.
    let later = CheckpointStore::new(folder.path());
    save(&later, 14);
    let Rotated { deleted, warnings } = later.rotate(1).unwrap();
    assert_eq!((deleted, warnings.len()), (vec![12], 1));

    // The steps that were kept are enough to repair it.
    fs::write(step_folder(folder.path(), 2).join(DELTA), good).unwrap();
    check(&store, 3);
    store.squash(3).unwrap();
    let later = CheckpointStore::new(folder.path());
    assert_eq!(rotate(&later, 1), [1, 2]);
    check(&store, 3);
}

#[test]
fn what_an_unreadable_step_held_goes_when_it_goes() {
    let (_folder, store, _) = broken_before_the_best();
    store.rotate(1).unwrap();
    save(&store, 6);
    store.rotate(1).unwrap();
    assert_eq!(store.steps().unwrap(), [1, 2, 3, 4, 5, 6]);
    save(&store, 7);
    store.mark_best(7).unwrap();
    assert_eq!(rotate(&store, 1), [1, 2, 3, 4, 5]);
    check(&store, 6);
    check(&store, 7);
}

#[test]
fn a_damaged_step_that_stands_alone_holds_nothing() {
    let (folder, store) = store();
    for step in 1..=3 {
        save(&store, step);
    }
    store.squash(3).unwrap();
    store.mark_best(3).unwrap();
    let path = step_folder(folder.path(), 3).join(DELTA);
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 900;
    bytes[at] ^= 4;
    fs::write(path, bytes).unwrap();
    assert_eq!(save(&store, 4).len(), 1);
    save(&store, 5);
    assert_eq!(rotate(&store, 1), [1, 2]);
    assert_eq!(store.steps().unwrap(), [3, 4, 5]);
}

#[test]
fn a_step_that_was_moved_away_can_be_moved_back() {
    let (folder, store) = store();
    for step in 1..=3 {
        save(&store, step);
    }
    store.mark_best(3).unwrap();
    let (there, away) = (step_folder(folder.path(), 2), folder.path().join("away"));
    fs::rename(&there, &away).unwrap();
    let said = save(&store, 4);
    assert!(
        said[0].ends_with("is the difference from step 2, which is gone"),
        "{said:?}"
    );
    let Rotated { deleted, warnings } = store.rotate(0).unwrap();
    assert!(
        deleted.is_empty() && warnings.is_empty(),
        "nothing is to be deleted"
    );
    save(&store, 5);
    let Rotated { deleted, warnings } = store.rotate(1).unwrap();
    // The unreadable step 3 was already reported by the save.
    assert!(deleted.is_empty() && warnings.is_empty(), "{warnings:?}");
    fs::rename(&away, &there).unwrap();
    for step in 1..=5 {
        check(&store, step);
    }
}

#[test]
fn a_step_without_its_header_holds_what_it_may_need() {
    let (folder, store) = store();
    for step in 1..=3 {
        save(&store, step);
    }
    store.mark_best(2).unwrap();
    let path = step_folder(folder.path(), 2).join(DELTA);
    let good = fs::read(&path).unwrap();
    fs::write(&path, &good[..100]).unwrap();
    save(&store, 4);
    save(&store, 5);
    let Rotated { deleted, warnings } = store.rotate(1).unwrap();
    assert_eq!((deleted, warnings.len()), (vec![3], 1));
    fs::write(&path, good).unwrap();
    check(&store, 2);
}

/// The file system refuses the squashed file. This is not damage, and nothing is deleted.
#[test]
fn a_step_that_cannot_be_written_anew_is_an_error() {
    use crate::durable::{Change, watch::watching};

    let (folder, store) = store();
    for step in 1..=4 {
        save(&store, step);
    }
    store.mark_best(2).unwrap();
    let path = step_folder(folder.path(), 2).join(DELTA);
    let good = fs::read(&path).unwrap();
    let place = path.clone();
    let rotated = watching(
        // When the new file is to be moved, a folder is in its place.
        move |change| {
            if matches!(change, Change::Written(_)) && place.is_file() {
                fs::remove_file(&place).unwrap();
                fs::create_dir(&place).unwrap();
            }
        },
        || store.rotate(1),
    );
    let error = rotated.unwrap_err();
    assert!(matches!(error, CheckpointError::Io { .. }), "{error}");
    fs::remove_dir(&path).unwrap();
    fs::write(&path, good).unwrap();
    assert_eq!(store.steps().unwrap(), [1, 2, 3, 4]);
    assert_eq!(rotate(&store, 1), [1]);
    check(&store, 2);
}

#[test]
fn what_lies_where_checkpoints_lie_is_left_alone() {
    let (folder, store) = store();
    save(&store, 1);
    let path = |name: &str| folder.path().join("checkpoints").join(name);
    fs::write(path("step-000004"), "notes").unwrap();
    fs::write(path(".step-000007.tmp"), "half").unwrap();
    fs::create_dir(path("step-x")).unwrap();
    fs::write(
        step_folder(folder.path(), 1).join(".state.json.1-2.tmp"),
        "half",
    )
    .unwrap();
    assert_eq!(store.steps().unwrap(), [1]);
    save(&store, 2);
    assert_eq!(rotate(&store, 1), Vec::<u64>::new());
    let left = [
        "last",
        "step-000001",
        "step-000002",
        "step-000004",
        "step-x",
    ];
    assert_eq!(names_in(&folder.path().join("checkpoints")), left);
    assert_eq!(names_in(&step_folder(folder.path(), 1)), [DELTA, STATE]);
    let error = store
        .save_delta(&at(4), &capture(4), &ChainOptions::exact(3))
        .unwrap_err();
    assert!(
        matches!(error, CheckpointError::StepExists { .. }),
        "{error}"
    );
    assert_eq!(fs::read_to_string(path("step-000004")).unwrap(), "notes");
}
