//! Published model shapes by name.
//!
//! The vocabulary size listed here is that of the published model; a model that is trained takes
//! its tokenizer's. Sources: the `config.json` of each model on Hugging Face, and the table in
//! llama2.c's README for the stories models.

use super::keys::{Architecture, Dtype, ModelConfig, Preset};
use super::shape::ModelShape;

/// One row of the table: the numbers that set a preset apart from others of its family.
struct Row {
    name: &'static str,
    architecture: Architecture,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    positions: usize,
    vocab: usize,
    rope_theta: f64,
    tied: bool,
}

const fn llama(name: &'static str, numbers: [usize; 7], rope_theta: f64, tied: bool) -> Row {
    let [
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        positions,
        vocab,
    ] = numbers;
    Row {
        name,
        architecture: Architecture::Llama,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        positions,
        vocab,
        rope_theta,
        tied,
    }
}

/// GPT-2's sizes share everything but width, depth and heads.
const fn gpt2(name: &'static str, [hidden, layers, heads]: [usize; 3]) -> Row {
    Row {
        name,
        architecture: Architecture::Gpt2,
        hidden,
        intermediate: 4 * hidden,
        layers,
        heads,
        kv_heads: heads,
        positions: 1024,
        vocab: 50257,
        rope_theta: 0.0,
        tied: true,
    }
}

impl Preset {
    /// Every preset, smallest of its family first.
    pub const ALL: [Preset; 12] = [
        Preset::Stories260K,
        Preset::Stories15M,
        Preset::Stories42M,
        Preset::Stories110M,
        Preset::SmolLm2_135M,
        Preset::SmolLm2_360M,
        Preset::SmolLm2_1_7B,
        Preset::TinyLlama1_1B,
        Preset::Gpt2,
        Preset::Gpt2Medium,
        Preset::Gpt2Large,
        Preset::Gpt2Xl,
    ];

    /// hidden, intermediate, layers, heads, key/value heads, positions, vocabulary.
    const fn row(self) -> Row {
        match self {
            Preset::Stories260K => llama("stories-260k", [64, 172, 5, 8, 4, 512, 512], 1e4, true),
            Preset::Stories15M => llama("stories-15m", [288, 768, 6, 6, 6, 256, 32000], 1e4, true),
            Preset::Stories42M => {
                llama("stories-42m", [512, 1376, 8, 8, 8, 1024, 32000], 1e4, true)
            }
            Preset::Stories110M => llama(
                "stories-110m",
                [768, 2048, 12, 12, 12, 1024, 32000],
                1e4,
                true,
            ),
            Preset::SmolLm2_135M => llama(
                "smollm2-135m",
                [576, 1536, 30, 9, 3, 8192, 49152],
                1e5,
                true,
            ),
            Preset::SmolLm2_360M => llama(
                "smollm2-360m",
                [960, 2560, 32, 15, 5, 8192, 49152],
                1e5,
                true,
            ),
            Preset::SmolLm2_1_7B => llama(
                "smollm2-1.7b",
                [2048, 8192, 24, 32, 32, 8192, 49152],
                1.3e5,
                true,
            ),
            Preset::TinyLlama1_1B => llama(
                "tinyllama-1.1b",
                [2048, 5632, 22, 32, 4, 2048, 32000],
                1e4,
                false,
            ),
            Preset::Gpt2 => gpt2("gpt2", [768, 12, 12]),
            Preset::Gpt2Medium => gpt2("gpt2-medium", [1024, 24, 16]),
            Preset::Gpt2Large => gpt2("gpt2-large", [1280, 36, 20]),
            Preset::Gpt2Xl => gpt2("gpt2-xl", [1600, 48, 25]),
        }
    }

    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Vocabulary size of the published model.
    pub fn published_vocab_size(self) -> usize {
        self.row().vocab
    }

    /// The published model's shape.
    pub fn shape(self) -> ModelShape {
        let positions = self.row().positions;
        // The table gives every key that a shape requires.
        ModelShape::of(&self.model_config(), positions).expect("a preset is complete")
    }

    /// The keys of `[model]` that it stands for. Keys that follow from others (the head width,
    /// key/value heads where all heads have their own) are left out, so that overriding the others
    /// still gives a consistent model.
    pub fn model_config(self) -> ModelConfig {
        let row = self.row();
        let is_gpt2 = row.architecture == Architecture::Gpt2;
        ModelConfig {
            preset: None,
            base_model: None,
            architecture: Some(row.architecture),
            hidden_size: Some(row.hidden),
            intermediate_size: Some(row.intermediate),
            num_hidden_layers: Some(row.layers),
            num_attention_heads: Some(row.heads),
            num_key_value_heads: (row.kv_heads != row.heads).then_some(row.kv_heads),
            head_dim: None,
            max_position_embeddings: Some(row.positions),
            tie_word_embeddings: Some(row.tied),
            bias: Some(is_gpt2),
            norm_eps: Some(1e-5),
            rope_theta: (!is_gpt2).then_some(row.rope_theta),
            initializer_range: None,
            zero_init_output: None,
            hidden_act: None,
            output_activation: None,
            dtype: Dtype::default(),
            sliding_window: None,
            rope_scaling: None,
        }
    }
}
