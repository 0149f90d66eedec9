//! `[average]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[average]`: an average of the weights over the run, for evaluation and export. Without the
/// section nothing is averaged. The weights that are trained stay as they are; evaluations, sample
/// completions, the best checkpoint, early stopping and the exported model use the average as soon
/// as it has begun. No key of it may differ between phases.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AverageConfig {
    /// The share of the average that an update keeps; the rest is of the present weights. The
    /// average of n weights keeps at most n / (n + 1), so that it begins as their plain mean. 1 =
    /// the plain mean of all weights since `start`.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "x-aliases" = ["timm: model_ema_decay", "HF: ema_decay", "HF: ema_max_decay", "ema_beta"]))]
    pub decay: f64,
    /// Steps from one update of the average to the next.
    #[schemars(range(min = 1, max = 1000000000000u64), extend("x-aliases" = ["fairseq: ema_update_freq", "NeMo: every_n_steps", "update_every", "swa_freq"]))]
    pub every: u64,
    /// Steps before those whose weights are averaged (1000), or a share of the run's steps ("75%").
    #[schemars(extend("examples" = ["75%"], "x-aliases" = ["fairseq: ema_start_update", "HF: update_after_step", "NeMo: start_step", "swa_start", "swa_epoch_start"]))]
    pub start: AverageStartKey,
}

impl Default for AverageConfig {
    fn default() -> Self {
        Self {
            decay: 0.999,
            every: 1,
            start: AverageStartKey::Steps(0),
        }
    }
}

/// `start` of `[average]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum AverageStartKey {
    /// Optimizer steps.
    Steps(#[schemars(range(max = 1000000000000u64))] u64),
    /// "75%".
    Text(String),
}
