//! One step: every parameter that has a gradient is updated by its rule.
//!
//! On the CPU, parameters are updated on all cores at the same time, since most are too small to be
//! worth sharing out. Large ones are updated one after another, with the cores sharing each: so the
//! memory that an update needs in between stays that of one large parameter. A parameter's result is the same
//! either way.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{Device, Tensor};
use rayon::prelude::*;

use super::rule::{RuleState, UpdateRule};
use super::{Optimizer, StepFacts};
use crate::device::is_cpu;
use crate::gradient::Gradient;
use crate::model::{MapParameters, map_parameters};

/// Parameters with at least this many weights are updated one after another.
const LARGE: usize = 1 << 20;

impl Optimizer {
    /// One update of every parameter that has a gradient. `facts` is the learning rate, or
    /// [`StepFacts`] with what else the step knows.
    pub fn step<M: Module>(
        &mut self,
        model: M,
        gradient: Gradient,
        facts: impl Into<StepFacts>,
    ) -> M {
        let facts = facts.into();
        let factor = self
            .velvet
            .as_mut()
            .map_or(1.0, |velvet| velvet.next(&facts));
        let mut take = Take {
            optimizer: self,
            gradient,
            learning_rate: facts.learning_rate * factor,
            updates: Vec::new(),
            device: None,
        };
        let model = map_parameters(model, &mut take);
        let Take {
            updates, device, ..
        } = take;
        let rules = &self.rules;
        let run = |update: Update| {
            let rule = rules.rule_for(&update.path, update.rank);
            update.run(rule)
        };
        let updated = update_parameters(device.as_ref(), updates, |update| update.weights, run);
        let mut values = BTreeMap::new();
        for Updated { path, value, state } in updated {
            if let Some(state) = state {
                self.states.insert(path.clone(), state);
            }
            values.insert(path, value);
        }
        map_parameters(model, &mut Put { values })
    }
}

/// Runs the updates of a model's parameters, in any order. `weights` is the size of a parameter.
pub(crate) fn update_parameters<U: Send, R: Send>(
    device: Option<&Device>,
    updates: Vec<U>,
    weights: impl Fn(&U) -> usize,
    run: impl Fn(U) -> R + Send + Sync,
) -> Vec<R> {
    if !device.is_some_and(is_cpu) {
        return updates.into_iter().map(run).collect();
    }
    let is_large = |update: &U| weights(update) >= LARGE;
    let (large, small): (Vec<U>, Vec<U>) = updates.into_iter().partition(is_large);
    let mut updated: Vec<R> = large.into_iter().map(&run).collect();
    updated.par_extend(small.into_par_iter().with_max_len(1).map(&run));
    updated
}

/// A parameter that is about to be updated.
struct Update {
    path: String,
    rank: usize,
    weights: usize,
    learning_rate: f64,
    value: BridgeTensor,
    gradient: BridgeTensor,
    state: Option<RuleState>,
}

/// Its new value and state.
struct Updated {
    path: String,
    value: BridgeTensor,
    state: Option<RuleState>,
}

impl Update {
    fn run(self, rule: &dyn UpdateRule) -> Updated {
        let (value, state) = rule.step(
            self.rank,
            self.learning_rate,
            self.value,
            self.gradient,
            self.state,
        );
        Updated {
            path: self.path,
            value,
            state,
        }
    }
}

/// Takes the values out of the parameters that have a gradient, and leaves empty tensors.
struct Take<'a> {
    optimizer: &'a mut Optimizer,
    gradient: Gradient,
    learning_rate: f64,
    updates: Vec<Update>,
    device: Option<Device>,
}

impl MapParameters for Take<'_> {
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = self.gradient.take::<D>(path) else {
            return param;
        };
        // Consuming the parameter leaves one owner of its memory, so that the update is in place.
        let (id, value, mapper) = param.consume();
        let device = value.device();
        let value = value.inner();
        self.device.get_or_insert_with(|| value.device());
        self.updates.push(Update {
            path: path.to_string(),
            rank: D,
            weights: value.shape().num_elements(),
            learning_rate: self.optimizer.learning_rate(path, self.learning_rate),
            value: value.into_bridge(),
            gradient: gradient.into_bridge(),
            state: self.optimizer.states.remove(path),
        });
        Param::from_mapped_value(id, Tensor::empty([0; D], &device), mapper)
    }
}

/// Puts the new values into the parameters.
struct Put {
    values: BTreeMap<String, BridgeTensor>,
}

impl MapParameters for Put {
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(value) = self.values.remove(path) else {
            return param;
        };
        let (id, _, mapper) = param.consume();
        let value = Tensor::from_inner(Tensor::<D>::from_bridge(value)).require_grad();
        Param::from_mapped_value(id, value, mapper)
    }
}
