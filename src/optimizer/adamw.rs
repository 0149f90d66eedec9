//! AdamW (Loshchilov and Hutter, 2019): Adam with decoupled weight decay of matrices.

use burn::optim::AdamWConfig;
use firebrick_kernels::difference::adam::Arithmetic;

use super::adam::STATE;
use super::applied::Adam;
use super::burn_rule::BurnRule;
use super::rules::Rules;

pub(super) fn rules(betas: [f64; 2], eps: f64, weight_decay: f64) -> Rules {
    Rules::uniform(rule(betas, eps, weight_decay), rule(betas, eps, 0.0))
}

pub(super) fn rule(betas: [f64; 2], eps: f64, weight_decay: f64) -> BurnRule {
    let (betas, eps) = (betas.map(|beta| beta as f32), eps as f32);
    let weight_decay = weight_decay as f32;
    let optimizer = AdamWConfig::new()
        .with_beta_1(betas[0])
        .with_beta_2(betas[1])
        .with_epsilon(eps)
        .with_weight_decay(weight_decay);
    BurnRule::new(optimizer.build(), STATE).with_adam(Adam {
        arithmetic: Arithmetic::AdamW,
        betas,
        eps,
        weight_decay,
    })
}
