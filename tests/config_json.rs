//! M1: config.json of every family, in the spellings there are.
#![allow(missing_docs)]

mod support;

use firebrick::config::{
    Architecture, DecoderSpec, EraOutput, Granularity, HiddenAct, RopeScaling, SaveDtype, SpecError,
};
use serde_json::{Value, json};
use support::{tiny, variants};

/// What no class has a default for here.
fn least(model_type: &str) -> Value {
    json!({
        "model_type": model_type,
        "hidden_size": 4096,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "vocab_size": 40000,
    })
}

fn with(model_type: &str, changes: &Value) -> Value {
    let mut config = least(model_type);
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    config
}

fn read(model_type: &str, changes: Value) -> Result<DecoderSpec, SpecError> {
    DecoderSpec::from_config_json(&with(model_type, &changes))
}

#[test]
fn m1_absent_fields_take_the_defaults_of_their_class() {
    // key/value heads, head width, positions, epsilon, window, bos, eos: transformers 5.23.
    let expected = [
        ("llama", 32, 128, 2048, 1e-6, None, Some(1), Some(2)),
        (
            "mistral",
            8,
            128,
            131_072,
            1e-6,
            Some(4096),
            Some(1),
            Some(2),
        ),
        ("qwen2", 32, 128, 32_768, 1e-6, None, None, None),
        ("qwen3", 32, 128, 32_768, 1e-6, None, None, None),
        ("phi3", 32, 128, 4096, 1e-5, None, Some(1), Some(32_000)),
    ];
    for (name, kv_heads, head_dim, positions, eps, window, bos, eos) in expected {
        let spec = read(name, json!({})).unwrap();
        let shape = &spec.shape;
        assert_eq!(shape.architecture.name(), name);
        assert_eq!(shape.num_key_value_heads, kv_heads, "{name}");
        assert_eq!(shape.head_dim, head_dim, "{name}");
        assert_eq!(shape.max_position_embeddings, positions, "{name}");
        assert_eq!(shape.norm_eps, eps, "{name}");
        assert_eq!(shape.sliding_window, window, "{name}");
        assert_eq!((spec.bos_token_id, spec.eos_token_id), (bos, eos), "{name}");
        assert_eq!(
            (shape.rope_theta, shape.rope_scaling),
            (1e4, None),
            "{name}"
        );
        assert!(!shape.tie_word_embeddings && !shape.bias, "{name}");
        assert_eq!(shape.qkv_bias, name == "qwen2");
        assert_eq!(shape.qk_norm, name == "qwen3");
    }
    // Qwen3's head width does not follow from the others.
    let narrow = json!({"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2});
    assert_eq!(read("qwen3", narrow.clone()).unwrap().shape.head_dim, 128);
    assert_eq!(read("qwen2", narrow).unwrap().shape.head_dim, 16);
    // Null is not absence.
    let null = json!({"sliding_window": null, "num_key_value_heads": null, "eos_token_id": null});
    let spec = read("mistral", null).unwrap();
    assert_eq!(spec.shape.sliding_window, None);
    assert_eq!(spec.shape.num_key_value_heads, 32);
    assert_eq!(spec.eos_token_id, None);
    // An end token that the vocabulary does not have is never written.
    let small = read("phi3", json!({"vocab_size": 320})).unwrap();
    assert_eq!(small.eos_token_id, None);
}

#[test]
fn m1_rope_is_read_in_the_old_and_the_new_spelling() {
    let linear = Some(RopeScaling::Linear { factor: 4.0 });
    let llama3 = Some(RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    });
    let inside = |kind: &str| {
        json!({
            "rope_type": kind, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4,
            "original_max_position_embeddings": 64,
        })
    };
    let mut new = inside("llama3");
    new["rope_theta"] = json!(5e5);
    let cases = [
        (json!({"rope_theta": 5e5}), None),
        (json!({"rope_theta": 5e5, "rope_scaling": null}), None),
        (
            json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}),
            None,
        ),
        (
            json!({"rope_parameters": {"rope_theta": 500000, "rope_type": "default"}}),
            None,
        ),
        (
            json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}),
            linear,
        ),
        (
            json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
            linear,
        ),
        (
            json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}),
            linear,
        ),
        (
            json!({"rope_theta": 5e5, "rope_scaling": inside("llama3")}),
            llama3,
        ),
        (json!({"rope_parameters": new}), llama3),
        // As in transformers: the old spelling wins, and so does a length outside.
        (
            json!({
                "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4},
                "rope_parameters": {"rope_type": "default"},
            }),
            linear,
        ),
    ];
    for (changes, scaling) in cases {
        for family in ["llama", "mistral", "qwen2", "qwen3"] {
            let shape = read(family, changes.clone()).unwrap().shape;
            assert_eq!(
                (shape.rope_theta, shape.rope_scaling),
                (5e5, scaling),
                "{changes}"
            );
        }
    }
    let mut outside = json!({"rope_scaling": inside("llama3")});
    outside["original_max_position_embeddings"] = json!(32);
    let shape = read("llama", outside).unwrap().shape;
    assert!(matches!(
        shape.rope_scaling,
        Some(RopeScaling::Llama3 {
            original_max_position_embeddings: 32,
            ..
        })
    ));
}

#[test]
fn m1_qwens_window_is_on_all_layers_or_none() {
    let window = |changes: Value| {
        ["qwen2", "qwen3"].map(|family| {
            let spec = read(family, changes.clone());
            spec.map(|spec| spec.shape.sliding_window)
        })
    };
    let none: [Value; 5] = [
        json!({"sliding_window": 8}),
        json!({"sliding_window": 8, "use_sliding_window": false, "max_window_layers": 0}),
        json!({"sliding_window": 8, "use_sliding_window": true}),
        json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 2}),
        json!({"sliding_window": 8, "use_sliding_window": true, "layer_types": ["full_attention", "full_attention"]}),
    ];
    for changes in none {
        for found in window(changes.clone()) {
            assert_eq!(found.unwrap(), None, "{changes}");
        }
    }
    let all: [Value; 2] = [
        json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 0}),
        json!({"sliding_window": 8, "use_sliding_window": true, "layer_types": ["sliding_attention", "sliding_attention"]}),
    ];
    for changes in all {
        for found in window(changes.clone()) {
            assert_eq!(found.unwrap(), Some(8), "{changes}");
        }
    }
    let mixed = [
        (
            "max_window_layers",
            json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 1}),
        ),
        (
            "layer_types",
            json!({"sliding_window": 8, "use_sliding_window": true, "layer_types": ["full_attention", "sliding_attention"]}),
        ),
        (
            "layer_types",
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
        ),
        ("layer_types", json!({"layer_types": ["full_attention"]})),
        ("layer_types", json!({"layer_types": "full_attention"})),
    ];
    for (field, changes) in mixed {
        for found in window(changes.clone()) {
            let error = found.unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}`")), "{changes}: {error}");
        }
    }
}

#[test]
fn o3_activations_are_read_as_they_are_written() {
    let act =
        |name: &str| read("qwen3", json!({"hidden_act": name})).map(|spec| spec.shape.hidden_act);
    for (name, expected) in [
        ("silu", HiddenAct::Silu),
        ("swish", HiddenAct::Silu),
        ("relu2", HiddenAct::Relu2),
        ("gelu_era", HiddenAct::GeluEra),
    ] {
        assert_eq!(act(name).unwrap(), Some(expected), "{name}");
    }
    for act in HiddenAct::ALL {
        let mut spec = tiny(Architecture::Llama);
        spec.shape.hidden_act = Some(act);
        let written = spec.to_config_json(SaveDtype::F32);
        assert_eq!(written["hidden_act"], act.name());
        assert_eq!(DecoderSpec::from_config_json(&written).unwrap(), spec);
    }
}

/// Programs that do not know the activation of the output do not know the model's name either.
#[test]
fn o3_a_model_with_an_activated_output_has_a_name_of_its_own() {
    for architecture in Architecture::ALL {
        let mut spec = tiny(architecture);
        spec.shape.output_activation = Some(EraOutput { min_entropy: 0.75 });
        let written = spec.to_config_json(SaveDtype::F32);
        let name = architecture.name();
        assert_eq!(written["model_type"], format!("era_{name}"));
        let class = written["architectures"][0].as_str().unwrap();
        assert!(class.starts_with("Era"), "{class}");
        assert_eq!(DecoderSpec::from_config_json(&written).unwrap(), spec);

        let refused = |changes: &[(&str, Value)]| {
            let mut config = written.clone();
            for (field, value) in changes {
                config[field] = value.clone();
            }
            DecoderSpec::from_config_json(&config)
                .unwrap_err()
                .to_string()
        };
        let error = refused(&[("output_activation", Value::Null)]);
        assert!(error.contains("`output_activation`"), "{error}");
        let error = refused(&[("output_activation", json!({"type": "soft_cap"}))]);
        assert!(error.contains("`output_activation.type`"), "{error}");
        let error = refused(&[(
            "output_activation",
            json!({"type": "era", "min_entropy": "1"}),
        )]);
        assert!(error.contains("`output_activation.min_entropy`"), "{error}");
        let class = json!([class.strip_prefix("Era").unwrap()]);
        let error = refused(&[("model_type", json!(name)), ("architectures", class)]);
        assert!(error.contains("`output_activation`"), "{error}");
    }
}

/// Families, a field as a message names it, and what it must not be.
#[test]
fn m1_what_is_not_supported_is_named_with_its_value() {
    let all = ["llama", "mistral", "qwen2", "qwen3", "phi3"];
    let cases: &[(&[&str], &str, Value)] = &[
        (&all, "hidden_act", json!({"hidden_act": "gelu"})),
        (&all, "attention_bias", json!({"attention_bias": true})),
        (&all, "mlp_bias", json!({"mlp_bias": true})),
        (&all, "attention_dropout", json!({"attention_dropout": 0.1})),
        (
            &all,
            "partial_rotary_factor",
            json!({"partial_rotary_factor": 0.75}),
        ),
        (
            &all,
            "rope_parameters.partial_rotary_factor",
            json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ),
        (
            &all,
            "quantization_config.quant_method",
            json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ),
        // Packed by another tool, which is what transformers takes these for where they are silent.
        (
            &["llama", "bitnet"],
            "quantization_config.linear_class",
            json!({"quantization_config": {"quant_method": "bitnet"}}),
        ),
        (
            &["llama", "bitnet"],
            "quantization_config.quantization_mode",
            json!({"quantization_config": {
                "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
            }}),
        ),
        (
            &["llama", "bitnet"],
            "quantization_config.modules_to_not_convert",
            json!({"quantization_config": {
                "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
                "modules_to_not_convert": ["q_proj"],
            }}),
        ),
        (
            &["phi3"],
            "quantization_config.quant_method",
            json!({"quantization_config": {
                "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
            }}),
        ),
        (&all, "num_experts", json!({"num_experts": 8})),
        (&all, "num_local_experts", json!({"num_local_experts": 8})),
        (
            &all,
            "architectures",
            json!({"architectures": ["LlamaForSequenceClassification"]}),
        ),
        (
            &all,
            "rope_scaling.rope_type",
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4}}),
        ),
        (
            &all,
            "rope_scaling.type",
            json!({"rope_scaling": {"type": "dynamic", "factor": 4}}),
        ),
        (
            &all,
            "rope_scaling.type",
            json!({"rope_scaling": {"type": "longrope", "short_factor": [1]}}),
        ),
        (
            &all,
            "rope_scaling.rope_type",
            json!({"rope_scaling": {"rope_type": "su"}}),
        ),
        (
            &["phi3"],
            "rope_scaling.type",
            json!({"rope_scaling": {"type": "linear", "factor": 4}}),
        ),
        (
            &all,
            "rope_parameters.full_attention",
            json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        ),
        (
            &all,
            "rope_scaling.mrope_section",
            json!({"rope_scaling": {"type": "default", "mrope_section": [1]}}),
        ),
        (&["llama"], "sliding_window", json!({"sliding_window": 8})),
        (
            &["mistral", "phi3"],
            "layer_types",
            json!({"sliding_window": 8, "layer_types": ["full_attention", "full_attention"]}),
        ),
    ];
    for (families, field, changes) in cases {
        for family in *families {
            let error = read(family, changes.clone()).unwrap_err();
            let said = error.to_string();
            assert!(
                said.contains(&format!("`{field}`")),
                "{family} {changes}: {said}"
            );
            assert!(matches!(error, SpecError::Unsupported { .. }), "{said}");
            let of_weights = field.starts_with("quantization_config");
            let named = if of_weights { "online" } else { "phi3" };
            assert!(error.help().is_some_and(|help| help.contains(named)));
        }
    }
    for absent in ["mamba", "gpt_neox", ""] {
        let error = read(absent, json!({})).unwrap_err();
        assert!(error.to_string().contains("model_type"), "{error}");
    }
    let gelu = json!({
        "model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 9,
    });
    let error = DecoderSpec::from_config_json(&gelu).unwrap_err();
    assert!(error.to_string().contains("activation_function"), "{error}");
}

#[test]
fn t1_a_hub_config_of_bitnet_is_read() {
    // The fields of microsoft/bitnet-b1.58-2B-4T-bf16.
    let config = json!({
        "architectures": ["BitNetForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_bitnet.BitNetConfig"},
        "bos_token_id": 128000, "eos_token_id": 128001,
        "hidden_act": "relu2", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 4096, "model_type": "bitnet",
        "rms_norm_eps": 1e-05, "num_attention_heads": 20, "num_hidden_layers": 30,
        "num_key_value_heads": 5, "rope_theta": 500000.0, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128256,
        "quantization_config": {
            "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
        },
    });
    let spec = DecoderSpec::from_config_json(&config).unwrap();
    assert!(spec.shape.is_bitnet_form());
    let ternary = spec.shape.ternary.unwrap();
    assert_eq!(ternary.granularity, Granularity::Tensor);
    assert!(ternary.rounds_activations);
    assert_eq!(spec.shape.rope_theta, 500_000.0);
    // 2.4 billion, as published; the embedding counted once.
    let parameters = spec.shape.parameters(spec.vocab_size);
    assert_eq!(parameters, 2_412_820_480);
}

#[test]
fn m1_what_is_written_reads_back_in_every_number_format() {
    for (name, spec) in variants() {
        for dtype in [SaveDtype::F32, SaveDtype::Bf16, SaveDtype::F16] {
            let config = spec.to_config_json(dtype);
            assert_eq!(
                DecoderSpec::from_config_json(&config).unwrap(),
                spec,
                "{name}"
            );
            assert_eq!(config["torch_dtype"], dtype.torch_name());
        }
    }
    assert_eq!(Architecture::ALL.len(), 7);
}
