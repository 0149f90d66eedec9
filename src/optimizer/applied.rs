//! The last Adam step that a parameter has taken. Delta checkpoints predict moments and weights
//! from it.

use firebrick_kernels::difference::adam::{AdamStep, Arithmetic};

use super::ramp::Ramped;
use super::{OptimizerState, StateScalar};

/// An Adam step that a parameter has taken, with the numbers that it was computed with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AppliedStep {
    /// The number of updates up to and including this one.
    pub time: u64,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// The step from the old moments and parameter to the new ones.
    pub step: AdamStep,
}

/// The settings of a rule that takes Adam steps.
#[derive(Debug, Clone)]
pub(super) struct Adam {
    pub(super) arithmetic: Arithmetic,
    pub(super) beta_1: f32,
    pub(super) beta_2: Ramped,
    pub(super) eps: f32,
    /// Decoupled weight decay. Where it is cautious, the prediction holds for the weights that are decayed.
    pub(super) weight_decay: f32,
    /// What the learning rate is multiplied with.
    pub(super) lr_ratio: f64,
}

impl Adam {
    /// The step of the parameter `path` that led to `state`; None if it has not taken any.
    pub(super) fn applied(
        &self,
        path: &str,
        state: &OptimizerState,
        learning_rate: f64,
    ) -> Option<AppliedStep> {
        let time = match state.scalars.get(&format!("{path}.momentum.time")) {
            Some(&StateScalar::Uint(time)) => time,
            Some(&StateScalar::Int(time)) => time as u64,
            _ => return None,
        };
        let learning_rate = self.lr_ratio * learning_rate;
        let beta_1 = self.beta_1;
        let step = AdamStep {
            arithmetic: self.arithmetic,
            beta_1,
            beta_2: self.beta_2.at(time),
            correction_1: 1.0 - beta_1.powi(i32::try_from(time).unwrap_or(i32::MAX)),
            correction_2: self.beta_2.correction(time),
            epsilon: self.eps,
            learning_rate: learning_rate as f32,
            decay: (1.0 - learning_rate * f64::from(self.weight_decay)) as f32,
        };
        Some(AppliedStep {
            time,
            weight_decay: self.weight_decay,
            step,
        })
    }
}
