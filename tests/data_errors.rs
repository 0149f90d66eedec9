//! Row R3: hostile and mistaken input ends in an error that names the place.

use std::fs;
use std::path::PathBuf;

use firebrick::config::{
    DataConfig, DatasetConfig, DatasetKind, FieldNames, OneOrMany, TokenizerConfig, TokenizerKind,
};
use firebrick::data::{Corpus, DataError, TokenCache};

/// Loads one file's contents with 10 % held out and sequences of 4 characters.
fn load(name: &str, contents: &[u8]) -> Result<Corpus, DataError> {
    load_with(name, contents, name, |_, _| {})
}

fn load_with(
    name: &str,
    contents: &[u8],
    pattern: &str,
    change: impl FnOnce(&mut DataConfig, &mut TokenizerConfig),
) -> Result<Corpus, DataError> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(name), contents).unwrap();
    let pattern = folder.path().join(pattern).to_str().unwrap().to_string();
    let mut data = DataConfig {
        sequence_len: 4,
        val_fraction: 0.1,
        datasets: vec![DatasetConfig {
            path: OneOrMany::One(pattern),
            kind: DatasetKind::Auto,
            weight: 1.0,
            fields: FieldNames::default(),
        }],
        ..DataConfig::default()
    };
    let mut tokenizer = TokenizerConfig {
        kind: TokenizerKind::Char,
        ..TokenizerConfig::default()
    };
    change(&mut data, &mut tokenizer);
    Corpus::load(
        &data,
        &tokenizer,
        &TokenCache::at(&folder.path().join("cache")),
    )
}

/// The error's message, checked to have the exit code and a help text.
fn message(result: Result<Corpus, DataError>, exit_code: u8) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.exit_code(), exit_code, "{error}");
    assert!(error.help().is_some(), "{error}");
    error.to_string()
}

#[test]
fn r3_no_datasets() {
    let result = load_with("a.txt", b"a", "a.txt", |data, _| data.datasets.clear());
    assert!(message(result, 3).contains("[[data.datasets]] is empty"));
}

#[test]
fn r3_missing_files_name_the_path_and_the_working_directory() {
    let directory = std::env::current_dir().unwrap().display().to_string();
    for (pattern, expected) in [("b.txt", "does not exist"), ("*.md", "matches no file")] {
        let said = message(load_with("a.txt", b"a", pattern, |_, _| {}), 3);
        assert!(
            said.contains(pattern) && said.contains(expected) && said.contains(&directory),
            "{said}"
        );
    }
    let result = load_with("a.txt", b"aaaaaaaaaaaa", "a.txt", |data, _| {
        data.val_path = Some(PathBuf::from("no/such.txt"));
    });
    assert!(message(result, 3).contains("`no/such.txt` does not exist"));
}

#[test]
fn r3_a_folder_is_not_a_file() {
    let error = load_with("a.txt", b"a", ".", |_, _| {}).unwrap_err();
    assert!(matches!(error, DataError::IsDirectory { .. }), "{error}");
    assert!(error.help().unwrap().contains("**/*.txt"));
}

#[test]
fn r3_a_broken_glob() {
    let said = message(load_with("a.txt", b"a", "***.txt", |_, _| {}), 3);
    assert!(said.contains("is not a valid glob"), "{said}");
}

#[test]
fn r3_empty_files() {
    for (name, contents) in [
        ("a.txt", b"".as_slice()),
        ("a.txt", b"\xef\xbb\xbf"),
        ("a.jsonl", b"\n \n"),
        ("a.jsonl", b"{\"text\": \"\"}"),
        ("a.json", b"[]"),
    ] {
        assert!(message(load(name, contents), 3).starts_with("no text in data.datasets[0]"));
    }
}

#[test]
fn r3_invalid_utf8_names_line_and_offset() {
    let said = message(load("a.txt", b"one\ntwo\nth\xffree\n"), 3);
    assert!(
        said.contains("a.txt:3: not UTF-8: byte 0xff at offset 10"),
        "{said}"
    );
    // A character cut off at the end of the file.
    let said = message(load("a.txt", b"caf\xc3"), 3);
    assert!(
        said.contains("a.txt:1: not UTF-8: byte 0xc3 at offset 3"),
        "{said}"
    );
    let utf16 = load("a.txt", b"\xff\xfeh\0i\0").unwrap_err();
    assert!(utf16.help().unwrap().contains("UTF-16"));
}

#[test]
fn r3_nul_bytes_are_text_and_are_pointed_out() {
    let corpus = load("a.txt", b"some\0text\0with\0holes").unwrap();
    assert!(
        corpus.notes.join("\n").contains("3 NUL characters kept"),
        "{:?}",
        corpus.notes
    );
}

#[test]
fn r3_broken_json_names_the_line() {
    for (name, contents, expected) in [
        (
            "a.jsonl",
            "{\"text\": \"a\"}\n{\"text\": \"b",
            "a.jsonl:2: invalid JSON at column 11",
        ),
        (
            "a.jsonl",
            "{\"text\": \"a\"} x\n",
            "a.jsonl:1: invalid JSON at column 15",
        ),
        (
            "a.json",
            "[{\"text\": \"a\"},\n{\"text\": \"b\"",
            "a.json:2: invalid JSON",
        ),
        (
            "a.json",
            "[{\"text\": \"a\"},\n\n",
            "a.json:3: the array is not closed",
        ),
        (
            "a.json",
            "[{\"text\": \"a\"}\n{\"text\": \"b\"}]",
            "a.json:2: expected `,` or `]`",
        ),
        (
            "a.json",
            "[{\"text\": \"a\"},\n{\"text\":\n\"b\",, 3}]",
            "a.json:3: invalid JSON",
        ),
        (
            "a.json",
            "[{\"text\": \"a\"}]\n\nmore",
            "a.json:3: more text after",
        ),
        (
            "a.json",
            "[{\"text\": \"a\"}",
            "a.json:1: expected `,` or `]`",
        ),
    ] {
        let said = message(load(name, contents.as_bytes()), 3);
        assert!(said.contains(expected), "{contents:?}: {said}");
    }
}

#[test]
fn r3_records_of_the_wrong_shape_name_the_line_and_the_fields() {
    for (name, contents, expected) in [
        (
            "a.jsonl",
            "{\"text\":\"a\"}\n{\"body\":\"b\",\"id\":1}",
            "a.jsonl:2: the record has no field `text` (it has: body, id)",
        ),
        ("a.jsonl", "{}", "(it has: none)"),
        (
            "a.jsonl",
            "\n\n{\"text\": 3}",
            "a.jsonl:3: field `text` is a number, not a string",
        ),
        (
            "a.jsonl",
            "{\"text\": null}",
            "field `text` is null, not a string",
        ),
        (
            "a.jsonl",
            "\"just a string\"",
            "a.jsonl:1: the record is a string, not an object",
        ),
        (
            "a.json",
            "[{\"text\": \"a\"},\n{\"text\": [\"b\"]}]",
            "a.json:2: field `text` is an array",
        ),
        (
            "a.json",
            "[[\n{\"text\": \"a\"}]]",
            "a.json:1: the record is an array, not an object",
        ),
    ] {
        let said = message(load(name, contents.as_bytes()), 3);
        assert!(said.contains(expected), "{contents:?}: {said}");
    }
    let error = load("a.jsonl", b"{\"body\": \"b\"}").unwrap_err();
    assert!(
        error
            .help()
            .unwrap()
            .contains("fields = { text = \"body\" }")
    );
}

#[test]
fn r3_too_little_data() {
    for contents in [b"x".as_slice(), b"xy", b"xyzx"] {
        let said = message(load("a.txt", contents), 3);
        assert!(said.contains("one sequence needs 5"), "{said}");
    }
    let error = load("a.txt", b"abcdefghij").unwrap_err();
    assert!(
        matches!(error, DataError::ValTooShort { tokens: 1 }),
        "{error}"
    );
    // Nine training characters are two sequences of 4 and the token after them.
    assert_eq!(
        load("a.txt", b"abcdefghijabcdefghij")
            .unwrap()
            .train_tokens(),
        18
    );
}

#[test]
fn r3_a_dataset_that_would_never_be_drawn_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let short = folder.path().join("short.txt");
    fs::write(&short, "ab").unwrap();
    let result = load_with("a.txt", b"abcdefghijabcdefghij", "a.txt", |data, _| {
        let mut second = data.datasets[0].clone();
        second.path = OneOrMany::One(short.to_str().unwrap().to_string());
        data.datasets.push(second);
    });
    assert!(message(result, 3).contains("data.datasets[1]"));
}

#[test]
fn r3_tokenizer_files() {
    let with = |contents: Option<&str>| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        if let Some(contents) = contents {
            fs::write(&path, contents).unwrap();
        }
        load_with("a.txt", b"abcdefghijabcdefghij", "a.txt", |_, tokenizer| {
            tokenizer.kind = TokenizerKind::File;
            tokenizer.path = Some(path);
        })
    };
    assert!(message(with(None), 2).contains("does not exist"));
    assert!(message(with(Some("{\"model\"")), 2).contains("tokenizer.json`: "));
    assert!(message(with(Some("{}")), 2).contains("tokenizer.json`: "));
    let model = |vocab: &str| {
        format!(r#"{{"version":"1.0","model":{{"type":"BPE","vocab":{vocab},"merges":[]}}}}"#)
    };
    assert!(message(with(Some(&model("{}"))), 2).contains("vocabulary is empty"));
    let gaps = message(with(Some(&model(r#"{"a":0,"b":1,"c":4000000000}"#))), 2);
    assert!(
        gaps.contains("3 tokens, but ids up to 4000000000; id 2 is the first"),
        "{gaps}"
    );
    let unknown = message(with(Some(&model(r#"{"a":0,"b":1,"c":2}"#))), 2);
    assert!(
        unknown.contains("character 'd' (U+0064) is not among the tokenizer's 3"),
        "{unknown}"
    );
    let unset = load_with("a.txt", b"abc", "a.txt", |_, tokenizer| {
        tokenizer.kind = TokenizerKind::File;
    });
    assert!(message(unset, 2).contains("tokenizer.path is not set"));
}

#[test]
fn r3_text_that_a_tokenizer_does_not_know_is_said() {
    let word_level = r#"{"version":"1.0","pre_tokenizer":{"type":"WhitespaceSplit"},
        "model":{"type":"WordLevel","vocab":{"[UNK]":0,"a":1},"unk_token":"[UNK]"}}"#;
    let dropping = r#"{"version":"1.0","model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":[["a","b"]]}}"#;
    for (contents, expected) in [
        (word_level, "6 unknown tokens stand for what it does not"),
        (dropping, "leaves out characters that it has no token for"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        fs::write(&path, contents).unwrap();
        let corpus = load_with(
            "a.txt",
            b"a b c a b c a b c a a a a a a a a a a a",
            "a.txt",
            |data, tokenizer| {
                data.val_fraction = 0.2;
                tokenizer.kind = TokenizerKind::File;
                tokenizer.path = Some(path);
            },
        )
        .unwrap();
        let said = corpus.notes.join("\n");
        assert!(said.contains(expected), "{said}");
    }
}
