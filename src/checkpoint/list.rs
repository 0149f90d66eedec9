//! What there is, what is whole, and any of it in the form that needs nothing else.

use std::fs;
use std::path::Path;

use super::chain::{self, DELTA};
use super::extra;
use super::state::{Form, State};
use super::store::write_whole;
use super::whole::{EXTRA, MODEL, OPTIMIZER, write_tensors};
use super::{CheckpointError, CheckpointStore, Progress, Snapshot, Weights};
use crate::config::{CONFIG_JSON, DecoderSpec};
use crate::delta::{self, Method, Opened};
use crate::durable;
use crate::model::ModelError;

/// A checkpoint, as its headers tell it.
#[derive(Debug)]
pub struct Listed {
    /// Completed optimizer steps.
    pub step: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// Whether it is the best checkpoint.
    pub best: bool,
    /// Its content, or why that cannot be read.
    pub details: Result<Details, CheckpointError>,
}

/// The content of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Details {
    /// How the checkpoint is stored.
    pub stored: Stored,
    /// Bytes of its tensors.
    pub tensor_bytes: u64,
    /// How some of its tensors were made smaller than they can be without loss.
    pub lossy: Option<Method>,
    /// How far the run had come.
    pub progress: Progress,
}

/// How a checkpoint is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Files that other programs read.
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
    /// The file system's.
    pub fn list(&self) -> Result<Vec<Listed>, CheckpointError> {
        let best = self.best();
        let list = self.steps()?.into_iter().map(|step| {
            let folder = self.existing(step)?;
            let mut bytes = 0;
            for entry in fs::read_dir(&folder).map_err(CheckpointError::io(&folder))? {
                let path = entry.map_err(CheckpointError::io(&folder))?.path();
                bytes += file_bytes(&path)?;
            }
            Ok(Listed {
                step,
                bytes,
                best: best == Some(step),
                details: details(&folder, step),
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
        let state = State::read(&folder, step)?;
        match state.form() {
            Some(Form::Whole { .. }) => self.load(step).map(drop),
            _ => {
                let delta = self.open(step)?.delta;
                let names = chain::extra_names(&delta);
                let names = names.iter().map(String::as_str);
                extra::check_owners(&folder.join(DELTA), names, &state.extra)?;
                chain::verify(&delta)
            }
        }
    }

    /// Writes a step to a folder of its own, whole: model.safetensors under Hugging Face's names with config.json, or the
    /// trained tensors of an adapter; optimizer.safetensors; extra.safetensors if there is extra state; state.json. `out` must be absent or empty.
    /// Returns the owners whose tensors are in extra.safetensors.
    ///
    /// # Errors
    /// As [`load`](Self::load); the file system's, and then nothing is left of it.
    pub fn restore(&self, step: u64, out: &Path) -> Result<Vec<String>, CheckpointError> {
        let config = self.config(step)?;
        let Snapshot {
            model,
            optimizer,
            extra,
            progress,
        } = self.load(step)?;
        let owners = extra.iter().filter(|(_, state)| !state.tensors.is_empty());
        let owners = owners.map(|(owner, _)| owner.clone()).collect();
        write_folder(out, |temporary| {
            let model = write_model(temporary, model, &config)?;
            write_whole(temporary, progress, model, optimizer, extra)?.create(temporary)
        })?;
        Ok(owners)
    }

    /// Writes the model of a step to a folder of its own. Tensors of extra state that belong to `owner` replace the weights
    /// of the same paths. No run can go on from that folder. `out` must be absent or empty. Returns false, and writes
    /// nothing, if the owner has no tensors at that step.
    ///
    /// # Errors
    /// As [`load`](Self::load); [`CheckpointError::NotInChain`] for a full checkpoint, which has its weights under other
    /// names and does not say what model they are of; [`CheckpointError::Broken`] for a tensor that replaces none; the
    /// file system's, and then nothing is left of it.
    pub fn restore_model_with(
        &self,
        step: u64,
        owner: &str,
        out: &Path,
    ) -> Result<bool, CheckpointError> {
        let config = self.config(step)?;
        let folder = self.existing(step)?;
        let (weights, extra) = self.load_model_and(step, owner)?;
        let replaced = extra.map(|state| state.tensors).unwrap_or_default();
        if replaced.is_empty() {
            return Ok(false);
        }
        let Weights::Own(mut tensors) = weights else {
            return Err(CheckpointError::NotInChain { folder });
        };
        for (path, value) in replaced {
            match tensors.get_mut(&path) {
                Some(weight) if weight.shape() == value.shape() => *weight = value,
                _ => {
                    let message = format!("its model has no such tensor as `{owner}.{path}`");
                    let path = folder.join(chain::DELTA);
                    return Err(CheckpointError::Broken { path, message });
                }
            }
        }
        write_folder(out, |temporary| {
            write_model(temporary, Weights::Own(tensors), &config).map(drop)
        })?;
        Ok(true)
    }

    /// config.json of a step's model; null if only other files say what model it is.
    fn config(&self, step: u64) -> Result<serde_json::Value, CheckpointError> {
        let folder = self.existing(step)?;
        Ok(match State::read(&folder, step)?.form() {
            Some(Form::Delta(link)) => link.config,
            _ => serde_json::Value::Null,
        })
    }
}

/// Writes model.safetensors and, if it is known, config.json. Returns the BLAKE3 of the former.
fn write_model(
    folder: &Path,
    model: Weights,
    config: &serde_json::Value,
) -> Result<String, CheckpointError> {
    let model = if config.is_null() {
        model.tensors()
    } else {
        let spec = DecoderSpec::from_config_json(config).map_err(ModelError::from)?;
        let path = folder.join(CONFIG_JSON);
        let text = format!("{config:#}\n");
        durable::replace_with(&path, text).map_err(CheckpointError::io(path))?;
        model.files(&spec)
    };
    write_tensors(&folder.join(MODEL), &model)
}

/// Writes a folder that appears when all of it is there. After an error nothing is left of it.
fn write_folder(
    out: &Path,
    write: impl FnOnce(&Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let temporary = durable::temporary_beside(out);
    let io = |path: &Path| CheckpointError::io(path.to_path_buf());
    let written = || {
        durable::create_folder(&temporary).map_err(io(&temporary))?;
        write(&temporary)?;
        if out.exists() {
            fs::remove_dir(out).map_err(io(out))?;
        }
        durable::rename(&temporary, out).map_err(io(out))?;
        durable::sync_folder(durable::parent(out)).map_err(io(out))
    };
    let written = written();
    if written.is_err() {
        // The error that matters is the one being returned.
        let _ = fs::remove_dir_all(&temporary);
    }
    written
}

fn details(folder: &Path, step: u64) -> Result<Details, CheckpointError> {
    let state = State::read(folder, step)?;
    let (stored, tensor_bytes, lossy) = match state.form() {
        Some(Form::Whole { extra, .. }) => {
            let names = [MODEL, OPTIMIZER].into_iter().chain(extra.map(|_| EXTRA));
            let sizes = names.map(|name| file_bytes(&folder.join(name)));
            let size = sizes.sum::<Result<u64, CheckpointError>>()?;
            (Stored::Whole, size, None)
        }
        _ => {
            let parent = chain::parent(folder)?;
            let stored = parent.map_or(Stored::Alone, Stored::Beside);
            let opened = delta::open(&folder.join(DELTA))?;
            (stored, opened.state_bytes(), main_method(&opened))
        }
    };
    Ok(Details {
        stored,
        tensor_bytes,
        lossy,
        progress: state.progress,
    })
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
