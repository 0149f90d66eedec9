//! The recipes that users copy, and `task = "dpo"`: a few steps of each on a tiny base model.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::bench::{Bench, json as read_json};

/// A base model whose tokenizer knows ChatML, and data of every kind.
pub(super) fn bench() -> Bench {
    let bench = Bench::new();
    let tokenizer = firebrick::data::Tokenizer::bytes().unwrap();
    let mut file: Value = serde_json::from_str(tokenizer.to_json()).unwrap();
    let added = file["added_tokens"].as_array_mut().unwrap();
    for token in ["<|im_start|>", "<|im_end|>"] {
        let mut next = added.last().unwrap().clone();
        next["id"] = json!(next["id"].as_u64().unwrap() + 1);
        next["content"] = json!(token);
        added.push(next);
    }
    fs::write(bench.path("tokenizer.json"), file.to_string()).unwrap();
    bench.train(&[
        "--output-dir",
        "models/base",
        "--set",
        "tokenizer={type=\"file\", path=\"tokenizer.json\"}",
        "--set",
        "model.max_position_embeddings=4096",
    ]);
    let lines =
        |rows: Vec<Value>| -> String { rows.iter().map(|row| format!("{row}\n")).collect() };
    let of = |row: &dyn Fn(usize) -> Value| lines((0..30).map(row).collect());
    let files = [
        (
            "instructions.jsonl",
            of(&|n| json!({"instruction": format!("say {n}"), "input": "", "output": "no"})),
        ),
        (
            "conversations.jsonl",
            of(&|n| {
                json!({"messages": [
                    {"role": "user", "content": format!("{n}?")},
                    {"role": "assistant", "content": "yes ".repeat(1 + n % 3)},
                ]})
            }),
        ),
        (
            "preferences.jsonl",
            of(
                &|n| json!({"prompt": format!("{n}?"), "chosen": "yes, of course", "rejected": "no"}),
            ),
        ),
        (
            "gsm8k-train.jsonl",
            of(&|n| json!({"question": format!("{n} + 1?"), "answer": format!("{}", n + 1)})),
        ),
    ];
    fs::create_dir(bench.path("data")).unwrap();
    for (name, rows) in files {
        fs::write(bench.path("data").join(name), rows).unwrap();
    }
    bench
}

fn train(bench: &Bench, config: &str, run: &str, sets: &[&str]) {
    let mut arguments = vec!["train", config, "--quiet", "--output-dir", run];
    sets.iter()
        .for_each(|set| arguments.extend(["--set", *set]));
    bench.expect(0, &arguments);
}

const FEW: [&str; 3] = [
    "train.num_epochs=0.3",
    "eval.eval_steps=1",
    "train.threads=2",
];

#[test]
fn recipes_run_as_they_are() {
    let bench = bench();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let recipes = fs::read_dir(root.join("examples/recipes")).unwrap();
    let mut names: Vec<String> = recipes
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["dpo.toml", "lora-sft.toml", "qlora-chat.toml"]);
    for name in &names {
        let recipe = root.join("examples/recipes").join(name);
        let recipe = recipe.to_str().unwrap();
        bench.expect(0, &["inspect", recipe, "--rows", "2"]);
        train(&bench, recipe, name, &FEW);
        let config = read_json(&bench.path(name).join("adapter_config.json"));
        assert_eq!(config["base_model_name_or_path"], "models/base");
        let loss = read_json(&bench.path(name).join("run.json"))["final"]["val_loss"].clone();
        assert!(loss.as_f64().is_some_and(f64::is_finite), "{name}: {loss}");
        let prompt = [
            "--prompt",
            "1?",
            "--max-new-tokens",
            "4",
            "--temperature",
            "0",
        ];
        bench.expect(0, &[&["generate", "--model", name], &prompt[..]].concat());
    }
    let config = root.join("configs/gsm8k-qlora.toml");
    let base = "model.base_model=models/base";
    train(
        &bench,
        config.to_str().unwrap(),
        "gsm8k",
        &[&FEW[..], &[base]].concat(),
    );
}

#[test]
fn dpo_learns_to_prefer_and_resumes_to_the_same_bits() {
    let bench = bench();
    let config = "\
task = \"dpo\"
output_dir = \"out\"
[model]
base_model = \"models/base\"
[dpo]
beta = 0.5
[data]
sequence_len = 128
val_fraction = 0.2
chat_template = \"chatml\"
[[data.datasets]]
path = \"data/preferences.jsonl\"
[train]
micro_batch_size = 4
max_steps = 20
threads = 2
[optimizer]
learning_rate = 1e-2
[eval]
eval_steps = 10
[checkpoint]
save_steps = 10
[logging]
logging_steps = 1
";
    fs::write(bench.path("dpo.toml"), config).unwrap();
    dpo_estimates(&bench);
    for (name, sets) in [
        ("lora", &["adapter.r=4", "adapter.lora_dropout=0.1"][..]),
        (
            "quantised",
            &[
                "adapter.r=4",
                "quantization.weights=nf4",
                "optimizer.name=adamw8bit",
            ],
        ),
        (
            "whole",
            &[
                "train.gradient_accumulation_steps=2",
                "train.gradient_checkpointing=true",
            ],
        ),
    ] {
        train(&bench, "dpo.toml", name, sets);
        let metrics = bench.metrics(name);
        let first = &metrics[0];
        assert!(
            (first["loss"].as_f64().unwrap() - std::f64::consts::LN_2).abs() < 1e-4,
            "{first}"
        );
        assert!(
            first["reward_margin"].as_f64().unwrap().abs() < 1e-3,
            "{first}"
        );
        let last = &metrics[19];
        assert!(last["val_loss"].as_f64().unwrap() < 0.5, "{name}: {last}");
        assert_eq!(last["val_reward_accuracy"], 1.0, "{name}: {last}");
        assert_eq!(last["bits_per_byte"], Value::Null);

        let cut = format!("{name}-cut");
        train(&bench, "dpo.toml", &cut, sets);
        fs::remove_dir_all(bench.path(&cut).join("checkpoints/step-000020")).unwrap();
        train(&bench, "dpo.toml", &cut, sets);
        assert_eq!(
            bench.checkpoint(&cut, 20),
            bench.checkpoint(name, 20),
            "{name}"
        );
        assert_eq!(bench.metrics(&cut), metrics, "{name}");
    }
}

/// What a reference takes, in memory and arithmetic.
fn dpo_estimates(bench: &Bench) {
    let estimate_of = |config: &str, sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", *set]);
        let arguments = ["estimate", config, "--json"].into_iter().chain(sets);
        let (stdout, _) = bench.expect(0, &arguments.collect::<Vec<_>>());
        serde_json::from_str::<Value>(&stdout).unwrap()
    };
    let estimate = |sets: &[&str]| estimate_of("dpo.toml", sets);
    let reference = |sets: &[&str]| {
        let found = estimate(sets);
        let terms = found["memory"]["terms"].as_array().unwrap().clone();
        let term = terms.into_iter().find(|term| term["name"] == "reference");
        term.map_or(0, |term| term["bytes"].as_u64().unwrap())
    };
    let parameters = estimate(&[])["parameters"].as_u64().unwrap();
    assert_eq!(reference(&[]), 4 * parameters);
    assert_eq!(reference(&["model.dtype=bf16"]), 2 * parameters);
    assert_eq!(reference(&["adapter.r=4"]), 0);
    assert_eq!(
        reference(&["adapter.r=4", "model.dtype=bf16"]),
        2 * parameters
    );
    let norm = "adapter.modules_to_save=[\"norm\"]";
    let hidden = read_json(&bench.path("models/base/config.json"))["hidden_size"].clone();
    assert_eq!(
        reference(&["adapter.r=4", norm]),
        4 * hidden.as_u64().unwrap()
    );

    // The reference's forward pass, and the head once more: a third of what there is, and a little.
    let flops = |found: &Value| found["flops_per_token"].as_f64().unwrap();
    let config = fs::read_to_string(bench.path("dpo.toml")).unwrap();
    let config = config.replace("task = \"dpo\"", "task = \"sft\"");
    let config = config.replace("[dpo]\nbeta", "# beta");
    fs::write(bench.path("sft.toml"), config).unwrap();
    let sft = estimate_of(
        "sft.toml",
        &[
            "data.datasets.0.type=completion",
            "data.datasets.0.fields.completion=chosen",
            // As long as the longest pair, to which the other is cut.
            "data.sequence_len=48",
        ],
    );
    let ratio = flops(&estimate(&[])) / flops(&sft);
    assert!(ratio > 4.0 / 3.0 && ratio < 5.0 / 3.0, "{ratio}");
    for sets in [&["--time"][..], &["--time", "--set", "adapter.r=4"]] {
        let (out, _) = bench.expect(0, &[&["estimate", "dpo.toml"], sets].concat());
        assert!(out.contains("time     "), "{out}");
    }
}

#[test]
fn q7_eight_bit_moments_train_as_f32_moments_do_and_resume_to_the_same_bits() {
    let bench = bench();
    let long = [
        "train.max_steps=60",
        "optimizer.learning_rate=3e-3",
        "model.hidden_size=64",
        "model.intermediate_size=128",
        "eval.eval_steps=30",
        "checkpoint.save_steps=30",
        "checkpoint.format=full",
    ];
    let best = |run: &str| {
        let run = read_json(&bench.path(run).join("run.json"));
        run["final"]["val_loss"].as_f64().unwrap()
    };
    train(&bench, "x.toml", "f32", &long);
    let eight = [&long[..], &["optimizer.name=adamw8bit"]].concat();
    train(&bench, "x.toml", "eight", &eight);
    let (f32, eight_bit) = (best("f32"), best("eight"));
    assert!((eight_bit / f32 - 1.0).abs() < 0.005, "{eight_bit} {f32}");
    let bytes = |run: &str| {
        let step = format!("{run}/checkpoints/step-000060/optimizer.safetensors");
        fs::metadata(bench.path(&step)).unwrap().len()
    };
    assert!(bytes("eight") < bytes("f32") / 3);
    train(&bench, "x.toml", "cut", &eight);
    fs::remove_dir_all(bench.path("cut/checkpoints/step-000060")).unwrap();
    train(&bench, "x.toml", "cut", &eight);
    assert_eq!(bench.checkpoint("cut", 60), bench.checkpoint("eight", 60));
}
