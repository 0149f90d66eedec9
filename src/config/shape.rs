//! A model's shape with every default filled in: what `[model]` resolves to.

use firebrick_kernels::blockwise::{BlockwiseShape, Format};
use firebrick_kernels::ternary::Granularity;
use firebrick_kernels::ternary::layout::Layout;

use super::era::EraOutput;
use super::keys::{Architecture, HiddenAct};

/// Everything that fixes a decoder's parameters except the vocabulary, which the tokenizer brings.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// Family of the decoder: its names and its files. What it computes is in the other fields.
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
    /// Whether queries, keys and values alone have biases (qwen2).
    pub qkv_bias: bool,
    /// Whether each head's queries and keys pass through an RMSNorm (qwen3).
    pub qk_norm: bool,
    /// Epsilon of RMSNorm or LayerNorm.
    pub norm_eps: f64,
    /// Base of the rotary frequencies (all but gpt2).
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: Option<RopeScaling>,
    /// Tokens that a token attends to, itself included; none = all before it.
    pub sliding_window: Option<usize>,
    /// What a gated feed-forward layer applies to its gate; none for gpt2, which has no gate.
    pub hidden_act: Option<HiddenAct>,
    /// What comes after the logits, if anything.
    pub output_activation: Option<EraOutput>,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// Whether projections that write to the residual stream begin at zero.
    pub zero_init_output: bool,
    /// Ternary weights in the linear layers of the blocks.
    pub ternary: Option<Ternary>,
    /// Blockwise codes in their place, which are not trained.
    pub blockwise: Option<Blockwise>,
}

/// Linear layers with weights in four or eight bits, and a scale for each block of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blockwise {
    /// What a code stands for.
    pub format: Format,
    /// What shares a scale.
    pub block: BlockSize,
    /// Whether scales are in eight bits themselves.
    pub double: bool,
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockSize {
    /// So many weights next to each other, outputs one after the other.
    Weights(usize),
    /// The weights of one output.
    Row,
}

impl Blockwise {
    /// Of a matrix `[in, out]`.
    pub fn of_matrix(self, [inputs, outputs]: [usize; 2]) -> BlockwiseShape {
        BlockwiseShape {
            rows: outputs,
            cols: inputs,
            format: self.format,
            block: match self.block {
                BlockSize::Weights(block) => block,
                BlockSize::Row => inputs,
            },
            double: self.double,
        }
    }
}

/// Linear layers with weights of -1, 0 and 1 times a scale (BitNet b1.58).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ternary {
    /// What one scale stands for.
    pub granularity: Granularity,
    /// Whether what goes into a layer is rounded to eight bits, token by token.
    pub rounds_activations: bool,
    /// How trits are kept where nothing else is: for inference. None for weights that are rounded as
    /// they are used, and can be trained.
    pub packed: Option<PackedLayout>,
}

/// How files keep packed trits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PackedLayout {
    /// Two bits each, as products read them.
    #[default]
    Compute,
    /// Five in a byte, 1.6 bits each: the smallest.
    Storage,
}

impl PackedLayout {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            PackedLayout::Compute => Layout::TwoBit16x16.name(),
            PackedLayout::Storage => Layout::FiveTritsAByte.name(),
        }
    }

    /// The layout with this name.
    pub fn named(name: &str) -> Option<Self> {
        let all = [PackedLayout::Compute, PackedLayout::Storage];
        all.into_iter().find(|layout| layout.name() == name)
    }
}

/// Rotary frequencies stretched for a longer context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Every frequency divided by `factor` (Chen et al., 2023).
    Linear {
        /// How much longer the context becomes.
        factor: f64,
    },
    /// Llama 3.1's: wavelengths above `original / low` are stretched by `factor`, those below
    /// `original / high` stay, and those in between are interpolated.
    Llama3 {
        /// How much longer the context becomes.
        factor: f64,
        /// Original contexts per wavelength below which all is stretched.
        low_freq_factor: f64,
        /// Original contexts per wavelength above which nothing is stretched.
        high_freq_factor: f64,
        /// The context's length before.
        original_max_position_embeddings: usize,
    },
}

impl ModelShape {
    /// GPT-2's form: LayerNorm, learned positions and an ungated GELU layer, in place of RMSNorm,
    /// rotary positions and SwiGLU.
    pub fn is_gpt2_form(&self) -> bool {
        self.architecture == Architecture::Gpt2
    }

    /// BitNet b1.58's form: RMSNorms before the projections that write to the residual stream (Ma et al., 2025, "BitNet b1.58 2B4T", section 2).
    pub fn is_bitnet_form(&self) -> bool {
        self.architecture == Architecture::Bitnet
    }

    /// What the model computes that no other program does; None if transformers has all of it.
    pub fn of_its_own(&self) -> Option<&'static str> {
        match (self.output_activation, self.hidden_act) {
            (Some(_), _) => Some("output_activation"),
            (None, Some(HiddenAct::GeluEra)) => Some("hidden_act = \"gelu_era\""),
            _ => None,
        }
    }

    /// Weights in the linear layers of the blocks: those that are ternary or quantised where any are.
    pub fn block_parameters(&self) -> u64 {
        let hidden = self.hidden_size as u64;
        let queries = (self.num_attention_heads * self.head_dim) as u64;
        let keys = (self.num_key_value_heads * self.head_dim) as u64;
        let matrices = if self.is_gpt2_form() { 2 } else { 3 };
        let feed_forward = matrices * hidden * self.intermediate_size as u64;
        let block = 2 * hidden * (queries + keys) + feed_forward;
        self.num_hidden_layers as u64 * block
    }

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
        let qkv_bias = u64::from(self.bias || self.qkv_bias);
        let norm = hidden * (1 + bias);

        let head_norms = u64::from(self.qk_norm) * 2 * self.head_dim as u64;
        let attention = 2 * hidden * queries
            + 2 * hidden * keys
            + qkv_bias * (queries + 2 * keys)
            + bias * hidden
            + head_norms;
        let feed_forward = if self.is_gpt2_form() {
            2 * hidden * intermediate + bias * (intermediate + hidden)
        } else {
            3 * hidden * intermediate
        };
        let positions = if self.is_gpt2_form() {
            self.max_position_embeddings as u64 * hidden
        } else {
            0
        };
        let embedding = vocab_size as u64 * hidden;
        let head = if self.tie_word_embeddings {
            0
        } else {
            embedding
        };
        let sub_norms = if self.is_bitnet_form() {
            queries + intermediate
        } else {
            0
        };
        let block = attention + feed_forward + 2 * norm + sub_norms;
        embedding + positions + self.num_hidden_layers as u64 * block + norm + head
    }
}
