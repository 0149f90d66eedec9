//! Runs with [adapter]: trained, resumed, exported, read back, merged.

use std::fs;

use safetensors::{Dtype, SafeTensors};

use super::bench::{Bench, json};

const LORA: &str = "\
output_dir = \"out\"
[model]
base_model = \"base\"
[adapter]
r = 4
[data]
sequence_len = 16
val_fraction = 0.1
[[data.datasets]]
path = \"text.txt\"
[train]
micro_batch_size = 4
max_steps = 6
threads = 2
[optimizer]
learning_rate = 1e-2
[eval]
eval_steps = 3
[checkpoint]
save_steps = 2
[logging]
logging_steps = 1
";

/// A base model, and a TOML that adapts it.
fn bench() -> Bench {
    let bench = Bench::new();
    bench.train(&[
        "--output-dir",
        "base",
        "--set",
        "model.tie_word_embeddings=false",
    ]);
    fs::write(bench.path("lora.toml"), LORA).unwrap();
    bench
}

const FORMS: [(&str, &[&str]); 12] = [
    ("lora", &[]),
    ("dora", &["adapter.type=dora"]),
    (
        "dropout",
        &["adapter.lora_dropout=0.2", "adapter.use_rslora=true"],
    ),
    ("pissa", &["adapter.init=pissa"]),
    (
        "saved",
        &["adapter.modules_to_save=[\"lm_head\", \"norm\"]"],
    ),
    (
        "parts",
        &[
            "adapter.target_modules=[\"q_proj\", \"down_proj\"]",
            "adapter.layers=[1]",
            "adapter.rank_pattern={ down_proj = 2 }",
            "adapter.lora_plus_ratio=8",
            "train.gradient_checkpointing=true",
        ],
    ),
    (
        "nf4",
        &["quantization.weights=nf4", "quantization.double_quant=true"],
    ),
    (
        "int4",
        &[
            "quantization.weights=int4",
            "quantization.symmetric=false",
            "adapter.type=dora",
        ],
    ),
    ("ternary", &["quantization.weights=ternary"]),
    (
        "half",
        &["checkpoint.save_dtype=bf16", "adapter.lora_alpha=8.0"],
    ),
    (
        "nf4-pissa",
        &["quantization.weights=nf4", "adapter.init=pissa"],
    ),
    (
        "int8-loftq",
        &[
            "quantization.weights=int8",
            "adapter.init=loftq",
            "adapter.loftq_iterations=2",
        ],
    ),
];

fn arguments<'a>(run: &'a str, sets: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", "lora.toml", "--quiet", "--output-dir", run];
    sets.iter()
        .for_each(|set| arguments.extend(["--set", *set]));
    arguments
}

#[test]
fn a1_a2_a3_a12_an_adapter_is_trained_resumed_exported_and_measured_again() {
    let bench = bench();
    let base = fs::read(bench.path("base/model.safetensors")).unwrap();
    for (name, sets) in FORMS {
        bench.expect(0, &arguments(name, sets));
        let folder = bench.path(name);
        assert!(!folder.join("model.safetensors").exists() && !folder.join("config.json").exists());
        let config = json(&folder.join("adapter_config.json"));
        let changed = name.contains('-');
        let base_folder = if changed {
            format!("{name}/base_model")
        } else {
            "base".to_string()
        };
        assert_eq!(config["base_model_name_or_path"], base_folder);
        assert_eq!(config["use_dora"], name == "dora" || name == "int4");
        let run = json(&folder.join("run.json"));
        assert!(run["trainable"].as_u64().unwrap() < run["parameters"].as_u64().unwrap());

        // What was exported is what was measured in the run.
        let best = run["final"]["best_val_loss"].as_f64().unwrap();
        let text = fs::read_to_string(bench.path("text.txt")).unwrap();
        let cut = (text.chars().count() as f64 * 0.9) as usize;
        fs::write(bench.path("val.txt"), &text[cut..]).unwrap();
        let codes = ["nf4", "int4"].contains(&name);
        for model in [
            vec!["--model", name],
            vec!["--model", &base_folder, "--adapter", name],
        ] {
            if codes && model.len() > 2 {
                // Beside the dense weights it was not trained with.
                continue;
            }
            let eval = [
                "eval",
                "--data",
                "val.txt",
                "--sequence-len",
                "16",
                "--json",
            ];
            let (out, _) = bench.expect(0, &[&eval[..], &model].concat());
            let found = serde_json::from_str::<serde_json::Value>(&out).unwrap();
            let loss = found["val_loss"].as_f64().unwrap();
            assert!((loss - best).abs() < 2e-3, "{name}: {loss} {best}");
        }
        let file = fs::read(folder.join("adapter_model.safetensors")).unwrap();
        let is_half = SafeTensors::deserialize(&file).unwrap();
        let is_half = is_half
            .iter()
            .all(|(_, tensor)| tensor.dtype() == Dtype::BF16);
        assert_eq!(is_half, name == "half");

        // Cut off after step 4 and resumed: bit for bit the same.
        let cut = format!("{name}-cut");
        bench.expect(0, &arguments(&cut, sets));
        fs::remove_dir_all(bench.path(&cut).join("checkpoints/step-000006")).unwrap();
        bench.expect(0, &arguments(&cut, sets));
        assert_eq!(
            bench.checkpoint(&cut, 6),
            bench.checkpoint(name, 6),
            "{name}"
        );
        assert_eq!(bench.metrics(&cut), bench.metrics(name), "{name}");
        let weights =
            |run: &str| fs::read(bench.path(run).join("adapter_model.safetensors")).unwrap();
        assert_eq!(weights(name), weights(&cut), "{name}");
    }
    assert_eq!(
        fs::read(bench.path("base/model.safetensors")).unwrap(),
        base
    );
}

/// What a greedy model goes on with.
fn greedy(bench: &Bench, model: &str) -> serde_json::Value {
    let generate = [
        "generate",
        "--prompt",
        "the ",
        "--temperature",
        "0",
        "--json",
    ];
    let (out, _) = bench.expect(0, &[&generate[..], &["--model", model]].concat());
    serde_json::from_str::<serde_json::Value>(&out).unwrap()["tokens"].clone()
}

#[test]
fn a12_a_run_that_was_moved_finds_the_base_model_it_keeps() {
    let bench = bench();
    let sets = ["quantization.weights=nf4", "adapter.init=pissa"];
    bench.expect(0, &arguments("run", &sets));
    let before = greedy(&bench, "run");
    let card = fs::read_to_string(bench.path("run/README.md")).unwrap();
    assert!(card.contains("`base_model/` beside this file"), "{card}");
    fs::rename(bench.path("run"), bench.path("moved")).unwrap();
    assert_eq!(before, greedy(&bench, "moved"));
    // Its data and the base model that it came from are not needed.
    fs::rename(bench.path("base"), bench.path("gone")).unwrap();
    fs::remove_file(bench.path("text.txt")).unwrap();
    assert_eq!(before, greedy(&bench, "moved"));
}

#[test]
fn a12_q1_an_adapter_beside_codes_needs_no_more_than_its_base_model() {
    let bench = bench();
    bench.expect(0, &arguments("run", &["quantization.weights=int4"]));
    let before = greedy(&bench, "run");
    fs::remove_file(bench.path("text.txt")).unwrap();
    assert_eq!(before, greedy(&bench, "run"));
    // A base model that has codes of its own by now is taken as it is.
    let export = [
        "export", "--model", "base", "--to", "int8", "--out", "eight",
    ];
    bench.expect(0, &export);
    fs::rename(bench.path("base"), bench.path("gone")).unwrap();
    fs::rename(bench.path("eight"), bench.path("base")).unwrap();
    greedy(&bench, "run");
}

#[test]
fn a1_r13_an_estimate_counts_what_dropout_keeps() {
    let bench = bench();
    let activations = |sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", *set]);
        let all = ["estimate", "lora.toml", "--json"].into_iter();
        let (out, _) = bench.expect(0, &all.chain(sets).collect::<Vec<_>>());
        let found: serde_json::Value = serde_json::from_str(&out).unwrap();
        let terms = found["memory"]["terms"].as_array().unwrap().clone();
        let mut terms = terms
            .into_iter()
            .filter(|term| term["name"] == "activations");
        terms.next().map(|term| term["bytes"].as_u64().unwrap())
    };
    // At a size at which activations are the most that there is.
    let large = "train.micro_batch_size=512";
    let (plain, dropped) = (
        activations(&[large]).unwrap(),
        activations(&[large, "adapter.lora_dropout=0.1"]).unwrap(),
    );
    // 2 blocks, 512 x 16 tokens, 2 x 4 bytes for what goes into attention, o, the two before, down.
    assert_eq!(dropped - plain, 2 * 512 * 16 * 8 * (16 + 16 + 16 + 32));
}

#[test]
fn a11_an_adapter_is_not_exported_without_its_base_model() {
    let bench = bench();
    bench.expect(0, &arguments("run", &[]));
    let export = ["export", "--model", "run", "--to", "nf4", "--out", "x"];
    let (_, error) = bench.expect(2, &export);
    assert!(error.contains("runner merge --model run"), "{error}");
}

#[test]
fn a11_a_model_of_few_positions_is_merged() {
    let bench = Bench::new();
    let model = [
        "model.architecture=gpt2",
        "model.tie_word_embeddings=true",
        "model.max_position_embeddings=16",
    ];
    let sets = model.iter().flat_map(|set| ["--set", *set]);
    let sets: Vec<&str> = ["--output-dir", "base"].into_iter().chain(sets).collect();
    bench.train(&sets);
    fs::write(bench.path("lora.toml"), LORA).unwrap();
    bench.expect(0, &arguments("run", &[]));
    bench.expect(0, &["merge", "--model", "run", "--out", "merged"]);
}

#[test]
fn a11_a_merged_model_says_what_base_and_adapter_say() {
    let bench = bench();
    bench.expect(0, &arguments("lora", &["train.max_steps=30"]));
    let merge = [
        "merge",
        "--model",
        "base",
        "--adapter",
        "lora",
        "--out",
        "merged",
    ];
    let (out, _) = bench.expect(0, &merge);
    assert!(out.contains("merged   14 layers"), "{out}");
    let adapted = greedy(&bench, "lora");
    assert_eq!(adapted, greedy(&bench, "merged"));
    assert_ne!(adapted, greedy(&bench, "base"));
    let (_, error) = bench.expect(1, &merge);
    assert!(error.contains("merged is not empty"), "{error}");
    let (_, error) = bench.expect(2, &["merge", "--model", "base", "--out", "x"]);
    assert!(error.contains("there is nothing to merge"), "{error}");

    bench.expect(
        0,
        &arguments(
            "new",
            &["train.max_steps=1", "optimizer.learning_rate=1e-50"],
        ),
    );
    let (_, error) = bench.expect(2, &["merge", "--model", "new", "--out", "x"]);
    assert!(error.contains("the adapter changes nothing"), "{error}");
    assert!(!bench.path("x").exists());
}

#[test]
fn a12_a_base_model_that_has_changed_or_gone_is_said() {
    let bench = bench();
    bench.expect(0, &arguments("lora", &[]));
    let resume = arguments("lora", &["train.max_steps=8"]);
    let weights = bench.path("base/model.safetensors");
    let good = fs::read(&weights).unwrap();
    let mut other = good.clone();
    *other.last_mut().unwrap() ^= 1;
    fs::write(&weights, &other).unwrap();
    let (_, error) = bench.expect(2, &resume);
    assert!(error.contains("a run from another base model"), "{error}");
    fs::write(&weights, &good).unwrap();
    bench.expect(0, &resume);
    fs::rename(bench.path("base"), bench.path("gone")).unwrap();
    let (_, error) = bench.expect(1, &["generate", "--model", "lora", "--prompt", "x"]);
    assert!(
        error.contains("base") && error.contains("--model"),
        "{error}"
    );
    bench.expect(
        0,
        &[
            "generate",
            "--model",
            "gone",
            "--adapter",
            "lora",
            "--prompt",
            "x",
        ],
    );
}
