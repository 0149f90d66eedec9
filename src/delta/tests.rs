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

#[test]
fn d1_a_chain_of_files_gives_every_state_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = |i: u32| folder.path().join(format!("{i}.safetensors"));
    let states: Vec<State> = (0..4).map(state).collect();
    for i in 0..4u32 {
        let child = memory(&states[i as usize]);
        let written = if i == 0 {
            write(&path(0), None, &child, &Options::default()).unwrap()
        } else {
            let before = memory(&states[i as usize - 1]);
            write(&path(i), Some(&beside(&before)), &child, &with_moments()).unwrap()
        };
        assert_eq!(written.bytes, std::fs::metadata(path(i)).unwrap().len());
        assert!(
            i == 0 || written.bytes < written.state_bytes * 3 / 4,
            "{written:?}"
        );
        assert_eq!(written.state, hashes(&child).unwrap());
    }
    for last in 0..4u32 {
        let mut delta = open(&path(0)).unwrap().beside(None).unwrap();
        for i in 1..=last {
            let next = open(&path(i)).unwrap();
            assert_eq!(next.parent_id(), Some(delta.state().id.as_str()));
            delta = next.beside(Some(Box::new(delta))).unwrap();
        }
        check(&delta, &states[last as usize]);
    }
}

#[test]
fn d1_a_file_is_valid_safetensors_with_aligned_sections() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = (state(0), state(1));
    write(
        &path,
        Some(&beside(&memory(&before))),
        &memory(&after),
        &with_moments(),
    )
    .unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert!((8 + header) % 64 == 8);
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert!(tensors.len() > 3);
    for (name, info) in metadata.tensors() {
        assert!(
            info.dtype == Dtype::U8 && info.data_offsets.0 % 64 == 0,
            "{name}"
        );
    }
    assert!(
        !tensors.names().contains(&"still"),
        "a tensor that stays takes no room"
    );
}

/// A state small enough that every byte of its file can be spoiled.
fn small(time: u32) -> State {
    let tensors = [
        ("w", Dtype::F32, vec![40]),
        ("n", Dtype::BF16, vec![17]),
        ("k", Dtype::I64, vec![3]),
    ];
    let tensors = tensors.into_iter().enumerate();
    tensors
        .map(|(i, (name, dtype, shape))| {
            let elements = shape.iter().product();
            (
                info(name, dtype, &shape),
                bytes(dtype, elements, i as u32 + 1, time),
            )
        })
        .collect()
}

#[test]
fn d1_every_flipped_bit_and_every_truncation_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = (small(0), small(900));
    let parent = memory(&before);
    write(
        &path,
        Some(&beside(&parent)),
        &memory(&after),
        &Options::default(),
    )
    .unwrap();
    let read = || restored(&open(&path)?.beside(Some(Box::new(&parent)))?);
    assert!(read().is_ok());
    let good = std::fs::read(&path).unwrap();
    for byte in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[byte] ^= 1 << bit;
            std::fs::write(&path, &bad).unwrap();
            assert!(read().is_err(), "bit {bit} of byte {byte}");
        }
        std::fs::write(&path, &good[..byte]).unwrap();
        assert!(read().is_err(), "{byte} bytes");
    }
    let longer = [&good[..], &[0; 64]].concat();
    std::fs::write(&path, longer).unwrap();
    assert!(read().is_err());
}

#[test]
fn d1_another_parent_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = (state(0), state(1));
    write(
        &path,
        Some(&beside(&memory(&before))),
        &memory(&after),
        &with_moments(),
    )
    .unwrap();
    let error = |parent: &State| {
        let parent = memory(parent);
        let read = open(&path).unwrap().beside(Some(Box::new(&parent)));
        let error = read.and_then(|delta| restored(&delta)).unwrap_err();
        assert!(matches!(error, DeltaError::OtherParent { .. }), "{error}");
        error.to_string()
    };
    assert!(error(&state(2)).contains("was not made from memory: "));
    let mut other = state(0);
    other.retain(|(info, _)| info.name != "still");
    assert!(error(&other).ends_with("it has no tensor `still`"));
    let mut other = state(0);
    other
        .iter_mut()
        .filter(|(info, _)| info.name == "still")
        .for_each(|(info, _)| info.dtype = Dtype::F32);
    assert!(error(&other).ends_with("tensor `still` is F32 [64] there"));
    assert!(open(&path).unwrap().beside(None).is_err());
    // What was not asked for is not missed, and a parent that is known is held against what is known.
    let before = memory(&before);
    let mut known = hashes(&before).unwrap();
    known.tensors.insert("c".to_string(), "0".repeat(64));
    let parent = Parent {
        known: Some(known),
        ..beside(&before)
    };
    let error = write(&path, Some(&parent), &memory(&after), &Options::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("memory: tensor `c`: its BLAKE3 is another than it was saved with"),
        "{error}"
    );
}

#[test]
fn d8_tensors_may_come_go_change_shape_and_be_tied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let tensor = |name: &str, shape: &[usize], seed: u32, time: u32| {
        let bytes = bytes(Dtype::F32, shape.iter().product(), seed, time);
        (info(name, Dtype::F32, shape), bytes)
    };
    let before = vec![
        tensor("gone", &[9], 1, 0),
        tensor("turned", &[4, 6], 2, 0),
        tensor("grown", &[5], 3, 0),
        tensor("head", &[8, 8], 4, 0),
    ];
    let after = vec![
        tensor("new", &[700], 5, 0),
        tensor("turned", &[6, 4], 2, 1),
        tensor("grown", &[6], 3, 1),
        tensor("head", &[8, 8], 4, 1),
        tensor("embedding", &[8, 8], 4, 1),
    ];
    let before = memory(&before);
    let mut parent = beside(&before);
    parent
        .names
        .insert("embedding".to_string(), "head".to_string());
    write(&path, Some(&parent), &memory(&after), &with_moments()).unwrap();
    let delta = open(&path)
        .unwrap()
        .beside(Some(Box::new(&before)))
        .unwrap();
    check(&delta, &after);
}

/// What a header says, changed; everything that follows from it is put right, so that only sense is checked.
fn with_index(path: &std::path::Path, change: impl Fn(&mut serde_json::Value)) {
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
        let mut at = 0;
        for section in sections {
            let bytes = section["bytes"]
                .as_u64()
                .unwrap_or(0)
                .checked_next_multiple_of(64)
                .unwrap_or(0);
            if let Some(name) = section["name"].as_str() {
                header[name] = serde_json::json!({"dtype": "U8", "shape": [bytes], "data_offsets": [at, at + bytes]});
            }
            at += bytes;
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

#[test]
fn d1_hostile_indices_are_errors() {
    use serde_json::json;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = (small(0), small(900));
    let parent = memory(&before);
    let try_with = |change: &dyn Fn(&mut serde_json::Value)| {
        write(
            &path,
            Some(&beside(&parent)),
            &memory(&after),
            &Options::default(),
        )
        .unwrap();
        with_index(&path, change);
        open(&path)?
            .beside(Some(Box::new(&parent)))
            .and_then(|delta| restored(&delta))
    };
    try_with(&|_| ()).unwrap();
    type Change = dyn Fn(&mut serde_json::Value);
    let hostile: [(&str, &Change); 16] = [
        ("a version to come", &|index| index["version"] = json!(3)),
        ("a huge shape", &|index| {
            index["tensors"][0]["shape"] = json!([u64::MAX, 8])
        }),
        ("a large shape", &|index| {
            index["tensors"][0]["shape"] = json!([1u64 << 50])
        }),
        ("a tensor twice", &|index| {
            index["tensors"][0]["name"] = json!("n")
        }),
        ("a section twice", &|index| {
            let section = index["sections"][0].clone();
            index["sections"].as_array_mut().unwrap().push(section);
        }),
        ("no section", &|index| {
            index["sections"][0]["tensors"] = json!([])
        }),
        ("a tensor that is not there", &|index| {
            index["sections"][0]["tensors"] = json!([9])
        }),
        ("more tensors than one", &|index| {
            index["sections"][0]["tensors"] = json!([0, 1])
        }),
        ("a huge section", &|index| {
            index["sections"][0]["bytes"] = json!(u64::MAX)
        }),
        ("a long section", &|index| {
            index["sections"][0]["bytes"] = json!(1u64 << 40)
        }),
        ("a short section", &|index| {
            index["sections"][0]["bytes"] = json!(1)
        }),
        ("no parent", &|index| index["parent"] = json!(null)),
        ("a parent of its own", &|index| {
            index["tensors"][0]["parent"] = json!("w")
        }),
        ("an unknown codec", &|index| {
            index["sections"][0]["codecs"] = json!({"magic": 1})
        }),
        ("an unknown key", &|index| index["more"] = json!(1)),
        ("no hash", &|index| {
            index["tensors"][0]["blake3"] = json!("")
        }),
    ];
    for (what, change) in hostile {
        assert!(try_with(change).is_err(), "{what}");
    }
}

/// A folder with files in it.
fn folder_of(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    folder
}

fn safetensors_file(tensors: &[(&str, Dtype, &[usize], u32, u32)]) -> Vec<u8> {
    let data: Vec<_> = tensors
        .iter()
        .map(|&(name, dtype, shape, seed, time)| {
            (
                name,
                dtype,
                shape,
                bytes(dtype, shape.iter().product(), seed, time),
            )
        })
        .collect();
    let views = data.iter().map(|(name, dtype, shape, bytes)| {
        (
            *name,
            safetensors::tensor::TensorView::new(*dtype, shape.to_vec(), bytes).unwrap(),
        )
    });
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize(views, Some(metadata)).unwrap()
}

#[test]
fn d9_a_folder_comes_back_byte_for_byte() {
    let base = folder_of(&[
        ("config.json", b"{\"a\": 1}".to_vec()),
        ("tokenizer.json", b"the same in both".repeat(50)),
        (
            "model.safetensors",
            safetensors_file(&[
                ("a", Dtype::BF16, &[300, 70], 1, 0),
                ("b", Dtype::F32, &[11], 2, 0),
            ]),
        ),
    ]);
    let first = safetensors_file(&[("a", Dtype::BF16, &[300, 70], 1, 5)]);
    let second = safetensors_file(&[
        ("b", Dtype::F32, &[11], 2, 5),
        ("new", Dtype::F16, &[4], 3, 0),
    ]);
    let files = [
        ("config.json", b"{\"a\": 2}".to_vec()),
        ("tokenizer.json", b"the same in both".repeat(50)),
        ("model-00001-of-00002.safetensors", first),
        ("model-00002-of-00002.safetensors", second),
        ("deep/er/notes.md", b"# notes\n".to_vec()),
        ("empty.txt", Vec::new()),
    ];
    let tuned = folder_of(&files);
    std::fs::write(tuned.path().join(".hidden"), "no part of a model").unwrap();
    let out = tempfile::tempdir().unwrap();
    let delta = out.path().join("delta.safetensors");
    let written = make(base.path(), tuned.path(), &delta, &Options::default()).unwrap();
    assert!(written.bytes < 42_000, "{written:?}");
    let again = make(base.path(), tuned.path(), &delta, &Options::default())
        .unwrap_err()
        .to_string();
    assert!(again.contains("exists"), "{again}");

    let made = out.path().join("made");
    let mut paths = apply(base.path(), &delta, &made).unwrap();
    paths.sort();
    assert_eq!(paths.len(), files.len());
    for (name, bytes) in &files {
        assert!(std::fs::read(made.join(name)).unwrap() == *bytes, "{name}");
    }
    assert!(
        apply(base.path(), &delta, &made).is_err(),
        "a folder that holds something is left alone"
    );

    // Nothing is left of what fails.
    let other = out.path().join("other");
    std::fs::write(
        base.path().join("tokenizer.json"),
        b"not the same any more".repeat(50),
    )
    .unwrap();
    let error = apply(base.path(), &delta, &other).unwrap_err().to_string();
    assert!(error.contains("was not made from"), "{error}");
    std::fs::write(
        base.path().join("model.safetensors"),
        safetensors_file(&[
            ("a", Dtype::BF16, &[300, 70], 9, 0),
            ("b", Dtype::F32, &[11], 2, 0),
        ]),
    )
    .unwrap();
    assert!(apply(base.path(), &delta, &other).is_err());
    assert!(!other.exists());
    let mut left: Vec<_> = std::fs::read_dir(out.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["delta.safetensors", "made"]);
}

#[test]
fn d9_paths_do_not_leave_the_folder() {
    let base = folder_of(&[("a.txt", b"1".to_vec())]);
    let tuned = folder_of(&[("a.txt", b"2".to_vec()), ("b.txt", b"3".to_vec())]);
    let out = tempfile::tempdir().unwrap();
    let delta = out.path().join("delta.safetensors");
    for path in [
        "../a.txt",
        "/tmp/a.txt",
        "",
        ".",
        "x/../../a",
        "b.txt",
        "c:a",
        "a\\b",
        "./b.txt",
    ] {
        make(base.path(), tuned.path(), &delta, &Options::default()).unwrap();
        with_index(&delta, |index| index["files"][0]["path"] = path.into());
        let error = apply(base.path(), &delta, &out.path().join("made"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("has a file with the path"),
            "{path}: {error}"
        );
        std::fs::remove_file(&delta).unwrap();
    }
    make(base.path(), tuned.path(), &delta, &Options::default()).unwrap();
    with_index(&delta, |index| index["files"] = serde_json::json!([]));
    assert!(apply(base.path(), &delta, &out.path().join("made")).is_err());
}

#[test]
fn d9_a_file_that_is_no_safetensors_is_named() {
    let base = folder_of(&[("model.safetensors", b"short".to_vec())]);
    let out = base.path().join("delta.safetensors");
    let error = make(base.path(), base.path(), &out, &Options::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("model.safetensors"), "{error}");
}

/// A child that has moved from its parent as fine-tunes do, with numbers of every kind in it.
fn moved(dtype: Dtype, shape: &[usize], by: f32) -> (State, State) {
    let elements: usize = shape.iter().product();
    let mut state = 9u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let put = |out: &mut Vec<u8>, value: f32| match dtype {
        Dtype::F32 => out.extend(value.to_le_bytes()),
        Dtype::BF16 => out.extend(half::bf16::from_f32(value).to_le_bytes()),
        _ => out.extend(half::f16::from_f32(value).to_le_bytes()),
    };
    for i in 0..elements {
        let value = next();
        let moved = value + by * next() * next();
        let (value, moved) = match i % 5003 {
            17 => (value, f32::NAN),
            18 => (f32::INFINITY, moved),
            19 => (f32::NEG_INFINITY, f32::NEG_INFINITY),
            20 => (-f32::MAX, f32::MAX),
            21 => (0.0, -0.0),
            22 => (value, 1e-40),
            23 => (f32::NAN, value),
            _ => (value, moved),
        };
        put(&mut before, value);
        put(&mut after, moved);
    }
    let of = |bytes| vec![(info("w", dtype, shape), bytes)];
    (of(before), of(after))
}

fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let half = |bytes: &[u8]| u16::from_le_bytes(bytes.try_into().unwrap());
    match dtype {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Dtype::BF16 => bytes
            .chunks(2)
            .map(|b| half::bf16::from_bits(half(b)).to_f32())
            .collect(),
        _ => bytes
            .chunks(2)
            .map(|b| half::f16::from_bits(half(b)).to_f32())
            .collect(),
    }
}

fn lossy(method: Method) -> Options {
    Options {
        lossy: Some(Lossy::new(method)),
        ..Options::default()
    }
}

const BLOCKS: [Method; 4] = [Method::Int8, Method::Int4, Method::OneBit, Method::Hybrid];

#[test]
fn d3_what_is_lost_is_within_what_the_file_says() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let (before, after) = moved(dtype, &[413, 701], 0.3);
        for method in BLOCKS {
            let path = folder
                .path()
                .join(format!("{dtype:?}-{method:?}.safetensors"));
            let parent = memory(&before);
            let written = write(
                &path,
                Some(&beside(&parent)),
                &memory(&after),
                &lossy(method),
            )
            .unwrap();
            let opened = open(&path).unwrap();
            let record = opened.lossy().get("w").copied();
            let delta = opened.beside(Some(Box::new(&parent))).unwrap();
            let back = restored(&delta).unwrap();
            let Some(record) = record else {
                // Of bf16, eight bits and scales are about what it takes without loss.
                assert_eq!((dtype, method), (Dtype::BF16, Method::Int8));
                assert!(back["w"] == after[0].1);
                continue;
            };
            assert_eq!(record.method, method);
            let (was, is, from) = (
                floats(dtype, &after[0].1),
                floats(dtype, &back["w"]),
                floats(dtype, &before[0].1),
            );
            let (mut error, mut change) = (0.0f64, 0.0f64);
            for ((was, is), from) in was.iter().zip(&is).zip(&from) {
                assert_eq!(was.is_finite(), is.is_finite(), "{method:?}: {was} {is}");
                if was.is_finite() {
                    let lost = (is - was).abs();
                    assert!(
                        lost <= record.largest_error,
                        "{method:?}: {was} {is} {record:?}"
                    );
                    error += f64::from(lost).powi(2);
                    if (was - from).is_finite() {
                        change += f64::from(was - from).powi(2);
                    }
                } else {
                    assert!(was.is_nan() || was == is);
                }
            }
            assert!(error > 0.0);
            assert!(
                (error / change).sqrt() <= f64::from(record.relative_error),
                "{method:?}"
            );
            let bits = 8.0 * written.bytes as f64 / (413.0 * 701.0);
            let most = match method {
                Method::Int8 => 8.5,
                Method::OneBit => 1.5,
                _ => 4.8,
            };
            assert!(bits < most, "{dtype:?} {method:?}: {bits} bits an element");
        }
    }
}

#[test]
fn d3_later_differences_are_taken_from_what_came_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = |i: usize| folder.path().join(format!("{i}.safetensors"));
    let (first, _) = moved(Dtype::F32, &[300, 500], 0.1);
    write(&path(0), None, &memory(&first), &lossy(Method::Int4)).unwrap();
    assert!(
        open(&path(0)).unwrap().lossy().is_empty(),
        "alone it is exact"
    );
    let mut target = first.clone();
    let mut before: Box<dyn Source> = Box::new(open(&path(0)).unwrap().beside(None).unwrap());
    let mut errors = Vec::new();
    for i in 1..6 {
        for value in target[0].1.as_chunks_mut::<4>().0 {
            let old = f32::from_le_bytes(*value);
            *value = (old + 1e-3 * (old * 1e4 + i as f32).sin()).to_le_bytes();
        }
        write(
            &path(i),
            Some(&beside(&*before)),
            &memory(&target),
            &lossy(Method::Int4),
        )
        .unwrap();
        let delta = open(&path(i)).unwrap().beside(Some(before)).unwrap();
        let back = restored(&delta).unwrap();
        let pairs = floats(Dtype::F32, &back["w"])
            .into_iter()
            .zip(floats(Dtype::F32, &target[0].1));
        let finite = pairs.filter(|(_, is)| is.abs() < 2.0);
        errors.push(finite.map(|(was, is)| (was - is).abs()).fold(0.0, f32::max));
        before = Box::new(delta);
    }
    // Errors that added up would be several times that of one.
    assert!(errors[4] < 1.5 * errors[0], "{errors:?}");

    // And what was lost stays lost, and labelled, when the chain is cut; an exact successor is exact.
    let alone = folder.path().join("alone.safetensors");
    write(&alone, None, &*before, &Options::default()).unwrap();
    assert_eq!(
        open(&alone).unwrap().lossy(),
        open(&path(5)).unwrap().lossy()
    );
    let exact = folder.path().join("exact.safetensors");
    write(
        &exact,
        Some(&beside(&*before)),
        &memory(&target),
        &Options::default(),
    )
    .unwrap();
    let exact = open(&exact).unwrap();
    assert!(exact.lossy().is_empty());
    check(&exact.beside(Some(before)).unwrap(), &target);
}

#[test]
fn d3_only_matrices_of_floats_lose_anything_and_nothing_that_is_said_to_be_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = (state(0), state(1));
    let parent = memory(&before);
    let is_lossy = |options: &Options| -> Vec<String> {
        write(&path, Some(&beside(&parent)), &memory(&after), options).unwrap();
        let opened = open(&path).unwrap();
        let lossy: Vec<String> = opened.lossy().into_keys().collect();
        let back = restored(&opened.beside(Some(Box::new(&parent))).unwrap()).unwrap();
        for (info, bytes) in &after {
            assert!(
                lossy.contains(&info.name) || back[&info.name] == *bytes,
                "{}",
                info.name
            );
        }
        lossy
    };
    let mut options = lossy(Method::Int8);
    options.moments = moments();
    assert_eq!(
        is_lossy(&options),
        ["a.weight", "a.weight.moment_1", "a.weight.moment_2"]
    );
    let exact = ["a.weight.moment_1", "a.weight.moment_2"].map(str::to_string);
    options.lossy.as_mut().unwrap().exact = exact.into();
    assert_eq!(is_lossy(&options), ["a.weight"]);
}

#[test]
fn d3_means_of_squares_are_rounded_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let of = |time: u32| -> State {
        let value = |i: u32| ((i as f32 * 0.7 + time as f32).sin().powi(2) * 1e-6).to_le_bytes();
        let names = ["m", "v"];
        names
            .map(|name| {
                (
                    info(name, Dtype::F32, &[200, 300]),
                    (0..60_000).flat_map(value).collect(),
                )
            })
            .into()
    };
    let (before, after) = (of(0), of(1));
    for method in [Method::OneBit, Method::Int4, Method::LowRank] {
        let options = Options {
            moments: vec![Moments {
                first: "m".into(),
                second: "v".into(),
                parameter: None,
                step: None,
            }],
            ..lossy(method)
        };
        let parent = memory(&before);
        write(&path, Some(&beside(&parent)), &memory(&after), &options).unwrap();
        let opened = open(&path).unwrap();
        assert_eq!(opened.lossy()["v"].method, Method::Int8);
        let back = restored(&opened.beside(Some(Box::new(&parent))).unwrap()).unwrap();
        let (was, is) = (
            floats(Dtype::F32, &after[1].1),
            floats(Dtype::F32, &back["v"]),
        );
        assert!(was.iter().zip(&is).all(|(was, is)| is >= was));
    }
}

#[test]
fn d3_energy_that_is_not_kept_makes_it_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = moved(Dtype::F32, &[300, 500], 0.3);
    let parent = memory(&before);
    let mut options = lossy(Method::OneBit);
    // A sign keeps less than two thirds of most.
    for (energy, is_exact) in [(0.2, false), (0.95, true)] {
        options.lossy.as_mut().unwrap().energy = Some(energy);
        write(&path, Some(&beside(&parent)), &memory(&after), &options).unwrap();
        let opened = open(&path).unwrap();
        assert_eq!(opened.lossy().is_empty(), is_exact);
        if is_exact {
            check(&opened.beside(Some(Box::new(&parent))).unwrap(), &after);
        }
    }
    // Nothing moved, and what moved by little is smaller without loss.
    write(
        &path,
        Some(&beside(&parent)),
        &memory(&before),
        &lossy(Method::Int8),
    )
    .unwrap();
    assert_eq!(open(&path).unwrap().codecs(), Default::default());
    let mut few = before.clone();
    few[0].1[4000] ^= 3;
    write(
        &path,
        Some(&beside(&parent)),
        &memory(&few),
        &lossy(Method::Int8),
    )
    .unwrap();
    check(
        &open(&path)
            .unwrap()
            .beside(Some(Box::new(&parent)))
            .unwrap(),
        &few,
    );
}

/// A child that is its parent and a matrix of this rank.
fn of_rank(dtype: Dtype, [rows, cols]: [usize; 2], rank: usize) -> (State, State) {
    let wave = |i: usize, by: f32| (i as f32 * by + 0.3).sin();
    let put = |value: f32| -> Vec<u8> {
        match dtype {
            Dtype::F32 => value.to_le_bytes().to_vec(),
            _ => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        }
    };
    let parent = |i: usize| wave(i * i % 10_007, 0.913);
    let change = |i: usize| -> f32 {
        let (row, col) = (i / cols, i % cols);
        (0..rank)
            .map(|k| wave(row * (k + 1), 0.71 + k as f32) * wave(col * (k + 2), 1.3))
            .sum()
    };
    let of = |value: &dyn Fn(usize) -> f32| -> State {
        let bytes = (0..rows * cols).flat_map(|i| put(value(i))).collect();
        vec![(info("w", dtype, &[rows, cols]), bytes)]
    };
    (of(&parent), of(&|i| parent(i) + 0.1 * change(i)))
}

#[test]
fn d3_a_product_is_found_and_has_the_energy_that_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    for (dtype, energy, most) in [
        (Dtype::F32, None, 0.05f32),
        (Dtype::F32, Some(0.999), 0.001),
        (Dtype::BF16, Some(0.9), 0.1),
    ] {
        let (before, after) = of_rank(dtype, [700, 431], 12);
        let parent = memory(&before);
        let mut options = lossy(Method::LowRank);
        options.lossy.as_mut().unwrap().energy = energy;
        let written = write(&path, Some(&beside(&parent)), &memory(&after), &options).unwrap();
        let factors = 12 * (700 + 431 + 4) as u64;
        assert!(written.bytes < 2 * factors, "{} {factors}", written.bytes);
        let opened = open(&path).unwrap();
        let record = opened.lossy()["w"];
        assert!(record.relative_error.powi(2) <= most + 1e-6, "{record:?}");
        let back = restored(&opened.beside(Some(Box::new(&parent))).unwrap()).unwrap();
        let pairs = floats(dtype, &back["w"])
            .into_iter()
            .zip(floats(dtype, &after[0].1));
        let largest = pairs.map(|(is, was)| (is - was).abs()).fold(0.0, f32::max);
        assert!(largest <= record.largest_error && largest > 0.0);
    }
    // Nor do numbers that are not finite keep it from being one: they come back as they are.
    let (before, mut after) = of_rank(Dtype::F32, [700, 431], 12);
    after[0].1[400..404].copy_from_slice(&f32::NAN.to_le_bytes());
    let parent = memory(&before);
    let options = lossy(Method::LowRank);
    write(&path, Some(&beside(&parent)), &memory(&after), &options).unwrap();
    let opened = open(&path).unwrap();
    assert!(opened.lossy().contains_key("w"));
    let back = restored(&opened.beside(Some(Box::new(&parent))).unwrap()).unwrap();
    assert_eq!(back["w"][400..404], f32::NAN.to_le_bytes());
    // What has no low rank is exact.
    let (before, after) = moved(Dtype::F32, &[300, 500], 0.3);
    let parent = memory(&before);
    write(
        &path,
        Some(&beside(&parent)),
        &memory(&after),
        &lossy(Method::LowRank),
    )
    .unwrap();
    let opened = open(&path).unwrap();
    assert!(opened.lossy().is_empty());
    check(&opened.beside(Some(Box::new(&parent))).unwrap(), &after);
}

#[test]
fn d3_every_changed_byte_of_a_lossy_file_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    for method in [
        Method::Int8,
        Method::Hybrid,
        Method::OneBit,
        Method::LowRank,
    ] {
        let (before, after) = match method {
            Method::LowRank => of_rank(Dtype::F32, [60, 70], 1),
            _ => moved(Dtype::F32, &[20, 30], 0.3),
        };
        let parent = memory(&before);
        write(
            &path,
            Some(&beside(&parent)),
            &memory(&after),
            &lossy(method),
        )
        .unwrap();
        assert!(!open(&path).unwrap().lossy().is_empty(), "{method:?}");
        let good = std::fs::read(&path).unwrap();
        for byte in 0..good.len() {
            let mut bad = good.clone();
            bad[byte] ^= 1 << (byte % 8);
            std::fs::write(&path, &bad).unwrap();
            let read = open(&path).and_then(|opened| opened.beside(Some(Box::new(&parent))));
            assert!(
                read.and_then(|delta| restored(&delta)).is_err(),
                "{method:?}: byte {byte}"
            );
        }
    }
}

proptest::proptest! {
    /// What a record may say takes no more room than was left for it.
    #[test]
    fn d3_no_record_is_longer_than_was_foreseen(largest: u32, relative: u32) {
        let of = |bits: u32| f32::from_bits(bits & 0x7f7f_ffff);
        let record = LossRecord { method: Method::LowRank, largest_error: of(largest), relative_error: of(relative) };
        let length = |record: &LossRecord| serde_json::to_string(record).unwrap().len();
        proptest::prop_assert!(length(&record) <= length(&super::lossy::LossRecord::longest()));
    }
}
