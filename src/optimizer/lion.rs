//! Lion (Chen et al., 2023): the sign of the momentum, with decoupled weight decay of matrices.

use burn::optim::LionConfig;

use super::burn_rule::{BurnRule, BurnState, StateSize};
use super::rules::Rules;

const STATE: BurnState = BurnState {
    family: "lion",
    tensors: &[("momentum", StateSize::Full)],
    scalars: &[],
};

pub(super) fn rules(betas: [f64; 2], weight_decay: f64) -> Rules {
    Rules::uniform(rule(betas, weight_decay), rule(betas, 0.0))
}

fn rule(betas: [f64; 2], weight_decay: f64) -> BurnRule {
    let optimizer = LionConfig::new()
        .with_beta_1(betas[0] as f32)
        .with_beta_2(betas[1] as f32)
        .with_weight_decay(weight_decay as f32);
    BurnRule::new(optimizer.build(), STATE)
}
