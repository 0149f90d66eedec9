//! PEFT's folders, written and read.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, TensorData};
use firebrick::adapter::{Adapter, AdapterError, PeftOptions};
use firebrick::config::{Architecture, SaveDtype};
use firebrick::data::Batch;
use firebrick::model::{DecoderSpec, folder, parameters};
use safetensors::SafeTensors;

use super::{DORA, LORA, bases, floats, logits, plan, trainable, trained};
use crate::support::{batch, distance, tiny};

#[test]
fn a12_what_is_written_is_read_back_in_every_family() {
    for shape in [LORA, DORA] {
        for (name, base) in bases() {
            let (spec, batch) = (base.spec().clone(), batch(2, 8, 13));
            let mut plan = plan(&spec, shape);
            // Another rank, in every layer that files fuse with others.
            for (path, shape) in &mut plan.layers {
                let wider = path.starts_with("layers.1.mlp");
                shape.rank += usize::from(wider);
            }
            if !spec.shape.tie_word_embeddings {
                plan.saved = vec!["lm_head".to_string(), "norm".to_string()];
            }
            let model = trained(base.clone().adapted(&plan, 9).unwrap(), &batch, 4);
            let folder = tempfile::tempdir().unwrap();
            let written = Adapter::of(&model);
            written
                .write(folder.path(), &spec, &PeftOptions::new(Path::new("base")))
                .unwrap();
            let read = Adapter::read(folder.path(), &spec).unwrap();
            assert_eq!(read.saved, written.saved, "{name}");
            let back = read.attach(base.valid()).unwrap();
            let error = distance(&logits(&model, &batch), &logits(&back, &batch));
            assert!(error < 1e-5, "{name} {shape:?}: {error}");
            let config = fs::read_to_string(folder.path().join("adapter_config.json")).unwrap();
            assert!(config.contains("\"base_model_name_or_path\": \"base\""));
        }
    }
}

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(path)
}

/// Tokens and logits of a reference.safetensors.
fn reference(folder: &Path) -> (Vec<u32>, Vec<f32>) {
    let bytes = fs::read(folder.join("reference.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tokens = file.tensor("tokens").unwrap().data().chunks_exact(8);
    let tokens = tokens.map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32);
    let logits = file.tensor("logits").unwrap().data().chunks_exact(4);
    let logits = logits.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    (tokens.collect(), logits.collect())
}

/// Adapters that peft 0.21 has written, and the logits it gives with them
/// (benches/peers/peft_adapters.py).
#[test]
fn a12_adapters_of_peft_give_its_logits() {
    let folders = fs::read_dir(data("adapters")).unwrap();
    let mut count = 0;
    for folder in folders {
        let folder = folder.unwrap().path();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let family = name.split('-').next().unwrap();
        let base = folder::load(&data("reference").join(family), &Device::flex()).unwrap();
        let adapter = Adapter::read(&folder, base.spec()).unwrap();
        let model = adapter.attach(base).unwrap();
        let (tokens, expected) = reference(&folder);
        let mut row = tokens.clone();
        row.push(0);
        let error = distance(&expected, &logits(&model, &Batch::of_row(&row)));
        assert!(error < 1e-4, "{name}: {error}");
        count += 1;
    }
    assert_eq!(count, 9);
}

/// The logits that peft gives with the head's own weights replaced are those of the test above; this
/// is that they are written again.
#[test]
fn a12_weights_that_come_with_an_adapter_stay_with_it() {
    let base = folder::load(&data("reference/llama"), &Device::flex()).unwrap();
    let adapter = Adapter::read(&data("adapters/llama-head"), base.spec()).unwrap();
    assert_eq!(adapter.replaced.len(), 1);
    let folder = tempfile::tempdir().unwrap();
    let options = PeftOptions::new(Path::new("base"));
    adapter.write(folder.path(), base.spec(), &options).unwrap();
    assert_eq!(Adapter::read(folder.path(), base.spec()).unwrap(), adapter);
    let mixed = Adapter::mix(&[(&adapter, 0.5), (&adapter, 0.5)]).unwrap();
    let batch = batch(1, 8, 13);
    let [expected, found] =
        [&adapter, &mixed].map(|adapter| logits(&adapter.attach(base.clone()).unwrap(), &batch));
    assert!(distance(&expected, &found) < 1e-5);
    let mut other = adapter.clone();
    other
        .replaced
        .values_mut()
        .for_each(|data| *data = zeros(data));
    assert!(matches!(
        Adapter::mix(&[(&adapter, 0.5), (&other, 0.5)]),
        Err(AdapterError::NotMixable { .. })
    ));
}

fn zeros(data: &TensorData) -> TensorData {
    TensorData::new(vec![0f32; data.num_elements()], data.shape().clone())
}

#[test]
fn a12_half_precision_files_are_half_as_large_and_near() {
    let base = folder::load(&data("reference/llama"), &Device::flex()).unwrap();
    let adapter = Adapter::read(&data("adapters/llama-dora"), base.spec()).unwrap();
    let size = |dtype| {
        let folder = tempfile::tempdir().unwrap();
        let options = PeftOptions {
            dtype,
            ..PeftOptions::new(Path::new("base"))
        };
        adapter.write(folder.path(), base.spec(), &options).unwrap();
        let read = Adapter::read(folder.path(), base.spec()).unwrap();
        for (path, update) in &adapter.layers {
            let (a, b) = (floats(&update.a), floats(&read.layers[path].a));
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= a.abs() / 256.0;
            assert!(a.iter().zip(&b).all(near), "{path}");
        }
        let file = folder.path().join("adapter_model.safetensors");
        let bytes = fs::read(file).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        file.iter()
            .map(|(_, tensor)| tensor.data().len())
            .sum::<usize>()
    };
    let sizes = [SaveDtype::F32, SaveDtype::Bf16, SaveDtype::F16].map(size);
    assert_eq!(sizes, [sizes[0], sizes[0] / 2, sizes[0] / 2]);
    let mut large = adapter.clone();
    let update = large.layers.values_mut().next().unwrap();
    let values = vec![1e6f32; update.a.num_elements()];
    update.a = TensorData::new(values, update.a.shape().clone());
    let folder = tempfile::tempdir().unwrap();
    let options = PeftOptions {
        dtype: SaveDtype::F16,
        ..PeftOptions::new(Path::new("base"))
    };
    let error = large
        .write(folder.path(), base.spec(), &options)
        .unwrap_err();
    assert!(error.to_string().contains("float16"), "{error}");
}

#[test]
fn a12_what_has_no_place_in_the_files_is_not_written() {
    let refused = |adapter: &Adapter, spec: &DecoderSpec| {
        let folder = tempfile::tempdir().unwrap();
        let options = PeftOptions::new(Path::new("base"));
        let error = adapter.write(folder.path(), spec, &options).unwrap_err();
        assert!(matches!(error, AdapterError::NotWritable { .. }), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        error.to_string()
    };
    let of = |spec: &DecoderSpec, shape| {
        let model = trainable(spec).adapted(&plan(spec, shape), 1).unwrap();
        Adapter::of(&model)
    };
    let phi3 = tiny(Architecture::Phi3);
    let mut part = of(&phi3, DORA);
    part.layers.remove("layers.0.self_attn.k_proj");
    let error = refused(&part, &phi3);
    assert!(error.contains("qkv_proj"), "{error}");

    let llama = tiny(Architecture::Llama);
    let mut mixed = of(&llama, DORA);
    mixed.layers.values_mut().next().unwrap().magnitude = None;
    let error = refused(&mixed, &llama);
    assert!(error.contains("DoRA"), "{error}");

    let mut foreign = of(&llama, LORA);
    let norm = TensorData::new(vec![1f32; 4], [4]);
    foreign
        .saved
        .insert("layers.7.norm.weight".to_string(), norm);
    let error = refused(&foreign, &llama);
    assert!(error.contains("layers.7.norm.weight"), "{error}");
    let mut foreign = of(&llama, LORA);
    let update = foreign.layers.values().next().unwrap().clone();
    foreign
        .layers
        .insert("layers.9.mlp.up_proj".to_string(), update);
    let error = refused(&foreign, &llama);
    assert!(error.contains("layers.9.mlp.up_proj"), "{error}");
}

#[test]
fn a12_an_embedding_that_is_the_head_as_well_is_not_taken_apart() {
    let spec = folder::read_config(&data("reference/qwen2")).unwrap();
    assert!(spec.shape.tie_word_embeddings);
    let base = folder::load(&data("reference/qwen2"), &Device::flex()).unwrap();
    let mut adapter = Adapter::read(&data("adapters/qwen2-lora"), &spec).unwrap();
    let embedding = parameters(&base)["embed_tokens.weight"].clone();
    adapter
        .saved
        .insert("embed_tokens.weight".to_string(), zeros(&embedding));
    let folder = tempfile::tempdir().unwrap();
    let options = PeftOptions::new(Path::new("base"));
    adapter.write(folder.path(), &spec, &options).unwrap();
    assert_eq!(Adapter::read(folder.path(), &spec).unwrap(), adapter);
    let path = folder.path().join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"ensure_weight_tying\": true"));
    fs::write(&path, text.replace("_tying\": true", "_tying\": false")).unwrap();
    let error = Adapter::read(folder.path(), &spec).unwrap_err();
    assert!(matches!(error, AdapterError::Unties { .. }), "{error}");
    assert!(error.help().unwrap().contains("ensure_weight_tying"));
}

#[cfg(unix)]
#[test]
fn a12_a_pipe_or_a_folder_in_the_place_of_weights_is_an_error() {
    let spec = folder::read_config(&data("reference/llama")).unwrap();
    for is_pipe in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let config = "adapter_config.json";
        fs::copy(
            data("adapters/llama-lora").join(config),
            folder.path().join(config),
        )
        .unwrap();
        let weights = folder.path().join("adapter_model.safetensors");
        if is_pipe {
            let made = std::process::Command::new("mkfifo").arg(&weights).status();
            assert!(made.unwrap().success());
        } else {
            fs::create_dir(&weights).unwrap();
        }
        let error = Adapter::read(folder.path(), &spec).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }
}

#[test]
fn a12_what_cannot_be_honoured_is_refused_by_name() {
    let spec = folder::read_config(&data("reference/llama")).unwrap();
    let copy = |change: &dyn Fn(&mut serde_json::Value)| {
        let folder = tempfile::tempdir().unwrap();
        let from = data("adapters/llama-lora");
        let text = fs::read_to_string(from.join("adapter_config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        change(&mut config);
        let config = config.to_string();
        fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        let weights = "adapter_model.safetensors";
        fs::copy(from.join(weights), folder.path().join(weights)).unwrap();
        Adapter::read(folder.path(), &spec)
    };
    assert!(copy(&|_| {}).is_ok());
    let fields = [
        ("peft_type", serde_json::json!("IA3")),
        ("bias", serde_json::json!("all")),
        ("lora_bias", serde_json::json!(true)),
        ("lora_alpha", serde_json::json!("eight")),
        ("use_qalora", serde_json::json!(true)),
        ("layer_replication", serde_json::json!([[0, 2], [1, 2]])),
        ("trainable_token_indices", serde_json::json!([1])),
        ("a_field_of_tomorrow", serde_json::json!(1)),
        ("alpha_pattern", serde_json::json!({ "(": 2 })),
        ("use_dora", serde_json::json!("yes")),
        ("use_rslora", serde_json::json!(1)),
        ("ensure_weight_tying", serde_json::json!("no")),
        ("init_lora_weights", serde_json::json!("pissa")),
        ("init_lora_weights", serde_json::json!("pissa_niter_16")),
        ("init_lora_weights", serde_json::json!("olora")),
        ("init_lora_weights", serde_json::json!("corda")),
        ("init_lora_weights", serde_json::json!("lora_ga")),
        ("init_lora_weights", serde_json::json!("loftq")),
        ("init_lora_weights", serde_json::json!(1)),
    ];
    for (field, value) in fields {
        match copy(&|config| config[field] = value.clone()) {
            Err(AdapterError::Unsupported { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    for init in [
        serde_json::json!(false),
        serde_json::Value::Null,
        serde_json::json!("gaussian"),
        serde_json::json!("orthogonal"),
        serde_json::json!("eva"),
    ] {
        assert!(copy(&|config| config["init_lora_weights"] = init.clone()).is_ok());
    }
    let dora = copy(&|config| config["use_dora"] = serde_json::json!(true));
    assert!(
        matches!(dora, Err(AdapterError::Missing { .. })),
        "{dora:?}"
    );
    let other = folder::read_config(&data("reference/phi3")).unwrap();
    let other = Adapter::read(&data("adapters/llama-lora"), &other);
    assert!(
        matches!(other, Err(AdapterError::Unexpected { .. })),
        "{other:?}"
    );
    let none = Adapter::read(&data("reference/llama"), &spec);
    assert!(
        matches!(none, Err(AdapterError::NotAnAdapter { .. })),
        "{none:?}"
    );
}
