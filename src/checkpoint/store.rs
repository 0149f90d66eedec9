//! The checkpoints of a run, one folder per step.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::chain::{self, DELTA};
use super::state::{Form, Link, STATE, State};
use super::whole::{MODEL, OPTIMIZER, read_tensors, write_tensors};
use super::{Capture, ChainOptions, CheckpointError, Progress, Snapshot, Weights};
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
/// assert_eq!(store.load(100)?.model.tensors()["norm.weight"], weights);
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

    /// Saves the state of a run under its step, whole, and makes it the last. Returns the step's folder.
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
        self.add(progress.step, |folder| {
            let model = write_tensors(&folder.join(MODEL), &model())?;
            let OptimizerState {
                tensors, scalars, ..
            } = optimizer();
            let optimizer = write_tensors(&folder.join(OPTIMIZER), &tensors)?;
            let form = Form::Whole { model, optimizer };
            State::new(&folder.join(STATE), progress.clone(), scalars, form)
        })
    }

    /// Saves the state of a run as the difference from the last checkpoint, or alone where that is no part of a chain,
    /// or its chain is as long as it may be; and makes it the last. Returns the step's folder.
    ///
    /// # Errors
    /// [`CheckpointError::StepExists`]; a last checkpoint that is not what was saved; the file system's. What had been
    /// saved before is untouched.
    pub fn save_delta(
        &self,
        progress: &Progress,
        capture: &Capture,
        options: &ChainOptions,
    ) -> Result<PathBuf, CheckpointError> {
        let parent = self.parent_for(options.keyframe_every)?;
        self.add(progress.step, |folder| {
            let parent = parent.as_ref().map(|(step, open)| (*step, &open.delta));
            let written = chain::write(folder, parent, capture, options)?;
            let form = Form::Delta(Link {
                result: written.state.id,
                config: capture.config.clone(),
            });
            let scalars = capture.optimizer.scalars.clone();
            State::new(&folder.join(STATE), progress.clone(), scalars, form)
        })
    }

    /// The last checkpoint, if the next is to be written beside it.
    fn parent_for(
        &self,
        keyframe_every: u64,
    ) -> Result<Option<(u64, chain::Open)>, CheckpointError> {
        // The trial of step 0 goes with the next save.
        let lasting = |&step: &u64| step > 0 && keyframe_every > 1;
        let Some(last) = self.latest()?.filter(lasting) else {
            return Ok(None);
        };
        if !self.is_in_chain(last)? {
            return Ok(None);
        }
        let open = self.open(last)?;
        let joins = open.length < keyframe_every.min(chain::LONGEST);
        Ok(joins.then_some((last, open)))
    }

    fn is_in_chain(&self, step: u64) -> Result<bool, CheckpointError> {
        let state = State::read(&self.existing(step)?, step)?;
        Ok(matches!(state.form(), Some(Form::Delta(_))))
    }

    /// Makes a step's folder: hidden until all of it is on the disk.
    fn add(
        &self,
        step: u64,
        write: impl FnOnce(&Path) -> Result<State, CheckpointError>,
    ) -> Result<PathBuf, CheckpointError> {
        let target = self.step_folder(step);
        if target.exists() {
            return Err(CheckpointError::StepExists { folder: target });
        }
        durable::create_folder(&self.folder).map_err(CheckpointError::io(&self.folder))?;
        self.sweep()?;
        let unfinished = self.folder.join(format!(".{}.tmp", step_name(step)));
        let folder = unfinished.as_path();
        let saved = durable::create_folder(folder)
            .map_err(CheckpointError::io(folder))
            .and_then(|()| write(folder)?.create(folder))
            .and_then(|()| durable::sync_folder(folder).map_err(CheckpointError::io(folder)))
            .and_then(|()| {
                durable::rename(folder, &target).map_err(CheckpointError::io(&target))?;
                durable::sync_folder(&self.folder).map_err(CheckpointError::io(&self.folder))
            });
        if saved.is_err() {
            // The error that matters is the one being returned.
            let _ = fs::remove_dir_all(folder);
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
        let folder = self.existing(progress.step)?;
        let state = State::read(&folder, progress.step)?;
        state
            .renewed(&folder.join(STATE), progress.clone())?
            .replace(&folder)?;
        self.point("last", progress.step)
    }

    /// Reads the snapshot of a step and verifies it.
    ///
    /// # Errors
    /// No such step; a file that is missing, malformed, or not the one that was saved.
    pub fn load(&self, step: u64) -> Result<Snapshot, CheckpointError> {
        let folder = self.existing(step)?;
        let state = State::read(&folder, step)?;
        let (model, tensors) = match state.form() {
            Some(Form::Whole { model, optimizer }) => {
                // The larger file first: while a file is read its bytes and its tensors are both in memory.
                let tensors = read_tensors(&folder.join(OPTIMIZER), &optimizer)?;
                let model = read_tensors(&folder.join(MODEL), &model)?;
                (Weights::Files(model), tensors)
            }
            _ => {
                let (model, tensors) = chain::read(&self.open(step)?.delta)?;
                (Weights::Own(model), tensors)
            }
        };
        Ok(Snapshot {
            model,
            optimizer: OptimizerState {
                tensors,
                scalars: state.optimizer,
                ..OptimizerState::default()
            },
            progress: state.progress,
            extra: Default::default(),
        })
    }

    /// The weights of a step; the rest is neither read nor verified.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_model(&self, step: u64) -> Result<Weights, CheckpointError> {
        let folder = self.existing(step)?;
        match State::read(&folder, step)?.form() {
            Some(Form::Whole { model, .. }) => {
                Ok(Weights::Files(read_tensors(&folder.join(MODEL), &model)?))
            }
            _ => Ok(Weights::Own(chain::read_model(&self.open(step)?.delta)?)),
        }
    }

    pub(super) fn open(&self, step: u64) -> Result<chain::Open, CheckpointError> {
        chain::open(&|step| self.step_folder(step), step)
    }

    /// Makes a step stand alone: whatever it was the difference from can go.
    ///
    /// # Errors
    /// As [`load`](Self::load); the file system's. The step stays as it was.
    pub fn squash(&self, step: u64) -> Result<(), CheckpointError> {
        let folder = self.existing(step)?;
        if self.is_in_chain(step)? && chain::parent(&folder)?.is_some() {
            chain::squash(&self.open(step)?.delta)?;
        }
        Ok(())
    }

    /// Deletes steps, the newest first: a crash in between leaves none that is the difference from one that is gone.
    /// Others that are the difference from one of them are made to stand alone before.
    fn remove_all(&self, steps: &[u64]) -> Result<(), CheckpointError> {
        let doomed: BTreeSet<u64> = steps.iter().copied().collect();
        if doomed.is_empty() {
            return Ok(());
        }
        for step in self.steps()? {
            if doomed.contains(&step) || !self.step_folder(step).join(DELTA).exists() {
                continue;
            }
            let parent = chain::parent(&self.step_folder(step))?;
            if parent.is_some_and(|parent| doomed.contains(&parent)) {
                self.squash(step)?;
            }
        }
        doomed
            .into_iter()
            .rev()
            .try_for_each(|step| self.remove(step))
    }

    pub(super) fn existing(&self, step: u64) -> Result<PathBuf, CheckpointError> {
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

    /// Makes no step the best.
    ///
    /// # Errors
    /// The file system's.
    pub fn forget_best(&self) -> Result<(), CheckpointError> {
        let path = self.folder.join("best");
        durable::remove_file(&path).map_err(CheckpointError::io(&path))
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
        self.remove_all(&deleted)?;
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
            _ => self.forget_best(),
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
    pub(super) fn remove(&self, step: u64) -> Result<(), CheckpointError> {
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

pub(super) fn step_name(step: u64) -> String {
    format!("step-{step:06}")
}

pub(super) fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("step-")?.parse().ok()
}
