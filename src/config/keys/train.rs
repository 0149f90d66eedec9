//! `[train]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[train]`: batch size, length of the run, clipping.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Sequences per forward and backward pass.
    #[schemars(range(min = 1, max = 1048576), extend("x-aliases" = ["HF: per_device_train_batch_size", "torchtune: batch_size", "axolotl: micro_batch_size"]))]
    pub micro_batch_size: usize,
    /// Passes per optimizer step. The loss is averaged over all trained tokens of the step, so
    /// 16 passes of 1 sequence equal 1 pass of 16.
    #[schemars(range(min = 1, max = 1048576), extend("x-aliases" = ["litgpt: accumulate_grad_batches", "grad_accumulation_steps", "grad_accum"]))]
    pub gradient_accumulation_steps: usize,
    /// Length of the run in optimizer steps. One of max_steps, num_epochs, max_tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000000000000u64), extend("x-aliases" = ["nanoGPT: max_iters", "mlx-lm: iters", "num_steps", "train_steps"]))]
    pub max_steps: Option<u64>,
    /// Length of the run in passes over the training data.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000000.0), extend("exclusiveMinimum" = 0.0, "x-aliases" = ["HF: num_train_epochs", "torchtune: epochs"]))]
    pub num_epochs: Option<f64>,
    /// Length of the run in trained tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000000000000000u64), extend("examples" = [10000000], "x-aliases" = ["litgpt: max_tokens", "total_tokens"]))]
    pub max_tokens: Option<u64>,
    /// Largest norm of the whole gradient; a larger one is scaled down to it. 0 = off.
    #[schemars(range(min = 0.0), extend("x-aliases" = ["torchtune: clip_grad_norm", "nanoGPT: grad_clip", "gradient_clipping", "clip_grad"]))]
    pub max_grad_norm: f64,
    /// Keep only what goes into each block in the forward pass, and compute the rest again in the
    /// backward pass: much less memory for one more forward pass, and the same gradient.
    #[schemars(extend("x-aliases" = ["activation_checkpointing", "grad_checkpoint", "torchtune: enable_activation_checkpointing"]))]
    pub gradient_checkpointing: bool,
    /// What to do with a step whose loss or gradient is not finite.
    pub on_nonfinite: OnNonfinite,
    /// Worker threads; 0 = all cores.
    #[schemars(range(max = 4096), extend("x-aliases" = ["num_threads", "num_workers"]))]
    pub threads: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            micro_batch_size: 8,
            gradient_accumulation_steps: 1,
            max_steps: None,
            num_epochs: None,
            max_tokens: None,
            max_grad_norm: 1.0,
            gradient_checkpointing: false,
            on_nonfinite: OnNonfinite::Skip,
            threads: 0,
        }
    }
}

/// What to do with a step whose loss or gradient is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnNonfinite {
    /// Leave the weights as they are, write down the batch, go on; stop after 3 in a row.
    Skip,
    /// Stop at the first one.
    Stop,
}
