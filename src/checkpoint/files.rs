//! The files of one checkpoint.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{CheckpointError, Progress, Snapshot};
use crate::durable;
use crate::model::Tensors;
use crate::model::folder::{stream_tensors, tensors_from_bytes, tensors_header};
use crate::optimizer::{OptimizerState, StateScalar};

pub(super) const MODEL: &str = "model.safetensors";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
pub(super) const STATE: &str = "state.json";

/// The version of state.json that this build writes and reads.
const VERSION: u32 = 1;

/// state.json.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    version: u32,
    progress: Progress,
    optimizer: BTreeMap<String, StateScalar>,
    blake3: Checksums,
}

#[derive(Debug, Serialize, Deserialize)]
struct Checksums {
    model: String,
    optimizer: String,
    /// Of progress and optimizer above, as compact JSON.
    state: String,
}

/// Writes and flushes a step's folder. The weights are asked for first and given up before the
/// optimizer's state is asked for, so that memory holds one of the two at a time.
pub(super) fn write(
    folder: &Path,
    progress: &Progress,
    model: impl FnOnce() -> Tensors,
    optimizer: impl FnOnce() -> OptimizerState,
) -> Result<(), CheckpointError> {
    durable::create_folder(folder).map_err(CheckpointError::io(folder))?;
    let model = write_tensors(&folder.join(MODEL), &model())?;
    let OptimizerState { tensors, scalars } = optimizer();
    let optimizer = write_tensors(&folder.join(OPTIMIZER), &tensors)?;
    drop(tensors);
    let path = folder.join(STATE);
    let state = State {
        version: VERSION,
        blake3: Checksums {
            model,
            optimizer,
            state: state_checksum(progress, &scalars, &path)?,
        },
        progress: progress.clone(),
        optimizer: scalars,
    };
    let text = state_text(&state, &path)?;
    durable::create(&path, |file| file.write_all(text.as_bytes()))
        .and_then(|file| file.sync_all())
        .map_err(CheckpointError::io(&path))?;
    durable::sync_folder(folder).map_err(CheckpointError::io(folder))
}

/// Says anew how far the run has come, of a step that is there: all of it, or nothing.
pub(super) fn renew(folder: &Path, progress: &Progress) -> Result<(), CheckpointError> {
    let path = folder.join(STATE);
    let mut state = read_state(folder, progress.step)?;
    state.blake3.state = state_checksum(progress, &state.optimizer, &path)?;
    state.progress = progress.clone();
    let text = state_text(&state, &path)?;
    durable::replace_with(&path, text).map_err(CheckpointError::io(&path))
}

/// Reads a step's folder and verifies all of it.
pub(super) fn read(folder: &Path, step: u64) -> Result<Snapshot, CheckpointError> {
    let state = read_state(folder, step)?;
    // The larger file first: while a file is read its bytes and its tensors are both in memory.
    let tensors = read_tensors(&folder.join(OPTIMIZER), &state.blake3.optimizer)?;
    let model = read_tensors(&folder.join(MODEL), &state.blake3.model)?;
    Ok(Snapshot {
        model,
        optimizer: OptimizerState {
            tensors,
            scalars: state.optimizer,
        },
        progress: state.progress,
    })
}

/// The weights of a step's folder, verified; the rest is not read.
pub(super) fn read_model(folder: &Path, step: u64) -> Result<Tensors, CheckpointError> {
    let state = read_state(folder, step)?;
    read_tensors(&folder.join(MODEL), &state.blake3.model)
}

fn read_state(folder: &Path, step: u64) -> Result<State, CheckpointError> {
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
    Ok(state)
}

fn state_checksum(
    progress: &Progress,
    optimizer: &BTreeMap<String, StateScalar>,
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

fn state_text(state: &State, path: &Path) -> Result<String, CheckpointError> {
    serde_json::to_string_pretty(state).map_err(|source| CheckpointError::Malformed {
        path: path.to_path_buf(),
        source,
    })
}

/// Returns the file's BLAKE3.
fn write_tensors(path: &Path, tensors: &Tensors) -> Result<String, CheckpointError> {
    let header = tensors_header(path, tensors)?;
    let mut hasher = blake3::Hasher::new();
    let written = durable::create(path, |file| {
        let mut hashed = Hashed {
            file,
            hasher: &mut hasher,
        };
        stream_tensors(&mut hashed, &header, tensors)
    });
    written
        .and_then(|file| file.sync_all())
        .map_err(CheckpointError::io(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Hashes what passes through on its way to a file.
struct Hashed<'a> {
    file: &'a mut dyn Write,
    hasher: &'a mut blake3::Hasher,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // No more at a time than stays in the cache between the two.
        let piece = &bytes[..bytes.len().min(1 << 18)];
        let written = self.file.write(piece)?;
        self.hasher.update(&piece[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn read_tensors(path: &Path, expected: &str) -> Result<Tensors, CheckpointError> {
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
