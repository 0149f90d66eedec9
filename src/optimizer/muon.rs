//! Muon (Jordan et al., 2024) for the matrices of the blocks: momentum, orthogonalised, with
//! decoupled weight decay. Embeddings, head, norms and biases take AdamW's rule.
//!
//! Updates are scaled to the size of AdamW's (Liu et al., 2025), so that both share one learning
//! rate. That scale is symmetric in the matrix's sides, so our `[in, out]` layout does not matter
//! to it.

use burn::optim::{AdjustLrFn, MuonConfig};

use super::adamw;
use super::burn_rule::{BurnRule, BurnState, StateSize, decay, momentum_without_dampening};
use super::rules::Rules;

const STATE: BurnState = BurnState {
    family: "muon",
    tensors: &[("momentum.velocity", StateSize::Full)],
    scalars: &[],
};

pub(super) fn rules(
    momentum: f64,
    nesterov: bool,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
) -> Rules {
    let others = adamw::rules(betas, eps, weight_decay);
    others.with_block_matrices(rule(momentum, nesterov, weight_decay))
}

fn rule(momentum: f64, nesterov: bool, weight_decay: f64) -> BurnRule {
    let optimizer = MuonConfig::new()
        .with_momentum(momentum_without_dampening(momentum, nesterov))
        .with_weight_decay(decay(weight_decay))
        .with_adjust_lr_fn(AdjustLrFn::MatchRmsAdamW);
    BurnRule::new(optimizer.build(), STATE)
}
