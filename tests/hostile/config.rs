//! config.json: missing fields, absurd numbers, other types.

use firebrick::config::{Architecture, SaveDtype};
use serde_json::{Value, json};

use super::{Model, runner};

const SIZES: [&str; 6] = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "model_type",
];

fn with_config(architecture: Architecture, change: impl FnOnce(&mut Value)) -> Model {
    let model = Model::new(architecture);
    let mut config = model.spec.to_config_json(SaveDtype::F32);
    change(&mut config);
    model.write("config.json", config.to_string());
    model
}

#[test]
fn a_missing_size_is_named() {
    for architecture in [Architecture::Llama, Architecture::Phi3, Architecture::Qwen3] {
        for field in SIZES {
            let model = with_config(architecture, |config| {
                config.as_object_mut().unwrap().remove(field);
            });
            model.refused(&[&format!("`{field}`"), "nothing"]);
            let model = with_config(architecture, |config| config[field] = Value::Null);
            model.refused(&[&format!("`{field}`")]);
        }
    }
}

#[test]
fn absurd_values_are_refused_by_name() {
    let counts = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "vocab_size",
    ];
    let absurd = [
        json!(0),
        json!(-1),
        json!(1.5),
        json!(1_000_000_000_000_000_000_u64),
        json!(u64::MAX),
        json!(1e300),
        json!("24"),
        json!(true),
        json!([24]),
        json!({"a": 24}),
    ];
    for field in counts {
        for value in &absurd {
            with_config(Architecture::Mistral, |config| {
                config[field] = value.clone()
            })
            .refused(&[field]);
        }
    }
    for field in ["rms_norm_eps", "rope_theta", "initializer_range"] {
        for value in [json!(0), json!(-1.0), json!("1e-5"), json!([1])] {
            with_config(Architecture::Llama, |config| config[field] = value.clone())
                .refused(&[field]);
        }
    }
    for (field, value) in [
        ("tie_word_embeddings", json!("yes")),
        ("eos_token_id", json!("</s>")),
        ("eos_token_id", json!(-1)),
        ("bos_token_id", json!(1u64 << 40)),
        ("rope_scaling", json!("linear")),
        ("rope_scaling", json!({"rope_type": "linear"})),
        ("rope_scaling", json!({"rope_type": "linear", "factor": -1})),
        ("rope_scaling", json!({"rope_type": 3})),
        ("rope_parameters", json!([])),
        ("hidden_act", json!(7)),
    ] {
        let change = |config: &mut Value| {
            if field == "rope_parameters" {
                config["rope_scaling"] = Value::Null;
            }
            config[field] = value.clone();
        };
        with_config(Architecture::Llama, change).refused(&[field]);
    }
}

/// Sizes within the limits that the weights do not have: no memory is taken for them.
#[test]
fn sizes_that_the_weights_do_not_have_cost_nothing() {
    for (field, value) in [
        ("vocab_size", 1 << 24),
        ("hidden_size", 1 << 20),
        ("intermediate_size", 1 << 22),
        ("num_hidden_layers", 4096),
        ("num_key_value_heads", 4),
        ("head_dim", 1 << 16),
    ] {
        for architecture in [Architecture::Llama, Architecture::Phi3, Architecture::Qwen2] {
            with_config(architecture, |config| {
                config[field] = json!(value);
                config["layer_types"] = Value::Null;
            })
            .refused(&["tensor"]);
        }
    }
    for (field, value) in [
        ("n_positions", 1 << 24),
        ("n_layer", 4096),
        ("n_inner", 1 << 22),
    ] {
        with_config(Architecture::Gpt2, |config| config[field] = json!(value)).refused(&["tensor"]);
    }
}

#[test]
fn shapes_that_do_not_add_up_are_refused() {
    with_config(Architecture::Llama, |config| {
        config.as_object_mut().unwrap().remove("head_dim");
        config["hidden_size"] = json!(26);
    })
    .refused(&["hidden_size", "num_attention_heads"]);
    with_config(Architecture::Gpt2, |config| config["n_embd"] = json!(25)).refused(&["n_embd"]);
    with_config(Architecture::Llama, |config| config["head_dim"] = json!(7)).refused(&["odd"]);
    with_config(Architecture::Llama, |config| {
        config["num_key_value_heads"] = json!(3);
    })
    .refused(&["share"]);
}

#[test]
fn a_file_that_is_no_config_is_refused() {
    let model = Model::new(Architecture::Llama);
    let nested = "[".repeat(100_000);
    let deep = format!("{}1{}", "{\"a\":".repeat(100), "}".repeat(100));
    let large = format!("{{\"a\": \"{}\"}}", "x".repeat(1 << 20));
    let wide = format!("[{}0]", "0,".repeat(120_000));
    for text in [
        "",
        "{",
        "null",
        "[]",
        "3",
        "\"llama\"",
        "{}",
        "{\"a\":1}{",
        &nested,
        &deep,
        &large,
        &wide,
    ] {
        // A parsed number takes a multiple of its digit; the size of the file is limited for that.
        let path = model.path("config.json");
        std::fs::write(&path, text).unwrap();
        let error = firebrick::model::folder::read_config(model.folder.path()).unwrap_err();
        let said = error.to_string();
        assert!(said.contains("config.json"), "{said}");
        assert!(said.len() < 1000, "{said}");
    }
    model.write("config.json", b"\xff\xfe{}");
    model.refused(&["config.json"]);
    for verb in [
        &["logits", "--tokens", "1", "--out", "x"][..],
        &["generate", "--prompt", "a"],
        &["eval", "--data", "x"],
    ] {
        let arguments = [verb, &["--model", "."]].concat();
        let (code, stderr) = runner(model.folder.path(), &arguments);
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.starts_with("error[model]"), "{stderr}");
    }
}
