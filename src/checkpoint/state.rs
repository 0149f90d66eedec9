//! state.json: how far a checkpoint's run had come, and what its tensors hash to.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{CheckpointError, Progress};
use crate::durable;
use crate::optimizer::StateScalar;

pub(super) const STATE: &str = "state.json";

/// The versions of state.json that this build writes and reads: of checkpoints that are whole, and of differences.
const WHOLE: u32 = 1;
const DIFFERENCE: u32 = 2;

/// state.json.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct State {
    version: u32,
    pub progress: Progress,
    pub optimizer: BTreeMap<String, StateScalar>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    delta: Option<Link>,
    blake3: Checksums,
}

/// A checkpoint in a chain. Beside which other it is written is the file's to say: that may change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Link {
    /// The id of the tensors that it makes.
    pub result: String,
    /// config.json of the model, in Hugging Face's form; null where only an adapter is trained.
    pub config: serde_json::Value,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Checksums {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    optimizer: Option<String>,
    /// Of all but the checksums and the version, as compact JSON.
    state: String,
}

/// What a checkpoint's tensors are.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Form {
    /// Two files, and their BLAKE3.
    Whole {
        /// Of model.safetensors.
        model: String,
        /// Of optimizer.safetensors.
        optimizer: String,
    },
    /// One file, perhaps the difference from another step's.
    Delta(Link),
}

impl State {
    pub(super) fn new(
        path: &Path,
        progress: Progress,
        optimizer: BTreeMap<String, StateScalar>,
        form: Form,
    ) -> Result<Self, CheckpointError> {
        let (version, delta, blake3) = match form {
            Form::Whole { model, optimizer } => {
                let checksums = Checksums {
                    model: Some(model),
                    optimizer: Some(optimizer),
                    ..Checksums::default()
                };
                (WHOLE, None, checksums)
            }
            Form::Delta(link) => (DIFFERENCE, Some(link), Checksums::default()),
        };
        let mut state = Self {
            version,
            progress,
            optimizer,
            delta,
            blake3,
        };
        state.blake3.state = state.checksum(path)?;
        Ok(state)
    }

    /// Reads and verifies that of a step's folder.
    pub(super) fn read(folder: &Path, step: u64) -> Result<Self, CheckpointError> {
        let path = folder.join(STATE);
        let text = fs::read_to_string(&path).map_err(CheckpointError::io(&path))?;
        let state: Self =
            serde_json::from_str(&text).map_err(|source| CheckpointError::Malformed {
                path: path.clone(),
                source,
            })?;
        let (version, saved) = (state.version, state.progress.step);
        let fits = match state.form() {
            Some(Form::Whole { .. }) => version == WHOLE,
            Some(Form::Delta(_)) => version == DIFFERENCE,
            None => false,
        };
        if !fits || saved != step {
            return Err(CheckpointError::Foreign {
                path,
                version,
                saved,
                step,
            });
        }
        let found = state.checksum(&path)?;
        if found != state.blake3.state {
            let expected = state.blake3.state;
            return Err(CheckpointError::Damaged {
                path,
                expected,
                found,
            });
        }
        Ok(state)
    }

    /// What its tensors are; none if it does not say.
    pub(super) fn form(&self) -> Option<Form> {
        let Checksums {
            model, optimizer, ..
        } = &self.blake3;
        match (&self.delta, model, optimizer) {
            (Some(link), None, None) => Some(Form::Delta(link.clone())),
            (None, Some(model), Some(optimizer)) => Some(Form::Whole {
                model: model.clone(),
                optimizer: optimizer.clone(),
            }),
            _ => None,
        }
    }

    /// The same of a run that has come further in what is no tensor.
    pub(super) fn renewed(
        mut self,
        path: &Path,
        progress: Progress,
    ) -> Result<Self, CheckpointError> {
        self.progress = progress;
        self.blake3.state = self.checksum(path)?;
        Ok(self)
    }

    /// Writes and flushes it to a folder that is being made.
    pub(super) fn create(&self, folder: &Path) -> Result<(), CheckpointError> {
        let path = folder.join(STATE);
        let text = self.text(&path)?;
        durable::create(&path, |file| file.write_all(text.as_bytes()))
            .and_then(|file| file.sync_all())
            .map_err(CheckpointError::io(path))
    }

    /// Puts it in the place of the one that is there: all of it, or nothing.
    pub(super) fn replace(&self, folder: &Path) -> Result<(), CheckpointError> {
        let path = folder.join(STATE);
        let text = self.text(&path)?;
        durable::replace_with(&path, text).map_err(CheckpointError::io(path))
    }

    fn text(&self, path: &Path) -> Result<String, CheckpointError> {
        serde_json::to_string_pretty(self).map_err(CheckpointError::malformed(path))
    }

    fn checksum(&self, path: &Path) -> Result<String, CheckpointError> {
        let bytes = match &self.delta {
            None => serde_json::to_vec(&(&self.progress, &self.optimizer)),
            Some(link) => serde_json::to_vec(&(&self.progress, &self.optimizer, link)),
        };
        let bytes = bytes.map_err(CheckpointError::malformed(path))?;
        Ok(blake3::hash(&bytes).to_hex().to_string())
    }
}
