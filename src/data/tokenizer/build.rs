//! The tokenizers that are made here instead of loaded: BPE, bytes, characters.
//!
//! Each is written down as a tokenizer.json and then loaded like any other, so that what runs
//! here is what a saved file does elsewhere.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, ModelWrapper};

use super::Tokenizer;
use crate::data::DataError;
use crate::data::pieces::Pieces;

/// End and begin token of the tokenizers made here, as in GPT-2.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// A pair must be seen this often to become a token: a token for something that occurs once
/// teaches a model nothing.
const MIN_FREQUENCY: u64 = 2;

/// Size of the pieces that texts are cut into for training.
const PIECE_BYTES: usize = 1 << 16;

impl Tokenizer {
    /// Learns a byte-level BPE as GPT-2's (Radford et al., 2019, section 2.2) from texts.
    ///
    /// `vocab_size` counts everything: `<|endoftext|>` (id 0), the 256 bytes, the merges. Texts
    /// with too little repetition give fewer tokens; compare [`Tokenizer::vocab_size`]. The same
    /// texts give the same tokenizer.
    pub fn train_bpe<'a>(
        texts: impl Iterator<Item = &'a str> + Send,
        vocab_size: usize,
    ) -> Result<Self, DataError> {
        let failed = |error: tokenizers::Error| DataError::Tokenizer {
            action: "train",
            reason: error.to_string(),
        };
        let mut trainer = TrainerWrapper::from(
            BpeTrainer::builder()
                .vocab_size(vocab_size)
                .min_frequency(MIN_FREQUENCY)
                .show_progress(false)
                .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
                .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
                .build(),
        );
        let mut inner = tokenizers::Tokenizer::new(ModelWrapper::BPE(BPE::default()));
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        inner.with_decoder(Some(ByteLevel::new(false, true, true)));
        // The trainer takes a text whole before it splits it into words; pieces keep that small.
        let pieces = texts.flat_map(|text| Pieces::new(text, PIECE_BYTES, |_, _| true));
        inner.train(&mut trainer, pieces).map_err(failed)?;
        let json = inner.to_string(false).map_err(failed)?;
        Self::from_json(json, Map::new(), Path::new("(trained BPE)"))
    }

    /// One token per byte, ids 0 to 255, and `<|endoftext|>`, id 256.
    pub fn bytes() -> Result<Self, DataError> {
        let vocab: Map<String, Value> = byte_characters()
            .into_iter()
            .enumerate()
            .map(|(byte, character)| (character.to_string(), json!(byte)))
            .collect();
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
        });
        let file = tokenizer_json(
            vocab,
            json!([{
                "id": 256, "content": END_OF_TEXT, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            }]),
            byte_level.clone(),
            byte_level,
        );
        Self::from_json(file, Map::new(), Path::new("(bytes)"))
    }

    /// One token per character that occurs in the texts, in the order of their code points, as
    /// nanoGPT's. No special tokens.
    pub fn chars<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Self, DataError> {
        let mut characters = BTreeSet::new();
        for text in texts {
            characters.extend(text.chars());
        }
        let vocab: Map<String, Value> = characters
            .into_iter()
            .enumerate()
            .map(|(id, character)| (character.to_string(), json!(id)))
            .collect();
        let file = tokenizer_json(vocab, json!([]), Value::Null, json!({"type": "Fuse"}));
        Self::from_json(file, Map::new(), Path::new("(characters)"))
    }
}

/// The characters that byte-level tokenizers write bytes as, by byte: printable ones stand for
/// themselves, the others are moved up from U+0100 (GPT-2's `bytes_to_unicode`).
fn byte_characters() -> [char; 256] {
    let mut moved = 0x100..;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            char::from(byte)
        } else {
            // 68 bytes move, to U+0100..U+0144, all of them characters.
            moved
                .next()
                .and_then(char::from_u32)
                .unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    })
}

/// A tokenizer.json with a BPE model that has no merges: one token per symbol.
fn tokenizer_json(
    vocab: Map<String, Value>,
    added: Value,
    pre_tokenizer: Value,
    decoder: Value,
) -> String {
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": [],
        },
    })
    .to_string()
}

/// The character of every token, if this tokenizer.json is a char tokenizer: symbols of one
/// character, nothing that merges, splits or rewrites them, and nothing to put for unknown ones.
pub(super) fn characters_of(
    json: &str,
    inner: &tokenizers::Tokenizer,
) -> Option<HashMap<char, u32>> {
    let plain = inner.get_normalizer().is_none()
        && inner.get_pre_tokenizer().is_none()
        && inner.get_added_tokens_decoder().is_empty();
    let ModelWrapper::BPE(model) = inner.get_model() else {
        return None;
    };
    if !plain || model.get_unk_token().is_some() || model.byte_fallback {
        return None;
    }
    let characters: Option<HashMap<char, u32>> = model
        .get_vocab()
        .into_iter()
        .map(|(token, id)| {
            let mut characters = token.chars();
            let character = characters.next()?;
            characters.next().is_none().then_some((character, id))
        })
        .collect();
    // The library does not show a model's merges, and they could only be ones that never apply.
    let file: Value = serde_json::from_str(json).ok()?;
    let merges = file.get("model")?.get("merges")?.as_array()?;
    characters.filter(|_| merges.is_empty())
}
