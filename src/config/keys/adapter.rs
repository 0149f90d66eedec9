//! `[adapter]`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::OneOrMany;

/// `[adapter]`: a few new weights beside those of the base model, which stay as they are. The run
/// folder gets an adapter in the format of Hugging Face's PEFT instead of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterConfig {
    /// What is added to a layer's output.
    #[serde(rename = "type")]
    #[schemars(extend("x-aliases" = ["axolotl: adapter", "HF: peft_type", "mlx-lm: fine_tune_type", "LLaMA-Factory: finetuning_type", "use_dora"]))]
    pub kind: AdapterKind,
    /// Rank: the width of the bottleneck between the two new matrices of a layer.
    #[schemars(range(min = 1, max = 65536), extend("x-aliases" = ["axolotl: lora_r", "LLaMA-Factory: lora_rank", "torchtune: lora_rank", "mlx-lm: rank", "lora_r", "lora_rank"]))]
    pub r: usize,
    /// The update is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with use_rslora.
    #[schemars(extend("exclusiveMinimum" = 0.0, "x-aliases" = ["alpha", "scale"]))]
    pub lora_alpha: f64,
    /// Share of what goes into the new matrices that is set to zero while training.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0, "x-aliases" = ["dropout"]))]
    pub lora_dropout: f64,
    /// Layers that get an adapter: "all-linear" (those of every block), names as
    /// ["q_proj", "v_proj"], or "re:" and a regular expression that has to match a whole path, as
    /// "re:.*_proj" or "re:layers\\.0\\..*".
    #[schemars(extend("x-aliases" = ["axolotl: lora_target_modules", "LLaMA-Factory: lora_target", "torchtune: lora_attn_modules", "mlx-lm: keys", "lora_target_linear"]))]
    pub target_modules: OneOrMany,
    /// Numbers of the blocks that get adapters, from 0. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["HF: layers_to_transform", "axolotl: peft_layers_to_transform", "mlx-lm: num_layers"]))]
    pub layers: Option<Vec<usize>>,
    /// Other ranks for some layers: { "down_proj" = 32 }. A name or the end of a path, or a regular
    /// expression for it. No two may say different things about a layer.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other lora_alphas for some layers.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023), which keeps high ranks learning.
    #[schemars(extend("x-aliases" = ["axolotl: peft_use_rslora", "rslora"]))]
    pub use_rslora: bool,
    /// What the new matrices begin as.
    #[schemars(extend("x-aliases" = ["HF: init_lora_weights", "axolotl: peft_init_lora_weights"]))]
    pub init: AdapterInit,
    /// Rounds of quantising and of taking the best low-rank correction (init = "loftq"). Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100), extend("x-aliases" = ["HF: loftq_iter"]))]
    pub loftq_iterations: Option<usize>,
    /// The second matrix learns at so many times the learning rate (LoRA+: Hayou et al., 2024, who
    /// take 16).
    #[schemars(extend("exclusiveMinimum" = 0.0, "x-aliases" = ["axolotl: loraplus_lr_ratio", "LLaMA-Factory: loraplus_lr_ratio", "loraplus_lr_ratio"]))]
    pub lora_plus_ratio: f64,
    /// Other modules that are trained whole and saved with the adapter: "lm_head",
    /// "embed_tokens", "norm".
    #[schemars(extend("x-aliases" = ["axolotl: lora_modules_to_save", "LLaMA-Factory: additional_target"]))]
    pub modules_to_save: Vec<String>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            kind: AdapterKind::Lora,
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: OneOrMany::One(ALL_LINEAR.to_string()),
            layers: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_rslora: false,
            init: AdapterInit::Default,
            loftq_iterations: None,
            lora_plus_ratio: 1.0,
            modules_to_save: Vec::new(),
        }
    }
}

/// `target_modules` for the linear layers of every block.
pub const ALL_LINEAR: &str = "all-linear";

/// What is added to a layer's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AdapterKind {
    /// A product of two narrow matrices (Hu et al., 2021).
    Lora,
    /// The same, and the length of each output's weights learned apart from their direction
    /// (Liu et al., 2024).
    Dora,
}

/// What the new matrices begin as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AdapterInit {
    /// The first random, the second zero: the model begins as the base model.
    Default,
    /// The largest singular directions of each weight, which the base keeps the rest of (PiSSA: Meng
    /// et al., 2024).
    Pissa,
    /// The best low-rank correction of what quantising takes from each weight (LoftQ: Li et al.,
    /// 2023). With `[quantization]` in four or eight bits only.
    Loftq,
}
