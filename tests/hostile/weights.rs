//! model.safetensors: headers, offsets, dtypes, shapes, values.

use burn::tensor::TensorData;
use firebrick::config::Architecture;
use firebrick::data::Tokenizer;
use firebrick::model::{Tensors, folder};
use serde_json::{Value, json};

use super::{Model, runner};

const FILE: &str = "model.safetensors";

/// Header and data of a file.
fn parts(bytes: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    (header, bytes[8 + length..].to_vec())
}

fn file(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// A model whose header went through `change`.
fn with_header(change: impl FnOnce(&mut Value)) -> Model {
    let model = Model::new(Architecture::Llama);
    let (mut header, data) = parts(&model.read(FILE));
    change(&mut header);
    model.write(FILE, file(header.to_string().as_bytes(), &data));
    model
}

const NORM: &str = "model.norm.weight";
const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

#[test]
fn a_file_cut_anywhere_is_refused() {
    let model = Model::new(Architecture::Llama);
    let whole = model.read(FILE);
    let (header, _) = parts(&whole);
    let lengths = (0..whole.len()).filter(|&n| n < 16 || n % 331 == 0 || n + 16 > whole.len());
    for length in lengths {
        model.write(FILE, &whole[..length]);
        model.refused(&[FILE]);
    }
    model.write(FILE, [&whole[..], b"more"].concat());
    model.refused(&[FILE]);
    assert!(header.get(NORM).is_some());
}

#[test]
fn header_lengths_that_lie_are_refused() {
    let model = Model::new(Architecture::Llama);
    let whole = model.read(FILE);
    let true_length = u64::from_le_bytes(whole[..8].try_into().unwrap());
    let size = whole.len() as u64;
    for length in [
        0,
        1,
        true_length - 1,
        true_length + 1,
        size - 8,
        size - 7,
        size,
        99_999_999,
        100_000_001,
        1 << 40,
        u64::MAX - 7,
        u64::MAX,
    ] {
        let mut lying = whole.clone();
        lying[..8].copy_from_slice(&length.to_le_bytes());
        model.write(FILE, lying);
        model.refused(&[FILE]);
    }
}

#[test]
fn headers_that_are_no_headers_are_refused() {
    let model = Model::new(Architecture::Llama);
    let (_, data) = parts(&model.read(FILE));
    let nested = "[".repeat(100_000);
    let objects = "{\"a\":".repeat(100_000);
    let twice = "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\
                  \"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}";
    let headers: [&[u8]; 9] = [
        b"",
        b"not json",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{\"a\": 1}",
        nested.as_bytes(),
        objects.as_bytes(),
        twice.as_bytes(),
    ];
    for header in headers {
        model.write(FILE, file(header, &data));
        model.refused(&[FILE]);
    }
    // No tensor at all is a valid file, and no model.
    model.write(FILE, file(b"{}", b""));
    model.refused(&["model.embed_tokens.weight", "missing"]);
}

#[test]
fn offsets_that_overlap_leave_holes_or_run_out_are_refused() {
    for offsets in [
        json!([0, 96]),
        json!([4, 100]),
        json!([96, 0]),
        json!([0, 1u64 << 40]),
        json!([u64::MAX - 95, u64::MAX]),
        json!([-4, 92]),
        json!([0.5, 96.5]),
        json!([0]),
        json!("all"),
    ] {
        with_header(|header| header[NORM]["data_offsets"] = offsets.clone()).refused(&[FILE]);
    }
    // Two tensors over the same bytes.
    let model = with_header(|header| {
        let same = header["model.layers.0.input_layernorm.weight"]["data_offsets"].clone();
        header[NORM]["data_offsets"] = same;
    });
    model.refused(&[FILE]);
}

#[test]
fn shapes_and_types_that_are_not_the_models_are_refused_by_name() {
    for shape in [
        json!([23]),
        json!([u64::MAX]),
        json!([1u64 << 40, 1u64 << 40]),
        json!([-1]),
        json!(["24"]),
    ] {
        with_header(|header| header[NORM]["shape"] = shape.clone()).refused(&[FILE]);
    }
    for shape in [json!([24, 1]), json!([1, 24]), json!([2, 12])] {
        with_header(|header| header[NORM]["shape"] = shape.clone()).refused(&[NORM, "[24]"]);
    }
    // A matrix lying on its side has as many bytes.
    with_header(|header| header[DOWN]["shape"] = json!([40, 24])).refused(&[DOWN, "[24, 40]"]);
    for dtype in ["I32", "U32"] {
        with_header(|header| header[NORM]["dtype"] = json!(dtype)).refused(&[NORM, dtype]);
    }
    for (dtype, shape) in [("I64", 12), ("F64", 12), ("U8", 96), ("BOOL", 96)] {
        with_header(|header| {
            header[NORM]["dtype"] = json!(dtype);
            header[NORM]["shape"] = json!([shape]);
        })
        .refused(&[NORM]);
    }
    for dtype in ["F33", "", "f32"] {
        with_header(|header| header[NORM]["dtype"] = json!(dtype)).refused(&[FILE]);
    }
}

#[test]
fn missing_and_extra_tensors_are_refused_by_name() {
    for architecture in Architecture::ALL {
        let model = Model::new(architecture);
        let good = folder::read_tensors(&model.path(FILE)).unwrap();
        let rewritten = |tensors: &Tensors| {
            folder::write_tensors(&model.path(FILE), tensors).unwrap();
        };
        for name in good.keys() {
            let mut tensors = good.clone();
            let data = tensors.remove(name).unwrap();
            // What a model without biases does not need, it does not miss.
            let zeros = data.iter::<f32>().all(|value| value == 0.0);
            if !(architecture == Architecture::Gpt2 && zeros) {
                rewritten(&tensors);
                model.refused(&[name, "missing"]);
            }
        }
        for name in [
            "model.layers.2.mlp.down_proj.weight",
            "lm_head.weight",
            "",
            "a\nb",
        ] {
            let mut tensors = good.clone();
            tensors.insert(name.to_string(), TensorData::new(vec![1.0f32; 4], [2, 2]));
            rewritten(&tensors);
            model.refused(&[name]);
        }
    }
    // A tied head that is stored is a copy, or a contradiction.
    let model = Model::new(Architecture::Llama);
    let mut tensors = folder::read_tensors(&model.path(FILE)).unwrap();
    let copy = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".to_string(), copy);
    folder::write_tensors(&model.path(FILE), &tensors).unwrap();
    model.load("a tied copy").unwrap();
}

#[test]
fn weights_that_are_not_numbers_load_and_are_not_used() {
    for poison in [f32::NAN, f32::INFINITY] {
        let model = Model::new(Architecture::Llama);
        // As many ids as the model has embeddings for, and no more.
        let mut tensors = folder::read_tensors(&model.path(FILE)).unwrap();
        let spec = firebrick::model::DecoderSpec {
            vocab_size: 257,
            ..model.spec.clone()
        };
        tensors.insert(
            "model.embed_tokens.weight".to_string(),
            TensorData::new(vec![poison; 257 * 24], [257, 24]),
        );
        let options = folder::SaveOptions::default();
        folder::save(model.folder.path(), &spec, &tensors, &options).unwrap();
        Tokenizer::bytes()
            .unwrap()
            .save(model.folder.path())
            .unwrap();
        model.load("not finite").unwrap();
        model.write("text.txt", "some text to be measured on");
        for arguments in [
            &["logits", "--model", ".", "--tokens", "1,2", "--out", "l.st"][..],
            &["generate", "--model", ".", "--prompt", "a"],
            &[
                "generate",
                "--model",
                ".",
                "--prompt",
                "a",
                "--temperature",
                "0",
            ],
            &["eval", "--model", ".", "--data", "text.txt"],
        ] {
            let (code, stderr) = runner(model.folder.path(), arguments);
            assert_eq!(code, 1, "{arguments:?}: {stderr}");
            assert!(stderr.contains("not finite"), "{stderr}");
        }
        assert!(!model.path("l.st").exists());
    }
}

#[test]
#[cfg(unix)]
fn a_pipe_a_folder_and_a_loop_are_not_weights() {
    use std::os::unix::fs::symlink;
    for name in [FILE, "config.json"] {
        let model = Model::new(Architecture::Llama);
        let path = model.path(name);
        let emptied = || std::fs::remove_file(&path).unwrap();
        emptied();
        std::fs::create_dir(&path).unwrap();
        model.refused(&[name]);
        std::fs::remove_dir(&path).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        model.refused(&[name]);
        emptied();
        symlink("/dev/zero", &path).unwrap();
        model.refused(&[name]);
        emptied();
        symlink(name, &path).unwrap();
        model.refused(&[name]);
    }
}
