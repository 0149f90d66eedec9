//! `[quantization]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[quantization]`: linear layers of the blocks in few bits. Embeddings, norms and the output head
/// stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct QuantizationConfig {
    /// What the layers compute with. Default: none, or the base model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["axolotl: load_in_4bit", "HF: quantization_config", "quant_method"]))]
    pub weights: Option<WeightFormat>,
    /// What shares one scale: "tensor" (a whole matrix), "row" (the weights of one output), or a
    /// number (so many weights of one output in a row, a multiple of 16). Default: "tensor".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["torchao: granularity", "HF: group_size", "q_group_size"]))]
    pub granularity: Option<GranularityKey>,
    /// Bits of what goes into the layers, with a scale for each token; 0 = not rounded. Default: 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 8), extend("x-aliases" = ["input_bits", "activation_dtype"]))]
    pub activation_bits: Option<u32>,
    /// Multiply as integers in the forward pass of training: the same up to rounding. On a CPU wide
    /// models gain by it and narrow ones lose. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub int8_forward: Option<bool>,
}

/// What the linear layers of the blocks compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// Their weights.
    None,
    /// Weights rounded to -1, 0 or 1 times a scale in every forward pass, trained straight through
    /// (BitNet b1.58).
    Ternary,
}

/// What shares one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum GranularityKey {
    /// A matrix or a row of it.
    Named(GranularityName),
    /// So many weights.
    Group(#[schemars(range(min = 16))] usize),
}

/// What shares one scale, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum GranularityName {
    /// The whole matrix.
    Tensor,
    /// The weights of one output.
    Row,
}
