//! Deletes checkpoints. Steps that depend on a deleted step are made independent of it first.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};

use super::chain::{self, DELTA};
use super::state::{Form, State};
use super::store::step_name;
use super::whole::MODEL;
use super::{CheckpointError, CheckpointStore, Warning};
use crate::durable;

/// The result of a deletion.
#[derive(Debug, Default)]
pub struct Rotated {
    /// The deleted steps, which the caller announces.
    pub deleted: Vec<u64>,
    /// Problems to report.
    pub warnings: Vec<Warning>,
}

/// Why a step could not be made independent.
enum NotAlone {
    /// It cannot be read.
    Unreadable(CheckpointError),
    /// It cannot be written.
    Unwritable(CheckpointError),
}

impl CheckpointStore {
    /// Deletes the oldest checkpoints until `keep` are left besides the best and the last; 0 keeps
    /// all. The one of step 0, which only shows that saving works, is deleted as soon as there is
    /// another.
    ///
    /// If a kept step depends on a step that will be deleted, it is first made a keyframe. If it
    /// cannot be read, the steps that it may depend on are kept with it, and a warning reports this
    /// once. They are deleted together with it.
    ///
    /// # Errors
    /// The file system's.
    pub fn rotate(&self, keep: usize) -> Result<Rotated, CheckpointError> {
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
        self.remove_all(&[&trial, &ordinary[..surplus]].concat())
    }

    /// Deletes steps, the newest first, so that a crash in between leaves no step that depends on a
    /// deleted one. Other steps that depend on them are made independent first.
    fn remove_all(&self, steps: &[u64]) -> Result<Rotated, CheckpointError> {
        let mut doomed: BTreeSet<u64> = steps.iter().copied().collect();
        let mut warnings = Vec::new();
        if doomed.is_empty() {
            return Ok(Rotated::default());
        }
        let all = self.steps()?;
        for &step in &all {
            if doomed.contains(&step) || !self.step_folder(step).join(DELTA).exists() {
                continue;
            }
            if self.unreadable().contains(&step) {
                self.hold(step, &all, &mut doomed);
                continue;
            }
            match self.part(step, &doomed) {
                Ok(()) => {}
                Err(NotAlone::Unwritable(error)) => return Err(error),
                Err(NotAlone::Unreadable(cause)) => {
                    let held = self.hold(step, &all, &mut doomed);
                    self.unreadable().insert(step);
                    warnings.push(Warning::Unreadable { step, held, cause });
                }
            }
        }
        let deleted: Vec<u64> = doomed.into_iter().collect();
        for &step in deleted.iter().rev() {
            self.remove(step)?;
        }
        Ok(Rotated { deleted, warnings })
    }

    /// Makes a step independent if its parent is in `doomed` or missing. A missing parent may only
    /// have been moved away; it would need its own ancestors once it is back.
    fn part(&self, step: u64, doomed: &BTreeSet<u64>) -> Result<(), NotAlone> {
        let parent = chain::parent(&self.step_folder(step)).map_err(NotAlone::Unreadable)?;
        let is_to_part = |&parent: &u64| {
            doomed.contains(&parent) || !self.step_folder(parent).join(DELTA).exists()
        };
        match parent.filter(is_to_part) {
            Some(_) => self.stand_alone(step),
            None => Ok(()),
        }
    }

    /// Removes from `doomed` the steps that an unreadable step may depend on, and returns them.
    fn hold(&self, step: u64, all: &[u64], doomed: &mut BTreeSet<u64>) -> Vec<u64> {
        let mut held = Vec::new();
        if self.stands_alone(step) {
            return held;
        }
        // Some steps may no longer say what they depend on. Each step depends on the one right
        // before it, so the search goes back until a step that is independent.
        for &earlier in all.iter().rev().filter(|&&earlier| earlier < step) {
            if doomed.remove(&earlier) {
                held.insert(0, earlier);
            }
            if self.stands_alone(earlier) {
                break;
            }
        }
        held
    }

    fn stands_alone(&self, step: u64) -> bool {
        let folder = self.step_folder(step);
        if folder.join(DELTA).exists() {
            matches!(chain::parent(&folder), Ok(None))
        } else {
            folder.join(MODEL).exists()
        }
    }

    /// Makes a step a keyframe, so that it no longer depends on another step.
    ///
    /// # Errors
    /// As [`load`](Self::load); the file system's. The step is then unchanged.
    pub fn squash(&self, step: u64) -> Result<(), CheckpointError> {
        self.existing(step)?;
        self.stand_alone(step).map_err(|error| match error {
            NotAlone::Unreadable(error) | NotAlone::Unwritable(error) => error,
        })
    }

    fn stand_alone(&self, step: u64) -> Result<(), NotAlone> {
        let folder = self.step_folder(step);
        let open = || {
            let state = State::read(&folder, step)?;
            let is_linked =
                matches!(state.form(), Some(Form::Delta(_))) && chain::parent(&folder)?.is_some();
            is_linked.then(|| self.open(step)).transpose()
        };
        match open().map_err(NotAlone::Unreadable)? {
            None => Ok(()),
            Some(open) => chain::squash(&open.delta).map_err(|error| {
                if error.is_of_source() {
                    NotAlone::Unreadable(error)
                } else {
                    NotAlone::Unwritable(error)
                }
            }),
        }
    }

    /// Deletes the checkpoints after a step, the newest first: a crash in between leaves later
    /// steps undeleted, but no gap. Returns the deleted steps, which the caller announces.
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

    /// Renames before deleting, so that a crash in between leaves no incomplete `step-*` folder. A
    /// folder that someone else has removed meanwhile is not an error.
    pub(super) fn remove(&self, step: u64) -> Result<(), CheckpointError> {
        let folder = self.step_folder(step);
        let doomed = self
            .folder
            .join(format!(".{}.deleted.tmp", step_name(step)));
        match durable::rename(&folder, &doomed) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.map_err(CheckpointError::io(folder))?,
        }
        self.unreadable().remove(&step);
        remove_any(&doomed)
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
                remove_any(&path)?;
            }
        }
        for step in self.steps()? {
            // Errors are ignored: leftovers in a folder that cannot be opened are deleted with that
            // folder.
            let _ = durable::sweep(&self.step_folder(step));
        }
        Ok(())
    }

    pub(super) fn unreadable(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        // The set is valid even if a thread panicked while holding the lock.
        self.unreadable
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes a folder, or a file with the same name.
fn remove_any(path: &Path) -> Result<(), CheckpointError> {
    let removed = if path.is_dir() {
        durable::remove_folder(path)
    } else {
        durable::remove_file(path)
    };
    removed.map_err(CheckpointError::io(path))
}
