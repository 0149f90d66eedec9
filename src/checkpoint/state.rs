//! state.json: how far a checkpoint's run had come, and what its tensors hash to.
//!
//! A field that this version does not know is an error: a newer version wrote it, and the run could
//! not be resumed exactly without it. So every new field is optional, is omitted if it is empty,
//! and is listed in [`State::checksum`]. Checkpoints without the field then keep their checksum.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::extra::OwnerScalars;
use super::whole::EXTRA;
use super::{CheckpointError, Progress};
use crate::durable;
use crate::optimizer::StateScalar;

pub(super) const STATE: &str = "state.json";

/// The versions of state.json that this build writes and reads: of checkpoints that are whole, and of differences.
const WHOLE: u32 = 1;
const DIFFERENCE: u32 = 2;

/// state.json.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    version: u32,
    pub progress: Progress,
    pub optimizer: BTreeMap<String, StateScalar>,
    /// The family of each parameter's optimizer state.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub optimizer_families: BTreeMap<String, String>,
    /// The scalars of all owners of extra state.
    #[serde(default, skip_serializing_if = "OwnerScalars::is_empty")]
    pub extra: OwnerScalars,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    delta: Option<Link>,
    blake3: Checksums,
}

/// A checkpoint in a chain. Beside which other it is written is the file's to say: that may change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Link {
    /// The id of the tensors that it makes.
    pub result: String,
    /// The id of the old tensors, present only while their file is being replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<String>,
    /// config.json of the model, in Hugging Face's form; null if the checkpoint holds only an
    /// adapter. If it holds an adapter and all weights, `firebrick_adapter` in it says in which
    /// phase of the run the adapter began.
    pub config: serde_json::Value,
}

impl Link {
    /// Whether `id` names this checkpoint's tensors.
    pub(super) fn makes(&self, id: &str) -> bool {
        self.result == id || self.replaces.as_deref() == Some(id)
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Checksums {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    optimizer: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    extra: Option<String>,
    /// BLAKE3 of the fields that no other checksum covers, as compact JSON.
    state: String,
}

/// The content of state.json besides the form.
#[derive(Debug, Clone)]
pub(super) struct Contents {
    pub progress: Progress,
    /// The optimizer's scalars.
    pub optimizer: BTreeMap<String, StateScalar>,
    /// The family of each parameter's optimizer state.
    pub optimizer_families: BTreeMap<String, String>,
    /// The scalars of all owners of extra state.
    pub extra: OwnerScalars,
}

/// What a checkpoint's tensors are.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Form {
    /// Two or three files, with their BLAKE3.
    Whole {
        /// Of model.safetensors.
        model: String,
        /// Of optimizer.safetensors.
        optimizer: String,
        /// The BLAKE3 of extra.safetensors, if there is one.
        extra: Option<String>,
    },
    /// One file, perhaps the difference from another step's.
    Delta(Link),
}

impl State {
    pub(super) fn new(
        path: &Path,
        contents: Contents,
        form: Form,
    ) -> Result<Self, CheckpointError> {
        let (version, delta, blake3) = match form {
            Form::Whole {
                model,
                optimizer,
                extra,
            } => {
                let checksums = Checksums {
                    model: Some(model),
                    optimizer: Some(optimizer),
                    extra,
                    ..Checksums::default()
                };
                (WHOLE, None, checksums)
            }
            Form::Delta(link) => (DIFFERENCE, Some(link), Checksums::default()),
        };
        let Contents {
            progress,
            optimizer,
            optimizer_families,
            extra,
        } = contents;
        let mut state = Self {
            version,
            progress,
            optimizer,
            optimizer_families,
            extra,
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
            model,
            optimizer,
            extra,
            ..
        } = &self.blake3;
        match (&self.delta, model, optimizer, extra) {
            (Some(link), None, None, None) => Some(Form::Delta(link.clone())),
            (None, Some(model), Some(optimizer), extra) => Some(Form::Whole {
                model: model.clone(),
                optimizer: optimizer.clone(),
                extra: extra.clone(),
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

    /// The state of a step whose file is about to be replaced. Until then the file holds the
    /// tensors `id`.
    pub(super) fn replacing(
        mut self,
        path: &Path,
        id: Option<String>,
    ) -> Result<Self, CheckpointError> {
        if let Some(link) = &mut self.delta {
            link.replaces = id;
        }
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
        // Names every field, so that a new one cannot be forgotten.
        let Self {
            version: _,
            progress,
            optimizer,
            optimizer_families,
            extra,
            delta,
            blake3,
        } = self;
        // Fields of later versions, omitted if they are empty.
        let mut later = serde_json::Map::new();
        if !optimizer_families.is_empty() {
            let families = serde_json::to_value(optimizer_families);
            let families = families.map_err(CheckpointError::malformed(path))?;
            later.insert("optimizer_families".to_string(), families);
        }
        if !extra.is_empty() {
            let extra = serde_json::to_value(extra).map_err(CheckpointError::malformed(path))?;
            later.insert("extra".to_string(), extra);
        }
        if let Some(hash) = &blake3.extra {
            later.insert(EXTRA.to_string(), hash.as_str().into());
        }
        let bytes = match (delta, later.is_empty()) {
            (None, true) => serde_json::to_vec(&(progress, optimizer)),
            (Some(link), true) => serde_json::to_vec(&(progress, optimizer, link)),
            (link, false) => serde_json::to_vec(&(progress, optimizer, link, later)),
        };
        let bytes = bytes.map_err(CheckpointError::malformed(path))?;
        Ok(blake3::hash(&bytes).to_hex().to_string())
    }
}
