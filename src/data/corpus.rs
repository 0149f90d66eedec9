//! Everything a run trains and validates on, as token ids.
//!
//! [`Corpus::load`] goes from the config to token streams in this order: find and hash the files,
//! get the tokenizer, look for the tokens in the cache under the hash of all that, and only if
//! they are not there read, split and tokenise. A second run therefore reads every file once, to
//! hash it, and maps the tokens.

use std::collections::HashMap;
use std::path::Path;

use super::DataError;
use super::cache::{Lookup, TokenCache};
use super::encode::encode_documents;
use super::files::FileRecord;
use super::notes::{self, Summary, counted};
use super::source::{Key, Source, Texts};
use super::token_stream::TokenStream;
use super::tokenizer::{Tokenizer, Unknown};
use crate::config::{DataConfig, TokenizerConfig, TokenizerKind};
use crate::readable::grouped;

/// Token ids to train and validate on, and where they came from.
#[derive(Debug, Clone)]
pub struct Corpus {
    /// What made the ids.
    pub tokenizer: Tokenizer,
    /// The training part of each dataset, in the order of the config.
    pub train: Vec<TrainStream>,
    /// The validation part of all datasets, or the validation file. None if `val_fraction` is 0.
    pub val: Option<TokenStream>,
    /// UTF-8 bytes of the validation text, for bits per byte.
    pub val_bytes: u64,
    /// Lines for the user: files, formats, tokens, cache hit or miss, warnings.
    pub notes: Vec<String>,
    /// Every file read, the tokenizer's included.
    pub files: Vec<FileRecord>,
}

/// The training part of one dataset.
#[derive(Debug, Clone)]
pub struct TrainStream {
    /// The dataset, in words, for messages.
    pub name: String,
    /// Its tokens.
    pub tokens: TokenStream,
    /// How often they are seen relative to those of other datasets.
    pub weight: f64,
}

impl Corpus {
    /// Loads what the config describes. `data.sequence_len` is only checked against.
    pub fn load(
        data: &DataConfig,
        tokenizer: &TokenizerConfig,
        cache: &TokenCache,
    ) -> Result<Self, DataError> {
        let source = Source::survey(data)?;
        let mut notes = source.warnings();
        let mut files = source.files();
        let tokenizer_note_at = notes.len();
        let made = make_tokenizer(tokenizer, &source, cache, &mut notes, &mut files)?;
        let (tokens, summary, origin) = load_tokens(&source, &made, cache, &mut notes)?;
        let corpus = Self::assemble(&source, made, tokens, &summary, files)?;
        // First what the files are, then what was made of them.
        notes.splice(
            tokenizer_note_at..tokenizer_note_at,
            source.describe(&summary),
        );
        notes.extend(warn_of_unknown(&corpus.tokenizer, &summary));
        notes.push(corpus.describe_tokens(origin));
        Ok(Self { notes, ..corpus })
    }

    /// Tokens of all training streams, each dataset once.
    pub fn train_tokens(&self) -> u64 {
        self.train
            .iter()
            .map(|stream| stream.tokens.len() as u64)
            .sum()
    }

    /// Bytes of all tokens, in memory or mapped into it.
    pub fn token_bytes(&self) -> u64 {
        let train = self.train.iter().map(|stream| &stream.tokens);
        let streams = train.chain(&self.val);
        streams
            .map(|tokens| (tokens.len() * tokens.width().bytes()) as u64)
            .sum()
    }

    fn assemble(
        source: &Source,
        tokenizer: Tokenizer,
        mut tokens: HashMap<String, TokenStream>,
        summary: &Summary,
        files: Vec<FileRecord>,
    ) -> Result<Self, DataError> {
        let sequence_len = source.config.sequence_len;
        let mut train = Vec::with_capacity(source.datasets.len());
        for (index, dataset) in source.datasets.iter().enumerate() {
            let name = notes::dataset_name(index, &dataset.paths());
            let tokens = tokens
                .remove(&train_name(index))
                .unwrap_or_else(|| TokenStream::from_ids(&[], 1));
            if tokens.len() <= sequence_len {
                return Err(DataError::TooShort {
                    what: name,
                    tokens: tokens.len() as u64,
                    sequence_len,
                });
            }
            let weight = dataset.config.weight;
            train.push(TrainStream {
                name,
                tokens,
                weight,
            });
        }
        let val = tokens.remove(VAL);
        match &val {
            Some(val) if val.len() < 2 => {
                return Err(DataError::ValTooShort {
                    tokens: val.len() as u64,
                });
            }
            None if source.validates() => return Err(DataError::ValTooShort { tokens: 0 }),
            _ => {}
        }
        Ok(Self {
            tokenizer,
            train,
            val,
            val_bytes: summary.val_bytes,
            notes: Vec::new(),
            files,
        })
    }

    fn describe_tokens(&self, origin: &str) -> String {
        let train = grouped(self.train_tokens());
        let val = match &self.val {
            Some(val) => format!("{} to validate on", grouped(val.len() as u64)),
            None => "none to validate on".to_string(),
        };
        format!("tokens: {train} to train on, {val} ({origin})")
    }
}

const VAL: &str = "val";

fn train_name(index: usize) -> String {
    format!("train.{index}")
}

/// The tokenizer the config asks for.
pub(super) fn make_tokenizer(
    config: &TokenizerConfig,
    source: &Source,
    cache: &TokenCache,
    notes: &mut Vec<String>,
    files: &mut Vec<FileRecord>,
) -> Result<Tokenizer, DataError> {
    let (tokenizer, what) = match config.kind {
        TokenizerKind::File => {
            let path = config.path.as_ref().ok_or(DataError::TokenizerPathUnset)?;
            let tokenizer = Tokenizer::from_file(path)?;
            files.push(FileRecord::survey(path)?);
            (tokenizer, format!("`{}`", path.display()))
        }
        TokenizerKind::Byte => (Tokenizer::bytes()?, "byte".to_string()),
        TokenizerKind::Char => {
            let (tokenizer, origin) = cached_tokenizer("char", source, cache, notes, |texts| {
                let documents = texts.train.iter().flatten().chain(&texts.val);
                Tokenizer::chars(documents.map(String::as_str))
            })?;
            (tokenizer, format!("char, from all of the data ({origin})"))
        }
        TokenizerKind::Bpe => {
            let asked = config
                .vocab_size
                .unwrap_or(TokenizerConfig::DEFAULT_VOCAB_SIZE);
            let recipe = format!("bpe {asked}");
            let (tokenizer, origin) = cached_tokenizer(&recipe, source, cache, notes, |texts| {
                Tokenizer::train_bpe(texts.train.iter().flatten().map(String::as_str), asked)
            })?;
            if tokenizer.vocab_size() < asked {
                notes.push(format!(
                    "warning: tokenizer.vocab_size = {asked} is more than this data supports: \
                     no pair of tokens is left that occurs twice; the vocabulary has {}",
                    tokenizer.vocab_size()
                ));
            }
            (
                tokenizer,
                format!("bpe, learned on the training part ({origin})"),
            )
        }
    };
    let vocabulary = describe_vocabulary(&tokenizer);
    notes.push(format!("tokenizer: {what}: {vocabulary}"));
    Ok(tokenizer)
}

fn warn_of_unknown(tokenizer: &Tokenizer, summary: &Summary) -> Option<String> {
    match tokenizer.unknown() {
        Unknown::Token(_) if summary.unknown_tokens > 0 => Some(format!(
            "warning: the tokenizer does not know all of this text: {} stand for what it does not",
            counted(summary.unknown_tokens, "unknown token"),
        )),
        Unknown::Dropped => Some(
            "warning: this tokenizer leaves out characters that it has no token for".to_string(),
        ),
        _ => None,
    }
}

fn describe_vocabulary(tokenizer: &Tokenizer) -> String {
    let unused = tokenizer.vocab_size() - tokenizer.token_count();
    let mut said = counted(tokenizer.token_count() as u64, "token");
    if unused > 0 {
        said.push_str(&format!(" and {}", counted(unused as u64, "unused id")));
    }
    match tokenizer.eos() {
        Some(eos) => format!("{said}, documents end with {}", eos.text),
        None => format!("{said}, no end token"),
    }
}

/// A tokenizer that is made from the data, from the cache if it has been made before. Returns
/// with it where it came from, in words.
fn cached_tokenizer(
    recipe: &str,
    source: &Source,
    cache: &TokenCache,
    notes: &mut Vec<String>,
    make: impl FnOnce(&Texts) -> Result<Tokenizer, DataError>,
) -> Result<(Tokenizer, &'static str), DataError> {
    let mut key = Key::new(recipe);
    key.add(source.fingerprint().to_hex().as_str());
    let key = key.finish().to_hex().to_string();
    match cache.tokenizer(&key) {
        Lookup::Hit(json) => {
            match Tokenizer::from_json(json, serde_json::Map::new(), Path::new("(cached)")) {
                Ok(tokenizer) => return Ok((tokenizer, "cache hit")),
                Err(error) => notes.push(format!("warning: {error}; made anew")),
            }
        }
        Lookup::Miss => {}
        Lookup::Damaged(error) => notes.push(format!("warning: {error}; made anew")),
    }
    let tokenizer = make(source.texts()?)?;
    match cache.store_tokenizer(&key, tokenizer.to_json()) {
        Ok(()) => Ok((tokenizer, "cache miss")),
        // The tokens will meet the same obstacle, and say so.
        Err(_) => Ok((tokenizer, "not cached")),
    }
}

/// The token streams by name, what is known about the texts, and where the tokens came from.
fn load_tokens(
    source: &Source,
    tokenizer: &Tokenizer,
    cache: &TokenCache,
    notes: &mut Vec<String>,
) -> Result<(HashMap<String, TokenStream>, Summary, &'static str), DataError> {
    let mut key = Key::new("tokens");
    key.add(source.fingerprint().to_hex().as_str());
    key.add(tokenizer.to_json());
    key.add(tokenizer.eos().map_or("", |eos| &eos.text));
    let key = key.finish().to_hex().to_string();
    match cache.tokens(&key) {
        Lookup::Hit(file) => match serde_json::from_str(&file.summary) {
            Ok(summary) => return Ok((file.streams, summary, "cache hit")),
            Err(error) => notes.push(format!(
                "warning: token cache: the summary of {key}: {error}; made anew"
            )),
        },
        Lookup::Miss => {}
        Lookup::Damaged(error) => notes.push(format!("warning: {error}; made anew")),
    }
    let texts = source.texts()?;
    let mut streams = Vec::with_capacity(texts.train.len() + 1);
    for (index, documents) in texts.train.iter().enumerate() {
        streams.push((train_name(index), encode_documents(tokenizer, documents)?));
    }
    if source.validates() {
        streams.push((VAL.to_string(), encode_documents(tokenizer, &texts.val)?));
    }
    let mut summary = texts.summary.clone();
    if let Unknown::Token(unknown) = tokenizer.unknown() {
        let ids = streams.iter().flat_map(|(_, stream)| stream.iter());
        summary.unknown_tokens = ids.filter(|&id| id == unknown).count() as u64;
    }
    // A Summary is numbers in structs, which always serialise.
    let summary_json = serde_json::to_string(&summary).expect("a summary is valid JSON");
    let (streams, origin) = match cache.store_tokens(&key, &summary_json, &streams) {
        Ok(file) => (file.streams, "cache miss, now cached"),
        Err(error) => {
            notes.push(format!("warning: {error}; the tokens stay in memory"));
            (streams.into_iter().collect(), "not cached")
        }
    };
    Ok((streams, summary, origin))
}
