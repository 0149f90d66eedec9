//! Which rule updates which parameter.

use std::sync::Arc;

use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{
    AdafactorConfig, AdamConfig, AdamWConfig, AdjustLrFn, DynOptimizer, LionConfig, MuonConfig,
    SgdConfig,
};

use crate::config::OptimizerPlan;

type Rule = Arc<dyn DynOptimizer>;

/// One rule per parameter group.
pub(super) struct Rules {
    /// Matrices of the blocks.
    block_matrices: Rule,
    /// Embeddings and the output head.
    other_matrices: Rule,
    /// Norms and biases.
    vectors: Rule,
}

impl Rules {
    pub(super) fn new(plan: &OptimizerPlan) -> Self {
        let both = |matrices: Rule, vectors: Rule| Self {
            block_matrices: matrices.clone(),
            other_matrices: matrices,
            vectors,
        };
        match *plan {
            OptimizerPlan::AdamW {
                betas,
                eps,
                weight_decay,
            } => both(adamw(betas, eps, weight_decay), adamw(betas, eps, 0.0)),
            OptimizerPlan::Adam {
                betas,
                eps,
                weight_decay,
            } => both(adam(betas, eps, weight_decay), adam(betas, eps, 0.0)),
            OptimizerPlan::Sgd {
                momentum,
                nesterov,
                weight_decay,
            } => both(
                sgd(momentum, nesterov, weight_decay),
                sgd(momentum, nesterov, 0.0),
            ),
            OptimizerPlan::Lion {
                betas,
                weight_decay,
            } => both(lion(betas, weight_decay), lion(betas, 0.0)),
            OptimizerPlan::Adafactor { weight_decay } => {
                both(adafactor(weight_decay), adafactor(0.0))
            }
            OptimizerPlan::Muon {
                momentum,
                nesterov,
                betas,
                eps,
                weight_decay,
            } => Self {
                block_matrices: muon(momentum, nesterov, weight_decay),
                other_matrices: adamw(betas, eps, weight_decay),
                vectors: adamw(betas, eps, 0.0),
            },
        }
    }

    pub(super) fn of(&self, path: &str, rank: usize) -> &Rule {
        match rank {
            0 | 1 => &self.vectors,
            _ if is_in_block(path) => &self.block_matrices,
            _ => &self.other_matrices,
        }
    }
}

/// Bytes of state that a rule keeps for a parameter of this path and shape, in f32.
pub(super) fn state_bytes(plan: &OptimizerPlan, path: &str, shape: &[usize]) -> u64 {
    let elements: u64 = shape.iter().map(|&n| n as u64).product();
    let floats = match *plan {
        OptimizerPlan::AdamW { .. } | OptimizerPlan::Adam { .. } => 2 * elements,
        OptimizerPlan::Sgd { momentum, .. } if momentum > 0.0 => elements,
        OptimizerPlan::Sgd { .. } => 0,
        OptimizerPlan::Lion { .. } => elements,
        // One moment per row and one per column.
        OptimizerPlan::Adafactor { .. } if shape.len() > 1 => shape.iter().map(|&n| n as u64).sum(),
        OptimizerPlan::Adafactor { .. } => elements,
        OptimizerPlan::Muon { .. } if shape.len() > 1 && is_in_block(path) => elements,
        OptimizerPlan::Muon { .. } => 2 * elements,
    };
    4 * floats
}

fn is_in_block(path: &str) -> bool {
    path.starts_with("layers.")
}

fn adamw(betas: [f64; 2], eps: f64, weight_decay: f64) -> Rule {
    Arc::new(
        AdamWConfig::new()
            .with_beta_1(betas[0] as f32)
            .with_beta_2(betas[1] as f32)
            .with_epsilon(eps as f32)
            .with_weight_decay(weight_decay as f32)
            .build(),
    )
}

fn adam(betas: [f64; 2], eps: f64, weight_decay: f64) -> Rule {
    Arc::new(
        AdamConfig::new()
            .with_beta_1(betas[0] as f32)
            .with_beta_2(betas[1] as f32)
            .with_epsilon(eps as f32)
            .with_weight_decay(decay(weight_decay))
            .build(),
    )
}

fn sgd(momentum: f64, nesterov: bool, weight_decay: f64) -> Rule {
    let momentum = (momentum > 0.0).then(|| momentum_without_dampening(momentum, nesterov));
    Arc::new(
        SgdConfig::new()
            .with_momentum(momentum)
            .with_weight_decay(decay(weight_decay))
            .build(),
    )
}

fn lion(betas: [f64; 2], weight_decay: f64) -> Rule {
    Arc::new(
        LionConfig::new()
            .with_beta_1(betas[0] as f32)
            .with_beta_2(betas[1] as f32)
            .with_weight_decay(weight_decay as f32)
            .build(),
    )
}

/// The learning rate is the schedule's, absolute: neither capped nor scaled by the parameter.
fn adafactor(weight_decay: f64) -> Rule {
    Arc::new(
        AdafactorConfig::new()
            .with_relative_step(false)
            .with_scale_parameter(false)
            .with_weight_decay(weight_decay as f32)
            .build(),
    )
}

/// Scaled to the size of AdamW's updates, so that both halves share one learning rate. That scale
/// is symmetric in the matrix's sides, so our `[in, out]` layout does not matter to it.
fn muon(momentum: f64, nesterov: bool, weight_decay: f64) -> Rule {
    Arc::new(
        MuonConfig::new()
            .with_momentum(momentum_without_dampening(momentum, nesterov))
            .with_weight_decay(decay(weight_decay))
            .with_adjust_lr_fn(AdjustLrFn::MatchRmsAdamW)
            .build(),
    )
}

fn decay(penalty: f64) -> Option<WeightDecayConfig> {
    (penalty > 0.0).then(|| WeightDecayConfig::new(penalty as f32))
}

/// burn dampens the gradient by default; PyTorch and the papers do not.
fn momentum_without_dampening(momentum: f64, nesterov: bool) -> MomentumConfig {
    MomentumConfig::new()
        .with_momentum(momentum)
        .with_dampening(0.0)
        .with_nesterov(nesterov)
}
