//! Delta checkpoints: each is the difference from the one before.
//!
//! One file holds the weights as `model.<path>`, the moments as `optimizer.<path>.<moment>`, and extra
//! state as `extra.<owner>.<name>`. Tensors keep their layout in memory, so a weight and its moments
//! have the same position. The first file of a chain is a keyframe, which needs no other. Every later
//! file names its parent step, and repeats the id of the parent's tensors in its header.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use firebrick_kernels::difference::adam::Arithmetic;

use super::state::{Form, State};
use super::store::{step_name, step_of};
use super::{Capture, ChainOptions, CheckpointError};
use crate::delta::{
    self, ArithmeticId, Delta, Lossy, Memory, Moments, Opened, Options, Parent, Source, StepRecord,
    TensorInfo, Written,
};
use crate::durable::{self, Failed};
use crate::model::Tensors;
use crate::model::folder::{file_dtype, memory_dtype};
use crate::optimizer::AppliedStep;

pub(super) const DELTA: &str = "delta.safetensors";

const MODEL: &str = "model.";
const OPTIMIZER: &str = "optimizer.";
const EXTRA: &str = "extra.";

/// Longest chain that is followed: reading takes some memory for each link.
pub(super) const LONGEST: u64 = 1000;

/// Weights, moments and extra state as a single state.
fn memory(capture: &Capture) -> Memory<'_> {
    let model = named(MODEL.to_string(), &capture.weights);
    let optimizer = named(OPTIMIZER.to_string(), &capture.optimizer.tensors);
    let extra = capture.extra.iter();
    let extra = extra.flat_map(|(owner, state)| named(format!("{EXTRA}{owner}."), &state.tensors));
    Memory::new(model.chain(optimizer).chain(extra))
}

fn named(prefix: String, tensors: &Tensors) -> impl Iterator<Item = (TensorInfo, &[u8])> {
    tensors.iter().map(move |(name, data)| {
        let dtype = file_dtype(data.dtype());
        let info = TensorInfo {
            name: format!("{prefix}{name}"),
            // The dtypes of extra state were checked before; all other tensors are made here.
            dtype: dtype.unwrap_or_else(|| unreachable!("no tensor is {:?}", data.dtype())),
            shape: data.shape().as_slice().to_vec(),
        };
        (info, data.as_bytes())
    })
}

/// What Adam and its relatives keep of a parameter.
fn moments(capture: &Capture) -> Vec<Moments> {
    let (model, optimizer) = (&capture.weights, &capture.optimizer.tensors);
    let of = |name: &String| {
        let parameter = name.strip_suffix(".momentum.moment_1")?;
        let second = format!("{parameter}.momentum.moment_2");
        optimizer.contains_key(&second).then(|| Moments {
            first: format!("{OPTIMIZER}{name}"),
            second: format!("{OPTIMIZER}{second}"),
            parameter: model
                .contains_key(parameter)
                .then(|| format!("{MODEL}{parameter}")),
            step: capture.steps.get(parameter).map(record),
        })
    };
    optimizer.keys().filter_map(of).collect()
}

/// A step as a file tells it.
fn record(applied: &AppliedStep) -> StepRecord {
    let step = applied.step;
    StepRecord {
        arithmetic: match step.arithmetic {
            Arithmetic::AdamW => ArithmeticId::BurnAdamW,
            Arithmetic::Adam => ArithmeticId::BurnAdam,
        },
        time: applied.time,
        learning_rate: step.learning_rate,
        beta_1: step.beta_1,
        beta_2: step.beta_2,
        correction_1: step.correction_1,
        correction_2: step.correction_2,
        epsilon: step.epsilon,
        weight_decay: applied.weight_decay,
        decay: step.decay,
    }
}

/// Writes the tensors of a checkpoint to a folder that is being made: beside a step's, or alone.
pub(super) fn write(
    folder: &Path,
    parent: Option<(u64, &Delta)>,
    capture: &Capture,
    options: &ChainOptions,
) -> Result<Written, CheckpointError> {
    let parent = parent.map(|(step, delta)| Parent {
        source: delta,
        names: Default::default(),
        name: Some(step_name(step)),
        known: Some(delta.state()),
    });
    let child = memory(capture);
    // A keyframe is coded tensor by tensor, so that weights can be read without the moments.
    let moments = match &parent {
        Some(_) => moments(capture),
        None => Vec::new(),
    };
    let state = child.tensors().into_iter().map(|info| info.name);
    let state = state.filter(|name| !name.starts_with(MODEL));
    // Only Adam's moments may be lossy: other state, such as Adafactor's row and column means of
    // squares, may not tolerate errors.
    let is_moment = |name: &String| {
        moments
            .iter()
            .any(|of| of.first == *name || of.second == *name)
    };
    let exact = state.filter(|name| !(options.lossy_moments && is_moment(name)));
    let lossy = options.lossy.map(|method| Lossy {
        exact: exact.collect(),
        ..Lossy::new(method)
    });
    let options = Options { moments, lossy };
    let path = folder.join(DELTA);
    Ok(delta::write(&path, parent.as_ref(), &child, &options)?)
}

/// Writes the tensors of a checkpoint anew, so that they stand alone.
pub(super) fn squash(delta: &Delta) -> Result<(), CheckpointError> {
    let path = delta.path();
    let alone = durable::replace_made(path, |temporary| {
        // Read one by one, what is coded together would be decoded as often as there are tensors of it.
        let options = Options {
            moments: delta.moments(),
            lossy: None,
        };
        let written = delta::write(temporary, None, delta, &options)?;
        // What was read was held against CRCs; this holds it against the tensors' hashes.
        if written.state == delta.state() {
            Ok(())
        } else {
            Err(CheckpointError::Broken {
                path: path.to_path_buf(),
                message: "its tensors are not those that were saved".to_string(),
            })
        }
    });
    alone.map_err(|failed| match failed {
        Failed::Making(error) => error,
        Failed::Replacing(error) => CheckpointError::io(path)(error),
    })
}

/// The step that a step is written beside, if it does not stand alone.
pub(super) fn parent(folder: &Path) -> Result<Option<u64>, CheckpointError> {
    let path = folder.join(DELTA);
    parent_of(&path, &delta::open(&path)?)
}

fn parent_of(path: &Path, opened: &Opened) -> Result<Option<u64>, CheckpointError> {
    match (opened.parent_id(), opened.parent_name()) {
        (None, None) => Ok(None),
        (Some(_), Some(name)) if step_of(name).is_some() => Ok(step_of(name)),
        (_, name) => Err(CheckpointError::Broken {
            path: path.to_path_buf(),
            message: format!("its parent is {name:?}, and no step"),
        }),
    }
}

/// A step of a chain.
pub(super) struct Open {
    pub delta: Delta<'static>,
    /// Steps it is read out of, itself included.
    pub length: u64,
}

/// The tensors of a step, to be read out of its chain.
pub(super) fn open(
    folder_of: &impl Fn(u64) -> PathBuf,
    step: u64,
) -> Result<Open, CheckpointError> {
    open_link(folder_of, step, LONGEST)
}

fn open_link(
    folder_of: &impl Fn(u64) -> PathBuf,
    step: u64,
    longest: u64,
) -> Result<Open, CheckpointError> {
    let folder = folder_of(step);
    let state = State::read(&folder, step)?;
    let path = folder.join(DELTA);
    let Some(Form::Delta(link)) = state.form() else {
        return Err(CheckpointError::NotInChain { folder });
    };
    let opened = delta::open(&path)?;
    let broken = |message: String| CheckpointError::Broken {
        path: path.clone(),
        message,
    };
    let made = opened.state().id;
    if !link.makes(&made) {
        return Err(broken(format!(
            "it makes the tensors {made}, and state.json says {}",
            link.result
        )));
    }
    let Some(parent) = parent_of(&path, &opened)? else {
        let delta = opened.beside(None)?;
        return Ok(Open { delta, length: 1 });
    };
    if parent >= step || longest == 0 {
        return Err(broken(format!("step {parent} cannot be its parent")));
    }
    if !folder_of(parent).is_dir() {
        return Err(CheckpointError::NoParent { folder, parent });
    }
    let before = open_link(folder_of, parent, longest - 1)?;
    let found = before.delta.state().id;
    if opened.parent_id() != Some(&found) {
        return Err(broken(format!(
            "it is the difference from other tensors than step {parent} has"
        )));
    }
    let delta = opened.beside(Some(Box::new(before.delta)))?;
    Ok(Open {
        delta,
        length: before.length + 1,
    })
}

/// The tensors of a step, grouped by owner.
#[derive(Debug, Default)]
pub(super) struct Sections {
    pub model: Tensors,
    pub optimizer: Tensors,
    /// Extra state, as `<owner>.<name>`.
    pub extra: Tensors,
}

/// Reads and verifies all tensors of a step.
pub(super) fn read(delta: &Delta) -> Result<Sections, CheckpointError> {
    read_some(delta, |_| true)
}

/// The weights, verified.
pub(super) fn read_model(delta: &Delta) -> Result<Tensors, CheckpointError> {
    Ok(read_some(delta, |name| name.starts_with(MODEL))?.model)
}

/// The weights and the extra state of one owner, verified.
pub(super) fn read_model_and(delta: &Delta, owner: &str) -> Result<Sections, CheckpointError> {
    let prefix = format!("{EXTRA}{owner}.");
    read_some(delta, |name| {
        name.starts_with(MODEL) || name.starts_with(&prefix)
    })
}

fn read_some(delta: &Delta, wanted: impl Fn(&str) -> bool) -> Result<Sections, CheckpointError> {
    let mut sections = Sections::default();
    let mut bytes = HashMap::new();
    let infos: Vec<TensorInfo> = delta
        .tensors()
        .into_iter()
        .filter(|info| wanted(&info.name))
        .collect();
    for info in &infos {
        let mut room = Vec::<u8>::new();
        let length = info.bytes().unwrap_or(0);
        room.try_reserve_exact(length)
            .map_err(|_| CheckpointError::Broken {
                path: delta.path().to_path_buf(),
                message: format!("no memory has room for tensor `{}`", info.name),
            })?;
        bytes.insert(info.name.clone(), room);
    }
    delta::restore(delta, &wanted, |info, part| {
        if let Some(bytes) = bytes.get_mut(&info.name) {
            bytes.extend_from_slice(part);
        }
        Ok(())
    })?;
    for info in infos {
        let bytes = bytes.remove(&info.name).unwrap_or_default();
        let unknown = || CheckpointError::Broken {
            path: delta.path().to_path_buf(),
            message: format!(
                "no checkpoint has a tensor `{}` of {}",
                info.name, info.dtype
            ),
        };
        let dtype = memory_dtype(info.dtype).ok_or_else(unknown)?;
        let data = TensorData::from_bytes_vec(bytes, info.shape.clone(), dtype);
        let of = |prefix| info.name.strip_prefix(prefix).map(str::to_string);
        match (of(MODEL), of(OPTIMIZER), of(EXTRA)) {
            (Some(name), ..) => sections.model.insert(name, data),
            (_, Some(name), _) => sections.optimizer.insert(name, data),
            (.., Some(name)) => sections.extra.insert(name, data),
            _ => return Err(unknown()),
        };
    }
    Ok(sections)
}

/// The names of the extra state's tensors, as `<owner>.<name>`.
pub(super) fn extra_names(delta: &Delta) -> Vec<String> {
    let infos = delta.tensors().into_iter();
    let names = infos.filter_map(|info| Some(info.name.strip_prefix(EXTRA)?.to_string()));
    names.collect()
}

/// Reads all of a step and verifies it, and keeps nothing.
pub(super) fn verify(delta: &Delta) -> Result<(), CheckpointError> {
    Ok(delta::restore(delta, |_| true, |_, _| Ok(()))?)
}
