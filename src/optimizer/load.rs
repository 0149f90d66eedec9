//! Loads a saved optimizer state.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use super::rule::{RuleState, SavedState};
use super::rules::Rules;
use super::{Optimizer, OptimizerError, OptimizerState};
use crate::model::{VisitParameters, visit_parameters};

impl Optimizer {
    /// Replaces this optimizer's state by a saved one, on `device` (the plain one). Returns the
    /// paths of the trained parameters without any saved state: they begin with a first update.
    ///
    /// # Errors
    /// The state of a parameter is incomplete, does not fit the parameter, or belongs to another
    /// rule; or the parameter is unknown or not trained. The optimizer is then unchanged.
    pub fn load_state(
        &mut self,
        model: &impl Module,
        state: OptimizerState,
        device: &Device,
    ) -> Result<Vec<String>, OptimizerError> {
        let mut state = state;
        let velvet = self.velvet.as_ref();
        let velvet = velvet.map(|velvet| velvet.loaded(&mut state));
        let velvet = velvet.transpose()?;
        let mut restore = Restore {
            rules: &self.rules,
            saved: state,
            device,
            states: BTreeMap::new(),
            fresh: Vec::new(),
            problem: None,
        };
        visit_parameters(model, &mut restore);
        if let Some(problem) = restore.problem {
            return Err(problem);
        }
        let OptimizerState {
            tensors,
            scalars,
            families,
        } = restore.saved;
        let left = tensors.into_keys().chain(scalars.into_keys());
        if let Some(name) = left.chain(families.into_keys()).next() {
            return Err(OptimizerError::Unexpected { name });
        }
        let fresh = restore.fresh;
        self.states = restore.states;
        self.velvet = velvet;
        Ok(fresh)
    }
}

struct Restore<'a> {
    rules: &'a Rules,
    /// The part of the saved state that no parameter has taken yet.
    saved: OptimizerState,
    device: &'a Device,
    states: BTreeMap<String, RuleState>,
    fresh: Vec<String>,
    problem: Option<OptimizerError>,
}

impl VisitParameters for Restore<'_> {
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        // A parameter that is not trained has no state.
        if !param.is_require_grad() || self.problem.is_some() {
            return;
        }
        let dims: Vec<usize> = param.lazy_shape().iter().copied().collect();
        let rule = self.rules.rule_for(path, D);
        let Some(saved) = SavedState::take(path, &mut self.saved) else {
            // A rule without state misses nothing.
            if !rule.layout(&dims).is_empty() {
                self.fresh.push(path.to_string());
            }
            return;
        };
        match saved.load(path, &dims, rule, self.device) {
            Ok(state) => {
                self.states.insert(path.to_string(), state);
            }
            Err(problem) => self.problem = Some(problem),
        }
    }
}
