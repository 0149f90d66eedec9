//! Whole folders.

use super::*;

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
