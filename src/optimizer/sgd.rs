//! Stochastic gradient descent with momentum. Weight decay is added to the gradient of matrices.

use burn::optim::SgdConfig;

use super::burn_rule::{BurnRule, BurnState, StateSize, decay, momentum_without_dampening};
use super::rules::Rules;

const STATE: BurnState = BurnState {
    family: "sgd",
    tensors: &[("momentum.velocity", StateSize::Full)],
    scalars: &[],
};

/// SGD without momentum keeps no state.
const NO_STATE: BurnState = BurnState {
    tensors: &[],
    ..STATE
};

pub(super) fn rules(momentum: f64, nesterov: bool, weight_decay: f64) -> Rules {
    let rule = |weight_decay| rule(momentum, nesterov, weight_decay);
    Rules::uniform(rule(weight_decay), rule(0.0))
}

fn rule(momentum: f64, nesterov: bool, weight_decay: f64) -> BurnRule {
    let has_momentum = momentum > 0.0;
    let optimizer = SgdConfig::new()
        .with_momentum(has_momentum.then(|| momentum_without_dampening(momentum, nesterov)))
        .with_weight_decay(decay(weight_decay));
    let state = if has_momentum { STATE } else { NO_STATE };
    BurnRule::new(optimizer.build(), state)
}
