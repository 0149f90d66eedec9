//! What fixes a decoder, its shape and its vocabulary, and how both are written in `config.json`.

mod blockwise;
mod error;
mod fields;
mod quantization;
mod read;
mod write;

use std::fs;
use std::io::Read;
use std::path::Path;

pub use error::SpecError;

use super::era::EraOutput;
use super::keys::HiddenAct;
use super::shape::ModelShape;
use firebrick_kernels::ternary::Granularity;
use firebrick_kernels::ternary::layout::compute::BLOCK;

/// The prefixes of `model_type` and of the class name, for a model whose output has an activation. No
/// other program knows these names, so none computes the model without its activation.
const ERA_PREFIX: &str = "era_";
const ERA_CLASS: &str = "Era";

/// The shape's file name in a model folder.
pub const CONFIG_JSON: &str = "config.json";

/// No model's config.json comes near this. A parsed one takes many times its size.
const MAX_BYTES: u64 = 1 << 18;

/// Everything needed to build a [`Decoder`](crate::model::Decoder).
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// Layers, widths, heads.
    pub shape: ModelShape,
    /// Rows of the embedding matrix: the largest token id + 1.
    pub vocab_size: usize,
    /// The token that ends a text.
    pub eos_token_id: Option<u32>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
}

impl DecoderSpec {
    /// The same model with dense weights instead of ternary or quantised ones.
    pub fn dense(&self) -> Self {
        let mut dense = self.clone();
        dense.shape.ternary = None;
        dense.shape.blockwise = None;
        dense
    }

    /// The longest sequence there are positions for; none with rotary positions, which are computed.
    pub fn position_limit(&self) -> Option<usize> {
        let learned = self.shape.is_gpt2_form();
        learned.then_some(self.shape.max_position_embeddings)
    }

    /// Reads the `config.json` of a model folder.
    ///
    /// # Errors
    /// A file that cannot be read, is no JSON or no config.json, and as
    /// [`from_config_json`](Self::from_config_json).
    pub fn read(folder: &Path) -> Result<Self, SpecError> {
        let path = folder.join(CONFIG_JSON);
        let io = |source| SpecError::Io {
            path: path.clone(),
            source,
        };
        // A pipe or a device would be read for ever.
        if !fs::metadata(&path).map_err(io)?.is_file() {
            let kind = std::io::ErrorKind::InvalidInput;
            return Err(io(std::io::Error::new(kind, "not a regular file")));
        }
        let mut bytes = Vec::new();
        let file = fs::File::open(&path).map_err(io)?;
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(io)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(SpecError::TooLarge {
                path,
                limit: MAX_BYTES,
            });
        }
        let config =
            serde_json::from_slice(&bytes).map_err(|source| SpecError::Json { path, source })?;
        Self::from_config_json(&config)
    }

    /// The arithmetic a shape must satisfy. `Plan` has said all this about a TOML already; this is
    /// for folders and for shapes built in code.
    ///
    /// # Errors
    /// [`SpecError::Shape`], naming the field.
    pub fn check(&self) -> Result<(), SpecError> {
        let s = &self.shape;
        // The limits of the TOML: beyond them, a count is a mistake or an attack.
        let limits = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", s.hidden_size, 1 << 20),
            ("intermediate_size", s.intermediate_size, 1 << 22),
            ("num_hidden_layers", s.num_hidden_layers, 4096),
            ("num_attention_heads", s.num_attention_heads, 4096),
            ("num_key_value_heads", s.num_key_value_heads, 4096),
            ("head_dim", s.head_dim, 1 << 16),
            (
                "max_position_embeddings",
                s.max_position_embeddings,
                1 << 24,
            ),
            ("sliding_window", s.sliding_window.unwrap_or(1), 1 << 24),
        ];
        for (field, value, limit) in limits {
            if value == 0 || value > limit {
                return Err(SpecError::shape(format!(
                    "{field} = {value} is not between 1 and {limit}"
                )));
            }
        }
        if !s.num_attention_heads.is_multiple_of(s.num_key_value_heads) {
            return Err(SpecError::shape(format!(
                "{} query heads cannot share {} key/value heads evenly",
                s.num_attention_heads, s.num_key_value_heads
            )));
        }
        if !s.is_gpt2_form() && !s.head_dim.is_multiple_of(2) {
            return Err(SpecError::shape(format!(
                "head_dim = {} is odd; rotary positions turn pairs",
                s.head_dim
            )));
        }
        let queries = s.num_attention_heads.saturating_mul(s.head_dim);
        if s.is_bitnet_form() && queries != s.hidden_size {
            return Err(SpecError::shape(format!(
                "num_attention_heads x head_dim = {queries} is not hidden_size = {}, which bitnet's \
                 attn_sub_norm has",
                s.hidden_size
            )));
        }
        if let Some(Granularity::Group(size)) = s.ternary.map(|ternary| ternary.granularity) {
            let widths = [s.hidden_size, queries, s.intermediate_size];
            if size == 0 || size % BLOCK != 0 || widths.iter().any(|width| width % size != 0) {
                return Err(SpecError::shape(format!(
                    "groups of {size} ternary weights are not a multiple of {BLOCK} that divides {widths:?}"
                )));
            }
        }
        if s.hidden_act.is_some() == s.is_gpt2_form() {
            return Err(SpecError::shape(format!(
                "hidden_act is for models with a gated feed-forward layer, and those need it; {} has {}",
                s.architecture.name(),
                s.hidden_act.map_or("none", HiddenAct::name)
            )));
        }
        if let Some(era) = s.output_activation
            && era.constants(self.vocab_size).is_none()
        {
            let [low, high] = EraOutput::limits(self.vocab_size);
            return Err(SpecError::shape(format!(
                "output_activation's min_entropy = {} is not between {low:.3} and {high:.3} nats, the \
                 limits for a vocabulary of {}",
                era.min_entropy, self.vocab_size
            )));
        }
        Ok(())
    }
}
