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
            write(&path(0), None, &child, &[]).unwrap()
        } else {
            let before = memory(&states[i as usize - 1]);
            write(&path(i), Some(&beside(&before)), &child, &moments()).unwrap()
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
        &moments(),
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
    write(&path, Some(&beside(&parent)), &memory(&after), &[]).unwrap();
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
        &moments(),
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
    let error = write(&path, Some(&parent), &memory(&after), &[])
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
    write(&path, Some(&parent), &memory(&after), &moments()).unwrap();
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
        write(&path, Some(&beside(&parent)), &memory(&after), &[]).unwrap();
        with_index(&path, change);
        open(&path)?
            .beside(Some(Box::new(&parent)))
            .and_then(|delta| restored(&delta))
    };
    try_with(&|_| ()).unwrap();
    type Change = dyn Fn(&mut serde_json::Value);
    let hostile: [(&str, &Change); 16] = [
        ("a version to come", &|index| index["version"] = json!(2)),
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
    let written = make(base.path(), tuned.path(), &delta).unwrap();
    assert!(written.bytes < 42_000, "{written:?}");
    let again = make(base.path(), tuned.path(), &delta)
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
        make(base.path(), tuned.path(), &delta).unwrap();
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
    make(base.path(), tuned.path(), &delta).unwrap();
    with_index(&delta, |index| index["files"] = serde_json::json!([]));
    assert!(apply(base.path(), &delta, &out.path().join("made")).is_err());
}

#[test]
fn d9_a_file_that_is_no_safetensors_is_named() {
    let base = folder_of(&[("model.safetensors", b"short".to_vec())]);
    let out = base.path().join("delta.safetensors");
    let error = make(base.path(), base.path(), &out)
        .unwrap_err()
        .to_string();
    assert!(error.contains("model.safetensors"), "{error}");
}
