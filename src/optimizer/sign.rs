//! The sign of the gradient for matrices, with decoupled weight decay; Lion for vectors.
//!
//! It is the update of DeMo (Peng, Quesnelle and Kingma, 2024, algorithm 1). The momentum is the
//! residual of the compressed exchange, so that the rule keeps nothing of a matrix. Vectors travel
//! whole and have no residual: they take the sign of a momentum of their own.

use burn::tensor::Tensor;

use super::decay::Decay;
use super::lion;
use super::rule::StateLayout;
use super::rules::Rules;
use super::tensor_rule::{Own, TensorRule, TensorState};
use crate::config::LionPlan;

pub(super) fn rules(plan: &LionPlan) -> Rules {
    let decay = Decay::new(plan.weight_decay, plan.cautious_weight_decay);
    Rules::uniform(Own(Sign { decay }), lion::rule(plan, Decay::NONE))
}

/// The rule with its parameters.
#[derive(Debug, Clone, Copy)]
struct Sign {
    decay: Decay,
}

impl TensorRule for Sign {
    fn family(&self) -> &'static str {
        "sign"
    }

    fn layout(&self, _dims: &[usize]) -> StateLayout {
        StateLayout {
            tensors: Vec::new(),
            scalars: &[],
        }
    }

    fn update<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        _state: &mut TensorState,
    ) -> Tensor<D> {
        let update = gradient.sign();
        let value = self.decay.decayed(learning_rate, value, &update);
        value - update.mul_scalar(learning_rate)
    }
}
