//! What the workers of a rank have not sent yet.

use std::collections::BTreeMap;

use burn::tensor::TensorData;

use super::{NamedParameter, squares};
use crate::collective::{Collective, CollectiveError};
use crate::extra::ExtraState;

/// The residuals of a rank's workers, and what a code keeps that is the same on every rank.
#[derive(Debug)]
pub(super) struct Residuals {
    /// By worker of this rank, then by path.
    workers: Vec<BTreeMap<String, Vec<f32>>>,
    /// By path: the memory of a [`LinearCompressor`](super::LinearCompressor).
    pub shared: BTreeMap<String, Vec<f32>>,
}

const SHARED: &str = "shared";

impl Residuals {
    pub fn new(workers: usize) -> Self {
        Self {
            workers: vec![BTreeMap::new(); workers],
            shared: BTreeMap::new(),
        }
    }

    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    pub fn of(&self, worker: usize, path: &str) -> Option<&[f32]> {
        self.workers.get(worker)?.get(path).map(Vec::as_slice)
    }

    /// Removes and returns a residual of `len` elements, zero if there is none.
    pub fn take(
        &mut self,
        worker: usize,
        parameter: &NamedParameter,
        len: usize,
    ) -> Result<Vec<f32>, String> {
        let path = &parameter.path;
        let residual = self.workers[worker].remove(path);
        let residual = residual.unwrap_or_else(|| vec![0.0; len]);
        match residual.len() == len {
            true => Ok(residual),
            false => Err(format!(
                "`{path}` has {len} elements, and its residual {}",
                residual.len()
            )),
        }
    }

    pub fn put(&mut self, worker: usize, path: String, values: Vec<f32>) {
        self.workers[worker].insert(path, values);
    }

    /// Σ e² over all residuals.
    pub fn squares(&self) -> f64 {
        let all = self.workers.iter().flat_map(BTreeMap::values);
        all.map(|residual| squares(residual)).sum()
    }

    pub fn forget(&mut self, is_gone: &dyn Fn(&str) -> bool) {
        for worker in &mut self.workers {
            worker.retain(|path, _| !is_gone(path));
        }
        self.shared.retain(|path, _| !is_gone(path));
    }

    /// The residuals of all ranks on rank 0; on another rank nothing.
    pub fn state(&self, collective: &dyn Collective) -> Result<ExtraState, CollectiveError> {
        let mut tensors = BTreeMap::new();
        let mut put = |owner: &str, path: &str, values: Vec<f32>| {
            let shape = [values.len()];
            tensors.insert(format!("{owner}.{path}"), TensorData::new(values, shape));
        };
        for (number, worker) in self.workers.iter().enumerate() {
            // A tensor at a time, so that rank 0 does not hold those of all ranks twice.
            for (path, values) in worker {
                if collective.ranks() == 1 {
                    put(&format!("rank{number}"), path, values.clone());
                    continue;
                }
                let bytes = values.iter().flat_map(|value| value.to_le_bytes());
                let of_ranks = collective.collect(bytes.collect())?;
                if collective.rank() > 0 {
                    continue;
                }
                for (rank, bytes) in of_ranks.iter().enumerate() {
                    let values = bytes.as_chunks().0.iter();
                    let values = values.map(|bytes| f32::from_le_bytes(*bytes)).collect();
                    let owner = format!("rank{}", rank * self.workers.len() + number);
                    put(&owner, path, values);
                }
            }
        }
        // Every rank has the same.
        if collective.rank() == 0 {
            for (path, values) in &self.shared {
                put(SHARED, path, values.clone());
            }
        }
        Ok(ExtraState {
            tensors,
            ..ExtraState::default()
        })
    }

    /// Takes this rank's part of the state of all ranks. Residuals of another number of workers are
    /// added up and shared out evenly. Returns a note that says so.
    pub fn load(
        &mut self,
        state: ExtraState,
        collective: &dyn Collective,
    ) -> Result<Option<String>, String> {
        let mut saved: BTreeMap<usize, BTreeMap<String, Vec<f32>>> = BTreeMap::new();
        let mut shared = BTreeMap::new();
        for (name, data) in state.tensors {
            let parts = name.split_once('.');
            let (owner, path) = parts.ok_or_else(|| format!("`{name}` is no residual"))?;
            let of_all = if owner == SHARED {
                &mut shared
            } else {
                let worker = owner.strip_prefix("rank");
                let worker = worker.and_then(|number| number.parse::<usize>().ok());
                let worker = worker.ok_or_else(|| format!("`{name}` is no residual"))?;
                saved.entry(worker).or_default()
            };
            let path = path.to_string();
            let values = data.try_into_vec::<f32>();
            let values = values.map_err(|_| format!("`{name}` is not in f32"))?;
            if values.iter().any(|value| !value.is_finite()) {
                return Err(format!("`{name}` is not finite"));
            }
            of_all.insert(path, values);
        }
        let before = saved.last_key_value().map_or(0, |(last, _)| last + 1);
        if before != saved.len() {
            return Err(format!(
                "it has residuals of {} workers, and the last of them is number {before}",
                saved.len()
            ));
        }
        self.shared = shared;
        let (own, all) = (self.workers.len(), self.workers.len() * collective.ranks());
        let first = own * collective.rank();
        if before == all || before == 0 {
            for (number, worker) in self.workers.iter_mut().enumerate() {
                *worker = saved.remove(&(first + number)).unwrap_or_default();
            }
            return Ok(None);
        }
        let mut sum: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for (path, values) in saved.into_values().flatten() {
            let Some(sum) = sum.get_mut(&path) else {
                sum.insert(path, values);
                continue;
            };
            if sum.len() != values.len() {
                return Err(format!("residuals of `{path}` have different lengths"));
            }
            sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
        }
        let values = sum.values_mut().flatten();
        values.for_each(|value| *value /= all as f32);
        self.workers.fill(sum);
        Ok(Some(format!(
            "the residuals of {before} workers are shared out over {all}"
        )))
    }
}
