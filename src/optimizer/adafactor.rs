//! Adafactor (Shazeer and Stern, 2018): keeps only the row and column means of a matrix's squared
//! gradients. The learning rate is that of the schedule; it is neither capped nor scaled by the
//! parameter. Weight decay is decoupled and applies to matrices only.

use burn::optim::AdafactorConfig;

use super::burn_rule::{BurnRule, BurnState, StateSize};
use super::rules::Rules;

const STATE: BurnState = BurnState {
    family: "adafactor",
    tensors: &[
        ("second_moment", StateSize::Rows),
        ("column_second_moment", StateSize::Columns),
    ],
    scalars: &["time"],
};

pub(super) fn rules(weight_decay: f64) -> Rules {
    Rules::uniform(rule(weight_decay), rule(0.0))
}

fn rule(weight_decay: f64) -> BurnRule {
    let optimizer = AdafactorConfig::new()
        .with_relative_step(false)
        .with_scale_parameter(false)
        .with_weight_decay(weight_decay as f32);
    BurnRule::new(optimizer.build(), STATE)
}
