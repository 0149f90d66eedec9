//! Text to token ids and back, over Hugging Face's `tokenizers`.
//!
//! Four kinds, one representation. Whatever a [`Tokenizer`] was made from (a tokenizer.json,
//! BPE learned here, bytes, characters), it *is* a tokenizer.json: [`Tokenizer::save`] writes one
//! that `AutoTokenizer` loads, and loading it again encodes identically. `build` makes the three
//! kinds that do not come from a file, `special` finds the end and begin tokens, `stream` decodes
//! one token at a time.
//!
//! Two habits of the format are undone on loading, because they would lose text without a word:
//! truncation and padding stored in the file are switched off, and a char tokenizer (a BPE model
//! without merges, which drops what it does not know) is recognised and made to refuse unknown
//! characters.
//!
//! Special tokens written out in a text, as `<|endoftext|>` in TinyStories, are taken as those
//! tokens; that is what `AutoTokenizer` does. None are added on top.

mod build;
mod special;
mod stream;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value, json};

pub use build::END_OF_TEXT;
pub use stream::StreamDecoder;

use super::DataError;
use super::chat::TemplateError;
use super::files::working_directory;
use crate::durable;

/// Where newer tokenizers keep their chat template.
const CHAT_TEMPLATE_FILE: &str = "chat_template.jinja";

/// A special token and its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// The token's text, such as `</s>`.
    pub text: String,
    /// Its id.
    pub id: u32,
}

/// Text to token ids and back.
///
/// ```
/// use firebrick::data::Tokenizer;
///
/// let tokenizer = Tokenizer::bytes()?;
/// assert_eq!(tokenizer.encode("hi")?, [104, 105]);
/// assert_eq!(tokenizer.decode(&[104, 105])?, "hi");
/// # Ok::<(), firebrick::data::DataError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The tokenizer.json, as loaded or as built.
    json: String,
    /// The tokenizer_config.json to write beside it.
    config: Map<String, Value>,
    /// Token of each character, for char tokenizers.
    characters: Option<HashMap<char, u32>>,
    eos: Option<SpecialToken>,
    bos: Option<SpecialToken>,
    /// Ids of special tokens.
    special: HashSet<u32>,
    /// Bytes of the longest token.
    longest: usize,
    /// The chat templates by name.
    chat_templates: Vec<(String, String)>,
    /// Whether the template is a file of its own, not a part of the config.
    writes_template: bool,
    vocab_size: usize,
    tokens: usize,
    unknown: Unknown,
}

/// What a tokenizer does with text that it has no token for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// There is no such text: every byte has a token. Or it is refused (char).
    Never,
    /// This token stands for it.
    Token(u32),
    /// It is left out.
    Dropped,
}

impl Tokenizer {
    /// Loads a tokenizer.json, and the tokenizer_config.json beside it where there is one.
    pub fn from_file(path: &Path) -> Result<Self, DataError> {
        let invalid = |path: &Path, reason: String| DataError::TokenizerInvalid {
            path: path.to_path_buf(),
            reason,
        };
        let json = match fs::read_to_string(path) {
            Ok(json) => json,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(DataError::TokenizerMissing {
                    path: path.to_path_buf(),
                    directory: working_directory(),
                });
            }
            Err(error) => return Err(invalid(path, error.to_string())),
        };
        let config_path = path.with_file_name("tokenizer_config.json");
        let config = match fs::read_to_string(&config_path) {
            Ok(config) => serde_json::from_str(&config)
                .map_err(|error| invalid(&config_path, error.to_string()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Map::new(),
            Err(error) => return Err(invalid(&config_path, error.to_string())),
        };
        let mut tokenizer = Self::from_json(json, config, path)?;
        let template_path = path.with_file_name(CHAT_TEMPLATE_FILE);
        match fs::read_to_string(&template_path) {
            // It takes precedence, as in transformers.
            Ok(template) => tokenizer.set_chat_template(&template),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(invalid(&template_path, error.to_string())),
        }
        Ok(tokenizer)
    }

    /// From the contents of tokenizer.json and tokenizer_config.json; `path` is for messages.
    pub(super) fn from_json(
        json: String,
        config: Map<String, Value>,
        path: &Path,
    ) -> Result<Self, DataError> {
        let invalid = |reason: String| DataError::TokenizerInvalid {
            path: path.to_path_buf(),
            reason,
        };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(&json).map_err(|error| invalid(error.to_string()))?;
        inner
            .with_padding(None)
            .with_truncation(None)
            .map_err(|error| invalid(error.to_string()))?;
        let vocab = inner.get_vocab(true);
        let longest = vocab.keys().map(String::len).max().unwrap_or(1).max(1);
        let ids: Vec<u32> = vocab.into_values().collect();
        let vocab_size = check_ids(&ids, path)?;
        // It would add special tokens, which nothing here asks for, and take blanks off offsets.
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        let special = special::find(&inner, &config).map_err(invalid)?;
        let added = inner.get_added_tokens_decoder();
        let special_ids = added.iter().filter(|(_, token)| token.special);
        let special_ids = special_ids.map(|(&id, _)| id).collect();
        let characters = build::characters_of(&json, &inner);
        let mut tokenizer = Self {
            unknown: special::unknown(&json, &inner, characters.is_some()),
            characters,
            inner,
            json,
            chat_templates: special::chat_templates(&config),
            config,
            writes_template: false,
            eos: special.eos,
            bos: special.bos,
            special: special_ids,
            longest,
            vocab_size,
            tokens: ids.len(),
        };
        tokenizer.complete_config();
        Ok(tokenizer)
    }

    /// Token ids of a text. No special tokens are added.
    ///
    /// A char tokenizer refuses characters that it has no token for.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        if let Some(characters) = &self.characters {
            return encode_characters(characters, text);
        }
        let encoding =
            self.inner
                .encode_fast(text, false)
                .map_err(|error| DataError::Tokenizer {
                    action: "encode",
                    reason: error.to_string(),
                })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of a text, each with the bytes of the text that it stands for. Tokens of one
    /// character, such as its bytes, all stand for that character; a token may stand for no text.
    pub(super) fn encode_with_offsets(
        &self,
        text: &str,
    ) -> Result<Vec<(u32, Range<usize>)>, DataError> {
        if let Some(characters) = &self.characters {
            let ids = encode_characters(characters, text)?;
            let places = text.char_indices();
            let ranges = places.map(|(at, character)| at..at + character.len_utf8());
            return Ok(ids.into_iter().zip(ranges).collect());
        }
        let encoding = self
            .inner
            .encode(text, false)
            .map_err(|error| DataError::Tokenizer {
                action: "encode",
                reason: error.to_string(),
            })?;
        let ranges = encoding
            .get_offsets()
            .iter()
            .map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    /// Whether an id is a special token's.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Bytes of text that one token stands for at most, where no text is unknown.
    pub(super) fn longest_token_bytes(&self) -> usize {
        self.longest
    }

    /// The text of token ids, special tokens included. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        // The library leaves unknown ids out, which would hide a model that is not this tokenizer's.
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(DataError::UnknownId {
                id,
                vocab_size: self.vocab_size,
            });
        }
        self.inner
            .decode(ids, false)
            .map_err(|error| DataError::Tokenizer {
                action: "decode",
                reason: error.to_string(),
            })
    }

    /// A decoder that takes one token at a time and gives text as soon as it is whole.
    pub fn stream(&self) -> StreamDecoder<'_> {
        self.stream_after(&[])
    }

    /// As [`stream`](Self::stream), for tokens that follow `prompt`: a space at the beginning of a
    /// text is not shown, one between prompt and completion is.
    pub fn stream_after(&self, prompt: &[u32]) -> StreamDecoder<'_> {
        StreamDecoder::new(self, prompt)
    }

    /// Rows an embedding matrix needs: the largest id + 1.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Number of tokens; smaller than [`vocab_size`](Self::vocab_size) where ids are unused.
    pub fn token_count(&self) -> usize {
        self.tokens
    }

    /// The token that ends a document, if the tokenizer has one.
    pub fn eos(&self) -> Option<&SpecialToken> {
        self.eos.as_ref()
    }

    /// Makes the token with this id the end token, for what [`save`](Self::save) writes too. Without
    /// such a token nothing changes.
    pub fn set_eos(&mut self, id: u32) {
        if let Some(text) = self.inner.id_to_token(id) {
            self.config.insert("eos_token".to_string(), json!(text));
            self.eos = Some(SpecialToken { text, id });
        }
    }

    /// The token that begins a document, if the tokenizer has one.
    pub fn bos(&self) -> Option<&SpecialToken> {
        self.bos.as_ref()
    }

    /// The id of a token by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether this is a char tokenizer: one token per character, unknown characters refused.
    pub fn is_char(&self) -> bool {
        self.characters.is_some()
    }

    /// What becomes of text that there is no token for.
    pub fn unknown(&self) -> Unknown {
        self.unknown
    }

    /// The tokenizer.json.
    pub fn to_json(&self) -> &str {
        &self.json
    }

    /// The source of the chat template called `name`; a tokenizer with one calls it `default`.
    ///
    /// # Errors
    /// There is none, or none of that name.
    pub fn chat_template(&self, name: &str) -> Result<&str, TemplateError> {
        let found = self.chat_templates.iter().find(|(known, _)| known == name);
        match found {
            Some((_, source)) => Ok(source),
            None if self.chat_templates.is_empty() => Err(TemplateError::NoneInTokenizer),
            None => Err(TemplateError::NotInTokenizer {
                name: name.to_string(),
                known: self
                    .chat_templates
                    .iter()
                    .map(|(name, _)| name.clone())
                    .collect(),
            }),
        }
    }

    /// Makes `source` the chat template: the one that [`save`](Self::save) writes.
    pub fn set_chat_template(&mut self, source: &str) {
        self.chat_templates = vec![("default".to_string(), source.to_string())];
        // Two places that say different things would be read differently by different programs.
        self.config.shift_remove("chat_template");
        self.writes_template = true;
    }

    /// Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, where there is one of
    /// its own, into a folder that exists.
    pub fn save(&self, directory: &Path) -> Result<(), DataError> {
        let write = |name: &str, contents: &str| {
            let path = directory.join(name);
            durable::replace_with(&path, contents)
                .map_err(|source| DataError::Unwritable { path, source })
        };
        write("tokenizer.json", &self.json)?;
        write(
            "tokenizer_config.json",
            &format!("{:#}\n", Value::Object(self.config.clone())),
        )?;
        match self.chat_templates.first() {
            Some((_, template)) if self.writes_template => write(CHAT_TEMPLATE_FILE, template),
            _ => Ok(()),
        }
    }

    /// Adds to the config what `AutoTokenizer` needs; what a loaded config says stays.
    fn complete_config(&mut self) {
        let special = [("eos_token", &self.eos), ("bos_token", &self.bos)];
        for (key, token) in special {
            if let Some(token) = token {
                self.config.entry(key).or_insert_with(|| json!(token.text));
            }
        }
        self.config
            .entry("tokenizer_class")
            .or_insert_with(|| json!("PreTrainedTokenizerFast"));
        // transformers would otherwise "clean up" spaces before punctuation when decoding.
        self.config
            .entry("clean_up_tokenization_spaces")
            .or_insert_with(|| json!(false));
    }
}

/// Checks that ids are dense enough for an embedding matrix; returns the largest + 1.
fn check_ids(ids: &[u32], path: &Path) -> Result<usize, DataError> {
    let Some(&max_id) = ids.iter().max() else {
        return Err(DataError::TokenizerInvalid {
            path: path.to_path_buf(),
            reason: "the vocabulary is empty".to_string(),
        });
    };
    // Some published tokenizers have a few unused ids. One whose ids are mostly holes is broken,
    // and its largest id would decide how much memory the model takes.
    let vocab_size = max_id as usize + 1;
    if vocab_size > 2 * ids.len() {
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let first_gap = (0..)
            .zip(&sorted)
            .find(|(i, id)| i != *id)
            .map_or(0, |(i, _)| i);
        return Err(DataError::TokenizerGaps {
            path: path.to_path_buf(),
            tokens: ids.len(),
            max_id,
            first_gap,
        });
    }
    Ok(vocab_size)
}

/// Some characters before and after a place in a text.
fn near(text: &str, position: usize) -> String {
    const REACH: usize = 20;
    let (before, after) = text.split_at(position);
    let start = before.char_indices().rev().nth(REACH - 1);
    let start = start.map_or(0, |(index, _)| index);
    before[start..]
        .chars()
        .chain(after.chars().take(REACH))
        .collect()
}

fn encode_characters(characters: &HashMap<char, u32>, text: &str) -> Result<Vec<u32>, DataError> {
    text.char_indices()
        .map(|(position, character)| {
            characters
                .get(&character)
                .copied()
                .ok_or_else(|| DataError::UnknownChar {
                    character,
                    near: near(text, position),
                    known: characters.len(),
                })
        })
        .collect()
}
