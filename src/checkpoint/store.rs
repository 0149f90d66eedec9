//! Full checkpoints, one folder per step.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{CheckpointError, Progress, Snapshot};
use crate::durable;
use crate::model::Tensors;
use crate::model::folder::{tensors_from_bytes, tensors_to_bytes};
use crate::optimizer::{OptimizerState, StateScalar};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// The checkpoints of one run.
///
/// ```
/// use burn::tensor::TensorData;
/// use firebrick::checkpoint::{CheckpointStore, Progress, Snapshot};
/// use firebrick::model::Tensors;
/// use firebrick::optimizer::OptimizerState;
///
/// let run = tempfile::tempdir()?;
/// let store = CheckpointStore::new(run.path());
/// let weights = TensorData::new(vec![1.0f32, 2.0], [2]);
/// store.save(&Snapshot {
///     model: Tensors::from([("norm.weight".to_string(), weights.clone())]),
///     optimizer: OptimizerState::default(),
///     progress: Progress { step: 100, ..Progress::default() },
/// })?;
/// assert_eq!(store.latest()?, Some(100));
/// assert_eq!(store.load(100)?.model["norm.weight"], weights);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    folder: PathBuf,
}

/// The version of state.json that this build writes and reads.
const VERSION: u32 = 1;

/// state.json.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    version: u32,
    progress: Progress,
    optimizer: std::collections::BTreeMap<String, StateScalar>,
    blake3: Checksums,
}

#[derive(Debug, Serialize, Deserialize)]
struct Checksums {
    model: String,
    optimizer: String,
    /// Of progress and optimizer above, as compact JSON.
    state: String,
}

fn state_checksum(
    progress: &Progress,
    optimizer: &std::collections::BTreeMap<String, StateScalar>,
    path: &Path,
) -> Result<String, CheckpointError> {
    let bytes = serde_json::to_vec(&(progress, optimizer)).map_err(|source| {
        CheckpointError::Malformed {
            path: path.to_path_buf(),
            source,
        }
    })?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

impl CheckpointStore {
    /// The store in a run folder. Creates nothing until the first save.
    pub fn new(run_folder: &Path) -> Self {
        Self {
            folder: run_folder.join("checkpoints"),
        }
    }

    /// Saves a snapshot under its step, replacing one of the same step, and makes it the last.
    /// Returns the step's folder.
    ///
    /// # Errors
    /// The file system's; what had been saved before is untouched.
    pub fn save(&self, snapshot: &Snapshot) -> Result<PathBuf, CheckpointError> {
        fs::create_dir_all(&self.folder).map_err(CheckpointError::io(&self.folder))?;
        self.sweep()?;
        let step = snapshot.progress.step;
        let unfinished = self.folder.join(format!(".{}.tmp", step_name(step)));
        let saved = write_step(&unfinished, snapshot).and_then(|()| {
            let target = self.step_folder(step);
            if target.exists() {
                remove_folder(&target)?;
            }
            fs::rename(&unfinished, &target).map_err(CheckpointError::io(&target))?;
            durable::sync_folder(&self.folder).map_err(CheckpointError::io(&self.folder))?;
            Ok(target)
        });
        if saved.is_err() {
            // The error that matters is the one being returned.
            let _ = fs::remove_dir_all(&unfinished);
        }
        let target = saved?;
        self.point("last", step)?;
        Ok(target)
    }

    /// Reads the snapshot of a step and verifies it.
    ///
    /// # Errors
    /// No such step; a file that is missing, malformed, or not the one that was saved.
    pub fn load(&self, step: u64) -> Result<Snapshot, CheckpointError> {
        let folder = self.step_folder(step);
        if !folder.is_dir() {
            let available = self.steps()?;
            return Err(CheckpointError::NoSuchStep {
                folder: self.folder.clone(),
                step,
                available,
            });
        }
        let path = folder.join(STATE);
        let text = fs::read_to_string(&path).map_err(CheckpointError::io(&path))?;
        let state: State =
            serde_json::from_str(&text).map_err(|source| CheckpointError::Malformed {
                path: path.clone(),
                source,
            })?;
        let (version, saved) = (state.version, state.progress.step);
        if version != VERSION || saved != step {
            return Err(CheckpointError::Foreign {
                path,
                version,
                saved,
                step,
            });
        }
        let found = state_checksum(&state.progress, &state.optimizer, &path)?;
        if found != state.blake3.state {
            let expected = state.blake3.state;
            return Err(CheckpointError::Damaged {
                path,
                expected,
                found,
            });
        }
        let model = read_verified(&folder.join(MODEL), &state.blake3.model)?;
        let tensors = read_verified(&folder.join(OPTIMIZER), &state.blake3.optimizer)?;
        let optimizer = OptimizerState {
            tensors,
            scalars: state.optimizer,
        };
        Ok(Snapshot {
            model,
            optimizer,
            progress: state.progress,
        })
    }

    /// The weights of a step, without the rest.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_model(&self, step: u64) -> Result<Tensors, CheckpointError> {
        self.load(step).map(|snapshot| snapshot.model)
    }

    /// Steps that have a checkpoint, ascending.
    ///
    /// # Errors
    /// The folder cannot be read; an absent one has no steps.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        use std::io::ErrorKind::{NotADirectory, NotFound};
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if matches!(error.kind(), NotFound | NotADirectory) => return Ok(Vec::new()),
            Err(error) => return Err(CheckpointError::io(&self.folder)(error)),
        };
        let mut steps = Vec::new();
        for entry in entries {
            let entry = entry.map_err(CheckpointError::io(&self.folder))?;
            steps.extend(entry.file_name().to_str().and_then(step_of));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// The step to resume from: the largest, whatever `last` says, since a crash can come between
    /// a finished save and the moment `last` is rewritten.
    ///
    /// # Errors
    /// As [`steps`](Self::steps).
    pub fn latest(&self) -> Result<Option<u64>, CheckpointError> {
        Ok(self.steps()?.last().copied())
    }

    /// Makes a saved step the best.
    ///
    /// # Errors
    /// The file system's.
    pub fn mark_best(&self, step: u64) -> Result<(), CheckpointError> {
        self.point("best", step)
    }

    /// The best step, if one was marked and is still there.
    pub fn best(&self) -> Option<u64> {
        let name = fs::read_to_string(self.folder.join("best")).ok()?;
        step_of(name.trim()).filter(|&step| self.has(step))
    }

    /// Deletes the oldest checkpoints until `keep` are left besides the best and the last; 0 keeps
    /// all. Returns the deleted steps, to be announced.
    ///
    /// # Errors
    /// The file system's.
    pub fn rotate(&self, keep: usize) -> Result<Vec<u64>, CheckpointError> {
        let steps = self.steps()?;
        let (best, last) = (self.best(), steps.last().copied());
        let ordinary: Vec<u64> = steps
            .into_iter()
            .filter(|&step| Some(step) != best && Some(step) != last)
            .collect();
        let surplus = if keep == 0 {
            0
        } else {
            ordinary.len().saturating_sub(keep)
        };
        for &step in &ordinary[..surplus] {
            remove_folder(&self.step_folder(step))?;
        }
        Ok(ordinary[..surplus].to_vec())
    }

    /// Whether a step has a checkpoint.
    pub fn has(&self, step: u64) -> bool {
        self.step_folder(step).is_dir()
    }

    /// Makes `last` and `best` say what a run that continues from `progress` knows: a crash, or
    /// going back, can have left them behind.
    ///
    /// # Errors
    /// The file system's.
    pub fn repoint(&self, progress: &Progress) -> Result<(), CheckpointError> {
        self.point("last", progress.step)?;
        match progress.best {
            Some(best) if self.has(best.step) => self.point("best", best.step),
            _ => {
                let path = self.folder.join("best");
                match fs::remove_file(&path) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        Err(CheckpointError::io(&path)(error))
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    /// Deletes the checkpoints past a step. Returns the deleted steps, to be announced.
    ///
    /// # Errors
    /// The file system's.
    pub fn discard_after(&self, step: u64) -> Result<Vec<u64>, CheckpointError> {
        let later = self.steps()?.into_iter().filter(|&other| other > step);
        let later: Vec<u64> = later.collect();
        for &step in &later {
            remove_folder(&self.step_folder(step))?;
        }
        Ok(later)
    }

    fn step_folder(&self, step: u64) -> PathBuf {
        self.folder.join(step_name(step))
    }

    /// Removes what a crash in the middle of a save or a deletion left behind. The run's lock makes
    /// sure that no one else is in the middle of one.
    fn sweep(&self) -> Result<(), CheckpointError> {
        let entries = fs::read_dir(&self.folder).map_err(CheckpointError::io(&self.folder))?;
        for entry in entries {
            let path = entry.map_err(CheckpointError::io(&self.folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(".step-") && name.ends_with(".tmp") {
                fs::remove_dir_all(&path).map_err(CheckpointError::io(&path))?;
            }
        }
        Ok(())
    }

    fn point(&self, name: &str, step: u64) -> Result<(), CheckpointError> {
        let path = self.folder.join(name);
        durable::replace_with(&path, format!("{}\n", step_name(step)))
            .map_err(CheckpointError::io(&path))
    }
}

fn step_name(step: u64) -> String {
    format!("step-{step:06}")
}

fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("step-")?.parse().ok()
}

/// Renames before deleting, so that a crash in between leaves no incomplete `step-*` folder.
fn remove_folder(folder: &Path) -> Result<(), CheckpointError> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let doomed = folder.with_file_name(format!(".{name}.deleted.tmp"));
    // A leftover of an earlier crash would be in the way.
    let _ = fs::remove_dir_all(&doomed);
    fs::rename(folder, &doomed).map_err(CheckpointError::io(folder))?;
    fs::remove_dir_all(&doomed).map_err(CheckpointError::io(&doomed))
}

fn write_step(folder: &Path, snapshot: &Snapshot) -> Result<(), CheckpointError> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(CheckpointError::io(folder))?;
    }
    fs::create_dir_all(folder).map_err(CheckpointError::io(folder))?;
    let model = write_tensors(&folder.join(MODEL), &snapshot.model)?;
    let optimizer = write_tensors(&folder.join(OPTIMIZER), &snapshot.optimizer.tensors)?;
    let path = folder.join(STATE);
    let (progress, scalars) = (&snapshot.progress, &snapshot.optimizer.scalars);
    let state = State {
        version: VERSION,
        progress: progress.clone(),
        optimizer: scalars.clone(),
        blake3: Checksums {
            model,
            optimizer,
            state: state_checksum(progress, scalars, &path)?,
        },
    };
    let text =
        serde_json::to_string_pretty(&state).map_err(|source| CheckpointError::Malformed {
            path: path.clone(),
            source,
        })?;
    write_flushed(&path, text.as_bytes())?;
    durable::sync_folder(folder).map_err(CheckpointError::io(folder))
}

/// Returns the file's BLAKE3.
fn write_tensors(path: &Path, tensors: &Tensors) -> Result<String, CheckpointError> {
    let bytes = tensors_to_bytes(path, tensors)?;
    write_flushed(path, &bytes)?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

fn write_flushed(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    File::create(path)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .map_err(CheckpointError::io(path))
}

fn read_verified(path: &Path, expected: &str) -> Result<Tensors, CheckpointError> {
    let bytes = fs::read(path).map_err(CheckpointError::io(path))?;
    let found = blake3::hash(&bytes).to_hex().to_string();
    if found != expected {
        let expected = expected.to_string();
        return Err(CheckpointError::Damaged {
            path: path.to_path_buf(),
            expected,
            found,
        });
    }
    Ok(tensors_from_bytes(path, &bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;

    fn snapshot(step: u64) -> Snapshot {
        let tensors = |value: f32| {
            Tensors::from([("a.b".to_string(), TensorData::new(vec![value, -0.0], [2]))])
        };
        let scalars = [("a.b.time".to_string(), StateScalar::Uint(step))];
        Snapshot {
            model: tensors(step as f32),
            optimizer: OptimizerState {
                tensors: tensors(0.5),
                scalars: scalars.into(),
            },
            progress: Progress {
                step,
                seconds: 0.1 + 0.2,
                ..Progress::default()
            },
        }
    }

    fn store() -> (tempfile::TempDir, CheckpointStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(folder.path());
        (folder, store)
    }

    #[test]
    fn a_snapshot_comes_back_as_it_was() {
        let (_folder, store) = store();
        store.save(&snapshot(7)).unwrap();
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
            store.save(&snapshot(step)).unwrap();
        }
        store.mark_best(1).unwrap();
        assert_eq!(store.rotate(0).unwrap(), Vec::<u64>::new());
        assert_eq!(store.rotate(1).unwrap(), vec![2, 3]);
        assert_eq!(store.steps().unwrap(), vec![1, 4, 5]);
        assert_eq!((store.best(), store.latest().unwrap()), (Some(1), Some(5)));
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_noticed() {
        let (folder, store) = store();
        let step = store.save(&snapshot(1)).unwrap();
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
            store.save(&snapshot(step)).unwrap();
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
        store.save(&snapshot(1)).unwrap();
        let unfinished = folder.path().join("checkpoints/.step-000002.tmp");
        fs::create_dir(&unfinished).unwrap();
        fs::write(unfinished.join(MODEL), b"half").unwrap();
        assert_eq!(store.steps().unwrap(), vec![1]);
        store.save(&snapshot(2)).unwrap();
        assert_eq!(store.load(2).unwrap().progress.step, 2);
    }

    #[test]
    fn a_missing_step_names_those_there_are() {
        let (_folder, store) = store();
        store.save(&snapshot(3)).unwrap();
        let message = store.load(4).unwrap_err().to_string();
        assert!(
            message.ends_with("has no checkpoint of step 4; there are: 3"),
            "{message}"
        );
    }
}
