//! What is written comes back, or is an error.

mod files;
mod folders;
mod lossy;

use std::collections::HashMap;

use safetensors::{Dtype, SafeTensors};

use super::*;

/// Tensors of a state, with their bytes.
type State = Vec<(TensorInfo, Vec<u8>)>;

fn info(name: &str, dtype: Dtype, shape: &[usize]) -> TensorInfo {
    TensorInfo {
        name: name.to_string(),
        dtype,
        shape: shape.to_vec(),
    }
}

fn memory(state: &State) -> Memory<'_> {
    Memory::new(
        state
            .iter()
            .map(|(info, bytes)| (info.clone(), bytes.as_slice())),
    )
}

/// Bytes that look like numbers, different for each seed, near each other for near times.
fn bytes(dtype: Dtype, elements: usize, seed: u32, time: u32) -> Vec<u8> {
    let value = |i: usize| {
        let wave = ((i as f64 + f64::from(seed)) * 12.9898).sin() * 0.02;
        wave + f64::from(time) * 1e-5 * ((i as f64) * 78.233).cos()
    };
    let of = |i: usize| -> Vec<u8> {
        match dtype {
            Dtype::F32 => (value(i) as f32).to_le_bytes().to_vec(),
            Dtype::F64 => value(i).to_le_bytes().to_vec(),
            Dtype::BF16 => half::bf16::from_f64(value(i)).to_le_bytes().to_vec(),
            Dtype::F16 => half::f16::from_f64(value(i)).to_le_bytes().to_vec(),
            Dtype::I64 => ((i as i64 - 50) * i64::from(time + 1))
                .to_le_bytes()
                .to_vec(),
            Dtype::I32 => (i as i32 * (time as i32 + 1)).to_le_bytes().to_vec(),
            _ => vec![(i as u32 * seed + time) as u8],
        }
    };
    (0..elements).flat_map(of).collect()
}

fn state(time: u32) -> State {
    let tensors = [
        ("a.weight", Dtype::F32, vec![300, 500]),
        ("a.weight.moment_1", Dtype::F32, vec![300, 500]),
        ("a.weight.moment_2", Dtype::F32, vec![300, 500]),
        ("b", Dtype::F64, vec![101]),
        ("c", Dtype::BF16, vec![70, 3]),
        ("d", Dtype::I64, vec![40]),
        ("e", Dtype::U8, vec![33]),
        ("empty", Dtype::F32, vec![0, 4]),
        ("one", Dtype::F16, vec![]),
        ("still", Dtype::I32, vec![64]),
    ];
    let tensors = tensors.into_iter().enumerate();
    tensors
        .map(|(i, (name, dtype, shape))| {
            let elements = shape.iter().product();
            let time = if name == "still" { 0 } else { time };
            (
                info(name, dtype, &shape),
                bytes(dtype, elements, i as u32 + 1, time),
            )
        })
        .collect()
}

fn moments() -> Vec<Moments> {
    vec![Moments {
        first: "a.weight.moment_1".to_string(),
        second: "a.weight.moment_2".to_string(),
        parameter: Some("a.weight".to_string()),
        step: None,
    }]
}

fn with_moments() -> Options {
    Options {
        moments: moments(),
        ..Options::default()
    }
}

fn beside(source: &dyn Source) -> Parent<'_> {
    Parent {
        source,
        names: HashMap::new(),
        name: None,
        known: None,
    }
}

fn restored(delta: &Delta) -> Result<HashMap<String, Vec<u8>>, DeltaError> {
    let mut all: HashMap<String, Vec<u8>> = delta
        .tensors()
        .into_iter()
        .map(|info| (info.name, Vec::new()))
        .collect();
    restore(
        delta,
        |_| true,
        |info, bytes| {
            all.get_mut(&info.name).unwrap().extend_from_slice(bytes);
            Ok(())
        },
    )?;
    Ok(all)
}

fn check(delta: &Delta, expected: &State) {
    let all = restored(delta).unwrap();
    assert_eq!(all.len(), expected.len());
    for (info, bytes) in expected {
        assert!(all[&info.name] == *bytes, "{}", info.name);
    }
}

/// What a header says, changed; everything that follows from it is put right, so that only sense is checked.
fn with_index(path: &std::path::Path, change: impl FnOnce(&mut serde_json::Value)) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let text = header["__metadata__"]["index"].as_str().unwrap();
    let mut index: serde_json::Value = serde_json::from_str(text).unwrap();
    change(&mut index);
    let text = index.to_string();
    let hash = blake3::hash(text.as_bytes()).to_hex().to_string();
    let mut header = header.clone();
    header["__metadata__"]["index"] = text.into();
    header["__metadata__"]["blake3"] = hash.into();
    if let Some(sections) = index["sections"].as_array() {
        let mut at = 0u64;
        for section in sections {
            let bytes = section["bytes"]
                .as_u64()
                .unwrap_or(0)
                .checked_next_multiple_of(64)
                .unwrap_or(0);
            if let Some(name) = section["name"].as_str() {
                let end = bytes.saturating_add(at);
                header[name] =
                    serde_json::json!({"dtype": "U8", "shape": [bytes], "data_offsets": [at, end]});
            }
            at = bytes.saturating_add(at);
        }
    }
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(64), b' ');
    let file = [
        &(header.len() as u64).to_le_bytes()[..],
        &header,
        &bytes[8 + length..],
    ]
    .concat();
    std::fs::write(path, file).unwrap();
}
