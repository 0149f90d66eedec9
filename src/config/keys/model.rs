//! `[model]` and `[tokenizer]`.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[model]`: a preset, a shape in Hugging Face's names, a preset with some keys overridden, or a
/// model to go on from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// A published shape by name; the other keys of this section override it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["litgpt: model_name", "HF: model_type"]))]
    pub preset: Option<Preset>,
    /// Folder of a trained model, a Hugging Face one or a run's, to go on training: its weights, its
    /// shape and, where `[tokenizer]` is absent, its tokenizer.json.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["models/SmolLM2-135M"], "x-aliases" = ["HF: model_name_or_path", "litgpt: checkpoint_dir", "nanoGPT: init_from"]))]
    pub base_model: Option<PathBuf>,
    /// Family of the decoder. Required without a preset or a base model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<Architecture>,
    /// Width of the residual stream. Required without a preset or a base model.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1048576), extend("x-aliases" = ["GPT-2: n_embd", "llama2.c: dim", "torchtune: embed_dim", "d_model"]))]
    pub hidden_size: Option<usize>,
    /// Width of the feed-forward layer. Default: 4 x hidden_size for gpt2; 8/3 x hidden_size
    /// rounded up to a multiple of 32 for the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4194304), extend("x-aliases" = ["GPT-2: n_inner", "torchtune: intermediate_dim", "d_ff", "ffn_dim"]))]
    pub intermediate_size: Option<usize>,
    /// Number of decoder blocks. Required without a preset or a base model.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096), extend("x-aliases" = ["GPT-2: n_layer", "llama2.c: n_layers", "num_layers"]))]
    pub num_hidden_layers: Option<usize>,
    /// Number of query heads. Required without a preset or a base model.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096), extend("x-aliases" = ["GPT-2: n_head", "llama2.c: n_heads", "num_heads"]))]
    pub num_attention_heads: Option<usize>,
    /// Number of key/value heads; fewer than query heads is grouped-query attention.
    /// Default: num_attention_heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096), extend("x-aliases" = ["llama2.c: n_kv_heads", "num_kv_heads"]))]
    pub num_key_value_heads: Option<usize>,
    /// Width of one head. Default: hidden_size / num_attention_heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub head_dim: Option<usize>,
    /// Longest sequence the model is made for: the size of gpt2's position table.
    /// Default: data.sequence_len, or the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16777216), extend("x-aliases" = ["GPT-2: n_positions", "nanoGPT: n_ctx", "max_seq_len"]))]
    pub max_position_embeddings: Option<usize>,
    /// Use the embedding matrix as the output head too. Default: true, or the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["weight_tying", "tied_embeddings"]))]
    pub tie_word_embeddings: Option<bool>,
    /// Biases in linear and norm layers (gpt2 only). Default: false, or the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<bool>,
    /// Epsilon of RMSNorm or LayerNorm. Default: 1e-5, or the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "x-aliases" = ["HF: rms_norm_eps", "GPT-2: layer_norm_epsilon"]))]
    pub norm_eps: Option<f64>,
    /// Base of the rotary position frequencies (not for gpt2). Default: 10000, or the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 1.0, "x-aliases" = ["rope_base", "rotary_base"]))]
    pub rope_theta: Option<f64>,
    /// Standard deviation of the initial weights; projections that write to the residual stream
    /// are scaled by 1/sqrt(2 x layers) on top (GPT-2 paper, section 2.3).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "x-aliases" = ["init_std", "init_range"]))]
    pub initializer_range: Option<f64>,
    /// Start the projections that write to the residual stream (`o_proj`, `down_proj`) at zero, so that
    /// each block begins as the identity. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["zero_init", "zero_init_residual"]))]
    pub zero_init_output: Option<bool>,
    /// What the gated feed-forward layer applies to its gate (not for gpt2).
    /// Default: relu2 for bitnet, silu for the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["HF: hidden_activation", "GPT-2: activation_function", "act_fn"]))]
    pub hidden_act: Option<HiddenAct>,
    /// What comes after the logits. Default: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_activation: Option<OutputActivationConfig>,
    /// Tokens that a token attends to, itself included (mistral, qwen2, qwen3, phi3).
    /// Default: all before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16777216), extend("x-aliases" = ["window_size", "attention_window"]))]
    pub sliding_window: Option<usize>,
    /// Rotary frequencies stretched for a longer context. Default: as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["HF: rope_parameters"]))]
    pub rope_scaling: Option<RopeScalingConfig>,
    /// What the forward and backward pass compute in. Weights, their updates and the optimizer's
    /// state are f32 whatever is chosen here; f16 comes with automatic loss scaling.
    #[schemars(extend("x-aliases" = ["HF: torch_dtype", "axolotl: bf16", "HF: fp16", "litgpt: precision", "mixed_precision"]))]
    pub dtype: Dtype,
}

/// A dtype to compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bf16 on a GPU that computes in it, else f32.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits with f32's range and 8 bits of precision.
    Bf16,
    /// 16 bits with 11 bits of precision and a small range.
    F16,
}

impl Dtype {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Auto => "auto",
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        }
    }
}

/// A function that is applied to the gate of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HiddenAct {
    /// x sigmoid(x), which makes the layer SwiGLU.
    Silu,
    /// max(x, 0)², which makes most of the gate zero.
    Relu2,
    /// GELU in its tanh form plus 0.1 softplus(x). Other programs cannot load a model with it.
    GeluEra,
}

impl HiddenAct {
    /// Every function.
    pub const ALL: [HiddenAct; 3] = [HiddenAct::Silu, HiddenAct::Relu2, HiddenAct::GeluEra];

    /// Its name in a configuration and in config.json.
    pub fn name(self) -> &'static str {
        match self {
            HiddenAct::Silu => "silu",
            HiddenAct::Relu2 => "relu2",
            HiddenAct::GeluEra => "gelu_era",
        }
    }
}

/// `[model.output_activation]`: what comes after the logits, in training and in generation. Also
/// written inline: `output_activation = { type = "era", min_entropy = 1.0 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutputActivationConfig {
    /// Which function.
    #[serde(rename = "type")]
    pub kind: OutputActivationKind,
    /// The bound below which the entropy of the next token cannot fall, in nats. It is a floor under
    /// the loss too; the run says which. Other programs cannot load a model with it.
    pub min_entropy: f64,
}

/// Which function comes after the logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputActivationKind {
    /// The entropy-regularising activation (ERA; Kang et al., 2025).
    Era,
}

/// `[model.rope_scaling]`: rotary frequencies stretched for a longer context. Also written inline:
/// `rope_scaling = { type = "linear", factor = 4.0 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RopeScalingConfig {
    /// Which frequencies are stretched.
    #[serde(rename = "type")]
    #[schemars(extend("x-aliases" = ["HF: rope_type"]))]
    pub kind: RopeScalingKind,
    /// How much longer the context becomes.
    #[schemars(range(min = 1.0, max = 1000000.0))]
    pub factor: f64,
    /// Wavelengths longer than the original context divided by this are stretched in full
    /// (type = "llama3"). Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000000.0), extend("exclusiveMinimum" = 0.0))]
    pub low_freq_factor: Option<f64>,
    /// Wavelengths shorter than the original context divided by this stay as they are
    /// (type = "llama3"). Default: 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000000.0), extend("exclusiveMinimum" = 0.0))]
    pub high_freq_factor: Option<f64>,
    /// Length of the context before it was stretched. Required for type = "llama3".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16777216))]
    pub original_max_position_embeddings: Option<usize>,
}

/// Which rotary frequencies are stretched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RopeScalingKind {
    /// All, by the same factor (position interpolation).
    Linear,
    /// The slow ones in full, the fast ones not at all, those in between by degrees (Llama 3.1).
    Llama3,
}

/// Family of the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// RMSNorm, rotary positions, grouped-query attention, SwiGLU.
    Llama,
    /// As llama, with a sliding window where `sliding_window` is set.
    Mistral,
    /// As mistral, with biases on queries, keys and values.
    Qwen2,
    /// As mistral, with an RMSNorm on each head's queries and keys.
    Qwen3,
    /// As mistral; its files fuse queries, keys and values, and gate and up.
    Phi3,
    /// As llama, with an RMSNorm before the projections that write to the residual stream (SubLN)
    /// and ReLU² in place of SiLU. Its weights are ternary with `[quantization]` only.
    Bitnet,
    /// LayerNorm, learned positions, GELU.
    Gpt2,
}

impl Architecture {
    /// Every family.
    pub const ALL: [Architecture; 7] = [
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Phi3,
        Architecture::Bitnet,
        Architecture::Gpt2,
    ];

    /// Its name in a configuration, and the `model_type` of its config.json.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Phi3 => "phi3",
            Architecture::Bitnet => "bitnet",
            Architecture::Gpt2 => "gpt2",
        }
    }

    /// What its feed-forward layer applies to the gate by default; None if it has no gate.
    pub fn hidden_act(self) -> Option<HiddenAct> {
        match self {
            Architecture::Gpt2 => None,
            Architecture::Bitnet => Some(HiddenAct::Relu2),
            _ => Some(HiddenAct::Silu),
        }
    }
}

/// Published shapes. The vocabulary size always comes from the tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Preset {
    /// llama2.c's 260 thousand parameters.
    #[serde(rename = "stories-260k")]
    Stories260K,
    /// llama2.c's 15 million parameters.
    #[serde(rename = "stories-15m")]
    Stories15M,
    /// llama2.c's 42 million parameters.
    #[serde(rename = "stories-42m")]
    Stories42M,
    /// llama2.c's 110 million parameters.
    #[serde(rename = "stories-110m")]
    Stories110M,
    /// SmolLM2 135M.
    #[serde(rename = "smollm2-135m")]
    SmolLm2_135M,
    /// SmolLM2 360M.
    #[serde(rename = "smollm2-360m")]
    SmolLm2_360M,
    /// SmolLM2 1.7B.
    #[serde(rename = "smollm2-1.7b")]
    SmolLm2_1_7B,
    /// TinyLlama 1.1B.
    #[serde(rename = "tinyllama-1.1b")]
    TinyLlama1_1B,
    /// GPT-2 small, 124M.
    #[serde(rename = "gpt2")]
    Gpt2,
    /// GPT-2 medium, 355M.
    #[serde(rename = "gpt2-medium")]
    Gpt2Medium,
    /// GPT-2 large, 774M.
    #[serde(rename = "gpt2-large")]
    Gpt2Large,
    /// GPT-2 XL, 1.5B.
    #[serde(rename = "gpt2-xl")]
    Gpt2Xl,
}

/// `[tokenizer]`: an existing tokenizer.json, or one trained on the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerConfig {
    /// Where token ids come from.
    #[serde(rename = "type")]
    pub kind: TokenizerKind,
    /// The tokenizer.json to use (type = "file").
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["tokenizer.json"], "x-aliases" = ["torchtune: tokenizer_path", "axolotl: tokenizer_config", "HF: tokenizer_name_or_path"]))]
    pub path: Option<PathBuf>,
    /// Number of tokens to learn, special tokens and the 256 bytes included (type = "bpe").
    /// Default: 4096.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 257, max = 1048576))]
    pub vocab_size: Option<usize>,
}

impl TokenizerConfig {
    /// Tokens that a `bpe` tokenizer learns where the file does not say.
    pub const DEFAULT_VOCAB_SIZE: usize = 4096;

    /// The tokenizer.json of a model folder.
    pub fn of_model(folder: &Path) -> Self {
        Self {
            kind: TokenizerKind::File,
            path: Some(folder.join("tokenizer.json")),
            vocab_size: None,
        }
    }
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self {
            kind: TokenizerKind::Bpe,
            path: None,
            vocab_size: None,
        }
    }
}

/// Where token ids come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerKind {
    /// A tokenizer.json in Hugging Face's format.
    File,
    /// Byte-level byte-pair encoding learned on the training split.
    Bpe,
    /// One token per byte.
    Byte,
    /// One token per Unicode character that occurs in the data.
    Char,
}
