//! Continues with the state of another optimizer.

use burn::module::Param;
use burn::tensor::{Device, Tensor};

use super::rule::SavedState;
use super::{Optimizer, OptimizerError, OptimizerState};
use crate::model::{Decoder, VisitParameters};

impl Optimizer {
    /// Drops the state of the parameters whose path `is_gone` accepts, because another parameter
    /// has taken the same path.
    pub fn forget(&mut self, is_gone: impl Fn(&str) -> bool) {
        self.states.retain(|path, _| !is_gone(path));
    }

    /// Takes over the state of another optimizer where its meaning is the same under this
    /// optimizer's rules: Adam and AdamW keep the same moments, for example. The state of a parameter is
    /// dropped if the parameter is no longer trained or if its new rule cannot go on from it. `device` is
    /// the plain one. Returns the paths of the trained parameters that begin without state.
    ///
    /// # Errors
    /// A state that does not fit its parameter.
    pub fn take_over(
        &mut self,
        before: &Self,
        model: &Decoder,
        device: &Device,
    ) -> Result<Vec<String>, OptimizerError> {
        let mut keep = Keep {
            rules: self,
            saved: before.state(model),
            kept: OptimizerState::default(),
        };
        model.visit_trained(&mut keep);
        let kept = keep.kept;
        let fresh = self.load_state(model, kept, device)?;
        if let (Some(velvet), Some(before)) = (&mut self.velvet, &before.velvet) {
            *velvet = velvet.going_on(before);
        }
        Ok(fresh)
    }
}

/// Moves the states that can be kept from one optimizer state to another.
struct Keep<'a> {
    rules: &'a Optimizer,
    saved: OptimizerState,
    kept: OptimizerState,
}

impl VisitParameters for Keep<'_> {
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let rule = self.rules.rules.rule_for(path, D);
        let dims: Vec<usize> = param.lazy_shape().iter().copied().collect();
        let saved = SavedState::take(path, &mut self.saved);
        if let Some(kept) = saved.and_then(|saved| rule.adopt(&dims, saved)) {
            kept.put_back(path, rule.state_family(), &mut self.kept);
        }
    }
}
