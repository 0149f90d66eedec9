//! The last Adam step that a parameter has taken. Delta checkpoints predict moments and weights
//! from it.

use firebrick_kernels::difference::adam::{AdamStep, Arithmetic};

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
#[derive(Debug, Clone, Copy)]
pub(super) struct Adam {
    pub(super) arithmetic: Arithmetic,
    pub(super) betas: [f32; 2],
    pub(super) eps: f32,
    /// Decoupled weight decay.
    pub(super) weight_decay: f32,
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
        let [beta_1, beta_2] = self.betas;
        let step = AdamStep {
            arithmetic: self.arithmetic,
            beta_1,
            beta_2,
            correction_1: 1.0 - beta_1.powi(time as i32),
            correction_2: 1.0 - beta_2.powi(time as i32),
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
