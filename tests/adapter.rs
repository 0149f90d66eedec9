//! Adapters beside a model, named by the rows of the design they hold up.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebrick::adapter::{Adapter, AdapterError, PeftOptions, Registry, merge};
use firebrick::config::{
    AdapterInit, AdapterPlan, Architecture, LoraShape, OptimizerPlan, PackedLayout, SaveDtype,
};
use firebrick::data::Batch;
use firebrick::gradient::{Gradient, Precision, backward, backward_with};
use firebrick::model::{
    Decoder, DecoderSpec, Tensors, VisitParameters, folder, parameters, visit_parameters,
};
use firebrick::optimizer::Optimizer;
use safetensors::SafeTensors;
use support::{batch, distance, ternary, tiny, variants};

const LORA: LoraShape = LoraShape {
    rank: 3,
    scale: 2.0,
    dropout: 0.0,
    magnitude: false,
};

const DORA: LoraShape = LoraShape {
    magnitude: true,
    ..LORA
};

fn linear_layers(spec: &DecoderSpec) -> Vec<String> {
    let leaves = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    ];
    let mlp: &[&str] = match spec.shape.architecture {
        Architecture::Gpt2 => &["mlp.up_proj", "mlp.down_proj"],
        _ => &["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    };
    let names = || leaves.iter().chain(mlp);
    let blocks = 0..spec.shape.num_hidden_layers;
    blocks
        .flat_map(|block| names().map(move |name| format!("layers.{block}.{name}")))
        .collect()
}

fn plan(spec: &DecoderSpec, shape: LoraShape) -> AdapterPlan {
    AdapterPlan {
        layers: linear_layers(spec)
            .into_iter()
            .map(|path| (path, shape))
            .collect(),
        saved: Vec::new(),
        init: AdapterInit::Default,
        loftq_iterations: 1,
        lora_plus_ratio: 1.0,
    }
}

fn trainable(spec: &DecoderSpec) -> Decoder {
    Decoder::new(spec, 5, &Device::flex().autodiff()).unwrap()
}

fn floats(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

fn logits(model: &Decoder, batch: &Batch) -> Vec<f32> {
    floats(&model.valid().forward(batch).unwrap().into_data())
}

fn is_adapter(path: &str) -> bool {
    path.contains(".adapter.")
}

/// The gradients there are, by path.
fn gradients(model: &Decoder, gradient: &Gradient) -> Tensors {
    struct Collect<'a>(&'a Gradient, Tensors);
    impl VisitParameters for Collect<'_> {
        fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.get(param) {
                self.1.insert(path.to_string(), gradient.into_data());
            }
        }
    }
    let mut collect = Collect(gradient, Tensors::new());
    visit_parameters(model, &mut collect);
    collect.1
}

fn adamw() -> Optimizer {
    Optimizer::new(&OptimizerPlan::AdamW {
        betas: [0.9, 0.99],
        eps: 1e-8,
        weight_decay: 0.01,
    })
}

fn trained(mut model: Decoder, batch: &Batch, steps: usize) -> Decoder {
    let mut optimizer = adamw();
    for _ in 0..steps {
        let result = backward(&model, std::slice::from_ref(batch)).unwrap();
        model = optimizer.step(model, result.gradient, 2e-2);
    }
    model
}

/// Every form of decoder, and ternary ones with packed weights.
fn bases() -> Vec<(String, Decoder)> {
    let latent = variants()
        .into_iter()
        .filter(|(_, spec)| spec.shape.ternary.is_none());
    let dense = latent.map(|(name, spec)| (name, trainable(&spec)));
    let packed = ternary().into_iter().map(|spec| {
        let model = trainable(&spec).packed(PackedLayout::Compute).unwrap();
        (format!("packed {:?}", spec.shape.ternary), model)
    });
    dense.chain(packed).collect()
}

#[test]
fn a1_a2_a_new_adapter_changes_nothing_and_learns_without_touching_the_base() {
    for shape in [LORA, DORA] {
        for (name, base) in bases() {
            let (spec, batch) = (base.spec().clone(), batch(3, 8, 13));
            let before = logits(&base, &batch);
            let weights = parameters(&base);
            let model = base.adapted(&plan(&spec, shape), 9).unwrap();
            let error = distance(&before, &logits(&model, &batch));
            assert!(error < 2e-5, "{name} {shape:?}: {error}");

            let mut optimizer = adamw();
            let mut seen: BTreeMap<String, bool> = BTreeMap::new();
            let mut model = model;
            for _ in 0..2 {
                let result = backward(&model, std::slice::from_ref(&batch)).unwrap();
                for (path, gradient) in gradients(&model, &result.gradient) {
                    assert!(is_adapter(&path), "{name}: {path} is the base's");
                    let moves = floats(&gradient).iter().any(|&value| value != 0.0);
                    *seen.entry(path).or_default() |= moves;
                }
                model = optimizer.step(model, result.gradient, 1e-2);
            }
            let leaves = if shape.magnitude { 3 } else { 2 };
            assert_eq!(seen.len(), leaves * linear_layers(&spec).len(), "{name}");
            let still: Vec<_> = seen.iter().filter(|(_, moves)| !**moves).collect();
            assert!(still.is_empty(), "{name}: no gradient for {still:?}");

            let after = parameters(&model);
            for (path, data) in &weights {
                assert_eq!(data, &after[path], "{name}: {path} has moved");
            }
            assert!(
                distance(&before, &logits(&model, &batch)) > 1e-3,
                "{name}: nothing learned"
            );
        }
    }
}

#[test]
fn a1_the_model_that_was_adapted_can_still_be_trained() {
    let spec = tiny(Architecture::Llama);
    // Nothing of it has been drawn yet.
    let base = trainable(&spec);
    let model = base.clone().adapted(&plan(&spec, LORA), 9).unwrap();
    let batch = [batch(2, 8, 13)];
    let found = gradients(&base, &backward(&base, &batch).unwrap().gradient);
    assert_eq!(found.len(), parameters(&base).len());
    let found = gradients(&model, &backward(&model, &batch).unwrap().gradient);
    assert!(found.keys().all(|path| is_adapter(path)));
}

#[test]
fn a1_gradients_are_those_of_a_dense_update() {
    // y = x (W + s A B): the gradient of the dense weight gives those of A and B.
    let spec = tiny(Architecture::Llama);
    let path = "layers.1.mlp.down_proj";
    let only = AdapterPlan {
        layers: BTreeMap::from([(path.to_string(), LORA)]),
        ..plan(&spec, LORA)
    };
    let batch = batch(2, 8, 13);
    let model = trained(trainable(&spec).adapted(&only, 3).unwrap(), &batch, 3);
    let result = backward(&model, std::slice::from_ref(&batch)).unwrap();
    let found = gradients(&model, &result.gradient);

    let adapter = Adapter::of(&model);
    let update = &adapter.layers[path];
    // The merged model, all of whose weights are trained.
    let dense = folder::hf_tensors(&model.clone().merged());
    let dense = folder::decoder_from_hf(&spec, dense, &Device::flex().autodiff()).unwrap();
    let all = backward(&dense, &[batch]).unwrap();
    let dw = &gradients(&dense, &all.gradient)[&format!("{path}.weight")];
    let matrix = |data: &TensorData| Tensor::<2>::from_data(data.clone(), &Device::flex());
    let (dw, a, b) = (matrix(dw), matrix(&update.a), matrix(&update.b));
    let da = dw.clone().matmul(b.transpose()) * LORA.scale;
    let db = a.transpose().matmul(dw) * LORA.scale;
    for (name, expected) in [("lora_a", da), ("lora_b", db)] {
        let expected = floats(&expected.into_data());
        let found = floats(&found[&format!("{path}.adapter.{name}")]);
        let largest = expected
            .iter()
            .fold(0f32, |max, value| max.max(value.abs()));
        let error = distance(&expected, &found);
        assert!(error < 1e-5 * largest.max(1.0), "{name}: {error}");
    }
}

#[test]
fn a1_checkpointing_stops_below_the_first_adapter_and_gives_the_same() {
    let mut spec = tiny(Architecture::Llama);
    spec.shape.num_hidden_layers = 4;
    let mut upper = plan(&spec, DORA);
    upper
        .layers
        .retain(|path, _| path.starts_with("layers.2") || path.starts_with("layers.3"));
    let batch = batch(4, 8, 13);
    for plan in [upper, plan(&spec, LORA)] {
        let model = trained(trainable(&spec).adapted(&plan, 3).unwrap(), &batch, 2);
        let whole = backward(&model, std::slice::from_ref(&batch)).unwrap();
        let precision = Precision {
            gradient_checkpointing: true,
            ..Precision::default()
        };
        let blockwise = backward_with(&model, std::slice::from_ref(&batch), precision).unwrap();
        assert!((whole.nats - blockwise.nats).abs() < 1e-4);
        let (whole, blockwise) = (
            gradients(&model, &whole.gradient),
            gradients(&model, &blockwise.gradient),
        );
        assert_eq!(whole.len(), blockwise.len());
        for (path, gradient) in &whole {
            let error = distance(&floats(gradient), &floats(&blockwise[path]));
            assert!(error < 1e-6, "{path}: {error}");
        }
    }
}

#[test]
fn a1_dropout_does_not_depend_on_micro_batches_or_checkpointing() {
    for magnitude in [false, true] {
        let spec = tiny(Architecture::Qwen2);
        let shape = LoraShape {
            dropout: 0.3,
            magnitude,
            ..LORA
        };
        let batch = batch(4, 8, 13);
        let model = trained(
            trainable(&spec).adapted(&plan(&spec, shape), 3).unwrap(),
            &batch,
            2,
        );
        let loss = |batches: &[Batch], seed: Option<[u64; 2]>, gradient_checkpointing| {
            let precision = Precision {
                dropout_seed: seed,
                gradient_checkpointing,
                ..Precision::default()
            };
            backward_with(&model, batches, precision).unwrap().nats
        };
        let rows: Vec<Batch> = (0..4).map(|row| batch.rows(row..row + 1)).collect();
        let whole = std::slice::from_ref(&batch);
        let (plain, dropped) = (loss(whole, None, false), loss(whole, Some([1, 1]), false));
        assert!((plain - dropped).abs() > 1e-4, "nothing was dropped");
        assert!((dropped - loss(&rows, Some([1, 1]), false)).abs() < 1e-4);
        assert!((dropped - loss(whole, Some([1, 1]), true)).abs() < 1e-5);
        assert!((dropped - loss(whole, Some([1, 2]), false)).abs() > 1e-4);
        assert!((plain - loss(whole, None, true)).abs() < 1e-4);
    }
}

#[test]
fn a3_lora_plus_is_another_learning_rate_for_b() {
    let spec = tiny(Architecture::Llama);
    let batch = batch(2, 8, 13);
    let step = |ratio: f64| {
        let model = trainable(&spec).adapted(&plan(&spec, LORA), 3).unwrap();
        let result = backward(&model, std::slice::from_ref(&batch)).unwrap();
        // Without decay AdamW's first update is the learning rate with a sign.
        let mut optimizer = Optimizer::new(&OptimizerPlan::AdamW {
            betas: [0.9, 0.99],
            eps: 1e-12,
            weight_decay: 0.0,
        })
        .with_lora_plus(ratio);
        Adapter::of(&optimizer.step(model, result.gradient, 1e-3))
    };
    let (one, sixteen) = (step(1.0), step(16.0));
    for (path, update) in &one.layers {
        assert_eq!(update.a, sixteen.layers[path].a, "{path}");
        let (b, faster) = (floats(&update.b), floats(&sixteen.layers[path].b));
        for (b, faster) in b.iter().zip(faster) {
            assert!((b * 16.0 - faster).abs() < 1e-6, "{path}: {b} {faster}");
        }
    }
}

#[test]
fn a1_a2_a11_merged_is_adapted_and_the_base_comes_back() {
    for shape in [LORA, DORA] {
        for (name, base) in bases() {
            let (spec, batch) = (base.spec().clone(), batch(2, 8, 13));
            let model = base.clone().adapted(&plan(&spec, shape), 9).unwrap();
            let adapter = Adapter::of(&trained(model, &batch, 4));
            let mut registry = Registry::new(base.valid());
            registry.insert("one", adapter.clone()).unwrap();
            let (with, merged) = (
                registry.with("one").unwrap(),
                registry.merged("one").unwrap(),
            );
            assert!(!merged.is_adapted() && with.is_adapted());
            let rounds = spec
                .shape
                .ternary
                .is_some_and(|ternary| ternary.rounds_activations);
            let error = distance(&logits(&with, &batch), &logits(&merged, &batch));
            // Merged weights are dense: what goes into them is not rounded to eight bits.
            let limit = if rounds { 1.0 } else { 1e-5 };
            assert!(error < limit, "{name} {shape:?}: {error}");
            assert!(merged.spec().shape.ternary.is_none(), "{name}");
            assert_eq!(
                parameters(registry.base()),
                parameters(&base.valid()),
                "{name}"
            );
            let (plain, without) = (logits(&base, &batch), with.without_adapters());
            assert_eq!(plain, logits(&without, &batch), "{name}");
        }
    }
}

#[test]
fn a11_a_weighted_mix_is_the_weighted_sum_of_updates() {
    let spec = tiny(Architecture::Llama);
    let base = trainable(&spec);
    let learn = |seed: u64, shape: LoraShape, layers: &str| {
        let mut plan = plan(&spec, shape);
        plan.layers.retain(|path, _| path.contains(layers));
        let batch = batch(2, 5 + seed as usize, 13);
        Adapter::of(&trained(
            base.clone().adapted(&plan, seed).unwrap(),
            &batch,
            3,
        ))
    };
    let wide = LoraShape {
        rank: 5,
        scale: 0.7,
        ..LORA
    };
    let mut registry = Registry::new(base.valid());
    registry.insert("a", learn(1, LORA, "")).unwrap();
    registry.insert("b", learn(2, wide, "self_attn")).unwrap();
    let mixed = registry.mixed(&[("a", 0.25), ("b", -1.5)]).unwrap();

    let weights = parameters(&base.valid());
    let [a, b] = ["a", "b"].map(|name| parameters(&registry.merged(name).unwrap()));
    let found = parameters(&mixed.merged());
    for (path, weight) in &weights {
        let parts = [weight, &a[path], &b[path]].map(floats);
        let sum: Vec<f32> = (0..parts[0].len())
            .map(|i| {
                let [w, a, b] = [&parts[0][i], &parts[1][i], &parts[2][i]];
                w + 0.25 * (a - w) - 1.5 * (b - w)
            })
            .collect();
        let error = distance(&sum, &floats(&found[path]));
        assert!(error < 1e-5, "{path}: {error}");
    }

    assert!(matches!(registry.with("c"), Err(AdapterError::Name { .. })));
    assert!(matches!(
        registry.mixed(&[]),
        Err(AdapterError::NotMixable { .. })
    ));
    let again = registry.insert("a", Adapter::default());
    assert!(matches!(again, Err(AdapterError::Name { .. })));
    let lengths = learn(3, DORA, "");
    assert!(matches!(
        Adapter::mix(&[(&lengths, 1.0)]),
        Err(AdapterError::NotMixable { .. })
    ));
    registry.remove("a").unwrap();
    assert_eq!(registry.names().collect::<Vec<_>>(), ["b"]);
}

#[test]
fn a11_an_untrained_adapter_is_not_merged() {
    let spec = tiny(Architecture::Llama);
    let base = trainable(&spec);
    let adapter = Adapter::of(&base.clone().adapted(&plan(&spec, LORA), 1).unwrap());
    let refused = merge(&base.valid(), &adapter, &[1, 2, 3]);
    assert!(matches!(refused, Err(AdapterError::Untrained)));
}

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
fn a11_adapters_without_a_sum_are_not_mixed() {
    let of = |spec: &DecoderSpec| {
        let model = trainable(spec).adapted(&plan(spec, LORA), 1).unwrap();
        Adapter::of(&model)
    };
    let adapter = of(&tiny(Architecture::Llama));
    let mut wide = tiny(Architecture::Llama);
    wide.shape.intermediate_size *= 2;
    let mut torn = adapter.clone();
    let update = torn.layers.values_mut().next().unwrap();
    update.b = TensorData::new(vec![0f32; 8], [1, 8]);
    let cases: [(&[(&Adapter, f64)], &str); 5] = [
        (&[(&adapter, f64::NAN)], "a weight of NaN"),
        (
            &[(&adapter, 1.0), (&adapter, f64::INFINITY)],
            "a weight of inf",
        ),
        (&[(&adapter, 1.0), (&of(&wide), 1.0)], "in another"),
        (&[(&torn, 1.0)], "has A"),
        (&[], "there is none"),
    ];
    for (parts, reason) in cases {
        match Adapter::mix(parts) {
            Err(AdapterError::NotMixable { reason: found }) => {
                assert!(found.contains(reason), "{found}");
            }
            other => panic!("{reason}: {other:?}"),
        }
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
