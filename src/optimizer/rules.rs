//! Which rule updates which parameter.

use std::sync::Arc;

use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{
    AdafactorConfig, AdamConfig, AdamWConfig, AdjustLrFn, DynOptimizer, LionConfig, MuonConfig,
    SgdConfig,
};

use firebrick_kernels::difference::adam::Arithmetic;

use super::eight_bit::{self, AdamW8bit};
use crate::config::OptimizerPlan;

/// How a parameter is updated.
#[derive(Clone)]
pub(super) enum Rule {
    /// By one of burn's optimizers.
    Burn(Arc<dyn DynOptimizer>),
    /// By our own AdamW with moments in eight bits.
    EightBit(AdamW8bit),
}

/// What a rule keeps of a parameter from step to step, counters apart.
#[derive(Debug, Clone, Copy)]
enum Kept {
    /// So many tensors of the parameter's shape.
    Whole(u64),
    /// A value for each row and one for each column of a matrix; of a vector all.
    RowsAndColumns,
    /// Two tensors of the parameter's shape in eight bits.
    EightBit,
}

impl Kept {
    fn bytes(self, dims: &[usize]) -> u64 {
        let all: usize = dims.iter().product();
        match (self, dims) {
            (Self::RowsAndColumns, [.., rows, columns]) => {
                4 * ((all / columns.max(&1)) + (all / rows.max(&1))) as u64
            }
            (Self::RowsAndColumns, _) => 4 * all as u64,
            (Self::Whole(tensors), _) => 4 * tensors * all as u64,
            (Self::EightBit, _) => eight_bit::kept_bytes(all),
        }
    }
}

/// What of Adam's rule a parameter is updated by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Adam {
    pub arithmetic: Arithmetic,
    pub betas: [f32; 2],
    pub eps: f32,
    /// Decoupled.
    pub weight_decay: f32,
}

/// One rule per parameter group.
pub(super) struct Rules {
    plan: OptimizerPlan,
    /// Matrices of the blocks.
    block_matrices: Rule,
    /// Embeddings and the output head.
    other_matrices: Rule,
    /// Norms and biases.
    vectors: Rule,
    /// What the rule of block matrices keeps.
    kept_of_block_matrices: Kept,
    /// What the other two keep.
    kept: Kept,
}

impl Rules {
    pub(super) fn new(plan: &OptimizerPlan) -> Self {
        let both = |matrices: Rule, vectors: Rule, kept: Kept| Self {
            plan: plan.clone(),
            block_matrices: matrices.clone(),
            other_matrices: matrices,
            vectors,
            kept_of_block_matrices: kept,
            kept,
        };
        match *plan {
            OptimizerPlan::AdamW {
                betas,
                eps,
                weight_decay,
            } => both(
                adamw(betas, eps, weight_decay),
                adamw(betas, eps, 0.0),
                Kept::Whole(2),
            ),
            OptimizerPlan::AdamW8bit {
                betas,
                eps,
                weight_decay,
            } => {
                let rule = |weight_decay: f64| {
                    Rule::EightBit(AdamW8bit {
                        betas: betas.map(|beta| beta as f32),
                        eps: eps as f32,
                        weight_decay: weight_decay as f32,
                    })
                };
                both(rule(weight_decay), rule(0.0), Kept::EightBit)
            }
            OptimizerPlan::Adam {
                betas,
                eps,
                weight_decay,
            } => both(
                adam(betas, eps, weight_decay),
                adam(betas, eps, 0.0),
                Kept::Whole(2),
            ),
            OptimizerPlan::Sgd {
                momentum,
                nesterov,
                weight_decay,
            } => both(
                sgd(momentum, nesterov, weight_decay),
                sgd(momentum, nesterov, 0.0),
                Kept::Whole(u64::from(momentum > 0.0)),
            ),
            OptimizerPlan::Lion {
                betas,
                weight_decay,
            } => both(lion(betas, weight_decay), lion(betas, 0.0), Kept::Whole(1)),
            OptimizerPlan::Adafactor { weight_decay } => both(
                adafactor(weight_decay),
                adafactor(0.0),
                Kept::RowsAndColumns,
            ),
            OptimizerPlan::Muon {
                momentum,
                nesterov,
                betas,
                eps,
                weight_decay,
            } => Self {
                plan: plan.clone(),
                block_matrices: muon(momentum, nesterov, weight_decay),
                other_matrices: adamw(betas, eps, weight_decay),
                vectors: adamw(betas, eps, 0.0),
                kept_of_block_matrices: Kept::Whole(1),
                kept: Kept::Whole(2),
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

    /// Adam's rule, if it updates a parameter with both moments in f32.
    pub(super) fn adam(&self, path: &str, rank: usize) -> Option<Adam> {
        let is_matrix = rank >= 2;
        let (arithmetic, betas, eps, weight_decay) = match self.plan {
            OptimizerPlan::AdamW {
                betas,
                eps,
                weight_decay,
            } => (Arithmetic::AdamW, betas, eps, weight_decay),
            OptimizerPlan::Muon {
                betas,
                eps,
                weight_decay,
                ..
            } if !(is_matrix && is_in_block(path)) => (Arithmetic::AdamW, betas, eps, weight_decay),
            // What it adds to the gradient is in the moments.
            OptimizerPlan::Adam { betas, eps, .. } => (Arithmetic::Adam, betas, eps, 0.0),
            _ => return None,
        };
        Some(Adam {
            arithmetic,
            betas: betas.map(|beta| beta as f32),
            eps: eps as f32,
            weight_decay: if is_matrix { weight_decay as f32 } else { 0.0 },
        })
    }

    /// Bytes of the tensors that the rule of a parameter keeps.
    pub(super) fn kept_bytes(&self, path: &str, dims: &[usize]) -> u64 {
        match dims.len() {
            2.. if is_in_block(path) => self.kept_of_block_matrices.bytes(dims),
            _ => self.kept.bytes(dims),
        }
    }
}

fn is_in_block(path: &str) -> bool {
    path.starts_with("layers.")
}

fn adamw(betas: [f64; 2], eps: f64, weight_decay: f64) -> Rule {
    Rule::Burn(Arc::new(
        AdamWConfig::new()
            .with_beta_1(betas[0] as f32)
            .with_beta_2(betas[1] as f32)
            .with_epsilon(eps as f32)
            .with_weight_decay(weight_decay as f32)
            .build(),
    ))
}

fn adam(betas: [f64; 2], eps: f64, weight_decay: f64) -> Rule {
    Rule::Burn(Arc::new(
        AdamConfig::new()
            .with_beta_1(betas[0] as f32)
            .with_beta_2(betas[1] as f32)
            .with_epsilon(eps as f32)
            .with_weight_decay(decay(weight_decay))
            .build(),
    ))
}

fn sgd(momentum: f64, nesterov: bool, weight_decay: f64) -> Rule {
    let momentum = (momentum > 0.0).then(|| momentum_without_dampening(momentum, nesterov));
    Rule::Burn(Arc::new(
        SgdConfig::new()
            .with_momentum(momentum)
            .with_weight_decay(decay(weight_decay))
            .build(),
    ))
}

fn lion(betas: [f64; 2], weight_decay: f64) -> Rule {
    Rule::Burn(Arc::new(
        LionConfig::new()
            .with_beta_1(betas[0] as f32)
            .with_beta_2(betas[1] as f32)
            .with_weight_decay(weight_decay as f32)
            .build(),
    ))
}

/// The learning rate is the schedule's, absolute: neither capped nor scaled by the parameter.
fn adafactor(weight_decay: f64) -> Rule {
    Rule::Burn(Arc::new(
        AdafactorConfig::new()
            .with_relative_step(false)
            .with_scale_parameter(false)
            .with_weight_decay(weight_decay as f32)
            .build(),
    ))
}

/// Scaled to the size of AdamW's updates, so that both halves share one learning rate. That scale
/// is symmetric in the matrix's sides, so our `[in, out]` layout does not matter to it.
fn muon(momentum: f64, nesterov: bool, weight_decay: f64) -> Rule {
    Rule::Burn(Arc::new(
        MuonConfig::new()
            .with_momentum(momentum_without_dampening(momentum, nesterov))
            .with_weight_decay(decay(weight_decay))
            .with_adjust_lr_fn(AdjustLrFn::MatchRmsAdamW)
            .build(),
    ))
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
