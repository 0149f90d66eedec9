//! The rule of each parameter group, and the table of all optimizers.

use std::sync::Arc;

use super::rule::UpdateRule;
use super::{adafactor, adam, adamw, adamw8bit, lion, muon, normuon, sgd, sign, soap};
use crate::config::OptimizerPlan;

/// One rule per parameter group.
pub(super) struct Rules {
    /// Matrices of the blocks.
    block_matrices: Arc<dyn UpdateRule>,
    /// Embeddings and the output head.
    other_matrices: Arc<dyn UpdateRule>,
    /// Norms and biases.
    vectors: Arc<dyn UpdateRule>,
}

impl Rules {
    /// Looks the optimizer up in the table, which has one entry for each.
    pub(super) fn new(plan: &OptimizerPlan) -> Self {
        match plan {
            OptimizerPlan::AdamW(plan) => adamw::rules(plan),
            OptimizerPlan::AdamW8bit(plan) => adamw8bit::rules(plan),
            &OptimizerPlan::Adam {
                betas,
                eps,
                weight_decay,
            } => adam::rules(betas, eps, weight_decay),
            &OptimizerPlan::Sgd {
                momentum,
                nesterov,
                weight_decay,
            } => sgd::rules(momentum, nesterov, weight_decay),
            OptimizerPlan::Sign(plan) => sign::rules(plan),
            OptimizerPlan::Lion(plan) => lion::rules(plan),
            &OptimizerPlan::Adafactor { weight_decay } => adafactor::rules(weight_decay),
            OptimizerPlan::Muon(plan) => muon::rules(plan),
            OptimizerPlan::NorMuon { neuron_beta, muon } => normuon::rules(muon, *neuron_beta),
            OptimizerPlan::Soap(plan) => soap::rules(plan),
            // Its signals act on the learning rate of all parameters: see `velvet.rs`.
            OptimizerPlan::Velvet { velvet, adamw } => {
                let is_sparse = velvet.sparse;
                let form = adamw::Form {
                    is_sparse,
                    ..adamw::Form::default()
                };
                adamw::rules_with(adamw, form)
            }
        }
    }

    /// One rule for all matrices, another for vectors.
    pub(super) fn uniform(
        matrices: impl UpdateRule + 'static,
        vectors: impl UpdateRule + 'static,
    ) -> Self {
        let matrices: Arc<dyn UpdateRule> = Arc::new(matrices);
        Self {
            block_matrices: matrices.clone(),
            other_matrices: matrices,
            vectors: Arc::new(vectors),
        }
    }

    /// Replaces the rule for the matrices of the blocks.
    pub(super) fn with_block_matrices(self, rule: impl UpdateRule + 'static) -> Self {
        Self {
            block_matrices: Arc::new(rule),
            ..self
        }
    }

    /// The rule of a parameter.
    pub(super) fn rule_for(&self, path: &str, rank: usize) -> &dyn UpdateRule {
        let rule = match rank {
            0 | 1 => &self.vectors,
            _ if path.starts_with("layers.") => &self.block_matrices,
            _ => &self.other_matrices,
        };
        rule.as_ref()
    }
}
