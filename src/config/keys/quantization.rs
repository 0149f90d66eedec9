//! `[quantization]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[quantization]`: linear layers of the blocks in few bits: trained as ternary, or a base model's
/// that `[adapter]` adapts. Embeddings, norms and the output head stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct QuantizationConfig {
    /// What the layers compute with. Default: none, or the base model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["axolotl: load_in_4bit", "HF: quantization_config", "quant_method"]))]
    pub weights: Option<WeightFormat>,
    /// What shares one scale of ternary weights: "tensor" (a whole matrix), "row" (the weights of one
    /// output), or a number (so many weights of one output in a row, a multiple of 16).
    /// Default: "tensor".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["torchao: granularity", "HF: group_size", "q_group_size"]))]
    pub granularity: Option<GranularityKey>,
    /// Weights that share one scale (nf4, fp4, int4, int8): a number, or "row" for those of one output.
    /// Default: 64; "row" for int8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["blocksize", "bnb_4bit_blocksize"]))]
    pub block_size: Option<BlockSizeKey>,
    /// Scales in eight bits themselves (nf4, fp4, int4, int8), 0.37 bits a weight less with blocks of
    /// 64. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["HF: bnb_4bit_use_double_quant", "LLaMA-Factory: double_quantization", "use_double_quant"]))]
    pub double_quant: Option<bool>,
    /// Levels on both sides of zero alike (int4). Without, each block has a zero point of its own:
    /// better for weights that lean to one side. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["sym", "zero_point"]))]
    pub symmetric: Option<bool>,
    /// Bits of what goes into ternary layers, with a scale for each token; 0 = not rounded. Default: 8.
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
    /// (BitNet b1.58). With `[adapter]`, packed and not trained.
    Ternary,
    /// A base model's weights in four bits, at quantiles of a normal distribution (QLoRA: Dettmers et
    /// al., 2023). With `[adapter]` only, as all that follow.
    Nf4,
    /// In four bits as floats: a sign, two bits of exponent, one of fraction.
    Fp4,
    /// In four bits as whole numbers.
    Int4,
    /// In eight bits as whole numbers.
    Int8,
}

/// How many weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum BlockSizeKey {
    /// By name.
    Named(BlockSizeName),
    /// So many.
    Weights(#[schemars(range(min = 1, max = 1048576))] usize),
}

/// How many weights share a scale, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BlockSizeName {
    /// Those of one output.
    Row,
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
