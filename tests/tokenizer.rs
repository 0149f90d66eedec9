//! Row R3: text to token ids and back, for every kind of tokenizer.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use firebrick::data::{DataError, END_OF_TEXT, TokenStream, Tokenizer, Unknown, encode_documents};
use proptest::prelude::*;

const SAMPLE: &str =
    "The cat sat on the mat. The cat's hat is on the mat.\n\nÉtés 東京 🙂 the the the\n";

/// The folder of published tokenizers and texts.
fn shared(path: &str) -> PathBuf {
    let folder = std::env::var_os("FIREBRICK_DATA").expect("FIREBRICK_DATA is not set");
    PathBuf::from(folder).join(path)
}

fn bpe() -> &'static Tokenizer {
    static BPE: OnceLock<Tokenizer> = OnceLock::new();
    BPE.get_or_init(|| Tokenizer::train_bpe([SAMPLE.repeat(3).as_str()].into_iter(), 280).unwrap())
}

/// Saves, loads, and checks that what was loaded encodes and decodes identically.
fn saved_and_loaded(tokenizer: &Tokenizer, text: &str) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let loaded = Tokenizer::from_file(&folder.path().join("tokenizer.json")).unwrap();
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(loaded.encode(text).unwrap(), ids);
    assert_eq!(
        loaded.decode(&ids).unwrap(),
        tokenizer.decode(&ids).unwrap()
    );
    assert_eq!(loaded.eos(), tokenizer.eos());
    assert_eq!(loaded.bos(), tokenizer.bos());
    assert_eq!(loaded.vocab_size(), tokenizer.vocab_size());
    assert_eq!(loaded.to_json(), tokenizer.to_json());
    loaded
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = tokenizer.stream();
    let mut text = String::new();
    for id in ids {
        text.push_str(&decoder.push(*id).unwrap());
    }
    text + &decoder.finish().unwrap()
}

/// A completion reads as it would in the whole text, the space before it included.
fn continues(tokenizer: &Tokenizer, text: &str) {
    let ids = tokenizer.encode(text).unwrap();
    for split in 1..ids.len() {
        let (prompt, rest) = ids.split_at(split);
        let mut decoder = tokenizer.stream_after(prompt);
        let mut shown = String::new();
        for id in rest {
            shown.push_str(&decoder.push(*id).unwrap());
        }
        shown.push_str(&decoder.finish().unwrap());
        let whole = tokenizer.decode(&ids).unwrap();
        let before = tokenizer.decode(prompt).unwrap();
        assert_eq!(before + &shown, whole, "after {split} tokens");
    }
}

#[test]
fn i2_a_completion_is_read_after_its_prompt() {
    continues(
        bpe(),
        "one two three four five six seven eight nine ten eleven twelve",
    );
}

#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn i2_a_completion_of_a_sentencepiece_model_begins_with_its_space() {
    let tokenizer = Tokenizer::from_file(&shared("stories260K/hf/tokenizer.json")).unwrap();
    continues(
        &tokenizer,
        "Once upon a time, there was a little girl named Lily. She loved to play.",
    );
}

#[test]
fn r3_byte_ids_are_bytes() {
    let tokenizer = Tokenizer::bytes().unwrap();
    let ids: Vec<u32> = SAMPLE.bytes().map(u32::from).collect();
    assert_eq!(tokenizer.encode(SAMPLE).unwrap(), ids);
    assert_eq!(tokenizer.vocab_size(), 257);
    assert_eq!(tokenizer.eos().unwrap().id, 256);
    assert_eq!(tokenizer.bos(), tokenizer.eos());
    saved_and_loaded(&tokenizer, SAMPLE);
}

#[test]
fn r3_char_ids_are_in_code_point_order() {
    let tokenizer = Tokenizer::chars(["hello\n", "wörld"].into_iter()).unwrap();
    assert_eq!(
        tokenizer.encode("\ndehlorwö").unwrap(),
        [0, 1, 2, 3, 4, 5, 6, 7, 8]
    );
    assert_eq!(tokenizer.vocab_size(), 9);
    assert_eq!((tokenizer.eos(), tokenizer.bos()), (None, None));
    assert_eq!(tokenizer.decode(&[8, 0, 4]).unwrap(), "ö\nl");
}

#[test]
fn r3_a_char_tokenizer_refuses_unknown_characters_also_after_loading() {
    let tokenizer = Tokenizer::chars(["abc"].into_iter()).unwrap();
    let loaded = saved_and_loaded(&tokenizer, "cab");
    for tokenizer in [tokenizer, loaded] {
        assert!(tokenizer.is_char());
        let error = tokenizer.encode("ab\u{e9}c").unwrap_err();
        assert!(matches!(
            error,
            DataError::UnknownChar {
                character: '\u{e9}',
                known: 3,
                ..
            }
        ));
        assert_eq!(
            error.to_string(),
            "character 'é' (U+00E9) is not among the tokenizer's 3 characters: \"abéc\""
        );
    }
}

#[test]
fn r3_bpe_has_all_bytes_and_the_end_token() {
    let tokenizer = bpe();
    assert_eq!(tokenizer.vocab_size(), 280);
    assert_eq!(tokenizer.token_to_id(END_OF_TEXT), Some(0));
    assert_eq!(tokenizer.eos().unwrap().id, 0);
    assert_eq!(tokenizer.unknown(), Unknown::Never);
    assert!(tokenizer.encode("the cat").unwrap().len() < 7);
    saved_and_loaded(tokenizer, SAMPLE);
    assert!(!tokenizer.is_char());
}

#[test]
fn r3_bpe_training_is_deterministic() {
    let texts: Vec<String> = (0..2000u32)
        .map(|i| {
            format!(
                "fn f{i}(x: u{}) -> Vec<Option<{}>> {{ x + {i} }}\n",
                i % 7,
                i * i % 13
            )
        })
        .collect();
    let train = || Tokenizer::train_bpe(texts.iter().map(String::as_str), 700).unwrap();
    let first = train();
    for _ in 0..3 {
        assert_eq!(first.to_json(), train().to_json());
    }
}

#[test]
fn r3_special_tokens_in_the_text_are_those_tokens() {
    let tokenizer = Tokenizer::bytes().unwrap();
    assert_eq!(tokenizer.encode("a<|endoftext|>b").unwrap(), [97, 256, 98]);
}

#[test]
fn r3_ids_outside_the_vocabulary_are_refused() {
    let error = Tokenizer::bytes().unwrap().decode(&[257]).unwrap_err();
    assert!(matches!(
        error,
        DataError::UnknownId {
            id: 257,
            vocab_size: 257
        }
    ));
}

#[test]
fn r3_truncation_stored_in_the_file_is_not_applied() {
    let json = Tokenizer::bytes().unwrap().to_json().replace(
        "\"truncation\":null",
        r#""truncation":{"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0}"#,
    );
    assert!(json.contains("max_length"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    fs::write(&path, json).unwrap();
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    assert_eq!(tokenizer.encode("abcdef").unwrap().len(), 6);
}

#[test]
fn r3_the_config_beside_the_file_names_the_special_tokens() {
    let folder = tempfile::tempdir().unwrap();
    Tokenizer::bytes().unwrap().save(folder.path()).unwrap();
    let config = folder.path().join("tokenizer_config.json");
    let load = |contents: &str| {
        fs::write(&config, contents).unwrap();
        Tokenizer::from_file(&folder.path().join("tokenizer.json"))
    };
    let tokenizer =
        load(r#"{"eos_token": {"content": "A"}, "bos_token": null, "chat_template": "x"}"#)
            .unwrap();
    assert_eq!(tokenizer.eos().unwrap().id, 65);
    assert_eq!(tokenizer.bos(), None);
    tokenizer.save(folder.path()).unwrap();
    assert!(
        fs::read_to_string(&config)
            .unwrap()
            .contains("chat_template")
    );
    let error = load(r#"{"eos_token": "</s>"}"#).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("\"</s>\" is not in the vocabulary"),
        "{error}"
    );
    assert_eq!(load("{").unwrap_err().exit_code(), 2);
}

#[test]
fn r3_streaming_waits_for_whole_characters() {
    let tokenizer = Tokenizer::bytes().unwrap();
    let mut decoder = tokenizer.stream();
    let pieces: Vec<String> = "a🙂"
        .bytes()
        .map(|byte| decoder.push(byte.into()).unwrap())
        .collect();
    assert_eq!(pieces, ["a", "", "", "", "🙂"]);
    assert_eq!(decoder.finish().unwrap(), "");
    // A real U+FFFD, twice, looks like an incomplete character until another follows.
    let text = "\u{fffd}\u{fffd}\u{17000}";
    assert_eq!(streamed(&tokenizer, &tokenizer.encode(text).unwrap()), text);
    // A character that never ends.
    assert_eq!(streamed(&tokenizer, &[0x61, 0xf0, 0x9f]), "a\u{fffd}");
    assert_eq!(streamed(&tokenizer, &[0xf0, 0x9f, 0x61]), "\u{fffd}a");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn r3_bytes_round_trip(text in any::<String>()) {
        let tokenizer = Tokenizer::bytes().unwrap();
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text.as_str());
        prop_assert_eq!(streamed(&tokenizer, &ids), text);
    }

    #[test]
    fn r3_bpe_round_trips(text in "(?s)(the | cat|\\s|[é東🙂]|\\PC|.){0,60}") {
        let ids = bpe().encode(&text).unwrap();
        prop_assert_eq!(bpe().decode(&ids).unwrap(), text.as_str());
        prop_assert_eq!(streamed(bpe(), &ids), text);
    }

    #[test]
    fn r3_chars_round_trip(text in any::<String>()) {
        prop_assume!(!text.is_empty());
        let tokenizer = Tokenizer::chars([text.as_str()].into_iter()).unwrap();
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(ids.len(), text.chars().count());
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
}

/// Encoding a long document in pieces gives what encoding it whole gives.
fn assert_pieces_agree(tokenizer: &Tokenizer, text: &str) {
    let mut whole = tokenizer.encode(text).unwrap();
    whole.extend(tokenizer.eos().map(|eos| eos.id));
    let stream = encode_documents(tokenizer, &[text.to_string()]).unwrap();
    assert!(stream == TokenStream::from_ids(&whole, tokenizer.vocab_size()));
}

#[test]
fn r3_pieces_give_the_tokens_of_the_whole() {
    let text: String = (0..30_000)
        .map(|i| format!("line {i}, the cat's  mat\r\n\n\tand 東京 {i}.\n"))
        .collect();
    for tokenizer in [
        bpe(),
        &Tokenizer::bytes().unwrap(),
        &Tokenizer::chars([text.as_str()].into_iter()).unwrap(),
    ] {
        assert_pieces_agree(tokenizer, &text);
    }
}

#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn r3_published_tokenizers() {
    let text = fs::read_to_string(shared("text/pride_and_prejudice_en.txt")).unwrap();
    for (file, vocab_size, eos, bos, hello) in [
        (
            "tokenizers/gpt2.json",
            50_257,
            "<|endoftext|>",
            "<|endoftext|>",
            vec![15496, 11, 995],
        ),
        (
            "tokenizers/mistral01.json",
            32_000,
            "</s>",
            "<s>",
            vec![22557, 28725, 1526],
        ),
        ("stories260K/hf/tokenizer.json", 512, "</s>", "<s>", vec![]),
    ] {
        let tokenizer = Tokenizer::from_file(&shared(file)).unwrap();
        assert_eq!(tokenizer.vocab_size(), vocab_size, "{file}");
        assert_eq!(tokenizer.eos().unwrap().text, eos, "{file}");
        assert_eq!(tokenizer.bos().unwrap().text, bos, "{file}");
        assert_eq!(tokenizer.unknown(), Unknown::Never, "{file}");
        let ids = tokenizer.encode("Hello, world").unwrap();
        assert!(hello.is_empty() || ids == hello, "{file}: {ids:?}");
        // Mistral's drops a first space; that is how it was made.
        let spaces = ["two  spaces", " first"][usize::from(!file.contains("mistral"))];
        for text in ["Hello, world", SAMPLE, spaces, "<0x41>", ""] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{file}");
            assert_eq!(streamed(&tokenizer, &ids), text, "{file}");
        }
        saved_and_loaded(&tokenizer, SAMPLE);
        assert_pieces_agree(&tokenizer, &text);
    }
}

#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn r3_tinyshakespeare_splits_as_in_nanogpt() {
    use firebrick::config::{DataConfig, DatasetConfig, TokenizerConfig, TokenizerKind};
    use firebrick::data::{Bigram, Corpus, TokenCache};
    let path = shared("text/tinyshakespeare.txt")
        .to_str()
        .unwrap()
        .to_string();
    let dataset: DatasetConfig = serde_json::from_value(serde_json::json!({"path": path})).unwrap();
    let data = DataConfig {
        val_fraction: 0.1,
        datasets: vec![dataset],
        ..DataConfig::default()
    };
    let cache = tempfile::tempdir().unwrap();
    let cache = TokenCache::at(cache.path());
    for (kind, vocab_size) in [(TokenizerKind::Char, 65), (TokenizerKind::Bpe, 1024)] {
        let tokenizer = TokenizerConfig {
            kind,
            vocab_size: Some(1024),
            path: None,
        };
        for _ in 0..2 {
            let start = std::time::Instant::now();
            let corpus = Corpus::load(&data, &tokenizer, &cache).unwrap();
            println!("{kind:?}: {:?}", start.elapsed());
            println!("{}", corpus.notes.join("\n"));
            assert_eq!(corpus.tokenizer.vocab_size(), vocab_size);
            assert_eq!(corpus.val_bytes, 111_540);
            if kind == TokenizerKind::Char {
                assert_eq!(corpus.train_tokens(), 1_003_854);
                assert_eq!(corpus.val.as_ref().unwrap().len(), 111_540);
            }
            let start = std::time::Instant::now();
            let streams = corpus.train.iter().map(|stream| &stream.tokens);
            let model = Bigram::fit(streams, vocab_size);
            let nats = model.nats_per_token(corpus.val.as_ref().unwrap()).unwrap();
            println!("bigram: {nats:.4} nats per token in {:?}", start.elapsed());
        }
    }
}
