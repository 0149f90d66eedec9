//! Adam (Kingma and Ba, 2015). Weight decay is added to the gradient of matrices.

use burn::optim::AdamConfig;
use firebrick_kernels::difference::adam::Arithmetic;

use super::applied::Adam;
use super::burn_rule::{BurnRule, BurnState, StateSize, decay};
use super::ramp::Ramped;
use super::rules::Rules;

/// The same state as AdamW's: running means of the gradient and of its square.
const STATE: BurnState = BurnState {
    family: "adam",
    tensors: &[
        ("momentum.moment_1", StateSize::Full),
        ("momentum.moment_2", StateSize::Full),
    ],
    scalars: &["momentum.time"],
};

pub(super) fn rules(betas: [f64; 2], eps: f64, weight_decay: f64) -> Rules {
    Rules::uniform(rule(betas, eps, weight_decay), rule(betas, eps, 0.0))
}

fn rule(betas: [f64; 2], eps: f64, weight_decay: f64) -> BurnRule {
    let (betas, eps) = (betas.map(|beta| beta as f32), eps as f32);
    let optimizer = AdamConfig::new()
        .with_beta_1(betas[0])
        .with_beta_2(betas[1])
        .with_epsilon(eps)
        .with_weight_decay(decay(weight_decay));
    BurnRule::new(optimizer.build(), STATE).with_adam(Adam {
        arithmetic: Arithmetic::Adam,
        beta_1: betas[0],
        beta_2: Ramped::new(f64::from(betas[1]), None),
        eps,
        // The decay is already part of the gradient, and so of the moments.
        weight_decay: 0.0,
        lr_ratio: 1.0,
    })
}
