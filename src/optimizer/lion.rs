//! Lion (Chen et al., 2023): the sign of the momentum, with decoupled weight decay of matrices.
//!
//! The operations are those of burn 0.22's Lion; the rule is ours because burn's has no cautious
//! decay.

use burn::tensor::{DType, Tensor};

use super::adamw::averaged;
use super::decay::Decay;
use super::rule::{StateLayout, StateTensor};
use super::rules::Rules;
use super::tensor_rule::{Own, TensorRule, TensorState};
use crate::config::LionPlan;

const MOMENTUM: &str = "momentum";

pub(super) fn rules(plan: &LionPlan) -> Rules {
    let decay = Decay::new(plan.weight_decay, plan.cautious_weight_decay);
    Rules::uniform(rule(plan, decay), rule(plan, Decay::NONE))
}

pub(super) fn rule(plan: &LionPlan, decay: Decay) -> Own<Lion> {
    Own(Lion {
        betas: plan.betas.map(|beta| beta as f32),
        decay,
    })
}

/// The rule with its parameters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lion {
    betas: [f32; 2],
    decay: Decay,
}

impl TensorRule for Lion {
    fn family(&self) -> &'static str {
        "lion"
    }

    fn layout(&self, dims: &[usize]) -> StateLayout {
        StateLayout {
            tensors: vec![StateTensor {
                name: MOMENTUM,
                dtype: DType::F32,
                dims: dims.to_vec(),
            }],
            scalars: &[],
        }
    }

    fn update<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        state: &mut TensorState,
    ) -> Tensor<D> {
        let before: Option<Tensor<D>> = state.take(MOMENTUM);
        let [beta_1, beta_2] = self.betas;
        let update = averaged(before.clone(), beta_1, gradient.clone()).sign();
        state.put(MOMENTUM, averaged(before, beta_2, gradient));
        let value = self.decay.decayed(learning_rate, value, &update);
        value - update.mul_scalar(learning_rate)
    }
}
