//! Stores the state of owners other than the model and the optimizer in a run's checkpoints, for example the error
//! feedback of compressed gradients.
//!
//! Each owner has a name, tensors and scalars. A delta checkpoint names its tensors `extra.<owner>.<name>`; a full
//! checkpoint names them `<owner>.<name>` in a file of their own. The scalars are in state.json, which lists every owner.
//! So an owner without tensors and scalars is also restored.

use std::collections::BTreeMap;
use std::path::Path;

use super::chain::{self, DELTA};
use super::state::{Form, State};
use super::whole::{EXTRA, MODEL, read_extra, read_tensors};
use super::{CheckpointError, CheckpointStore, Weights};
use crate::extra::{ExtraState, Extras, StateScalar, is_owner};
use crate::model::Tensors;
use crate::model::folder::file_dtype;

/// The scalars of all owners, by owner.
pub(super) type OwnerScalars = BTreeMap<String, BTreeMap<String, StateScalar>>;

/// Checks that a checkpoint can hold these states.
pub(super) fn check(extras: &Extras) -> Result<(), CheckpointError> {
    for (owner, state) in extras {
        let wrong = |message: String| CheckpointError::Extra {
            owner: owner.clone(),
            message,
        };
        if !is_owner(owner) {
            let message = "its owner's name is made of other letters than a-z, 0-9, _ and -";
            return Err(wrong(message.to_string()));
        }
        for (name, data) in &state.tensors {
            let dtype = data.dtype();
            if file_dtype(dtype).is_none() {
                return Err(wrong(format!("tensor `{name}` is of {dtype:?}")));
            }
        }
        for (name, scalar) in &state.scalars {
            // JSON can write neither NaN nor infinities.
            if let StateScalar::Float(value) = scalar
                && !value.is_finite()
            {
                return Err(wrong(format!("scalar `{name}` is {value}")));
            }
        }
    }
    Ok(())
}

/// Separates the tensors, named `<owner>.<name>`, from the scalars. No tensor is copied.
pub(super) fn split(extras: Extras) -> (Tensors, OwnerScalars) {
    let (mut tensors, mut scalars) = (Tensors::new(), OwnerScalars::new());
    for (owner, state) in extras {
        let named = state.tensors.into_iter();
        tensors.extend(named.map(|(name, data)| (format!("{owner}.{name}"), data)));
        scalars.insert(owner, state.scalars);
    }
    (tensors, scalars)
}

/// A copy of the scalars, without the tensors.
pub(super) fn scalars(extras: &Extras) -> OwnerScalars {
    let of = |(owner, state): (&String, &ExtraState)| (owner.clone(), state.scalars.clone());
    extras.iter().map(of).collect()
}

/// Reverses [`split`]. `path` is the file that the tensors were in.
pub(super) fn join(
    path: &Path,
    tensors: Tensors,
    scalars: OwnerScalars,
) -> Result<Extras, CheckpointError> {
    let mut extras: Extras = scalars
        .into_iter()
        .map(|(owner, scalars)| {
            let tensors = Tensors::new();
            (owner, ExtraState { tensors, scalars })
        })
        .collect();
    for (full, data) in tensors {
        let (owner, name) = owner_of(path, &full)?;
        let state = extras
            .get_mut(owner)
            .ok_or_else(|| unknown_owner(path, &full))?;
        state.tensors.insert(name.to_string(), data);
    }
    Ok(extras)
}

impl CheckpointStore {
    /// Loads the weights of a step and the extra state of one owner, if it has any there. All other
    /// tensors are neither read nor verified; in a full checkpoint extra state is read whole.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_model_and(
        &self,
        step: u64,
        owner: &str,
    ) -> Result<(Weights, Option<ExtraState>), CheckpointError> {
        let folder = self.existing(step)?;
        let mut state = State::read(&folder, step)?;
        let form = state.form();
        state.extra.retain(|name, _| name == owner);
        let prefix = format!("{owner}.");
        let (model, path, mut tensors) = match form {
            Some(Form::Whole { model, extra, .. }) => {
                let model = Weights::Files(read_tensors(&folder.join(MODEL), &model)?);
                let path = folder.join(EXTRA);
                let extra = match extra.filter(|_| !state.extra.is_empty()) {
                    Some(hash) => read_extra(&path, &hash)?,
                    None => Tensors::new(),
                };
                (model, path, extra)
            }
            _ => {
                let sections = chain::read_model_and(&self.open(step)?.delta, owner)?;
                let path = folder.join(DELTA);
                (Weights::Own(sections.model), path, sections.extra)
            }
        };
        tensors.retain(|name, _| name.starts_with(&prefix));
        let mut extra = join(&path, tensors, state.extra)?;
        Ok((model, extra.remove(owner)))
    }
}

/// Checks that each of these tensors, named `<owner>.<name>`, has an owner that state.json lists.
pub(super) fn check_owners<'a>(
    path: &Path,
    mut names: impl Iterator<Item = &'a str>,
    scalars: &OwnerScalars,
) -> Result<(), CheckpointError> {
    names.try_for_each(|full| {
        let (owner, _) = owner_of(path, full)?;
        let is_known = scalars.contains_key(owner);
        is_known
            .then_some(())
            .ok_or_else(|| unknown_owner(path, full))
    })
}

fn owner_of<'a>(path: &Path, full: &'a str) -> Result<(&'a str, &'a str), CheckpointError> {
    full.split_once('.')
        .ok_or_else(|| unknown_owner(path, full))
}

fn unknown_owner(path: &Path, full: &str) -> CheckpointError {
    CheckpointError::Broken {
        path: path.to_path_buf(),
        message: format!("state.json knows no owner of the extra tensor `{full}`"),
    }
}
