//! From a [`DecoderSpec`] to `config.json`, in words that transformers 4 and 5 both read.

use serde_json::{Map, Value, json};

use super::{DecoderSpec, ERA_CLASS, ERA_PREFIX, quantization};
use crate::config::keys::{Architecture, HiddenAct, SaveDtype};
use crate::config::shape::{ModelShape, RopeScaling};

impl DecoderSpec {
    /// The `config.json` that Hugging Face's tools read this model with; `dtype` is that of the
    /// weights beside it.
    pub fn to_config_json(&self, dtype: SaveDtype) -> Value {
        let shape = &self.shape;
        let mut config = object(json!({"model_type": shape.architecture.name()}));
        config.extend(match shape.architecture {
            Architecture::Gpt2 => gpt2(shape),
            _ => rotary(shape),
        });
        if let Some(era) = shape.output_activation {
            let name = shape.architecture.name();
            config.insert("model_type".into(), json!(format!("{ERA_PREFIX}{name}")));
            let class = config["architectures"][0].as_str().unwrap_or_default();
            let class = format!("{ERA_CLASS}{class}");
            config.insert("architectures".into(), json!([class]));
            let output = json!({"type": "era", "min_entropy": era.min_entropy});
            config.insert("output_activation".into(), output);
        }
        if let Some(quantization) = quantization::write(shape) {
            config.insert("quantization_config".into(), quantization);
        }
        config.insert(
            "tie_word_embeddings".into(),
            json!(shape.tie_word_embeddings),
        );
        config.insert("initializer_range".into(), json!(shape.initializer_range));
        config.insert("vocab_size".into(), json!(self.vocab_size));
        config.insert("bos_token_id".into(), json!(self.bos_token_id));
        config.insert("eos_token_id".into(), json!(self.eos_token_id));
        // Transformers 5 writes `dtype` and reads both.
        config.insert("torch_dtype".into(), json!(dtype.torch_name()));
        Value::Object(config)
    }
}

fn rotary(shape: &ModelShape) -> Map<String, Value> {
    let class = match shape.architecture {
        Architecture::Mistral => "MistralForCausalLM",
        Architecture::Qwen2 => "Qwen2ForCausalLM",
        Architecture::Qwen3 => "Qwen3ForCausalLM",
        Architecture::Phi3 => "Phi3ForCausalLM",
        Architecture::Bitnet => "BitNetForCausalLM",
        Architecture::Llama | Architecture::Gpt2 => "LlamaForCausalLM",
    };
    let mut config = object(json!({
        "architectures": [class],
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": shape.hidden_act.map(HiddenAct::name),
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": shape.rope_scaling.map(rope_scaling),
        "attention_dropout": 0.0,
        // Phi3's default lies outside small vocabularies.
        "pad_token_id": null,
    }));
    let more = match shape.architecture {
        Architecture::Llama => json!({"attention_bias": false, "mlp_bias": false}),
        Architecture::Bitnet => json!({"attention_bias": false}),
        Architecture::Mistral => json!({"sliding_window": shape.sliding_window}),
        Architecture::Phi3 => json!({
            "sliding_window": shape.sliding_window,
            "original_max_position_embeddings": shape.max_position_embeddings,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        }),
        _ => {
            let (kind, first) = match shape.sliding_window {
                Some(_) => ("sliding_attention", 0),
                None => ("full_attention", shape.num_hidden_layers),
            };
            json!({
                "use_sliding_window": shape.sliding_window.is_some(),
                "sliding_window": shape.sliding_window,
                "max_window_layers": first,
                "layer_types": vec![kind; shape.num_hidden_layers],
            })
        }
    };
    config.extend(object(more));
    if shape.architecture == Architecture::Qwen3 {
        config.insert("attention_bias".into(), json!(false));
    }
    config
}

/// Before 4.43 transformers took exactly `type` and `factor`; since then it takes `type` for
/// `rope_type`, and llama3, which came with it, is spelled the new way.
fn rope_scaling(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::Linear { factor } => json!({"type": "linear", "factor": factor}),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    }
}

fn gpt2(shape: &ModelShape) -> Map<String, Value> {
    object(json!({
        "architectures": ["GPT2LMHeadModel"],
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
    }))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => unreachable!("{other} is written as an object above"),
    }
}
