//! A model's shape with every default filled in: what `[model]` resolves to.

use super::keys::Architecture;

/// Everything that fixes a decoder's parameters except the vocabulary, which the tokenizer brings.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// Family of the decoder.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of decoder blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key/value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest sequence the model is made for.
    pub max_position_embeddings: usize,
    /// Whether the embedding matrix is the output head too.
    pub tie_word_embeddings: bool,
    /// Whether linear and norm layers have biases (gpt2).
    pub bias: bool,
    /// Epsilon of RMSNorm or LayerNorm.
    pub norm_eps: f64,
    /// Base of the rotary frequencies (llama).
    pub rope_theta: f64,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
}
