//! model.safetensors.index.json: what it may name, and whether it tells the truth.

use std::path::PathBuf;

use firebrick::config::Architecture;
use serde_json::{Value, json};

use super::Model;

const INDEX: &str = "model.safetensors.index.json";
const NORM: &str = "model.norm.weight";

/// A sharded model whose index went through `change`.
fn with_index(change: impl FnOnce(&mut Value)) -> Model {
    let model = Model::sharded(Architecture::Llama, 8_000);
    let mut index: Value = serde_json::from_slice(&model.read(INDEX)).unwrap();
    change(&mut index);
    model.write(INDEX, index.to_string());
    model
}

fn first_shard(model: &Model) -> PathBuf {
    let names = std::fs::read_dir(model.folder.path()).unwrap();
    let mut paths = names.map(|entry| entry.unwrap().path());
    paths
        .find(|path| path.to_str().unwrap().contains("model-00001-of-"))
        .unwrap()
}

#[test]
fn an_index_names_plain_files_of_its_folder_only() {
    with_index(|_| {}).load("as it is").unwrap();
    let model = Model::sharded(Architecture::Llama, 8_000);
    let elsewhere = tempfile::tempdir().unwrap();
    let stolen = elsewhere.path().join("x.safetensors");
    std::fs::copy(first_shard(&model), &stolen).unwrap();
    for name in [
        "../x.safetensors",
        stolen.to_str().unwrap(),
        "./x.safetensors",
        "a/../x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x.safetensors/",
        "..",
        ".",
        "",
        "/",
        "config.json",
        "x\0.safetensors",
    ] {
        let model = with_index(|index| index["weight_map"][NORM] = json!(name));
        model.refused(&[INDEX, "not a safetensors file in this folder"]);
    }
}

#[test]
fn an_index_that_does_not_agree_with_its_shards_is_refused() {
    // A shard that is not there.
    let model = with_index(|index| index["weight_map"][NORM] = json!("model-9.safetensors"));
    model.refused(&["model-9.safetensors"]);
    // A tensor put in another shard than it is in.
    let model = with_index(|index| {
        let other = index["weight_map"]["model.embed_tokens.weight"].clone();
        assert_ne!(index["weight_map"][NORM], other);
        index["weight_map"][NORM] = other;
    });
    model.refused(&[INDEX, NORM]);
    // A tensor that no shard has, and one that no line lists.
    let model = with_index(|index| {
        let shard = index["weight_map"][NORM].clone();
        index["weight_map"]["model.extra"] = shard;
    });
    model.refused(&[INDEX, "model.extra", "does not have it"]);
    let model = with_index(|index| {
        index["weight_map"].as_object_mut().unwrap().remove(NORM);
    });
    model.refused(&[INDEX, NORM, "does not list"]);
    // A tensor in two shards: the last is a copy of the first.
    let model = Model::sharded(Architecture::Llama, 8_000);
    let index: Value = serde_json::from_slice(&model.read(INDEX)).unwrap();
    let first = index["weight_map"]["model.embed_tokens.weight"]
        .as_str()
        .unwrap();
    let last = index["weight_map"][NORM].as_str().unwrap();
    model.write(last, model.read(first));
    model.refused(&[INDEX, "model.", "has it"]);
}

#[test]
fn an_index_that_is_no_index_is_refused() {
    let model = Model::sharded(Architecture::Llama, 8_000);
    let nested = format!("{{\"weight_map\": {}", "[".repeat(100_000));
    let ignored = format!("{{\"metadata\": {}", "[".repeat(100_000));
    for text in [
        "",
        "null",
        "[]",
        "{}",
        "{\"weight_map\": []}",
        "{\"weight_map\": {}}",
        "{\"weight_map\": {\"a\": 1}}",
        "{\"weight_map\": {\"a\": [\"b\"]}}",
        &nested,
        &ignored,
    ] {
        model.write(INDEX, text);
        model.refused(&[INDEX]);
    }
}

#[test]
#[cfg(unix)]
fn links_are_followed_and_loops_are_not() {
    use std::os::unix::fs::symlink;
    // A hub's cache: the folder holds links to blobs elsewhere.
    let model = Model::sharded(Architecture::Llama, 8_000);
    let blobs = tempfile::tempdir().unwrap();
    let shard = first_shard(&model);
    let blob = blobs.path().join("3f2a");
    std::fs::rename(&shard, &blob).unwrap();
    symlink(&blob, &shard).unwrap();
    model.load("a link").unwrap();
    std::fs::remove_file(&shard).unwrap();
    symlink(&shard, &shard).unwrap();
    model.refused(&["model-00001"]);
}
