//! Base models in four and eight bits, named by the rows of the design they hold up.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, FloatDType, TensorData};
use firebrick::adapter::Adapter;
use firebrick::config::{
    AdapterInit, AdapterPlan, Architecture, BlockFormat, BlockSize, Blockwise, LoraShape,
    OptimizerPlan, SaveDtype,
};
use firebrick::data::Batch;
use firebrick::model::folder::{self, SaveOptions};
use firebrick::model::{Decoder, DecoderSpec, Tensors, parameters};
use firebrick::objective::{CrossEntropy, Precision, backward, backward_with};
use firebrick::optimizer::Optimizer;
use safetensors::SafeTensors;
use support::{batch, distance, tiny};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(path)
}

fn data_of(name: &str) -> PathBuf {
    data("quantised").join(name)
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

fn floats(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

fn logits(model: &Decoder, batch: &Batch) -> Vec<f32> {
    floats(&model.valid().forward(batch).unwrap().into_data())
}

/// Every format, with the block sizes and kinds of scales that change what is stored.
fn forms() -> Vec<Blockwise> {
    let mut forms = Vec::new();
    for format in BlockFormat::ALL {
        for (block, double) in [
            (BlockSize::Weights(64), false),
            (BlockSize::Weights(64), true),
            (BlockSize::Weights(24), true),
            (BlockSize::Row, false),
        ] {
            forms.push(Blockwise {
                format,
                block,
                double,
            });
        }
    }
    forms
}

/// The dense folder of a model, and the model.
fn dense(architecture: Architecture) -> (tempfile::TempDir, Decoder) {
    let mut spec = tiny(architecture);
    spec.shape.tie_word_embeddings = architecture == Architecture::Qwen2;
    let model = Decoder::new(&spec, 5, &Device::flex()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = SaveOptions::default();
    folder::save(folder.path(), &spec, &folder::hf_tensors(&model), &options).unwrap();
    (folder, model)
}

fn load(folder: &Path, blockwise: Blockwise, device: &Device) -> Decoder {
    let mut spec = folder::read_config(folder).unwrap();
    spec.shape.blockwise = Some(blockwise);
    let mut quantiser = folder::quantiser(blockwise);
    folder::load_quantising(&spec, folder, device, &mut quantiser).unwrap()
}

fn plan(spec: &DecoderSpec, init: AdapterInit) -> AdapterPlan {
    let shape = LoraShape {
        rank: 3,
        scale: 2.0,
        dropout: 0.0,
        magnitude: false,
    };
    let names = match spec.shape.architecture {
        Architecture::Gpt2 => &["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"][..],
        _ => &[
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ],
    };
    let blocks = 0..spec.shape.num_hidden_layers;
    let paths = blocks.flat_map(|block| names.iter().map(move |n| format!("layers.{block}.{n}")));
    AdapterPlan {
        layers: paths.map(|path| (path, shape)).collect::<BTreeMap<_, _>>(),
        saved: Vec::new(),
        init,
        loftq_iterations: 1,
        lora_plus_ratio: 1.0,
    }
}

const FAMILIES: [Architecture; 5] = [
    Architecture::Llama,
    Architecture::Qwen2,
    Architecture::Phi3,
    Architecture::Gpt2,
    Architecture::Bitnet,
];

#[test]
fn q1_q3_a_quantised_folder_is_read_back_bit_for_bit() {
    for architecture in FAMILIES {
        let (source, model) = dense(architecture);
        let batch = batch(2, 8, 13);
        for blockwise in forms() {
            let quantised = load(source.path(), blockwise, &Device::flex());
            let away = tempfile::tempdir().unwrap();
            let tensors = folder::hf_tensors(&quantised);
            let spec = quantised.spec();
            folder::save(away.path(), spec, &tensors, &SaveOptions::default()).unwrap();
            let back = folder::load(away.path(), &Device::flex()).unwrap();
            assert_eq!(back.spec(), spec, "{architecture:?} {blockwise:?}");
            assert_eq!(parameters(&back), parameters(&quantised));
            assert_eq!(logits(&back, &batch), logits(&quantised, &batch));
            let error = distance(&logits(&model, &batch), &logits(&quantised, &batch));
            // Eight bits are near the weights; four are not, and not far either.
            let limit = if blockwise.format == BlockFormat::Int8 {
                0.2
            } else {
                4.0
            };
            assert!(
                error > 0.0 && error < limit,
                "{architecture:?} {blockwise:?}: {error}"
            );
        }
    }
}

/// Codes of scales: all but one in a hundred the same, and those next to each other. Their mean, which
/// is subtracted first, is a sum that torch takes in another order.
fn nearly(a: &[u8], b: &[u8]) -> bool {
    let differing = a.iter().zip(b).filter(|(a, b)| a != b);
    let near = differing.clone().all(|(&a, &b)| a.abs_diff(b) == 1);
    a.len() == b.len() && near && differing.count() <= a.len().div_ceil(100)
}

/// What transformers and bitsandbytes have written, and what dense weights become here.
#[test]
fn q1_q2_folders_of_bitsandbytes_are_read_and_written_byte_for_byte() {
    for (name, format, double) in [
        ("nf4", BlockFormat::Nf4, true),
        ("fp4", BlockFormat::Fp4, false),
    ] {
        let theirs = folder::load(&data("quantised").join(name), &Device::flex()).unwrap();
        let blockwise = Blockwise {
            format,
            block: BlockSize::Weights(64),
            double,
        };
        assert_eq!(theirs.spec().shape.blockwise, Some(blockwise));
        let ours = load(&data_of("dense"), blockwise, &Device::flex());
        let (expected, found) = (parameters(&theirs), parameters(&ours));
        for (path, data) in &expected {
            let same = match path {
                path if path.ends_with(".scales") => {
                    distance(&floats(data), &floats(&found[path])) < 1e-6
                }
                path if path.ends_with(".side") => nearly(data.as_bytes(), found[path].as_bytes()),
                path => data == &found[path],
            };
            assert!(same, "{name}: {path}");
        }
        let (tokens, logits) = reference(&data_of(name));
        let mut row = tokens.clone();
        row.push(0);
        let error = distance(&logits, &self::logits(&theirs, &Batch::of_row(&row)));
        assert!(error < 1e-4, "{name}: {error}");
        let folder = tempfile::tempdir().unwrap();
        let tensors = folder::hf_tensors(&ours);
        folder::save(
            folder.path(),
            ours.spec(),
            &tensors,
            &SaveOptions::default(),
        )
        .unwrap();
        let read = |path: PathBuf| {
            let bytes = fs::read(path.join("model.safetensors")).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let tensors = file.iter().map(|(name, view)| {
                let value = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                (name.to_string(), value)
            });
            tensors.collect::<BTreeMap<_, _>>()
        };
        let (written, expected) = (
            read(folder.path().to_path_buf()),
            read(data("quantised").join(name)),
        );
        let names = |file: &BTreeMap<_, _>| file.keys().cloned().collect::<Vec<String>>();
        assert_eq!(names(&written), names(&expected));
        for (tensor, value) in &expected {
            let is_mean = tensor.ends_with("nested_absmax") || tensor.contains("quant_state");
            let same = match tensor {
                _ if double && is_mean => written[tensor].0 == value.0,
                tensor if double && tensor.ends_with(".absmax") => {
                    nearly(&written[tensor].2, &value.2)
                }
                tensor => &written[tensor] == value,
            };
            assert!(same, "{name}: {tensor}");
        }
    }
}

#[test]
fn q2_scales_in_eight_bits_take_less() {
    let (source, _) = dense(Architecture::Llama);
    let bytes = |double| {
        let blockwise = Blockwise {
            format: BlockFormat::Nf4,
            block: BlockSize::Weights(64),
            double,
        };
        let folder = tempfile::tempdir().unwrap();
        let model = load(source.path(), blockwise, &Device::flex());
        let mut tensors = folder::hf_tensors(&model);
        // What bitsandbytes says about itself is the same for any size of matrix.
        tensors.retain(|name, _| !name.contains("quant_map") && !name.contains("quant_state"));
        let path = folder.path().join("x");
        let total: usize = tensors.values().map(|data| data.as_bytes().len()).sum();
        fs::write(path, "").unwrap();
        total
    };
    assert!(bytes(true) < bytes(false));
}

#[test]
fn q5_a_quantised_base_trains_as_the_dense_weights_it_stands_for() {
    for architecture in FAMILIES {
        let (source, _) = dense(architecture);
        for blockwise in forms().into_iter().step_by(3) {
            let device = Device::flex().autodiff();
            let quantised = load(source.path(), blockwise, &device);
            let spec = quantised.spec().clone();
            // The same numbers, dense.
            let mut plain = spec.clone();
            plain.shape.blockwise = None;
            let dense = folder::hf_tensors(&quantised.clone().merged());
            let dense = folder::decoder_from_hf(&plain, dense, &device).unwrap();
            let plan = plan(&spec, AdapterInit::Default);
            let batch = batch(2, 8, 13);
            let optimizer = || {
                Optimizer::new(&OptimizerPlan::Sgd {
                    momentum: 0.0,
                    nesterov: false,
                    weight_decay: 0.0,
                })
            };
            let mut models =
                [quantised, dense].map(|model| (model.adapted(&plan, 1).unwrap(), optimizer()));
            let before = parameters(&models[0].0);
            for _ in 0..4 {
                let steps = models.map(|(model, mut optimizer)| {
                    let result = backward(&model, std::slice::from_ref(&batch)).unwrap();
                    let (loss, found) = (result.loss(), result.gradient.to_tensors());
                    (
                        optimizer.step(model, result.gradient, 0.5),
                        optimizer,
                        loss,
                        found,
                    )
                });
                let [
                    (a, a_optimizer, a_loss, a_found),
                    (b, b_optimizer, b_loss, b_found),
                ] = steps;
                assert!(
                    (a_loss - b_loss).abs() < 1e-4,
                    "{architecture:?} {blockwise:?}"
                );
                assert_eq!(a_found.len(), b_found.len());
                for (path, gradient) in &a_found {
                    let error = distance(&floats(gradient), &floats(&b_found[path]));
                    assert!(
                        error < 1e-4,
                        "{architecture:?} {blockwise:?} {path}: {error}"
                    );
                }
                models = [(a, a_optimizer), (b, b_optimizer)];
            }
            let after = parameters(&models[0].0);
            for (path, data) in before
                .iter()
                .filter(|(path, _)| !path.contains(".adapter."))
            {
                assert_eq!(data, &after[path], "{path} has moved");
            }
            assert!(
                Adapter::of(&models[0].0)
                    .layers
                    .values()
                    .any(|update| { floats(&update.b).iter().any(|&value| value != 0.0) })
            );
        }
    }
}

#[test]
fn q5_half_precision_leaves_scales_as_they_are() {
    let (source, _) = dense(Architecture::Llama);
    let blockwise = Blockwise {
        format: BlockFormat::Nf4,
        block: BlockSize::Weights(64),
        double: true,
    };
    let device = Device::flex().autodiff();
    let model = load(source.path(), blockwise, &device);
    let before = parameters(&model);
    let halved = parameters(&model.clone().cast(FloatDType::BF16));
    for (path, data) in before.iter().filter(|(path, _)| path.contains(".weight.s")) {
        assert_eq!(data, &halved[path], "{path}");
    }
    let plan = plan(model.spec(), AdapterInit::Default);
    let model = model.adapted(&plan, 1).unwrap();
    let batch = batch(2, 8, 13);
    let loss = |dtype| {
        let precision = Precision {
            dtype,
            ..Precision::default()
        };
        let result = backward_with(
            &model,
            std::slice::from_ref(&batch),
            &CrossEntropy,
            precision,
        )
        .unwrap();
        assert!(result.gradient.norm() > 0.0);
        result.loss()
    };
    assert!((loss(FloatDType::F32) - loss(FloatDType::BF16)).abs() < 0.1);
}

#[test]
fn q1_what_is_not_as_config_json_says_is_refused_by_name() {
    let copy = |change: &dyn Fn(&mut serde_json::Value)| {
        let folder = tempfile::tempdir().unwrap();
        let from = data_of("nf4");
        let text = fs::read_to_string(from.join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        change(&mut config["quantization_config"]);
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        fs::copy(
            from.join("model.safetensors"),
            folder.path().join("model.safetensors"),
        )
        .unwrap();
        folder::load(folder.path(), &Device::flex()).map(drop)
    };
    assert!(copy(&|_| {}).is_ok());
    let cases = [
        ("load_in_4bit", serde_json::json!(false), "load_in_4bit"),
        (
            "bnb_4bit_quant_type",
            serde_json::json!("nf3"),
            "bnb_4bit_quant_type",
        ),
        ("bnb_4bit_quant_type", serde_json::json!("fp4"), "quant"),
        (
            "bnb_4bit_use_double_quant",
            serde_json::json!(false),
            "nested",
        ),
        (
            "bnb_4bit_quant_storage",
            serde_json::json!("bfloat16"),
            "bnb_4bit_quant_storage",
        ),
        (
            "llm_int8_skip_modules",
            serde_json::json!(["q_proj"]),
            "llm_int8_skip_modules",
        ),
        ("quant_method", serde_json::json!("gptq"), "quant_method"),
    ];
    for (field, value, named) in cases {
        let error = copy(&|config| config[field] = value.clone())
            .unwrap_err()
            .to_string();
        assert!(error.contains(named), "{field}: {error}");
    }
    let dense = folder::save(
        Path::new("/nowhere"),
        &folder::read_config(&data("reference/llama")).unwrap(),
        &Tensors::new(),
        &SaveOptions {
            dtype: SaveDtype::Bf16,
            ..SaveOptions::default()
        },
    );
    assert!(dense.is_err());
}
