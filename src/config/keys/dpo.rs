//! `[dpo]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[dpo]`: direct preference optimisation (Rafailov et al., 2023).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DpoConfig {
    /// How closely the model is held to the base model: the smaller, the farther it may go.
    #[schemars(extend("exclusiveMinimum" = 0.0, "x-aliases" = ["axolotl: rl_beta", "LLaMA-Factory: pref_beta", "TRL: beta"]))]
    pub beta: f64,
    /// Probability that the worse answer of a pair was marked as the better.
    #[schemars(range(min = 0.0, max = 0.5), extend("x-aliases" = ["axolotl: dpo_label_smoothing", "LLaMA-Factory: dpo_label_smoothing"]))]
    pub label_smoothing: f64,
}

impl Default for DpoConfig {
    fn default() -> Self {
        Self {
            beta: 0.1,
            label_smoothing: 0.0,
        }
    }
}
