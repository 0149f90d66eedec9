//! Tests of steps that cannot be read, and of how a run goes on.

use std::fs;

use super::*;

#[test]
fn d5_a_broken_chain_says_where_it_is_broken() {
    let (folder, store) = store();
    for step in 1..=3 {
        save_delta(&store, step);
    }
    let step = |step: u64| step_folder(folder.path(), step);
    let error = |of: u64| store.load(of).unwrap_err().to_string();
    // A step of another run.
    let other = tempfile::tempdir().unwrap();
    let strangers = CheckpointStore::new(other.path());
    let strange = Capture {
        weights: capture(9).weights,
        ..capture(2)
    };
    let strange = strangers
        .save_delta(&at(2), &strange, &ChainOptions::exact(3))
        .unwrap()
        .folder;
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
    // A damaged step.
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
    assert_eq!(store.steps().unwrap(), [1, 2, 3]);
}

/// Chains of three up to `steps`, in which `damage` changes the folder of one step.
fn damaged(steps: u64, damage: impl FnOnce(&Path)) -> (tempfile::TempDir, CheckpointStore) {
    let (folder, store) = store();
    for step in 1..=steps {
        save_delta(&store, step);
    }
    damage(folder.path());
    (folder, store)
}

fn flip(path: &Path, from_end: usize) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() - from_end;
    bytes[at] ^= 4;
    fs::write(path, bytes).unwrap();
}

fn cut(path: &Path, length: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(length).unwrap();
}

/// A step of another run with the same number.
fn strange(step: u64) -> (tempfile::TempDir, PathBuf) {
    let run = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(run.path());
    let saved = store.save_delta(&at(step), &capture(step + 7), &ChainOptions::exact(3));
    (run, saved.unwrap().folder)
}

type Damage = fn(&Path);

/// The ways in which a step's folder can be damaged, by name.
fn damages() -> Vec<(&'static str, Damage)> {
    vec![
        ("a flipped bit in a tensor", |step| {
            flip(&step.join(DELTA), 900)
        }),
        ("a flipped bit in a table", |step| {
            flip(&step.join(DELTA), 70)
        }),
        ("a flipped bit in the index", |step| {
            let path = step.join(DELTA);
            let length = fs::metadata(&path).unwrap().len() as usize;
            flip(&path, length - 100);
        }),
        ("a flipped bit in state.json", |step| {
            flip(&step.join(STATE), 40)
        }),
        ("a short file", |step| cut(&step.join(DELTA), 3000)),
        ("an empty file", |step| cut(&step.join(DELTA), 0)),
        ("a short state.json", |step| cut(&step.join(STATE), 60)),
        ("an empty state.json", |step| cut(&step.join(STATE), 0)),
        ("no file", |step| fs::remove_file(step.join(DELTA)).unwrap()),
        ("no state.json", |step| {
            fs::remove_file(step.join(STATE)).unwrap()
        }),
        ("an empty folder", |step| {
            fs::remove_dir_all(step).unwrap();
            fs::create_dir(step).unwrap();
        }),
        ("no folder", |step| fs::remove_dir_all(step).unwrap()),
        ("a file", |step| {
            fs::remove_dir_all(step).unwrap();
            fs::write(step, "x").unwrap();
        }),
        ("another run's file", |step| {
            let number = step_of(step);
            let (_run, other) = strange(number);
            fs::copy(other.join(DELTA), step.join(DELTA)).unwrap();
        }),
        ("another run's step", |step| {
            let number = step_of(step);
            let (_run, other) = strange(number);
            fs::remove_dir_all(step).unwrap();
            copy_folder(&other, step);
        }),
    ]
}

fn step_of(folder: &Path) -> u64 {
    let name = folder.file_name().unwrap().to_str().unwrap();
    super::super::store::step_of(name).unwrap()
}

#[test]
fn a_damaged_parent_or_grandparent_costs_a_keyframe_and_a_warning() {
    for (name, damage) in damages() {
        for of in [1, 2] {
            let (folder, store) = damaged(2, |run| damage(&step_folder(run, of)));
            let place = format!("{name} in the place of step {of}");
            let said = save_told(&store, 3);
            // The gap is closed by the step before it, or by another run's whole chain.
            let is_gone = matches!(name, "no folder" | "a file") && of == 2;
            let serves = is_gone || name == "another run's step" && of == 2;
            use Stored::{Alone, Beside};
            let stored = store.list().unwrap().pop().unwrap().details.unwrap().stored;
            match serves {
                true => {
                    assert_eq!(said, Vec::<String>::new(), "{place}");
                    assert_ne!(stored, Alone, "{place}");
                }
                false => {
                    assert_eq!(said.len(), 1, "{place}: {said:?}");
                    let start = "the checkpoint of step 2 cannot be read: that of step 3 is stored \
                                 without it. ";
                    assert!(said[0].starts_with(start), "{place}: {said:?}");
                    assert!(said[0].contains("checkpoints/step-00000"), "{said:?}");
                    assert_eq!(stored, Alone, "{place}");
                }
            }
            check(&store, 3);
            // Later saves succeed without warnings.
            save_delta(&store, 4);
            save_delta(&store, 5);
            let kinds: Vec<_> = store.list().unwrap().into_iter().rev().take(2).collect();
            let kinds = kinds
                .into_iter()
                .map(|listed| listed.details.unwrap().stored);
            let expected = match serves {
                // The third step of a chain, and the first step of the next chain.
                true => [Alone, Beside(3)],
                false => [Beside(4), Beside(3)],
            };
            assert_eq!(kinds.collect::<Vec<_>>(), expected, "{place}");
            for step in 3..=5 {
                check(&store, step);
            }
            // Damaged steps are deleted like the others.
            rotate(&store, 1);
            assert_eq!(store.steps().unwrap(), [4, 5], "{place}");
            check(&store, 4);
            check(&store, 5);
            drop(folder);
        }
    }
}

#[test]
fn any_byte_of_what_came_before_may_be_wrong() {
    let (folder, store) = damaged(2, |_| {});
    for of in [1, 2] {
        for name in [DELTA, STATE] {
            let path = step_folder(folder.path(), of).join(name);
            let good = fs::read(&path).unwrap();
            for place in (0..good.len()).step_by(good.len() / 40) {
                let mut bad = good.clone();
                bad[place] ^= 1 << (place % 8);
                for bad in [&bad[..], &good[..place]] {
                    fs::write(&path, bad).unwrap();
                    let said = save_told(&store, 3);
                    assert_eq!(said.len(), 1, "byte {place} of {name} of step {of}");
                    check(&store, 3);
                    store.remove(3).unwrap();
                }
            }
            fs::write(&path, &good).unwrap();
            save_delta(&store, 3);
            assert_eq!(stored(&store)[2], (3, Stored::Beside(2)));
            store.remove(3).unwrap();
        }
    }
}

/// A step is damaged after it was saved, while the run goes on.
#[test]
fn a_step_that_cannot_be_read_is_saved_again() {
    for (name, damage) in damages() {
        // A file in the folder's place is not deleted, and another run's step is not noticed.
        if matches!(
            name,
            "a file" | "another run's step" | "a flipped bit in a tensor"
        ) {
            continue;
        }
        let (folder, store) = damaged(2, |run| damage(&step_folder(run, 2)));
        assert!(!store.is_saved(2, false), "{name}");
        save_delta(&store, 2);
        check(&store, 2);
        assert_eq!(names_in(&folder.path().join("checkpoints")).len(), 3);
    }
    // The same for full checkpoints.
    let (folder, store) = store();
    save(&store, 1);
    fs::write(step_folder(folder.path(), 1).join(STATE), "{}").unwrap();
    assert!(!store.is_saved(1, false));
    save(&store, 1);
    store.verify(1).unwrap();
}

#[test]
fn nothing_that_a_run_asks_of_older_steps_fails() {
    for (name, damage) in damages() {
        let (folder, store) = damaged(2, |_| {});
        store.mark_best(1).unwrap();
        damage(&step_folder(folder.path(), 1));
        save_told(&store, 3);
        let progress = Progress {
            val_loss: Some(1.0),
            ..at(3)
        };
        store.renew(&progress).unwrap();
        assert_eq!(store.latest().unwrap(), Some(3), "{name}");
        let is_gone = matches!(name, "no folder" | "a file");
        assert_eq!(store.best(), (!is_gone).then_some(1), "{name}");
        assert_eq!(store.steps().unwrap().contains(&1), !is_gone, "{name}");
        let list = store.list().unwrap();
        assert!(list.last().unwrap().details.is_ok(), "{name}");
        store.repoint(&progress).unwrap();
        store.mark_best(3).unwrap();
        assert_eq!(store.best(), Some(3));
        store.rotate(1).unwrap();
        assert_eq!(*store.steps().unwrap().last().unwrap(), 3);
        store.verify(3).unwrap();
        assert_eq!(
            store.load_model(3).unwrap(),
            Weights::Own(capture(3).weights)
        );
        store.discard_after(0).unwrap();
        assert_eq!(store.steps().unwrap(), Vec::<u64>::new(), "{name}");
    }
}

/// The disk is full: the file is written to a device without space.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_no_damage() {
    use crate::delta::DeltaError;
    use crate::durable::watch::watching;

    for damage in [None, Some(2u64)] {
        let (folder, store) = damaged(2, |run| {
            if let Some(of) = damage {
                flip(&step_folder(run, of).join(DELTA), 900);
            }
        });
        let hidden = folder.path().join("checkpoints/.step-000003.tmp");
        let saved = watching(
            move |_| {
                if hidden.is_dir() && fs::symlink_metadata(hidden.join(DELTA)).is_err() {
                    std::os::unix::fs::symlink("/dev/full", hidden.join(DELTA)).unwrap();
                }
            },
            || store.save_delta(&at(3), &capture(3), &ChainOptions::exact(3)),
        );
        let error = saved.unwrap_err();
        let CheckpointError::Delta(DeltaError::Io { source, path }) = &error else {
            panic!("{error}");
        };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        assert!(path.to_string_lossy().contains(".step-000003.tmp"));
        assert!(error.help().unwrap().contains("make room"));
        let names = names_in(&folder.path().join("checkpoints"));
        assert_eq!(names, ["last", "step-000001", "step-000002"]);
        check(&store, 1);
        let said = save_told(&store, 3);
        assert_eq!(said.len(), usize::from(damage.is_some()));
    }
}
