//! From `config.json` to a [`DecoderSpec`].
//!
//! A field that is absent takes the default of its family's configuration class in transformers. A
//! field that changes what the model computes and is not implemented is an error that names it.
//! Fields that no class of these families reads are left alone, as transformers does.

use serde_json::{Value, json};

use super::fields::Fields;
use super::{DecoderSpec, ERA_CLASS, ERA_PREFIX, SpecError};
use crate::config::era::EraOutput;
use crate::config::keys::{Architecture, HiddenAct};
use crate::config::shape::{ModelShape, RopeScaling};

/// What a family's configuration class takes where config.json is silent.
struct Family {
    architecture: Architecture,
    class: &'static str,
    /// None: as many as query heads.
    kv_heads: Option<usize>,
    /// None: hidden_size / num_attention_heads.
    head_dim: Option<usize>,
    positions: usize,
    norm_eps: f64,
    rope_theta: f64,
    sliding_window: Option<usize>,
    bos: Option<u32>,
    eos: Option<u32>,
}

const LLAMA: Family = Family {
    architecture: Architecture::Llama,
    class: "LlamaForCausalLM",
    kv_heads: None,
    head_dim: None,
    positions: 2048,
    norm_eps: 1e-6,
    rope_theta: 10_000.0,
    sliding_window: None,
    bos: Some(1),
    eos: Some(2),
};

const MISTRAL: Family = Family {
    architecture: Architecture::Mistral,
    class: "MistralForCausalLM",
    kv_heads: Some(8),
    positions: 4096 * 32,
    sliding_window: Some(4096),
    ..LLAMA
};

const QWEN2: Family = Family {
    architecture: Architecture::Qwen2,
    class: "Qwen2ForCausalLM",
    kv_heads: Some(32),
    positions: 32768,
    sliding_window: Some(4096),
    bos: None,
    eos: None,
    ..LLAMA
};

const QWEN3: Family = Family {
    architecture: Architecture::Qwen3,
    class: "Qwen3ForCausalLM",
    head_dim: Some(128),
    ..QWEN2
};

const PHI3: Family = Family {
    architecture: Architecture::Phi3,
    class: "Phi3ForCausalLM",
    positions: 4096,
    norm_eps: 1e-5,
    eos: Some(32000),
    ..LLAMA
};

const BITNET: Family = Family {
    architecture: Architecture::Bitnet,
    class: "BitNetForCausalLM",
    kv_heads: Some(5),
    norm_eps: 1e-5,
    rope_theta: 500_000.0,
    bos: Some(128_000),
    eos: Some(128_001),
    ..LLAMA
};

impl DecoderSpec {
    /// Reads a parsed `config.json`.
    ///
    /// # Errors
    /// A missing field, a field of the wrong type or out of range, or a value this build cannot
    /// honour: each is named, none is ignored.
    pub fn from_config_json(config: &Value) -> Result<Self, SpecError> {
        let fields = Fields::new(config)?;
        let family = fields.text("model_type")?;
        let spec = match family.strip_prefix(ERA_PREFIX).unwrap_or(family) {
            "llama" => fields.rotary(&LLAMA)?,
            "mistral" => fields.rotary(&MISTRAL)?,
            "qwen2" => fields.rotary(&QWEN2)?,
            "qwen3" => fields.rotary(&QWEN3)?,
            "phi3" => fields.rotary(&PHI3)?,
            "bitnet" => fields.rotary(&BITNET)?,
            "gpt2" => fields.gpt2()?,
            _ => return Err(fields.unsupported("model_type")),
        };
        spec.check()?;
        Ok(spec)
    }
}

impl Fields<'_> {
    /// What is applied to the gate.
    fn hidden_act(&self, architecture: Architecture) -> Result<Option<HiddenAct>, SpecError> {
        if self.get("hidden_act").is_none() {
            return Ok(architecture.hidden_act());
        }
        let name = match self.text("hidden_act")? {
            // Another name of the same in transformers.
            "swish" => HiddenAct::Silu.name(),
            name => name,
        };
        let found = HiddenAct::ALL.into_iter().find(|act| act.name() == name);
        found
            .map(Some)
            .ok_or_else(|| self.unsupported("hidden_act"))
    }

    /// Whether the file is of a model that only this library builds: its `model_type` says so, for
    /// programs that would leave out the activation of the output without a word.
    fn has_era(&self) -> Result<bool, SpecError> {
        Ok(self.text("model_type")?.starts_with(ERA_PREFIX))
    }

    fn output_activation(&self) -> Result<Option<EraOutput>, SpecError> {
        let output = self.inner("output_activation", "output_activation.")?;
        let Some(output) = output else {
            return match self.has_era()? {
                true => Err(self.invalid("output_activation", "the activation of the output")),
                false => Ok(None),
            };
        };
        if !self.has_era()? {
            return Err(self.unsupported("output_activation"));
        }
        output.require("type", &json!("era"))?;
        let min_entropy = output.get("min_entropy").and_then(Value::as_f64);
        let min_entropy = min_entropy.ok_or_else(|| output.invalid("min_entropy", "a number"))?;
        Ok(Some(EraOutput { min_entropy }))
    }

    fn rotary(&self, family: &Family) -> Result<DecoderSpec, SpecError> {
        self.refuse_unsupported(family.class)?;
        let hidden_size = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        let layers = self.count("num_hidden_layers")?;
        let (rope_theta, rope_scaling) = self.rope(family)?;
        let (ternary, blockwise) = self.quantization(family.architecture)?;
        let shape = ModelShape {
            architecture: family.architecture,
            hidden_size,
            intermediate_size: self.count("intermediate_size")?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: self
                .optional_count("num_key_value_heads", family.kv_heads)?
                .unwrap_or(heads),
            head_dim: match self.optional_count("head_dim", family.head_dim)? {
                Some(width) => width,
                None => even_share("hidden_size", hidden_size, "num_attention_heads", heads)?,
            },
            max_position_embeddings: self.count_or("max_position_embeddings", family.positions)?,
            tie_word_embeddings: self.flag_or("tie_word_embeddings", false)?,
            bias: false,
            qkv_bias: family.architecture == Architecture::Qwen2,
            qk_norm: family.architecture == Architecture::Qwen3,
            norm_eps: self.positive_or("rms_norm_eps", family.norm_eps)?,
            rope_theta,
            rope_scaling,
            sliding_window: self.window(family, layers)?,
            hidden_act: self.hidden_act(family.architecture)?,
            output_activation: self.output_activation()?,
            initializer_range: self.positive_or("initializer_range", 0.02)?,
            zero_init_output: false,
            ternary,
            blockwise,
        };
        self.spec(shape, family.bos, family.eos)
    }

    fn gpt2(&self) -> Result<DecoderSpec, SpecError> {
        self.refuse_unsupported("GPT2LMHeadModel")?;
        self.require("activation_function", &json!("gelu"))?;
        if !self.has("activation_function") {
            // The class's default is another form of GELU.
            return Err(self.invalid("activation_function", "\"gelu\""));
        }
        let hidden_size = self.count("n_embd")?;
        let heads = self.count("n_head")?;
        let (ternary, blockwise) = self.quantization(Architecture::Gpt2)?;
        let shape = ModelShape {
            architecture: Architecture::Gpt2,
            hidden_size,
            intermediate_size: match self.optional_count("n_inner", None)? {
                Some(width) => width,
                None => hidden_size.saturating_mul(4),
            },
            num_hidden_layers: self.count("n_layer")?,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: even_share("n_embd", hidden_size, "n_head", heads)?,
            max_position_embeddings: self.count_or("n_positions", 1024)?,
            tie_word_embeddings: self.flag_or("tie_word_embeddings", true)?,
            bias: self.flag_or("bias", true)?,
            qkv_bias: false,
            qk_norm: false,
            norm_eps: self.positive_or("layer_norm_epsilon", 1e-5)?,
            rope_theta: 10_000.0,
            rope_scaling: None,
            sliding_window: None,
            hidden_act: None,
            output_activation: self.output_activation()?,
            initializer_range: self.positive_or("initializer_range", 0.02)?,
            zero_init_output: false,
            ternary,
            blockwise,
        };
        self.spec(shape, Some(50256), Some(50256))
    }

    fn spec(
        &self,
        shape: ModelShape,
        bos: Option<u32>,
        eos: Option<u32>,
    ) -> Result<DecoderSpec, SpecError> {
        let vocab_size = self.count("vocab_size")?;
        // A class's default that lies outside the vocabulary is never written.
        let known = |id: Option<u32>| id.filter(|&id| (id as usize) < vocab_size);
        Ok(DecoderSpec {
            shape,
            vocab_size,
            eos_token_id: self.token("eos_token_id", known(eos))?,
            bos_token_id: self.token("bos_token_id", known(bos))?,
        })
    }

    /// Everything that would make this another model than the one that is built.
    fn refuse_unsupported(&self, class: &str) -> Result<(), SpecError> {
        let classes = self.get("architectures").and_then(Value::as_array);
        let class = match self.has_era()? {
            true => format!("{ERA_CLASS}{class}"),
            false => class.to_string(),
        };
        if classes.is_some_and(|names| !names.iter().any(|name| name == &class)) {
            return Err(self.unsupported("architectures"));
        }
        for field in ABSENT {
            self.require(field, &Value::Null)?;
        }
        for field in OFF {
            self.require(field, &json!(false))?;
        }
        for field in ZERO {
            self.require(field, &json!(0))?;
        }
        for field in ONE {
            self.require(field, &json!(1))?;
        }
        self.require("scale_attn_weights", &json!(true))
    }

    /// The window all layers share. Layers with and without one are not built.
    fn window(&self, family: &Family, layers: usize) -> Result<Option<usize>, SpecError> {
        let window = self.optional_count("sliding_window", family.sliding_window)?;
        let qwen = matches!(
            family.architecture,
            Architecture::Qwen2 | Architecture::Qwen3
        );
        let never = matches!(
            family.architecture,
            Architecture::Llama | Architecture::Bitnet
        );
        if never && window.is_some() {
            return Err(self.unsupported("sliding_window"));
        }
        if !qwen {
            self.require("use_sliding_window", &json!(window.is_some()))?;
            self.require_layer_types(layers, window.is_some())?;
            return Ok(window);
        }
        let window = if self.flag_or("use_sliding_window", false)? {
            window
        } else {
            None
        };
        if self.get("layer_types").is_some() {
            // They decide; a window that no layer has is no window.
            let sliding = window.is_some() && !self.layer_types_are("full_attention");
            self.require_layer_types(layers, sliding)?;
            return Ok(window.filter(|_| sliding));
        }
        let first = match self.get("max_window_layers") {
            None => 28,
            Some(Value::Number(first)) if first.as_u64() == Some(0) => 0,
            Some(_) => self.count("max_window_layers")?,
        };
        match window {
            Some(_) if first >= layers => Ok(None),
            Some(_) if first > 0 => Err(self.unsupported("max_window_layers")),
            window => Ok(window),
        }
    }

    fn layer_types_are(&self, kind: &str) -> bool {
        let types = self.get("layer_types").and_then(Value::as_array);
        types.is_some_and(|types| types.iter().all(|name| name == kind))
    }

    /// `layer_types`, where present, must say of every layer what holds for all.
    fn require_layer_types(&self, layers: usize, sliding: bool) -> Result<(), SpecError> {
        let Some(types) = self.get("layer_types") else {
            return Ok(());
        };
        if types.as_array().is_none_or(|types| types.len() != layers) {
            let expected = format!("a list of {layers} names, one a layer");
            return Err(self.invalid("layer_types", &expected));
        }
        let kind = if sliding {
            "sliding_attention"
        } else {
            "full_attention"
        };
        if self.layer_types_are(kind) {
            Ok(())
        } else {
            Err(self.unsupported("layer_types"))
        }
    }

    /// Base and scaling of the rotary frequencies. Since transformers 5 they are in
    /// `rope_parameters`; before, the base was `rope_theta` and the rest in `rope_scaling`, which
    /// still wins where a file has both.
    fn rope(&self, family: &Family) -> Result<(f64, Option<RopeScaling>), SpecError> {
        let theta = self.positive_or("rope_theta", family.rope_theta)?;
        let old = self.inner("rope_scaling", "rope_scaling.")?;
        let rope = match old.filter(|old| !old.is_empty()) {
            Some(old) => old,
            None => match self.inner("rope_parameters", "rope_parameters.")? {
                Some(new) => new,
                None => return Ok((theta, None)),
            },
        };
        let theta = rope.positive_or("rope_theta", theta)?;
        rope.require("partial_rotary_factor", &json!(1))?;
        let spelled = ["rope_type", "type"];
        let spelled = spelled.into_iter().find(|field| rope.get(field).is_some());
        let kind = spelled.map_or(Ok("default"), |field| rope.text(field))?;
        let unsupported = || rope.unsupported(spelled.unwrap_or("rope_type"));
        let (known, scaling): (&[&str], _) = match kind {
            "default" => (&[], None),
            // Its class in transformers takes none of the others.
            _ if family.architecture == Architecture::Phi3 => return Err(unsupported()),
            "linear" => {
                let factor = rope.positive("factor")?;
                (&["factor"], Some(RopeScaling::Linear { factor }))
            }
            "llama3" => (
                &[
                    "factor",
                    "low_freq_factor",
                    "high_freq_factor",
                    "original_max_position_embeddings",
                ],
                Some(self.llama3(&rope)?),
            ),
            _ => return Err(unsupported()),
        };
        let always = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
        let mut unknown = rope
            .names()
            .filter(|name| !always.contains(name) && !known.contains(name));
        match unknown.find(|name| rope.get(name).is_some()) {
            Some(name) => Err(rope.unsupported(name)),
            None => Ok((theta, scaling)),
        }
    }

    fn llama3(&self, rope: &Fields) -> Result<RopeScaling, SpecError> {
        let field = "original_max_position_embeddings";
        let original = match (self.get(field), rope.get(field)) {
            (Some(_), _) => self.count(field)?,
            (None, Some(_)) => rope.count(field)?,
            (None, None) => self.count("max_position_embeddings")?,
        };
        let (low, high) = (
            rope.positive("low_freq_factor")?,
            rope.positive("high_freq_factor")?,
        );
        if low >= high {
            return Err(rope.invalid("low_freq_factor", "below high_freq_factor"));
        }
        Ok(RopeScaling::Llama3 {
            factor: rope.positive("factor")?,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        })
    }
}

/// Fields that only another kind of model has.
const ABSENT: &[&str] = &[
    "compression_config",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_chunk_size",
    "no_rope_layers",
    "clip_qkv",
    "kv_lora_rank",
    "q_lora_rank",
    "per_layer_config",
    "text_config",
    "vision_config",
    "audio_config",
];
const OFF: &[&str] = &[
    "attention_bias",
    "mlp_bias",
    "use_mrope",
    "use_qk_norm",
    "qk_layernorm",
    "alibi",
    "add_cross_attention",
    "is_encoder_decoder",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
];
/// Dropout is not built; a run that trains the model further would leave it out.
const ZERO: &[&str] = &[
    "attention_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "hidden_dropout",
    "chunk_size_feed_forward",
];
const ONE: &[&str] = &[
    "partial_rotary_factor",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
];

fn even_share(whole: &str, width: usize, parts: &str, heads: usize) -> Result<usize, SpecError> {
    if width.is_multiple_of(heads) {
        Ok(width / heads)
    } else {
        Err(SpecError::shape(format!(
            "{whole} = {width} is not a multiple of {parts} = {heads}"
        )))
    }
}
