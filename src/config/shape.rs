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

impl ModelShape {
    /// Number of trainable parameters with a vocabulary of `vocab_size`, a tied head counted once.
    ///
    /// ```
    /// use firebrick::config::Preset;
    /// let gpt2 = Preset::Gpt2.shape();
    /// assert_eq!(gpt2.parameters(Preset::Gpt2.published_vocab_size()), 124_439_808);
    /// ```
    pub fn parameters(&self, vocab_size: usize) -> u64 {
        let hidden = self.hidden_size as u64;
        let intermediate = self.intermediate_size as u64;
        let queries = (self.num_attention_heads * self.head_dim) as u64;
        let keys = (self.num_key_value_heads * self.head_dim) as u64;
        let bias = u64::from(self.bias);
        let norm = hidden * (1 + bias);

        let attention =
            2 * hidden * queries + 2 * hidden * keys + bias * (queries + 2 * keys + hidden);
        let feed_forward = match self.architecture {
            Architecture::Llama => 3 * hidden * intermediate,
            Architecture::Gpt2 => 2 * hidden * intermediate + bias * (intermediate + hidden),
        };
        let positions = match self.architecture {
            Architecture::Llama => 0,
            Architecture::Gpt2 => self.max_position_embeddings as u64 * hidden,
        };
        let embedding = vocab_size as u64 * hidden;
        let head = if self.tie_word_embeddings {
            0
        } else {
            embedding
        };
        let block = attention + feed_forward + 2 * norm;
        embedding + positions + self.num_hidden_layers as u64 * block + norm + head
    }
}
