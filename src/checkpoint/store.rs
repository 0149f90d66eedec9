//! Full checkpoints, one folder per step.

use std::fs;
use std::path::{Path, PathBuf};

use super::{CheckpointError, Progress, Snapshot, files};
use crate::durable;
use crate::model::Tensors;
use crate::optimizer::OptimizerState;

/// The checkpoints of one run.
///
/// ```
/// use burn::tensor::TensorData;
/// use firebrick::checkpoint::{CheckpointStore, Progress};
/// use firebrick::model::Tensors;
/// use firebrick::optimizer::OptimizerState;
///
/// let run = tempfile::tempdir()?;
/// let store = CheckpointStore::new(run.path());
/// let weights = TensorData::new(vec![1.0f32, 2.0], [2]);
/// store.save(
///     &Progress { step: 100, ..Progress::default() },
///     || Tensors::from([("norm.weight".to_string(), weights.clone())]),
///     OptimizerState::default,
/// )?;
/// assert_eq!(store.latest()?, Some(100));
/// assert_eq!(store.load(100)?.model["norm.weight"], weights);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    folder: PathBuf,
}

impl CheckpointStore {
    /// The store in a run folder. Creates nothing until the first save.
    pub fn new(run_folder: &Path) -> Self {
        Self {
            folder: run_folder.join("checkpoints"),
        }
    }

    /// Saves the state of a run under its step and makes it the last. Returns the step's folder.
    ///
    /// The weights are asked for when they are about to be written and given up before the
    /// optimizer's state is asked for, so that memory holds one copy of one of them at a time.
    ///
    /// # Errors
    /// [`CheckpointError::StepExists`]; the file system's. What had been saved before is untouched.
    pub fn save(
        &self,
        progress: &Progress,
        model: impl FnOnce() -> Tensors,
        optimizer: impl FnOnce() -> OptimizerState,
    ) -> Result<PathBuf, CheckpointError> {
        let step = progress.step;
        let target = self.step_folder(step);
        if target.exists() {
            return Err(CheckpointError::StepExists { folder: target });
        }
        durable::create_folder(&self.folder).map_err(CheckpointError::io(&self.folder))?;
        self.sweep()?;
        let unfinished = self.folder.join(format!(".{}.tmp", step_name(step)));
        let saved = files::write(&unfinished, progress, model, optimizer).and_then(|()| {
            durable::rename(&unfinished, &target).map_err(CheckpointError::io(&target))?;
            durable::sync_folder(&self.folder).map_err(CheckpointError::io(&self.folder))
        });
        if saved.is_err() {
            // The error that matters is the one being returned.
            let _ = fs::remove_dir_all(&unfinished);
        }
        saved?;
        self.point("last", step)?;
        Ok(target)
    }

    /// Says anew how far the run of a saved step has come, and makes it the last. Weights and
    /// moments stay: they are a function of the step, while an evaluation may have been added.
    ///
    /// # Errors
    /// As [`load`](Self::load); what had been saved before is untouched.
    pub fn renew(&self, progress: &Progress) -> Result<(), CheckpointError> {
        files::renew(&self.existing(progress.step)?, progress)?;
        self.point("last", progress.step)
    }

    /// Reads the snapshot of a step and verifies it.
    ///
    /// # Errors
    /// No such step; a file that is missing, malformed, or not the one that was saved.
    pub fn load(&self, step: u64) -> Result<Snapshot, CheckpointError> {
        files::read(&self.existing(step)?, step)
    }

    /// The weights of a step; the rest is neither read nor verified.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_model(&self, step: u64) -> Result<Tensors, CheckpointError> {
        files::read_model(&self.existing(step)?, step)
    }

    fn existing(&self, step: u64) -> Result<PathBuf, CheckpointError> {
        let folder = self.step_folder(step);
        if folder.is_dir() {
            return Ok(folder);
        }
        let available = self.steps()?;
        Err(CheckpointError::NoSuchStep {
            folder: self.folder.clone(),
            step,
            available,
        })
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
    /// all. The one of step 0, which only shows that saving works, is deleted as soon as there is
    /// another. Returns the deleted steps, to be announced.
    ///
    /// # Errors
    /// The file system's.
    pub fn rotate(&self, keep: usize) -> Result<Vec<u64>, CheckpointError> {
        let steps = self.steps()?;
        let (best, last) = (self.best(), steps.last().copied());
        let deletable = |&step: &u64| Some(step) != best && Some(step) != last;
        let (trial, ordinary): (Vec<u64>, Vec<u64>) = steps
            .into_iter()
            .filter(deletable)
            .partition(|&step| step == 0);
        let surplus = match keep {
            0 => 0,
            keep => ordinary.len().saturating_sub(keep),
        };
        let deleted = [&trial, &ordinary[..surplus]].concat();
        for &step in &deleted {
            self.remove(step)?;
        }
        Ok(deleted)
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
                durable::remove_file(&path).map_err(CheckpointError::io(&path))
            }
        }
    }

    /// Deletes the checkpoints past a step, the newest first: a crash in between leaves a run that
    /// is a little less far back, not one with a gap. Returns the deleted steps, to be announced.
    ///
    /// # Errors
    /// The file system's.
    pub fn discard_after(&self, step: u64) -> Result<Vec<u64>, CheckpointError> {
        let mut later = self.steps()?;
        later.retain(|&other| other > step);
        later.reverse();
        for &step in &later {
            self.remove(step)?;
        }
        Ok(later)
    }

    fn step_folder(&self, step: u64) -> PathBuf {
        self.folder.join(step_name(step))
    }

    /// Renames before deleting, so that a crash in between leaves no incomplete `step-*` folder.
    fn remove(&self, step: u64) -> Result<(), CheckpointError> {
        let folder = self.step_folder(step);
        let doomed = self
            .folder
            .join(format!(".{}.deleted.tmp", step_name(step)));
        durable::rename(&folder, &doomed).map_err(CheckpointError::io(folder))?;
        durable::remove_folder(&doomed).map_err(CheckpointError::io(&doomed))
    }

    /// Removes what a crash in the middle of a save or a deletion left behind. The run's lock makes
    /// sure that no one else is in the middle of one.
    ///
    /// # Errors
    /// The file system's.
    pub fn sweep(&self) -> Result<(), CheckpointError> {
        durable::sweep(&self.folder).map_err(CheckpointError::io(&self.folder))?;
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(CheckpointError::io(&self.folder))?,
        };
        for entry in entries {
            let path = entry.map_err(CheckpointError::io(&self.folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(".step-") && name.ends_with(".tmp") {
                durable::remove_folder(&path).map_err(CheckpointError::io(&path))?;
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

#[cfg(test)]
mod tests {
    use super::super::files::{MODEL, OPTIMIZER, STATE};
    use super::*;
    use crate::optimizer::StateScalar;
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

    fn save(store: &CheckpointStore, step: u64) -> PathBuf {
        let Snapshot {
            model,
            optimizer,
            progress,
        } = snapshot(step);
        store.save(&progress, || model, || optimizer).unwrap()
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
}
