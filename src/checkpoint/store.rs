//! The checkpoints of a run, one folder per step.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::chain::{self, DELTA};
use super::extra;
use super::state::{Contents, Form, Link, STATE, State};
use super::whole::{EXTRA, MODEL, OPTIMIZER, read_extra, read_tensors, write_tensors};
use super::{Capture, ChainOptions, CheckpointError, Extras, Progress, Snapshot, Warning, Weights};
use crate::durable;
use crate::model::Tensors;
use crate::optimizer::OptimizerState;

/// The checkpoints of one run.
///
/// ```
/// use burn::tensor::TensorData;
/// use firebrick::checkpoint::{CheckpointStore, Progress};
/// use firebrick::extra::Extras;
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
///     Extras::default,
/// )?;
/// assert_eq!(store.latest()?, Some(100));
/// assert_eq!(store.load(100)?.model.tensors()["norm.weight"], weights);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    pub(super) folder: PathBuf,
    /// Steps that could not be read. Each is reported once and not tried again.
    pub(super) unreadable: Arc<Mutex<BTreeSet<u64>>>,
}

/// The result of a save.
#[derive(Debug)]
pub struct Saved {
    /// The folder of the step.
    pub folder: PathBuf,
    /// Problems to report.
    pub warnings: Vec<Warning>,
}

/// The checkpoint that the next delta can be based on.
enum Before {
    /// None: a new chain begins.
    Nothing,
    /// This step is the parent.
    Parent(u64, Box<chain::Open>),
    /// This step would be the parent, but it cannot be read.
    Unreadable(u64, CheckpointError),
}

impl CheckpointStore {
    /// The store in a run folder. Creates nothing until the first save.
    pub fn new(run_folder: &Path) -> Self {
        Self {
            folder: run_folder.join("checkpoints"),
            unreadable: Arc::default(),
        }
    }

    /// Saves the state of a run under its step, whole, and makes it the last. Returns the step's folder.
    ///
    /// The weights are requested when they are about to be written, and freed before the optimizer
    /// state is requested, which in turn is freed before the extra state is requested. So memory
    /// holds a copy of only one of them at a time.
    ///
    /// # Errors
    /// [`CheckpointError::StepExists`] if the step has a readable checkpoint;
    /// [`CheckpointError::Extra`]; the file system's. Earlier checkpoints are unchanged.
    pub fn save(
        &self,
        progress: &Progress,
        model: impl FnOnce() -> Tensors,
        optimizer: impl FnOnce() -> OptimizerState,
        extra: impl FnOnce() -> Extras,
    ) -> Result<PathBuf, CheckpointError> {
        self.refuse_existing(progress.step, false)?;
        self.add(progress.step, |folder| {
            let model = write_tensors(&folder.join(MODEL), &model())?;
            write_whole(folder, progress.clone(), model, optimizer(), extra())
        })
    }

    /// Saves the state of a run as a difference from the last checkpoint, and marks it as the last.
    /// It becomes a keyframe if the last checkpoint is in the full format, belongs to another model
    /// or cannot be read, or if the chain has reached its maximum length.
    ///
    /// A step that already has a checkpoint is written again in two cases: the checkpoint cannot be
    /// read, or it is lossy and the last, and is now saved exactly. A crash leaves either the old
    /// one or the new one.
    ///
    /// # Errors
    /// [`CheckpointError::StepExists`] if the step has a checkpoint and neither case applies;
    /// [`CheckpointError::Extra`]; the file system's. Earlier checkpoints are unchanged.
    pub fn save_delta(
        &self,
        progress: &Progress,
        capture: &Capture,
        options: &ChainOptions,
    ) -> Result<Saved, CheckpointError> {
        let step = progress.step;
        let replaces = self.refuse_existing(step, options.lossy.is_none())?;
        extra::check(&capture.extra)?;
        let (mut warnings, mut parent) = (Vec::new(), None);
        let mut stands_alone = |before, cause| {
            self.unreadable().insert(before);
            warnings.push(Warning::StandsAlone {
                step,
                before,
                cause,
            });
        };
        match self.before(step, capture, options)? {
            Before::Nothing => {}
            Before::Parent(before, open) => parent = Some((before, open)),
            Before::Unreadable(before, cause) => stands_alone(before, cause),
        }
        let write = |folder: &Path| {
            let beside = parent.as_ref().map(|(step, open)| (*step, &open.delta));
            let written = match (chain::write(folder, beside, capture, options), beside) {
                // Damage inside tensors is found only when they are read.
                (Err(cause), Some((before, _))) if cause.is_of_source() => {
                    stands_alone(before, cause);
                    chain::write(folder, None, capture, options)?
                }
                (written, _) => written?,
            };
            let form = Form::Delta(Link {
                result: written.state.id,
                replaces: None,
                config: capture.config.clone(),
            });
            let contents = Contents {
                progress: progress.clone(),
                optimizer: capture.optimizer.scalars.clone(),
                optimizer_families: capture.optimizer.families.clone(),
                extra: extra::scalars(&capture.extra),
            };
            State::new(&folder.join(STATE), contents, form)
        };
        let folder = match replaces {
            Some(old) => self.replace(step, &old, write)?,
            None => self.add(step, write)?,
        };
        Ok(Saved { folder, warnings })
    }

    /// The checkpoint that a step can be based on.
    fn before(
        &self,
        step: u64,
        capture: &Capture,
        options: &ChainOptions,
    ) -> Result<Before, CheckpointError> {
        let mut steps = self.steps()?.into_iter();
        // The trial of step 0 goes with the next save.
        let last = steps.rfind(|&other| 0 < other && other < step);
        let Some(last) = last.filter(|_| options.keyframe_every > 1) else {
            return Ok(Before::Nothing);
        };
        let state = match State::read(&self.step_folder(last), last) {
            Ok(state) => state,
            Err(cause) => return Ok(Before::Unreadable(last, cause)),
        };
        let same_model =
            matches!(state.form(), Some(Form::Delta(link)) if link.config == capture.config);
        if !same_model {
            return Ok(Before::Nothing);
        }
        Ok(match self.open(last) {
            Ok(open) if open.length < options.keyframe_every.min(chain::LONGEST) => {
                Before::Parent(last, Box::new(open))
            }
            Ok(_) => Before::Nothing,
            Err(cause) => Before::Unreadable(last, cause),
        })
    }

    /// Whether a step has a checkpoint whose headers can be read and, if `exact`, whose weights are
    /// stored without loss.
    pub fn is_saved(&self, step: u64, exact: bool) -> bool {
        self.is_readable(step) && !(exact && self.lossy(step).is_ok_and(|method| method.is_some()))
    }

    fn is_readable(&self, step: u64) -> bool {
        let folder = self.step_folder(step);
        let form = State::read(&folder, step).map(|state| state.form());
        match form {
            Ok(Some(Form::Delta(_))) => self.open(step).is_ok(),
            Ok(Some(Form::Whole { .. })) => [MODEL, OPTIMIZER]
                .iter()
                .all(|name| folder.join(name).is_file()),
            _ => false,
        }
    }

    /// Refuses to save a step that already has a checkpoint. Returns the state of a lossy
    /// checkpoint that is to be replaced by an exact one.
    fn refuse_existing(&self, step: u64, exact: bool) -> Result<Option<State>, CheckpointError> {
        let folder = self.step_folder(step);
        if folder.exists() && !folder.is_dir() {
            return Err(CheckpointError::StepExists { folder });
        }
        if !self.is_readable(step) {
            return Ok(None);
        }
        // Later steps may depend on a step that is not the last.
        if self.is_saved(step, exact) || self.latest()? != Some(step) {
            return Err(CheckpointError::StepExists { folder });
        }
        State::read(&folder, step).map(Some)
    }

    /// Creates a step's folder. It stays hidden until it is completely on the disk. An existing
    /// folder is replaced.
    fn add(
        &self,
        step: u64,
        write: impl FnOnce(&Path) -> Result<State, CheckpointError>,
    ) -> Result<PathBuf, CheckpointError> {
        let target = self.step_folder(step);
        self.hidden(step, write, |_, hidden| {
            if target.exists() {
                self.remove(step)?;
            }
            durable::rename(hidden, &target).map_err(CheckpointError::io(&target))?;
            durable::sync_folder(&self.folder).map_err(CheckpointError::io(&self.folder))
        })?;
        self.unreadable().remove(&step);
        self.point("last", step)?;
        Ok(target)
    }

    /// Replaces the delta file of a step. state.json is replaced first, by one that accepts both
    /// files.
    fn replace(
        &self,
        step: u64,
        old: &State,
        write: impl FnOnce(&Path) -> Result<State, CheckpointError>,
    ) -> Result<PathBuf, CheckpointError> {
        let target = self.step_folder(step);
        self.hidden(step, write, |state, hidden| {
            let (path, file) = (target.join(STATE), target.join(DELTA));
            let before = match old.form() {
                Some(Form::Delta(link)) => link.replaces.unwrap_or(link.result),
                _ => {
                    return Err(CheckpointError::StepExists {
                        folder: target.clone(),
                    });
                }
            };
            state
                .clone()
                .replacing(&path, Some(before))?
                .replace(&target)?;
            durable::rename(&hidden.join(DELTA), &file).map_err(CheckpointError::io(&file))?;
            durable::sync_folder(&target).map_err(CheckpointError::io(&target))?;
            state.replace(&target)?;
            durable::remove_folder(hidden).map_err(CheckpointError::io(hidden))
        })?;
        self.point("last", step)?;
        Ok(target)
    }

    /// Writes a step to a hidden folder, flushes it, and calls `put` to move it to its place. After
    /// an error the hidden folder is deleted.
    fn hidden(
        &self,
        step: u64,
        write: impl FnOnce(&Path) -> Result<State, CheckpointError>,
        put: impl FnOnce(State, &Path) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        durable::create_folder(&self.folder).map_err(CheckpointError::io(&self.folder))?;
        self.sweep()?;
        let hidden = self.folder.join(format!(".{}.tmp", step_name(step)));
        let hidden = hidden.as_path();
        let write = || {
            durable::create_folder(hidden).map_err(CheckpointError::io(hidden))?;
            let state = write(hidden)?;
            state.create(hidden)?;
            durable::sync_folder(hidden).map_err(CheckpointError::io(hidden))?;
            put(state, hidden)
        };
        let saved = write();
        if saved.is_err() {
            // The error that matters is the one being returned.
            let _ = fs::remove_dir_all(hidden);
        }
        saved
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
        let (model, tensors, extra) = match state.form() {
            Some(Form::Whole {
                model,
                optimizer,
                extra,
            }) => {
                // The larger file is read first: reading needs memory for both the file's bytes and
                // its tensors.
                let tensors = read_tensors(&folder.join(OPTIMIZER), &optimizer)?;
                let model = read_tensors(&folder.join(MODEL), &model)?;
                let path = folder.join(EXTRA);
                let extra = match extra {
                    Some(hash) => read_extra(&path, &hash)?,
                    None => Tensors::new(),
                };
                let extra = extra::join(&path, extra, state.extra)?;
                (Weights::Files(model), tensors, extra)
            }
            _ => {
                let sections = chain::read(&self.open(step)?.delta)?;
                let extra = extra::join(&folder.join(DELTA), sections.extra, state.extra)?;
                (Weights::Own(sections.model), sections.optimizer, extra)
            }
        };
        Ok(Snapshot {
            model,
            optimizer: OptimizerState {
                tensors,
                scalars: state.optimizer,
                families: state.optimizer_families,
            },
            extra,
            progress: state.progress,
        })
    }

    /// Loads the weights of a step. All other tensors, extra state included, are neither read nor
    /// verified.
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
            let step = entry.file_name().to_str().and_then(step_of);
            // A file with such a name is not a checkpoint.
            steps.extend(step.filter(|_| entry.path().is_dir()));
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

    /// Removes the mark of the best step.
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

    pub(super) fn step_folder(&self, step: u64) -> PathBuf {
        self.folder.join(step_name(step))
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

/// Writes a full checkpoint, except for its weights, to an unfinished folder. `model` is the BLAKE3
/// of the weights.
pub(super) fn write_whole(
    folder: &Path,
    progress: Progress,
    model: String,
    optimizer: OptimizerState,
    extra: Extras,
) -> Result<State, CheckpointError> {
    extra::check(&extra)?;
    let OptimizerState {
        tensors,
        scalars,
        families,
    } = optimizer;
    let optimizer = write_tensors(&folder.join(OPTIMIZER), &tensors)?;
    drop(tensors);
    let (tensors, owners) = extra::split(extra);
    let extra = match tensors.is_empty() {
        true => None,
        false => Some(write_tensors(&folder.join(EXTRA), &tensors)?),
    };
    let form = Form::Whole {
        model,
        optimizer,
        extra,
    };
    let contents = Contents {
        progress,
        optimizer: scalars,
        optimizer_families: families,
        extra: owners,
    };
    State::new(&folder.join(STATE), contents, form)
}
