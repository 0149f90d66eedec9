//! Model folders through the runner: families from a TOML, base models, `logits`, `eval`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, TensorData};
use firebrick::config::{DecoderSpec, Plan, SaveDtype, load};
use firebrick::data::{Corpus, Sampler, TokenCache, Tokenizer};
use firebrick::model::{Decoder, folder};
use safetensors::SafeTensors;

use super::bench::{Bench, json};

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/reference")
        .join(name)
}

fn words(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

/// Tensors of 4- and 8-byte little-endian values, as f64.
fn numbers(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f64>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |view: &safetensors::tensor::TensorView| match view.dtype() {
        safetensors::Dtype::F32 => view
            .data()
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
            .collect(),
        safetensors::Dtype::I64 => view
            .data()
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64)
            .collect(),
        other => panic!("{other:?}"),
    };
    file.iter()
        .map(|(name, view)| (name.to_string(), (view.shape().to_vec(), values(&view))))
        .collect()
}

#[test]
fn m1_every_family_is_trained_exported_and_read_back() {
    let bench = Bench::new();
    let linear = "model.rope_scaling={type=\"linear\", factor=2.0}";
    let llama3 =
        "model.rope_scaling={type=\"llama3\", factor=8.0, original_max_position_embeddings=8}";
    for (family, more) in [
        ("llama", linear),
        ("mistral", "model.sliding_window=5"),
        ("qwen2", "model.sliding_window=5"),
        ("qwen3", llama3),
        ("phi3", "model.tie_word_embeddings=false"),
    ] {
        let architecture = format!("model.architecture={family}");
        let sets = [
            "--set",
            &architecture,
            "--set",
            more,
            "--output-dir",
            family,
        ];
        bench.train(&[&sets[..], &["--set", "train.max_steps=2"]].concat());
        let config = json(&bench.path(family).join("config.json"));
        assert_eq!(config["model_type"], family);
        let plan = load(&bench.path(family).join("resolved.toml"), &[]).unwrap();
        let spec = folder::read_config(&bench.path(family)).unwrap();
        assert_eq!(spec.shape, plan.shape, "{family}");
        let model = folder::load(&bench.path(family), &Device::flex()).unwrap();
        let counted = json(&bench.path(family).join("run.json"))["parameters"].as_u64();
        use burn::module::Module;
        assert_eq!(counted, Some(model.num_params() as u64));
        assert_eq!(counted, Some(spec.shape.parameters(spec.vocab_size)));
        let prompt = [
            "generate",
            "--model",
            family,
            "--prompt",
            "the river ",
            "--max-new-tokens",
            "20",
        ];
        bench.expect(0, &prompt);
    }
}

#[test]
fn m1_the_exported_model_takes_its_number_format_and_checkpoints_do_not() {
    let bench = Bench::new();
    bench.train(&["--output-dir", "exact"]);
    bench.train(&[
        "--output-dir",
        "half",
        "--set",
        "checkpoint.save_dtype=bf16",
    ]);
    assert_eq!(bench.checkpoint("exact", 6), bench.checkpoint("half", 6));
    let size = |run: &str| {
        fs::metadata(bench.path(run).join("model.safetensors"))
            .unwrap()
            .len()
    };
    assert!(size("half") < size("exact") * 6 / 10);
    let config = json(&bench.path("half/config.json"));
    assert_eq!(config["torch_dtype"], "bfloat16");
    bench.expect(0, &["generate", "--model", "half", "--prompt", "the"]);
}

#[test]
fn logits_writes_what_the_reference_implementation_computes() {
    let bench = Bench::new();
    for name in ["llama", "qwen3"] {
        let expected = numbers(&reference(name).join("reference.safetensors"));
        let ids: Vec<String> = expected["tokens"].1.iter().map(f64::to_string).collect();
        let model = words(&reference(name));
        let arguments = [
            "logits",
            "--model",
            &model,
            "--tokens",
            &ids.join(","),
            "--out",
            "l.st",
        ];
        let (stdout, _) = bench.expect(0, &arguments);
        assert!(stdout.contains("logits [32, 320] f32"), "{stdout}");
        let found = numbers(&bench.path("l.st"));
        assert_eq!(found["tokens"], expected["tokens"]);
        assert_eq!(found["logits"].0, [32, 320]);
        for (a, b) in found["logits"].1.iter().zip(&expected["logits"].1) {
            assert!((a - b).abs() <= 1e-4);
        }
    }
    bench.train(&[]);
    let text = ["logits", "--model", "out", "--text", "the", "--out", "t.st"];
    bench.expect(0, &text);
    assert_eq!(
        numbers(&bench.path("t.st"))["tokens"].1,
        [116.0, 104.0, 101.0]
    );

    let model = words(&reference("llama"));
    let refused = |code, more: &[&str], said: &str| {
        let arguments = [&["logits", "--model", &model, "--out", "x.st"], more].concat();
        let (_, stderr) = bench.expect(code, &arguments);
        assert!(stderr.contains(said), "{stderr}");
        assert!(!bench.path("x.st").exists());
    };
    refused(2, &["--tokens", "1,320"], "token 320 is outside");
    refused(2, &[], "--tokens");
    refused(2, &["--tokens", "1", "--text", "a"], "--text");
    refused(2, &["--text", "a"], "tokenizer.json");
    let (_, stderr) = bench.expect(
        1,
        &["logits", "--model", "no", "--tokens", "1", "--out", "x"],
    );
    assert!(stderr.contains("not a model folder"), "{stderr}");
}

#[test]
fn eval_measures_what_training_measures() {
    let bench = Bench::new();
    let text = fs::read_to_string(bench.path("text.txt")).unwrap();
    fs::write(bench.path("val.txt"), &text[..301]).unwrap();
    bench.train(&[
        "--set",
        "data={sequence_len=16, val_path=\"val.txt\", datasets=[{path=\"text.txt\"}]}",
    ]);
    let eval = |data: &str, more: &[&str]| {
        let arguments = [&["eval", "--model", "out", "--data", data], more].concat();
        let (stdout, stderr) = bench.expect(0, &arguments);
        (stdout, stderr)
    };
    let (stdout, stderr) = eval("val.txt", &["--sequence-len", "16", "--json"]);
    assert_eq!(stderr, "");
    let found: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let metrics = bench.metrics("out");
    let exported = json(&bench.path("out/run.json"))["exported_step"].as_u64();
    let row = metrics
        .iter()
        .find(|row| row["step"].as_u64() == exported)
        .unwrap();
    for key in ["val_loss", "bits_per_byte"] {
        let (a, b) = (found[key].as_f64().unwrap(), row[key].as_f64().unwrap());
        assert!((a - b).abs() < 1e-5, "{key}: {a} {b}");
    }
    // 301 bytes and the end token; all but the first are predicted.
    assert_eq!(found["tokens"], 301);
    fs::write(
        bench.path("val.jsonl"),
        format!("{}\n", serde_json::json!({"text": &text[..301]})),
    )
    .unwrap();
    let (same, _) = eval("val.jsonl", &["--sequence-len", "16", "--json"]);
    assert_eq!(same, stdout);
    let (stdout, stderr) = eval("val.txt", &[]);
    assert!(
        stdout.starts_with("val_loss ") && stderr.contains("sequence length 16"),
        "{stderr}"
    );
    let (_, stderr) = eval("val.txt", &["--sequence-len", "64"]);
    assert!(stderr.contains("made for sequences of 16"), "{stderr}");

    let refused = |code, data: &str, said: &str| {
        let (_, stderr) = bench.expect(code, &["eval", "--model", "out", "--data", data]);
        assert!(stderr.contains(said), "{stderr}");
    };
    fs::write(bench.path("empty.txt"), "").unwrap();
    fs::write(bench.path("none.jsonl"), "{\"content\": \"a\"}\n").unwrap();
    refused(3, "empty.txt", "empty.txt");
    refused(3, "absent.txt", "absent.txt");
    refused(3, "none.jsonl", "text");
    bench.expect(
        2,
        &[
            "eval",
            "--model",
            "out",
            "--data",
            "val.txt",
            "--sequence-len",
            "0",
        ],
    );
    bench.expect(1, &["eval", "--model", "no", "--data", "val.txt"]);
    // A model with fewer embeddings than its tokenizer has ids.
    let small = base(&bench, "small", 100);
    let arguments = ["eval", "--model", &small, "--data", "val.txt"];
    let (_, stderr) = bench.expect(2, &arguments);
    assert!(
        stderr.contains("ids up to 256") && stderr.contains("embeddings up to 99"),
        "{stderr}"
    );
}

/// A folder with a random model of another seed and the byte tokenizer.
fn base(bench: &Bench, name: &str, vocab_size: usize) -> String {
    let spec = folder::read_config(&reference("qwen3")).unwrap();
    let spec = DecoderSpec { vocab_size, ..spec };
    let model = Decoder::new(&spec, 99, &Device::flex()).unwrap();
    let path = bench.path(name);
    fs::create_dir_all(&path).unwrap();
    let options = folder::SaveOptions {
        dtype: SaveDtype::F32,
        max_shard_bytes: 100_000,
    };
    folder::save(&path, &spec, &folder::hf_tensors(&model), &options).unwrap();
    Tokenizer::bytes().unwrap().save(&path).unwrap();
    name.to_string()
}

const FROM_BASE: &str = r#"
output_dir = "on"
[model]
base_model = "base"
[data]
sequence_len = 16
[[data.datasets]]
path = "text.txt"
[train]
micro_batch_size = 4
max_steps = 2
[optimizer]
learning_rate = 1e-3
[logging]
logging_steps = 1
"#;

#[test]
fn a_base_model_is_trained_on() {
    let bench = Bench::new();
    base(&bench, "base", 300);
    fs::write(bench.path("on.toml"), FROM_BASE).unwrap();
    bench.expect(0, &["train", "on.toml", "--quiet"]);

    // The loss of the first step is that of the base model, not of random weights.
    let relative = |path: &str| bench.path(path).to_str().unwrap().to_string();
    let sets = [
        format!("model.base_model={}", relative("base")),
        format!("data.datasets.0.path={}", relative("text.txt")),
    ];
    let plan: Plan = load(&bench.path("on.toml"), &sets).unwrap();
    let (data, tokenizer) = (&plan.config.data, &plan.config.tokenizer);
    assert_eq!(tokenizer.path, Some(bench.path("base/tokenizer.json")));
    let corpus = Corpus::load(data, tokenizer, &TokenCache::at(&bench.path("cache"))).unwrap();
    let seed = plan.config.seed;
    let sampler = Sampler::new(&corpus, data.sampling, data.sequence_len, seed).unwrap();
    let batch = sampler.batch(0, plan.config.train.micro_batch_size);
    let loss_of = |model: &Decoder| {
        let nats = model.evaluate(&batch).unwrap().into_scalar::<f32>();
        f64::from(nats) / batch.weight()
    };
    let model = folder::load(&bench.path("base"), &Device::flex()).unwrap();
    let first = bench.metrics("on")[0]["loss"].as_f64().unwrap();
    assert!((first - loss_of(&model)).abs() < 1e-5, "{first}");
    let random = Decoder::new(model.spec(), seed, &Device::flex()).unwrap();
    assert!((first - loss_of(&random)).abs() > 1e-2);
    // Rows that no token has are kept: the shape is the base model's.
    let config = json(&bench.path("on/config.json"));
    assert_eq!(
        (&config["vocab_size"], &config["model_type"]),
        (&300.into(), &"qwen3".into())
    );

    // It goes on from its checkpoint; and not from another base.
    bench.expect(
        0,
        &["train", "on.toml", "--quiet", "--set", "train.max_steps=3"],
    );
    let record = json(&bench.path("on/run.json"));
    let files = record["base_model"].as_array().unwrap();
    assert!(
        files.len() > 3,
        "config.json, the index and the shards: {record}"
    );
    let mut files = fs::read_dir(bench.path("base"))
        .unwrap()
        .map(|e| e.unwrap().path());
    let shard = files.find(|f| words(f).contains("model-00001")).unwrap();
    let mut tensors = folder::read_tensors(&shard).unwrap();
    let (name, data) = tensors.pop_first().unwrap();
    let changed: Vec<f32> = data.iter::<f32>().map(|v| v + 1.0).collect();
    tensors.insert(name, TensorData::new(changed, data.shape().clone()));
    folder::write_tensors(&shard, &tensors).unwrap();
    let longer = ["train", "on.toml", "--quiet", "--set", "train.max_steps=4"];
    let (_, stderr) = bench.expect(2, &longer);
    assert!(
        stderr.contains("another base model") && stderr.contains("model-00001"),
        "{stderr}"
    );
}

#[test]
fn what_does_not_agree_with_a_base_model_is_refused() {
    let bench = Bench::new();
    base(&bench, "base", 300);
    base(&bench, "small", 100);
    fs::write(bench.path("on.toml"), FROM_BASE).unwrap();
    let refused = |set: &str, said: &str| {
        let (_, stderr) = bench.expect(2, &["train", "on.toml", "--set", set]);
        assert!(stderr.contains(said), "{set}: {stderr}");
    };
    refused("model.hidden_size=128", "the base model's is 64");
    refused("model.architecture=llama", "the base model's is \"qwen3\"");
    refused("model.sliding_window=4", "the base model's is none");
    refused("model.preset=gpt2", "`preset` together with `base_model`");
    refused("model.base_model=nowhere", "nowhere/config.json");
    refused("data.sequence_len=512", "256 positions");
    refused("model.base_model=small", "embeddings up to 99");
    fs::write(
        bench.path("base/config.json"),
        "{\"model_type\": \"mamba\"}",
    )
    .unwrap();
    refused("seed=1", "mamba");
    assert!(!bench.path("on").exists());
    // What agrees may be said.
    base(&bench, "base", 300);
    bench.expect(
        0,
        &[
            "train",
            "on.toml",
            "--dry-run",
            "--set",
            "model.hidden_size=64",
        ],
    );
}
