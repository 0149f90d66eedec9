//! M1: every supported family against transformers 5.23 in f32. The ten folders in
//! tests/data/reference are tiny random models; reference.safetensors in each holds tokens, logits,
//! loss, gradients by name, and the greedy continuation of the first eight tokens.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use firebrick::config::SaveDtype;
use firebrick::data::Batch;
use firebrick::gradient::Gradient;
use firebrick::model::folder::{self, SaveOptions};
use firebrick::model::{Decoder, KvCache, with_parameters};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use support::distance;

const FOLDERS: [&str; 10] = [
    "bitnet",
    "llama",
    "llama-rope-linear",
    "llama-rope-llama3",
    "llama-ternary",
    "mistral-window",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3-relu2",
];
/// Tokens that the greedy continuation was given.
const PROMPT: usize = 8;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/reference")
        .join(name)
}

/// Name -> dtype, shape and bytes.
type File = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> File {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            let (shape, data) = (view.shape().to_vec(), view.data().to_vec());
            (name.to_string(), (view.dtype(), shape, data))
        })
        .collect()
}

fn floats_of(file: &File, name: &str) -> Vec<f32> {
    let bytes = file[name].2.chunks_exact(4);
    bytes
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

fn ids_of(file: &File, name: &str) -> Vec<u32> {
    let bytes = file[name].2.chunks_exact(8);
    bytes
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32)
        .collect()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// All tokens as one row, the last without a target.
fn whole_row(tokens: &[u32]) -> Batch {
    let mut padded = tokens.to_vec();
    padded.push(0);
    let mut batch = Batch::of_row(&padded);
    *batch.weights.last_mut().unwrap() = 0.0;
    batch
}

#[test]
fn m1_logits_and_loss_are_the_reference_implementations() {
    for name in FOLDERS {
        let reference = read(&path(name).join("reference.safetensors"));
        let batch = whole_row(&ids_of(&reference, "tokens"));
        let model = folder::load(&path(name), &Device::flex()).unwrap();
        let logits = floats(model.forward(&batch).unwrap());
        let error = distance(&logits, &floats_of(&reference, "logits"));
        assert!(error <= 1e-4, "{name}: logits differ by {error}");
        let loss = model.evaluate(&batch).unwrap().into_scalar::<f32>();
        let loss = f64::from(loss) / batch.weight();
        let error = (loss - f64::from(floats_of(&reference, "loss")[0])).abs();
        assert!(error <= 1e-5, "{name}: loss differs by {error}");
    }
}

/// Gradients put in the place of the weights, so that they take the way of weights into a file.
#[test]
fn m1_gradients_are_the_reference_implementations() {
    for name in FOLDERS {
        let reference = read(&path(name).join("reference.safetensors"));
        let batch = whole_row(&ids_of(&reference, "tokens"));
        let model = folder::load(&path(name), &Device::flex().autodiff()).unwrap();
        let loss = model.loss(&batch, 1.0 / batch.weight()).unwrap();
        let gradient = Gradient::backward(&loss.objective, &model);
        let plain = Decoder::new(model.spec(), 0, &Device::flex()).unwrap();
        let gradients = with_parameters(plain, gradient.to_tensors(), &Device::flex()).unwrap();
        let ours = folder::hf_tensors(&gradients);
        let mut seen = 0;
        for tensor in reference.keys().filter(|n| n.starts_with("grad.")) {
            let expected = floats_of(&reference, tensor);
            let hf = tensor.trim_start_matches("grad.");
            let found: Vec<f32> = ours[hf].iter::<f32>().collect();
            assert_eq!(ours[hf].shape().as_slice(), reference[tensor].1);
            let norm = |values: &[f32]| {
                let squares = values.iter().map(|&v| f64::from(v) * f64::from(v));
                squares.sum::<f64>().sqrt()
            };
            let difference: Vec<f32> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
            let error = norm(&difference) / norm(&expected);
            assert!(error <= 1e-4, "{name}: {tensor}: {error}");
            seen += 1;
        }
        assert_eq!(seen, ours.len(), "{name}");
    }
}

fn best(logits: &[f32]) -> u32 {
    let all = logits.iter().enumerate();
    all.max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32
}

#[test]
fn m1_greedy_continuations_from_the_cache_are_the_reference_implementations() {
    for name in FOLDERS {
        let reference = read(&path(name).join("reference.safetensors"));
        let expected = ids_of(&reference, "greedy");
        let model = folder::load(&path(name), &Device::flex()).unwrap();
        let mut cache = KvCache::new(&model, expected.len());
        let mut text = expected[..PROMPT].to_vec();
        while text.len() < expected.len() {
            let logits = model.decode(&text[cache.len()..], &mut cache).unwrap();
            text.push(best(&floats(logits)));
        }
        assert_eq!(text, expected, "{name}");
    }
}

/// The window holds however the text was read, long after the cache began to forget.
#[test]
fn i1_a_sliding_window_holds_in_the_cache() {
    let model = folder::load(&path("mistral-window"), &Device::flex()).unwrap();
    let tokens: Vec<u32> = (0..100).map(|i| (i * i * 7 + 3) % 320).collect();
    let whole = floats(model.forward(&whole_row(&tokens)).unwrap());
    for sizes in [[1, 1, 1], [3, 20, 1], [17, 8, 9]] {
        let mut cache = KvCache::new(&model, tokens.len());
        for size in sizes.iter().cycle() {
            let end = (cache.len() + size).min(tokens.len());
            let piece = &tokens[cache.len()..end];
            if piece.is_empty() {
                break;
            }
            let logits = floats(model.decode(piece, &mut cache).unwrap());
            let expected = &whole[(end - 1) * 320..end * 320];
            let error = distance(&logits, expected);
            assert!(error <= 1e-4, "{sizes:?} at {end}: {error}");
        }
    }
}

#[test]
fn m1_a_loaded_folder_is_saved_as_it_was() {
    for name in FOLDERS {
        let model = folder::load(&path(name), &Device::flex()).unwrap();
        let out = tempfile::tempdir().unwrap();
        let tensors = folder::hf_tensors(&model);
        let options = SaveOptions::default();
        folder::save(out.path(), model.spec(), &tensors, &options).unwrap();
        let written = read(&out.path().join("model.safetensors"));
        assert!(
            written == read(&path(name).join("model.safetensors")),
            "{name}"
        );
        assert_eq!(
            &folder::read_config(out.path()).unwrap(),
            model.spec(),
            "{name}"
        );
    }
}

fn shards(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("safetensors"))
        .collect();
    names.sort();
    names
}

/// Sharded, in half precision, and over what an earlier save left.
#[test]
fn m1_shards_and_half_precision_are_written_and_read_back() {
    for (name, dtype) in [
        ("phi3", SaveDtype::Bf16),
        ("qwen2", SaveDtype::F16),
        ("llama", SaveDtype::F32),
    ] {
        let model = folder::load(&path(name), &Device::flex()).unwrap();
        let tensors = folder::hf_tensors(&model);
        let out = tempfile::tempdir().unwrap();
        let save = |dtype, max_shard_bytes| {
            let options = SaveOptions {
                dtype,
                max_shard_bytes,
            };
            folder::save(out.path(), model.spec(), &tensors, &options).unwrap();
        };
        let others = [
            "keep-00001-of-00002.safetensors",
            "model-1-of-2.safetensors",
        ];
        for other in others {
            fs::write(out.path().join(other), "not ours").unwrap();
        }
        save(SaveDtype::F32, u64::MAX);
        save(dtype, 50_000);
        let files = shards(out.path());
        let count = files.iter().filter(|n| n.contains("-of-0")).count() - 1;
        assert!(count > 2, "{files:?}");
        assert!(!files.contains(&"model.safetensors".to_string()));
        assert!(files.contains(&"model.safetensors.index.json".to_string()));
        for other in others {
            assert!(files.contains(&other.to_string()), "{other} was deleted");
        }
        let config = fs::read_to_string(out.path().join("config.json")).unwrap();
        assert!(config.contains(dtype.torch_name()), "{config}");
        let index = fs::read_to_string(out.path().join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        let map = index["weight_map"].as_object().unwrap();
        assert_eq!(map.len(), tensors.len());
        let elements: usize = tensors.values().map(|data| data.num_elements()).sum();
        let bytes = if dtype == SaveDtype::F32 { 4 } else { 2 };
        assert_eq!(index["metadata"]["total_size"], elements * bytes);
        for n in 1..=count {
            let shard = read(
                &out.path()
                    .join(format!("model-{n:05}-of-{count:05}.safetensors")),
            );
            let size: usize = shard.values().map(|tensor| tensor.2.len()).sum();
            assert!(size <= 50_000 || shard.len() == 1, "{name} {n}: {size}");
        }

        let back = folder::load(out.path(), &Device::flex()).unwrap();
        for (tensor, data) in folder::hf_tensors(&back) {
            let rounded = |value: f32| match dtype {
                SaveDtype::F32 => value,
                SaveDtype::Bf16 => bf16::from_f32(value).to_f32(),
                SaveDtype::F16 => f16::from_f32(value).to_f32(),
            };
            let expected: Vec<f32> = tensors[&tensor].iter::<f32>().map(rounded).collect();
            assert_eq!(data.iter::<f32>().collect::<Vec<_>>(), expected, "{tensor}");
        }

        // And back to one file.
        save(SaveDtype::F32, u64::MAX);
        let mut expected = others.map(String::from).to_vec();
        expected.push("model.safetensors".to_string());
        expected.sort();
        assert_eq!(shards(out.path()), expected);
        assert_eq!(
            folder::hf_tensors(&folder::load(out.path(), &Device::flex()).unwrap()),
            tensors
        );
    }
}

/// Ties go to the even neighbour, in both formats; what does not fit is refused by name.
#[test]
fn m1_rounding_is_to_the_nearest_even() {
    use burn::tensor::TensorData;
    let model = folder::load(&path("llama"), &Device::flex()).unwrap();
    let mut tensors = folder::hf_tensors(&model);
    let name = "model.norm.weight";
    let mut saved = |values: &[f32], dtype| {
        let mut all = vec![1.0f32; 64];
        all[..values.len()].copy_from_slice(values);
        tensors.insert(name.to_string(), TensorData::new(all, [64]));
        let out = tempfile::tempdir().unwrap();
        let options = SaveOptions {
            dtype,
            ..SaveOptions::default()
        };
        folder::save(out.path(), model.spec(), &tensors, &options)?;
        let file = read(&out.path().join("model.safetensors"));
        let bits = file[name].2.chunks_exact(2);
        Ok::<Vec<u16>, firebrick::model::ModelError>(
            bits.take(values.len())
                .map(|b| u16::from_le_bytes(b.try_into().unwrap()))
                .collect(),
        )
    };
    let f32s = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0xbf80_7fff].map(f32::from_bits);
    let found = saved(&f32s, SaveDtype::Bf16).unwrap();
    assert_eq!(found, [0x3f80, 0x3f82, 0x3f81, 0xbf80]);
    // Halfway between 1 and its neighbour, the same one further, the least subnormal, half of it.
    let f32s = [
        1.0 + 2f32.powi(-11),
        1.0 + 3.0 * 2f32.powi(-11),
        2f32.powi(-24),
        2f32.powi(-25),
    ];
    let found = saved(&f32s, SaveDtype::F16).unwrap();
    assert_eq!(found, [0x3c00, 0x3c02, 0x0001, 0x0000]);
    let error = saved(&[65_520.0], SaveDtype::F16).unwrap_err();
    assert!(
        error.to_string().contains(name) && error.help().is_some(),
        "{error}"
    );
    assert_eq!(saved(&[65_519.0], SaveDtype::F16).unwrap(), [0x7bff]);
    saved(&[f32::MAX], SaveDtype::Bf16).unwrap_err();
    assert_eq!(saved(&[f32::INFINITY], SaveDtype::Bf16).unwrap(), [0x7f80]);
}
