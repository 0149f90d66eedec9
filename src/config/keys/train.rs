//! `[train]`, `[optimizer]` and `[lr_scheduler]`.

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

/// `[optimizer]`: the update rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The update rule.
    #[schemars(extend("x-aliases" = ["HF: optim", "axolotl: optimizer", "optimizer_type", "adamw_bnb_8bit", "adamw_8bit"]))]
    pub name: OptimizerName,
    /// Peak learning rate.
    #[schemars(extend("exclusiveMinimum" = 0.0, "x-aliases" = ["lr", "max_lr", "peak_lr"]))]
    pub learning_rate: f64,
    /// Decay of the moment estimates (adamw, adam, lion, and the adamw half of muon).
    /// Default: [0.9, 0.95]; lion: [0.9, 0.99].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(inner(range(min = 0.0, max = 0.999999)), extend("x-aliases" = ["HF: adam_beta1", "HF: adam_beta2", "beta1", "beta2"]))]
    pub betas: Option<[f64; 2]>,
    /// Added to the denominator (adamw, adam, and the adamw half of muon). Default: 1e-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0.0, "x-aliases" = ["HF: adam_epsilon", "epsilon"]))]
    pub eps: Option<f64>,
    /// Decay of matrices and embeddings; norms and biases are never decayed. Decoupled for adamw,
    /// lion and muon; added to the gradient for adam and sgd.
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Momentum (sgd, muon). Default: 0.9 for sgd, 0.95 for muon.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0), extend("examples" = [0.9], "exclusiveMaximum" = 1.0))]
    pub momentum: Option<f64>,
    /// Nesterov momentum (sgd, muon). Default: false for sgd, true for muon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nesterov: Option<bool>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            name: OptimizerName::Adamw,
            learning_rate: 1e-3,
            betas: None,
            eps: None,
            weight_decay: 0.1,
            momentum: None,
            nesterov: None,
        }
    }
}

/// The update rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// Adam with decoupled weight decay (Loshchilov and Hutter, 2019).
    Adamw,
    /// AdamW with both moments in eight bits, in this process's memory whatever the device (Dettmers et
    /// al., 2022): two bytes a weight where AdamW keeps eight.
    #[serde(rename = "adamw8bit")]
    Adamw8bit,
    /// Adam (Kingma and Ba, 2015).
    Adam,
    /// Stochastic gradient descent with momentum.
    Sgd,
    /// Sign of the momentum (Chen et al., 2023). Wants about a tenth of AdamW's learning rate.
    Lion,
    /// Factored second moments (Shazeer and Stern, 2018).
    Adafactor,
    /// Orthogonalised momentum for the blocks' matrices (Jordan et al., 2024), scaled to AdamW's update size
    /// (Liu et al., 2025); AdamW for embeddings, head, norms and biases.
    Muon,
}

/// `[lr_scheduler]`: the learning rate over the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LrSchedulerConfig {
    /// Shape of the decay after warm-up.
    #[schemars(extend("x-aliases" = ["HF: lr_scheduler_type", "axolotl: lr_scheduler", "scheduler"]))]
    pub name: SchedulerName,
    /// Steps of linear warm-up from 0 to the peak. Default: 0. Not together with warmup_ratio.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["nanoGPT: warmup_iters", "torchtune: num_warmup_steps", "litgpt: lr_warmup_steps", "warmup"]))]
    pub warmup_steps: Option<u64>,
    /// Warm-up as a share of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0), extend("examples" = [0.1], "x-aliases" = ["litgpt: lr_warmup_fraction"]))]
    pub warmup_ratio: Option<f64>,
    /// Learning rate at the last step, as a share of the peak.
    /// Ignored by constant and inverse_sqrt, which therefore refuse it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0), extend("x-aliases" = ["axolotl: cosine_min_lr_ratio", "nanoGPT: min_lr", "lr_end"]))]
    pub min_lr_ratio: Option<f64>,
    /// Share of the run spent decaying (wsd). Default: 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0), extend("examples" = [0.2], "x-aliases" = ["HF: num_decay_steps", "cooldown_ratio"]))]
    pub decay_ratio: Option<f64>,
    /// Shape of that decay (wsd). Default: linear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_shape: Option<DecayShape>,
    /// Exponent of the decay (polynomial). Default: 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100.0), extend("examples" = [2.0], "exclusiveMinimum" = 0.0))]
    pub power: Option<f64>,
}

impl Default for LrSchedulerConfig {
    fn default() -> Self {
        Self {
            name: SchedulerName::Cosine,
            warmup_steps: None,
            warmup_ratio: None,
            min_lr_ratio: None,
            decay_ratio: None,
            decay_shape: None,
            power: None,
        }
    }
}

/// Shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerName {
    /// The peak all the way.
    Constant,
    /// A straight line to min_lr_ratio.
    Linear,
    /// Half a cosine to min_lr_ratio.
    Cosine,
    /// Warm-up, stable, decay: the peak, then a decay over the last decay_ratio of the run.
    Wsd,
    /// (1 - progress)^power to min_lr_ratio.
    Polynomial,
    /// peak x sqrt(warm-up / step).
    InverseSqrt,
}

/// Shape of the decay of wsd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DecayShape {
    /// 1 - x.
    Linear,
    /// 1 - sqrt(x) (Hägele et al., 2024).
    Sqrt,
    /// Half a cosine.
    Cosine,
}
