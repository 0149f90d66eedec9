//! What fixes a decoder: its shape, its vocabulary, and how both are written in `config.json`.

use serde_json::{Value, json};

use super::ModelError;
use crate::config::{Architecture, ModelShape};

/// Everything needed to build a [`Decoder`](super::Decoder).
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
    /// The longest sequence there are positions for; none with rotary positions, which are computed.
    pub fn position_limit(&self) -> Option<usize> {
        let learned = self.shape.architecture == Architecture::Gpt2;
        learned.then_some(self.shape.max_position_embeddings)
    }

    /// The `config.json` that Hugging Face's tools read this model with.
    pub fn to_config_json(&self) -> Value {
        let shape = &self.shape;
        let mut config = match shape.architecture {
            Architecture::Llama => json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": shape.hidden_size,
                "intermediate_size": shape.intermediate_size,
                "num_hidden_layers": shape.num_hidden_layers,
                "num_attention_heads": shape.num_attention_heads,
                "num_key_value_heads": shape.num_key_value_heads,
                "head_dim": shape.head_dim,
                "max_position_embeddings": shape.max_position_embeddings,
                "hidden_act": "silu",
                "rms_norm_eps": shape.norm_eps,
                "rope_theta": shape.rope_theta,
                "attention_bias": false,
                "mlp_bias": false,
            }),
            Architecture::Gpt2 => json!({
                "architectures": ["GPT2LMHeadModel"],
                "model_type": "gpt2",
                "n_embd": shape.hidden_size,
                "n_inner": shape.intermediate_size,
                "n_layer": shape.num_hidden_layers,
                "n_head": shape.num_attention_heads,
                "n_positions": shape.max_position_embeddings,
                "activation_function": "gelu",
                "layer_norm_epsilon": shape.norm_eps,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
                // GPT2LMHeadModel always has biases; ours may not, and then writes zeros for it.
                "bias": shape.bias,
            }),
        };
        config["tie_word_embeddings"] = json!(shape.tie_word_embeddings);
        config["initializer_range"] = json!(shape.initializer_range);
        config["vocab_size"] = json!(self.vocab_size);
        config["bos_token_id"] = json!(self.bos_token_id);
        config["eos_token_id"] = json!(self.eos_token_id);
        config["torch_dtype"] = json!("float32");
        config
    }

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// A missing field, a field of the wrong type or out of range, or a value this build cannot
    /// honour: each is named, none is ignored.
    pub fn from_config_json(config: &Value) -> Result<Self, ModelError> {
        let fields = Fields { config };
        let spec = match fields.text("model_type")? {
            "llama" => fields.llama()?,
            "gpt2" => fields.gpt2()?,
            other => return Err(fields.unsupported("model_type", &json!(other))),
        };
        spec.check()?;
        Ok(spec)
    }

    /// The arithmetic a shape must satisfy. `Plan` has said all this about a TOML already; this is
    /// for folders and for shapes built in code.
    pub(super) fn check(&self) -> Result<(), ModelError> {
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
        ];
        for (field, value, limit) in limits {
            if value == 0 || value > limit {
                return Err(ModelError::shape(format!(
                    "{field} = {value} is not between 1 and {limit}"
                )));
            }
        }
        if !s.num_attention_heads.is_multiple_of(s.num_key_value_heads) {
            return Err(ModelError::shape(format!(
                "{} query heads cannot share {} key/value heads evenly",
                s.num_attention_heads, s.num_key_value_heads
            )));
        }
        if s.architecture == Architecture::Llama && !s.head_dim.is_multiple_of(2) {
            return Err(ModelError::shape(format!(
                "head_dim = {} is odd; rotary positions turn pairs",
                s.head_dim
            )));
        }
        Ok(())
    }
}

/// Typed access to a config.json, each failure naming its field.
struct Fields<'a> {
    config: &'a Value,
}

impl Fields<'_> {
    fn llama(&self) -> Result<DecoderSpec, ModelError> {
        self.require("hidden_act", &json!("silu"))?;
        self.require("attention_bias", &json!(false))?;
        self.require("mlp_bias", &json!(false))?;
        for scaling in ["rope_scaling", "sliding_window"] {
            self.require(scaling, &Value::Null)?;
        }
        let hidden_size = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        let shape = ModelShape {
            architecture: Architecture::Llama,
            hidden_size,
            intermediate_size: self.count("intermediate_size")?,
            num_hidden_layers: self.count("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: self.count_or("num_key_value_heads", heads)?,
            head_dim: self.count_or("head_dim", hidden_size / heads.max(1))?,
            max_position_embeddings: self.count_or("max_position_embeddings", 2048)?,
            tie_word_embeddings: self.flag_or("tie_word_embeddings", false)?,
            bias: false,
            norm_eps: self.number_or("rms_norm_eps", 1e-6)?,
            rope_theta: self.rope_theta()?,
            initializer_range: self.number_or("initializer_range", 0.02)?,
        };
        self.spec(shape)
    }

    fn gpt2(&self) -> Result<DecoderSpec, ModelError> {
        self.require("activation_function", &json!("gelu"))?;
        let hidden_size = self.count("n_embd")?;
        let heads = self.count("n_head")?;
        let shape = ModelShape {
            architecture: Architecture::Gpt2,
            hidden_size,
            intermediate_size: self.count_or("n_inner", 4 * hidden_size)?,
            num_hidden_layers: self.count("n_layer")?,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: hidden_size / heads.max(1),
            max_position_embeddings: self.count("n_positions")?,
            tie_word_embeddings: self.flag_or("tie_word_embeddings", true)?,
            bias: self.flag_or("bias", true)?,
            norm_eps: self.number_or("layer_norm_epsilon", 1e-5)?,
            rope_theta: 10_000.0,
            initializer_range: self.number_or("initializer_range", 0.02)?,
        };
        if shape.head_dim * heads != hidden_size {
            return Err(ModelError::shape(format!(
                "n_embd = {hidden_size} is not a multiple of n_head = {heads}"
            )));
        }
        self.spec(shape)
    }

    /// `rope_theta` at the top, or, since transformers 5, inside `rope_parameters`.
    fn rope_theta(&self) -> Result<f64, ModelError> {
        let Some(parameters) = self.get("rope_parameters") else {
            return self.number_or("rope_theta", 10_000.0);
        };
        let inner = Fields { config: parameters };
        inner.require("rope_type", &json!("default"))?;
        inner.number_or("rope_theta", 10_000.0)
    }

    fn spec(&self, shape: ModelShape) -> Result<DecoderSpec, ModelError> {
        Ok(DecoderSpec {
            shape,
            vocab_size: self.count("vocab_size")?,
            eos_token_id: self.token("eos_token_id")?,
            bos_token_id: self.token("bos_token_id")?,
        })
    }

    fn get(&self, field: &str) -> Option<&Value> {
        self.config.get(field).filter(|value| !value.is_null())
    }

    fn invalid(&self, field: &str, expected: &str) -> ModelError {
        ModelError::Field {
            field: field.to_string(),
            found: self
                .config
                .get(field)
                .cloned()
                .unwrap_or(Value::Null)
                .to_string(),
            expected: expected.to_string(),
        }
    }

    fn unsupported(&self, field: &str, value: &Value) -> ModelError {
        ModelError::Unsupported {
            field: field.to_string(),
            value: value.to_string(),
        }
    }

    /// A field that, where present, must have the one value this build implements.
    fn require(&self, field: &str, supported: &Value) -> Result<(), ModelError> {
        match self.get(field) {
            Some(value) if value != supported => Err(self.unsupported(field, value)),
            _ => Ok(()),
        }
    }

    fn text(&self, field: &str) -> Result<&str, ModelError> {
        self.get(field)
            .and_then(Value::as_str)
            .ok_or_else(|| self.invalid(field, "a string"))
    }

    fn count(&self, field: &str) -> Result<usize, ModelError> {
        self.get(field)
            .and_then(Value::as_u64)
            .and_then(|value| usize::try_from(value).ok())
            .ok_or_else(|| self.invalid(field, "a positive integer"))
    }

    fn count_or(&self, field: &str, default: usize) -> Result<usize, ModelError> {
        self.get(field).map_or(Ok(default), |_| self.count(field))
    }

    fn number_or(&self, field: &str, default: f64) -> Result<f64, ModelError> {
        self.get(field).map_or(Ok(default), |value| {
            value
                .as_f64()
                .ok_or_else(|| self.invalid(field, "a number"))
        })
    }

    fn flag_or(&self, field: &str, default: bool) -> Result<bool, ModelError> {
        self.get(field).map_or(Ok(default), |value| {
            value
                .as_bool()
                .ok_or_else(|| self.invalid(field, "true or false"))
        })
    }

    fn token(&self, field: &str) -> Result<Option<u32>, ModelError> {
        // Newer configs list several end tokens; the first is the one texts are ended with.
        let value = match self.get(field) {
            Some(Value::Array(several)) => several.first(),
            other => other,
        };
        let Some(value) = value else { return Ok(None) };
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(Some)
            .ok_or_else(|| self.invalid(field, "a token id"))
    }
}
