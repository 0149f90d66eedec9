//! What there is, what is whole, and any of it in the form that needs nothing else.

use std::fs;
use std::path::Path;

use super::chain::{self, DELTA};
use super::state::{Form, STATE, State};
use super::whole::{MODEL, OPTIMIZER, write_tensors};
use super::{CheckpointError, CheckpointStore, Progress, Snapshot};
use crate::config::{CONFIG_JSON, DecoderSpec};
use crate::delta::{self, Method, Opened};
use crate::durable;
use crate::model::ModelError;

/// A checkpoint, as its headers tell it.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed {
    /// Completed optimizer steps.
    pub step: u64,
    /// How it is stored.
    pub stored: Stored,
    /// Bytes of its files.
    pub bytes: u64,
    /// Bytes of its tensors.
    pub tensor_bytes: u64,
    /// How some of its tensors were made smaller than they can be without loss.
    pub lossy: Option<Method>,
    /// Whether it is the best.
    pub best: bool,
    /// How far the run had come.
    pub progress: Progress,
}

/// How a checkpoint is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Two files that other programs read.
    Whole,
    /// One file that stands alone.
    Alone,
    /// One file, the difference from this step.
    Beside(u64),
}

impl CheckpointStore {
    /// All checkpoints, by step; their headers are checked, their tensors not.
    ///
    /// # Errors
    /// A header that is damaged; the file system's.
    pub fn list(&self) -> Result<Vec<Listed>, CheckpointError> {
        let best = self.best();
        let list = self.steps()?.into_iter().map(|step| {
            let folder = self.existing(step)?;
            let state = State::read(&folder, step)?;
            let (stored, tensor_bytes, lossy) = match state.form() {
                Some(Form::Whole { .. }) => {
                    let size = |name| file_bytes(&folder.join(name));
                    (Stored::Whole, size(MODEL)? + size(OPTIMIZER)?, None)
                }
                _ => {
                    let parent = chain::parent(&folder)?;
                    let stored = parent.map_or(Stored::Alone, Stored::Beside);
                    let opened = delta::open(&folder.join(DELTA))?;
                    (stored, opened.state_bytes(), main_method(&opened))
                }
            };
            let mut bytes = 0;
            for entry in fs::read_dir(&folder).map_err(CheckpointError::io(&folder))? {
                let path = entry.map_err(CheckpointError::io(&folder))?.path();
                bytes += file_bytes(&path)?;
            }
            Ok(Listed {
                step,
                stored,
                bytes,
                tensor_bytes,
                lossy,
                best: best == Some(step),
                progress: state.progress,
            })
        });
        list.collect()
    }

    /// How some tensors of a step were made smaller than they can be without loss; none if it is exact.
    ///
    /// # Errors
    /// No such step; a header that is damaged.
    pub fn lossy(&self, step: u64) -> Result<Option<Method>, CheckpointError> {
        let path = self.existing(step)?.join(DELTA);
        if path.exists() {
            Ok(main_method(&delta::open(&path)?))
        } else {
            Ok(None)
        }
    }

    /// Reads all of a step, and of what it is the difference from what it needs, and holds it against what was saved.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn verify(&self, step: u64) -> Result<(), CheckpointError> {
        let folder = self.existing(step)?;
        match State::read(&folder, step)?.form() {
            Some(Form::Whole { .. }) => self.load(step).map(drop),
            _ => chain::verify(&self.open(step)?.delta),
        }
    }

    /// Writes a step to a folder of its own, whole: model.safetensors under Hugging Face's names with config.json, or the
    /// trained tensors of an adapter; optimizer.safetensors; state.json. `out` must be absent or empty.
    ///
    /// # Errors
    /// As [`load`](Self::load); the file system's, and then nothing is left of it.
    pub fn restore(&self, step: u64, out: &Path) -> Result<(), CheckpointError> {
        let folder = self.existing(step)?;
        let config = match State::read(&folder, step)?.form() {
            Some(Form::Delta(link)) => link.config,
            _ => serde_json::Value::Null,
        };
        let Snapshot {
            model,
            optimizer,
            progress,
            extra: _,
        } = self.load(step)?;
        let temporary = durable::temporary_beside(out);
        let io = |path: &Path| CheckpointError::io(path.to_path_buf());
        let write = || {
            durable::create_folder(&temporary).map_err(io(&temporary))?;
            let model = if config.is_null() {
                model.tensors()
            } else {
                let spec = DecoderSpec::from_config_json(&config).map_err(ModelError::from)?;
                let path = temporary.join(CONFIG_JSON);
                let text = format!("{config:#}\n");
                durable::replace_with(&path, text).map_err(io(&path))?;
                model.files(&spec)
            };
            let model = write_tensors(&temporary.join(MODEL), &model)?;
            let tensors = write_tensors(&temporary.join(OPTIMIZER), &optimizer.tensors)?;
            let form = Form::Whole {
                model,
                optimizer: tensors,
            };
            let path = temporary.join(STATE);
            State::new(&path, progress, optimizer.scalars, form)?.create(&temporary)?;
            if out.exists() {
                fs::remove_dir(out).map_err(io(out))?;
            }
            durable::rename(&temporary, out).map_err(io(out))?;
            durable::sync_folder(durable::parent(out)).map_err(io(out))
        };
        let written = write();
        if written.is_err() {
            // The error that matters is the one being returned.
            let _ = fs::remove_dir_all(&temporary);
        }
        written
    }
}

/// The method that most of the tensors that lost something were treated with.
fn main_method(opened: &Opened) -> Option<Method> {
    let lossy = opened.lossy();
    let of = |method: Method| {
        lossy
            .values()
            .filter(|record| record.method == method)
            .count()
    };
    let methods = lossy.values().map(|record| record.method);
    methods.max_by_key(|&method| of(method))
}

fn file_bytes(path: &Path) -> Result<u64, CheckpointError> {
    Ok(fs::metadata(path).map_err(CheckpointError::io(path))?.len())
}
