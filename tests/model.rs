//! Behaviours of the decoder, named by the rows of the design they hold up.
#![allow(missing_docs)]

mod support;

use std::path::PathBuf;

use burn::module::{Module, Param};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick::config::{Architecture, EraOutput, HiddenAct, SaveDtype, SpecError};
use firebrick::data::Batch;
use firebrick::gradient::Gradient;
use firebrick::model::folder::SaveOptions;
use firebrick::model::{
    Decoder, DecoderSpec, KvCache, Linear, ModelError, VisitParameters, Weight, cross_entropy,
    folder, parameters, visit_parameters,
};
use support::{batch, distance, tiny, variants};

fn plain(spec: &DecoderSpec) -> Decoder {
    Decoder::new(spec, 5, &Device::flex()).unwrap()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

#[test]
fn m2_parameter_count_is_the_sum_of_tensor_sizes() {
    for (name, spec) in variants() {
        let model = plain(&spec);
        let counted = model.num_params();
        let summed: usize = parameters(&model)
            .values()
            .map(|data| data.num_elements())
            .sum();
        assert_eq!(counted, summed, "{name}");
    }
    // LLaMA by hand: embedding + per layer (q, o: 24x24; k, v: 24x12; 3 x 24x40; 2 norms) + norm.
    let per_layer = 2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40 + 2 * 24;
    assert_eq!(
        plain(&tiny(Architecture::Llama)).num_params(),
        13 * 24 + 2 * per_layer + 24
    );
}

#[test]
fn m3_every_parameter_gets_a_gradient() {
    struct Check<'a> {
        name: &'a str,
        gradient: &'a Gradient,
        seen: usize,
    }
    impl VisitParameters for Check<'_> {
        fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            let gradient = self.gradient.get::<D>(path);
            let gradient = gradient.unwrap_or_else(|| panic!("{}: {path} has none", self.name));
            assert_eq!(
                gradient.shape(),
                param.val().shape(),
                "{}: {path}",
                self.name
            );
            let largest = floats(gradient)
                .into_iter()
                .fold(0.0f32, |m, g| m.max(g.abs()));
            assert!(
                largest > 0.0 && largest.is_finite(),
                "{}: {path}: {largest}",
                self.name
            );
            self.seen += 1;
        }
    }
    for (name, spec) in variants() {
        let model = Decoder::new(&spec, 5, &Device::flex().autodiff()).unwrap();
        let loss = model
            .loss(&batch(3, 8, spec.vocab_size), 1.0 / 24.0)
            .unwrap();
        let gradient = Gradient::backward(&loss.objective, &model);
        let mut check = Check {
            name: &name,
            gradient: &gradient,
            seen: 0,
        };
        visit_parameters(&model, &mut check);
        assert_eq!(check.seen, parameters(&model).len());
    }
}

#[test]
fn gradients_agree_with_finite_differences_of_the_loss() {
    for architecture in [Architecture::Llama, Architecture::Gpt2] {
        let spec = tiny(architecture);
        let mut batch = batch(2, 6, spec.vocab_size);
        batch.weights[3] = 0.0;
        batch.weights[7] = 0.5;
        let device = Device::flex().autodiff();
        let model = Decoder::new(&spec, 5, &device).unwrap();
        let loss = model.loss(&batch, 1.0).unwrap();
        let gradient = Gradient::backward(&loss.objective, &model);
        for (param, row, col) in [
            (dense(&model.layers[0].self_attn.k_proj), 3, 5),
            (dense(&model.layers[1].mlp.down_proj), 7, 2),
            (&model.embed_tokens.weight, batch.tokens[0] as usize, 4),
        ] {
            let path = path_of(&model, param);
            let analytic = floats(gradient.get::<2>(&path).unwrap());
            let cols = param.val().dims()[1];
            let nudged = |delta: f32| {
                let mut tensors = parameters(&model);
                let data = tensors.remove(&path).unwrap();
                let shape = data.shape().clone();
                let mut values: Vec<f32> = data.iter::<f32>().collect();
                values[row * cols + col] += delta;
                tensors.insert(path.clone(), TensorData::new(values, shape));
                let model = plain(&spec);
                let model =
                    firebrick::model::with_parameters(model, tensors, &Device::flex()).unwrap();
                f64::from(model.evaluate(&batch).unwrap().into_scalar::<f32>())
            };
            let numeric = (nudged(1e-2) - nudged(-1e-2)) / 2e-2;
            let analytic = f64::from(analytic[row * cols + col]);
            assert!(
                (numeric - analytic).abs() < 2e-3 + 0.01 * numeric.abs(),
                "{numeric} {analytic}"
            );
        }
    }
}

fn dense(linear: &Linear) -> &Param<Tensor<2>> {
    match &linear.weight {
        Weight::Dense(weight) => weight,
        _ => panic!("a model in training has dense weights"),
    }
}

fn path_of(model: &Decoder, wanted: &Param<Tensor<2>>) -> String {
    struct Find(burn::module::ParamId, String);
    impl VisitParameters for Find {
        fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            if param.id == self.0 {
                self.1 = path.to_string();
            }
        }
    }
    let mut find = Find(wanted.id, String::new());
    visit_parameters(model, &mut find);
    find.1
}

#[test]
fn the_written_down_gradient_of_cross_entropy_is_the_taped_one() {
    let device = Device::flex().autodiff();
    let (rows, vocab) = (5, 7);
    let values: Vec<f32> = (0..rows * vocab)
        .map(|i| ((i * 37 % 19) as f32 - 9.0) * 0.7)
        .collect();
    let targets: Vec<i32> = (0..rows).map(|i| (i * 3 + 1) % vocab).collect();
    let weights = vec![1.0f32, 0.0, 2.0, 0.5, 1.0];
    let logits = || {
        Tensor::<2>::from_data(TensorData::new(values.clone(), [rows, vocab]), &device)
            .require_grad()
    };
    let targets_on = |device: &Device| {
        Tensor::<1, Int>::from_data(TensorData::new(targets.clone(), [rows]), device)
    };
    let weights_on =
        |device: &Device| Tensor::<1>::from_data(TensorData::new(weights.clone(), [rows]), device);

    let ours = logits();
    let inner = device.clone().inner();
    let loss = cross_entropy(ours.clone(), targets_on(&inner), weights_on(&inner), 0.25);
    let our_gradient = floats(ours.grad(&loss.objective.backward()).unwrap());

    let taped = logits();
    let nats = log_softmax(taped.clone(), 1)
        .gather(1, targets_on(&device).unsqueeze_dim(1))
        .neg();
    let nats: Tensor<1> = nats.squeeze_dim(1);
    let reference = (nats * weights_on(&device)).sum();
    let reference_gradient = floats(
        taped
            .grad(&reference.clone().mul_scalar(0.25).backward())
            .unwrap(),
    );

    assert!((loss.sum.into_scalar::<f32>() - reference.into_scalar::<f32>()).abs() < 1e-5);
    assert!(distance(&our_gradient, &reference_gradient) < 1e-6);
}

#[test]
fn cross_entropy_is_finite_where_the_target_is_all_but_impossible() {
    let logits = Tensor::<2>::from_data([[300.0f32, -300.0]], &Device::flex());
    let target = Tensor::<1, Int>::from_data([1], &Device::flex());
    let weight = Tensor::<1>::from_data([1.0f32], &Device::flex());
    let nats = firebrick::model::cross_entropy_sum(logits, target, weight).into_scalar::<f32>();
    assert_eq!(nats, 600.0);
}

#[test]
fn a_token_does_not_see_its_future() {
    for (name, spec) in variants() {
        let model = plain(&spec);
        let first = batch(1, 8, spec.vocab_size);
        let mut second = first.clone();
        for token in &mut second.tokens[5..] {
            *token = (*token + 1) % spec.vocab_size as u32;
        }
        let [a, b] = [&first, &second].map(|batch| floats(model.forward(batch).unwrap()));
        let seen = 5 * spec.vocab_size;
        assert_eq!(a[..seen], b[..seen], "{name}");
        assert!(distance(&a[seen..], &b[seen..]) > 1e-3, "{name}");
    }
}

#[test]
fn i1_cached_logits_are_the_uncached_ones() {
    for (name, spec) in variants() {
        let model = plain(&spec);
        let batch = batch(1, 9, spec.vocab_size);
        let whole = floats(model.forward(&batch).unwrap());
        // A prompt in two pieces, then token by token.
        let mut cache = KvCache::new(&model, 9);
        for end in [3, 5, 6, 7, 8, 9] {
            let begin = cache.len();
            let logits = floats(model.decode(&batch.tokens[begin..end], &mut cache).unwrap());
            let expected = &whole[(end - 1) * spec.vocab_size..end * spec.vocab_size];
            assert!(distance(&logits, expected) < 1e-4, "{name} at {end}");
        }
        assert!(matches!(
            model.decode(&[0], &mut cache),
            Err(ModelError::TooLong {
                length: 10,
                limit: 9
            })
        ));
    }
}

#[test]
fn r4_texts_packed_into_one_row_do_not_see_each_other() {
    for (name, spec) in variants() {
        let model = plain(&spec);
        let one = batch(2, 5, spec.vocab_size);
        let packed = Batch {
            rows: 1,
            cols: 10,
            segment_ids: (0..10).map(|i| i / 5).collect(),
            ..one.clone()
        };
        let [apart, together] = [&one, &packed].map(|batch| floats(model.forward(batch).unwrap()));
        assert!(distance(&apart, &together) < 1e-4, "{name}");
    }
}

#[test]
fn rows_of_a_batch_with_different_segments_and_positions_are_each_their_own() {
    for (name, spec) in variants() {
        let model = plain(&spec);
        let mut mixed = batch(2, 6, spec.vocab_size);
        mixed.segment_ids[6..].copy_from_slice(&[0, 0, 1, 1, 1, 1]);
        mixed.positions[6..].copy_from_slice(&[0, 1, 0, 1, 2, 3]);
        let together = floats(model.forward(&mixed).unwrap());
        for row in 0..2 {
            let alone = floats(model.forward(&mixed.rows(row..row + 1)).unwrap());
            let width = 6 * spec.vocab_size;
            assert!(
                distance(&alone, &together[row * width..(row + 1) * width]) < 1e-4,
                "{name}"
            );
        }
    }
}

#[test]
fn a_position_past_a_learned_table_is_an_error() {
    let mut spec = tiny(Architecture::Gpt2);
    spec.shape.max_position_embeddings = 4;
    let error = plain(&spec)
        .forward(&batch(1, 5, spec.vocab_size))
        .unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::TooLong {
                length: 5,
                limit: 4
            }
        ),
        "{error}"
    );
}

#[test]
fn initial_weights_depend_on_seed_and_path_alone() {
    let spec = tiny(Architecture::Llama);
    // The residual projections' scale depends on the depth, nothing else does.
    let mut deeper = spec.clone();
    deeper.shape.num_hidden_layers = 3;
    let weights =
        |spec: &DecoderSpec, seed| parameters(&Decoder::new(spec, seed, &Device::flex()).unwrap());
    assert_eq!(weights(&spec, 1), weights(&spec, 1));
    assert_ne!(
        weights(&spec, 1)["embed_tokens.weight"],
        weights(&spec, 2)["embed_tokens.weight"]
    );
    for path in [
        "embed_tokens.weight",
        "layers.1.self_attn.q_proj.weight",
        "layers.0.mlp.up_proj.weight",
    ] {
        assert_eq!(weights(&spec, 1)[path], weights(&deeper, 1)[path]);
    }
    let mut wide = tiny(Architecture::Llama);
    wide.shape.hidden_size = 256;
    wide.shape.initializer_range = 0.02;
    let deviation = |name: &str| {
        let values: Vec<f32> = weights(&wide, 1)[name].iter::<f32>().collect();
        (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt()
    };
    assert!((deviation("layers.0.mlp.up_proj.weight") - 0.02).abs() < 0.001);
    // Two layers: residual projections start at 0.02 / sqrt(4).
    assert!((deviation("layers.1.mlp.down_proj.weight") - 0.01).abs() < 0.0005);
    assert!((deviation("layers.1.self_attn.o_proj.weight") - 0.01).abs() < 0.0005);
}

#[test]
fn projections_to_the_residual_stream_can_begin_at_zero() {
    let mut spec = tiny(Architecture::Qwen3);
    let usual = parameters(&plain(&spec));
    spec.shape.zero_init_output = true;
    let mut model = Decoder::new(&spec, 5, &Device::flex().autodiff()).unwrap();
    for (path, data) in parameters(&model) {
        let is_output = path.ends_with("o_proj.weight") || path.ends_with("down_proj.weight");
        match is_output {
            true => assert!(data.iter::<f32>().all(|weight| weight == 0.0), "{path}"),
            false => assert_eq!(data, usual[&path], "{path}"),
        }
    }
    // What comes back from them is zero in the first step only.
    for step in 0..2 {
        let loss = model.loss(&batch(2, 8, spec.vocab_size), 1.0 / 16.0);
        let gradient = Gradient::backward(&loss.unwrap().objective, &model);
        let mut weights = parameters(&model);
        for (path, data) in gradient.to_tensors() {
            let behind_zero = step == 0
                && path.starts_with("layers.")
                && !path.ends_with("o_proj.weight")
                && !path.ends_with("down_proj.weight");
            let norm: f64 = data.iter::<f64>().map(|g| g * g).sum();
            assert_eq!(norm == 0.0, behind_zero, "step {step}: {path} {norm}");
            let moved: Vec<f32> = weights[&path]
                .iter::<f32>()
                .zip(data.iter::<f32>())
                .map(|(w, g)| w - g)
                .collect();
            let shape = data.shape();
            weights.insert(path, TensorData::new(moved, shape));
        }
        model =
            firebrick::model::with_parameters(model, weights, &Device::flex().autodiff()).unwrap();
    }
}

#[test]
fn a_gate_and_an_output_that_do_not_fit_the_model_are_errors() {
    let refused = |spec: &DecoderSpec| match Decoder::new(spec, 0, &Device::flex()) {
        Err(ModelError::Spec(error @ SpecError::Shape { .. })) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let mut ungated = tiny(Architecture::Llama);
    ungated.shape.hidden_act = None;
    assert!(refused(&ungated).contains("llama has none"));
    let mut gated = tiny(Architecture::Gpt2);
    gated.shape.hidden_act = Some(HiddenAct::Silu);
    assert!(refused(&gated).contains("gpt2 has silu"));
    let mut sure = tiny(Architecture::Llama);
    sure.shape.output_activation = Some(EraOutput { min_entropy: -0.1 });
    assert!(
        refused(&sure).contains("-0.060 and 2.505 nats"),
        "{}",
        refused(&sure)
    );
}

/// The loss of a model that is as sure as it can be, and right, is what is said to be the least.
#[test]
fn o3_no_loss_is_below_the_least_that_is_told() {
    let era = EraOutput { min_entropy: 1.0 };
    let mut spec = tiny(Architecture::Llama);
    spec.shape.output_activation = Some(era);
    spec.shape.initializer_range = 1.0;
    let model = plain(&spec);
    let batch = batch(2, 16, spec.vocab_size);
    let least = era.least_loss(spec.vocab_size).unwrap();
    let nats = |model: &Decoder| {
        f64::from(model.evaluate(&batch).unwrap().into_scalar::<f32>()) / batch.weight()
    };
    let loss = nats(&model);
    assert!(loss > least, "{loss} {least}");
    // A right answer everywhere: each token's own most likely next one.
    let logits = model.forward(&batch).unwrap();
    let targets: Vec<i32> = logits.argmax(1).into_data().iter::<i32>().collect();
    let mut right = batch.clone();
    right.targets = targets.iter().map(|&t| t as u32).collect();
    let loss = f64::from(model.evaluate(&right).unwrap().into_scalar::<f32>()) / batch.weight();
    assert!(loss >= least - 1e-6 && loss < least + 1.0, "{loss} {least}");
}

#[test]
fn a_model_folder_gives_the_same_model_back() {
    for (name, spec) in variants() {
        let folder = tempfile::tempdir().unwrap();
        let model = plain(&spec);
        folder::save(
            folder.path(),
            &spec,
            &folder::hf_tensors(&model),
            &SaveOptions::default(),
        )
        .unwrap();
        let back = folder::load(folder.path(), &Device::flex()).unwrap();
        assert_eq!(parameters(&back), parameters(&model), "{name}");
        assert_eq!(back.spec(), &spec, "{name}");
    }
}

#[test]
fn files_hold_hugging_faces_names_and_layout() {
    let llama = folder::hf_tensors(&plain(&tiny(Architecture::Llama)));
    let shape = |name: &str| llama[name].shape().as_slice().to_vec();
    assert_eq!(shape("model.layers.1.self_attn.k_proj.weight"), [12, 24]);
    assert_eq!(shape("model.layers.0.mlp.down_proj.weight"), [24, 40]);
    assert_eq!(shape("model.embed_tokens.weight"), [13, 24]);
    let gpt2 = folder::hf_tensors(&plain(&tiny(Architecture::Gpt2)));
    let shape = |name: &str| gpt2[name].shape().as_slice().to_vec();
    assert_eq!(shape("transformer.h.1.attn.c_attn.weight"), [24, 72]);
    assert_eq!(shape("transformer.h.1.mlp.c_proj.weight"), [40, 24]);
    assert_eq!(shape("transformer.h.0.attn.c_attn.bias"), [72]);
}

#[test]
fn damaged_and_foreign_folders_are_typed_errors() {
    let spec = tiny(Architecture::Llama);
    let model = plain(&spec);
    let good = folder::hf_tensors(&model);
    let load = |change: &dyn Fn(&std::path::Path)| {
        let folder = tempfile::tempdir().unwrap();
        folder::save(folder.path(), &spec, &good, &SaveOptions::default()).unwrap();
        change(folder.path());
        folder::load(folder.path(), &Device::flex()).unwrap_err()
    };
    let config = |field: &'static str, value: serde_json::Value| {
        let mut json = spec.to_config_json(SaveDtype::F32);
        json[field] = value;
        load(&move |path| std::fs::write(path.join("config.json"), json.to_string()).unwrap())
    };
    let weights = |tensors: firebrick::model::Tensors| {
        load(&move |path| folder::write_tensors(&path.join("model.safetensors"), &tensors).unwrap())
    };

    let missing = load(&|path| std::fs::remove_file(path.join("config.json")).unwrap());
    assert!(matches!(
        missing,
        ModelError::NotAModel {
            missing: "config.json",
            ..
        }
    ));
    let truncated = load(&|path| {
        let file = path.join("model.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
    });
    assert!(matches!(truncated, ModelError::Safetensors { .. }));
    let not_json = load(&|path| std::fs::write(path.join("config.json"), "{").unwrap());
    assert!(matches!(not_json, ModelError::Spec(SpecError::Json { .. })));

    let named =
        |error: ModelError, field: &str| assert!(error.to_string().contains(field), "{error}");
    named(
        config("rope_scaling", serde_json::json!({"rope_type": "yarn"})),
        "rope_scaling",
    );
    named(config("model_type", serde_json::json!("mamba")), "mamba");
    named(
        config("hidden_size", serde_json::json!("24")),
        "hidden_size",
    );
    named(
        config("num_hidden_layers", serde_json::json!(-1)),
        "num_hidden_layers",
    );
    named(config("hidden_size", serde_json::json!(0)), "hidden_size");
    named(
        config("num_hidden_layers", serde_json::json!(2_000_000_000)),
        "num_hidden_layers",
    );
    named(
        config("vocab_size", serde_json::json!(14)),
        "model.embed_tokens.weight".trim_start_matches("model."),
    );

    let gpt2 = tiny(Architecture::Gpt2);
    let mut hollow = folder::hf_tensors(&plain(&gpt2));
    let name = "transformer.h.0.attn.c_attn.weight";
    hollow.insert(
        name.to_string(),
        TensorData::new(Vec::<f32>::new(), [24, 0]),
    );
    let error = folder::decoder_from_hf(&gpt2, hollow, &Device::flex()).unwrap_err();
    named(error, name);

    let mut without = good.clone();
    without.remove("model.norm.weight");
    named(weights(without), "norm.weight");
    let mut with_more = good.clone();
    with_more.insert(
        "model.extra".to_string(),
        TensorData::new(vec![0.0f32], [1]),
    );
    named(weights(with_more), "extra");
}

fn shared(name: &str) -> PathBuf {
    let root = std::env::var_os("FIREBRICK_DATA").expect("FIREBRICK_DATA names the data folder");
    PathBuf::from(root).join(name)
}

#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn m1_logits_and_greedy_ids_of_a_real_model() {
    let folder = shared("stories260K/hf");
    let model = folder::load(&folder, &Device::flex()).unwrap();
    let bytes = std::fs::read(folder.join("reference.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let expected: Vec<f32> = file
        .tensor("logits")
        .unwrap()
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let tokens: Vec<u32> = integers(&file, "tokens");
    let cols = expected.len() / model.spec().vocab_size;
    let mut batch = batch(1, cols, model.spec().vocab_size);
    batch.tokens = tokens[..cols].to_vec();
    let error = distance(&floats(model.forward(&batch).unwrap()), &expected);
    assert!(error < 1e-4, "{error}");

    let mut cache = KvCache::new(&model, tokens.len());
    let mut text = tokens[..1].to_vec();
    while text.len() < tokens.len() {
        let logits = floats(model.decode(&text[cache.len()..], &mut cache).unwrap());
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        text.push(best.unwrap() as u32);
    }
    assert_eq!(text, tokens);
}

fn integers(file: &safetensors::SafeTensors, name: &str) -> Vec<u32> {
    let names = file.names();
    let tensor = file
        .tensor(name)
        .unwrap_or_else(|_| panic!("{name} not in {names:?}"));
    let ids = tensor.data().chunks_exact(tensor.dtype().bitsize() / 8);
    ids.map(|b| u32::from_le_bytes(b[..4].try_into().unwrap()))
        .collect()
}

#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn i2_a_real_model_tells_its_published_story() {
    use firebrick::data::Tokenizer;
    use firebrick::generate::{Sampling, TextRequest, complete};
    let folder = shared("stories260K/hf");
    let model = folder::load(&folder, &Device::flex()).unwrap();
    let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json")).unwrap();
    let request = TextRequest {
        prompt: "",
        max_new_tokens: 255,
        sampling: Sampling::default(),
        seed: 0,
        stop: &[],
    };
    let (text, completion) = complete(&model, &tokenizer, &request, |_| {}).unwrap();
    assert_eq!(completion.tokens.len(), 255);
    let published = std::fs::read_to_string(shared("stories260K/stories260K.md")).unwrap();
    assert!(published.contains(text.trim()), "{text}");
}
