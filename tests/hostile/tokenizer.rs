//! Tokenizers with gaps in their ids, and tokenizers of another model.

use firebrick::config::Architecture;
use firebrick::data::Tokenizer;
use serde_json::{Value, json};

use super::{Model, bounded, runner};

/// A tokenizer of three words with these ids.
fn words(ids: [u64; 3]) -> String {
    let vocab: serde_json::Map<String, Value> = ["a", "b", "[UNK]"]
        .iter()
        .zip(ids)
        .map(|(word, id)| (word.to_string(), json!(id)))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": null, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    })
    .to_string()
}

#[test]
fn ids_with_gaps_are_rows_or_an_error() {
    let model = Model::new(Architecture::Llama);
    let path = model.path("tokenizer.json");
    // A few unused ids are rows of the embedding that no text reaches.
    model.write("tokenizer.json", words([0, 1, 4]));
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.token_count()), (5, 3));
    assert_eq!(tokenizer.encode("b a c").unwrap(), [1, 0, 4]);
    model.write("text.txt", "a b a b c");
    let eval = ["eval", "--model", ".", "--data", "text.txt", "--json"];
    assert_eq!(runner(model.folder.path(), &eval).0, 0);
    // Mostly holes: its largest id would decide how much memory is taken.
    for ids in [[0, 1, 6], [0, 1, 1_000_000], [0, 7, u64::from(u32::MAX)]] {
        let text = words(ids);
        model.write("tokenizer.json", &text);
        let error = bounded(text.len(), "gaps", || Tokenizer::from_file(&path)).unwrap_err();
        assert!(
            error.to_string().contains("3 tokens, but ids up to"),
            "{error}"
        );
        let (code, stderr) = runner(model.folder.path(), &eval);
        assert_eq!(code, 2, "{stderr}");
        assert!(
            stderr.contains("error[data]") && stderr.contains("help"),
            "{stderr}"
        );
    }
    for ids in [[0, 1, 1 << 32], [0, 1, u64::MAX]] {
        model.write("tokenizer.json", words(ids));
        assert!(Tokenizer::from_file(&path).is_err());
        assert_eq!(runner(model.folder.path(), &eval).0, 2);
    }
}

#[test]
fn a_tokenizer_of_a_larger_model_is_refused() {
    // Thirteen embeddings, and a token for every byte.
    let model = Model::new(Architecture::Llama);
    Tokenizer::bytes()
        .unwrap()
        .save(model.folder.path())
        .unwrap();
    model.write("text.txt", "some text");
    for verb in [
        &["logits", "--text", "a", "--out", "x"][..],
        &["generate", "--prompt", "a"],
        &["eval", "--data", "text.txt"],
    ] {
        let arguments = [verb, &["--model", "."]].concat();
        let (code, stderr) = runner(model.folder.path(), &arguments);
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains("ids up to 256"), "{stderr}");
        assert!(
            stderr.contains("tokenizer.json that the model was trained with"),
            "{stderr}"
        );
    }
}
