//! Everything a run trains and validates on, as token ids.
//!
//! [`Corpus::load`] goes from the config to token streams in this order: find and hash the files,
//! get the tokenizer, look for the tokens in the cache under the hash of all that, and only if
//! they are not there read, split and tokenise. A second run therefore reads every file once, to
//! hash it, and maps the tokens.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::path::PathBuf;

use super::DataError;
use super::cache::{Lookup, TokenCache};
use super::documents::{self, Documents, Format};
use super::encode::encode_documents;
use super::files::{FileRecord, existing_file, expand};
use super::notes::{self, Findings, Summary, counted, grouped};
use super::split::{Split, split};
use super::token_stream::TokenStream;
use super::tokenizer::Tokenizer;
use crate::config::{DataConfig, DatasetConfig, DatasetKind, TokenizerConfig, TokenizerKind};

/// Part of every cache key. Raise it when the same files and config give other tokens, or the
/// files of the cache other contents.
const CACHE_VERSION: &str = "firebrick tokens 1";

/// `tokenizer.vocab_size` where the config does not say.
const DEFAULT_VOCAB_SIZE: usize = 4096;

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
        notes.push(corpus.describe_tokens(&origin));
        Ok(Self { notes, ..corpus })
    }

    /// Tokens of all training streams, each dataset once.
    pub fn train_tokens(&self) -> u64 {
        self.train
            .iter()
            .map(|stream| stream.tokens.len() as u64)
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

/// The files of a config, hashed, and their texts once they are needed.
struct Source<'a> {
    config: &'a DataConfig,
    datasets: Vec<Dataset<'a>>,
    val_file: Option<FileRecord>,
    texts: OnceCell<Texts>,
}

struct Dataset<'a> {
    config: &'a DatasetConfig,
    files: Vec<FileRecord>,
}

impl Dataset<'_> {
    fn paths(&self) -> Vec<PathBuf> {
        self.files.iter().map(|file| file.path.clone()).collect()
    }
}

struct Texts {
    /// Training documents per dataset.
    train: Vec<Vec<String>>,
    val: Vec<String>,
    summary: Summary,
}

impl<'a> Source<'a> {
    fn survey(config: &'a DataConfig) -> Result<Self, DataError> {
        if config.datasets.is_empty() {
            return Err(DataError::NoDatasets);
        }
        let mut datasets = Vec::with_capacity(config.datasets.len());
        for dataset in &config.datasets {
            let paths = expand(dataset.path.as_slice())?;
            let files = paths
                .iter()
                .map(|path| FileRecord::survey(path))
                .collect::<Result<_, _>>()?;
            datasets.push(Dataset {
                config: dataset,
                files,
            });
        }
        let val_file = match &config.val_path {
            Some(path) => Some(FileRecord::survey(&existing_file(path)?)?),
            None => None,
        };
        Ok(Self {
            config,
            datasets,
            val_file,
            texts: OnceCell::new(),
        })
    }

    fn validates(&self) -> bool {
        self.val_file.is_some() || self.config.val_fraction > 0.0
    }

    /// The text field of the validation file's records: the first dataset's.
    fn val_field(&self) -> &str {
        &self.datasets[0].config.fields.text
    }

    fn files(&self) -> Vec<FileRecord> {
        let mut files: Vec<FileRecord> = Vec::new();
        for file in self
            .datasets
            .iter()
            .flat_map(|d| &d.files)
            .chain(&self.val_file)
        {
            if !files.iter().any(|seen| seen.path == file.path) {
                files.push(file.clone());
            }
        }
        files
    }

    /// Hash of everything that decides the documents and the split. Paths and weights do not.
    fn fingerprint(&self) -> blake3::Hash {
        let mut key = Key::new(CACHE_VERSION);
        let mut add_file = |file: &FileRecord, field: &str| {
            key.add("file");
            key.add(&file.blake3);
            if Format::of(&file.path) == Format::Records {
                key.add(field);
            }
        };
        for dataset in &self.datasets {
            for file in &dataset.files {
                add_file(file, &dataset.config.fields.text);
            }
        }
        if let Some(file) = &self.val_file {
            add_file(file, self.val_field());
        }
        for dataset in &self.datasets {
            key.add(&dataset.files.len().to_string());
        }
        match self.val_file {
            Some(_) => key.add("val_path"),
            None => key.add(&format!(
                "val_fraction {:016x}",
                self.config.val_fraction.to_bits()
            )),
        }
        key.finish()
    }

    /// Reads and splits the documents, the first time it is called.
    fn texts(&self) -> Result<&Texts, DataError> {
        if let Some(texts) = self.texts.get() {
            return Ok(texts);
        }
        let texts = self.read_texts()?;
        Ok(self.texts.get_or_init(|| texts))
    }

    fn read_texts(&self) -> Result<Texts, DataError> {
        let mut texts = Texts {
            train: Vec::with_capacity(self.datasets.len()),
            val: Vec::new(),
            summary: Summary::default(),
        };
        let val_fraction = if self.val_file.is_some() {
            0.0
        } else {
            self.config.val_fraction
        };
        for (index, dataset) in self.datasets.iter().enumerate() {
            let files = read_files(&dataset.files, &dataset.config.fields.text)?;
            if files
                .iter()
                .all(|(_, documents)| documents.texts.is_empty())
            {
                return Err(DataError::Empty {
                    what: notes::dataset_name(index, &dataset.paths()),
                });
            }
            texts.summary.datasets.push(Findings::of(&files));
            let Split { train, val } = split(files, val_fraction);
            texts.train.push(train);
            texts.val.extend(val);
        }
        if let Some(file) = &self.val_file {
            let files = read_files(std::slice::from_ref(file), self.val_field())?;
            texts.summary.val = Some(Findings::of(&files));
            texts.val = files
                .into_iter()
                .flat_map(|(_, documents)| documents.texts)
                .collect();
            if texts.val.is_empty() {
                return Err(DataError::Empty {
                    what: format!("the validation file `{}`", file.path.display()),
                });
            }
        }
        texts.summary.val_bytes = texts.val.iter().map(|text| text.len() as u64).sum();
        Ok(texts)
    }

    /// Files that are in the data twice, which the user may or may not mean.
    fn warnings(&self) -> Vec<String> {
        let mut first: HashMap<&str, (usize, &FileRecord)> = HashMap::new();
        let mut warnings = Vec::new();
        for (index, dataset) in self.datasets.iter().enumerate() {
            for file in &dataset.files {
                match first.get(file.blake3.as_str()) {
                    Some((other, same)) if file.bytes > 0 => warnings.push(format!(
                        "warning: `{}` in data.datasets[{index}] has the same contents as `{}` in data.datasets[{other}]",
                        file.path.display(),
                        same.path.display(),
                    )),
                    _ => {
                        first.insert(&file.blake3, (index, file));
                    }
                }
            }
        }
        if let Some(val) = &self.val_file
            && let Some((index, _)) = first.get(val.blake3.as_str())
        {
            warnings.push(format!(
                "warning: the validation file `{}` is also trained on, in data.datasets[{index}]: its loss will say nothing",
                val.path.display(),
            ));
        }
        warnings
    }

    /// A line per dataset, and one for the validation file.
    fn describe(&self, summary: &Summary) -> Vec<String> {
        let mut lines = Vec::new();
        for (index, (dataset, findings)) in self.datasets.iter().zip(&summary.datasets).enumerate()
        {
            let formats = notes::formats(
                &dataset.paths(),
                dataset.config.kind,
                &dataset.config.fields.text,
            );
            lines.push(format!(
                "data.datasets[{index}]: {formats}: {}",
                findings.describe()
            ));
        }
        if let (Some(file), Some(findings)) = (&self.val_file, &summary.val) {
            let paths = [file.path.clone()];
            let formats = notes::formats(&paths, DatasetKind::Auto, self.val_field());
            lines.push(format!("data.val_path: {formats}: {}", findings.describe()));
        }
        lines
    }
}

fn read_files(files: &[FileRecord], field: &str) -> Result<Vec<(Format, Documents)>, DataError> {
    files
        .iter()
        .map(|file| Ok((Format::of(&file.path), documents::read(file, field)?)))
        .collect()
}

/// The tokenizer the config asks for.
fn make_tokenizer(
    config: &TokenizerConfig,
    source: &Source,
    cache: &TokenCache,
    notes: &mut Vec<String>,
    files: &mut Vec<FileRecord>,
) -> Result<Tokenizer, DataError> {
    match config.kind {
        TokenizerKind::File => {
            let path = config.path.as_ref().ok_or(DataError::TokenizerPathUnset)?;
            let tokenizer = Tokenizer::from_file(path)?;
            files.push(FileRecord::survey(path)?);
            notes.push(format!(
                "tokenizer: `{}`, {}",
                path.display(),
                describe_vocabulary(&tokenizer)
            ));
            Ok(tokenizer)
        }
        TokenizerKind::Byte => {
            let tokenizer = Tokenizer::bytes()?;
            notes.push(format!(
                "tokenizer: byte, {}",
                describe_vocabulary(&tokenizer)
            ));
            Ok(tokenizer)
        }
        TokenizerKind::Char => {
            let made = cached_tokenizer("char", source, cache, notes, |texts| {
                Tokenizer::chars(
                    texts
                        .train
                        .iter()
                        .flatten()
                        .chain(&texts.val)
                        .map(String::as_str),
                )
            });
            let (tokenizer, origin) = made?;
            let vocabulary = describe_vocabulary(&tokenizer);
            notes.push(format!(
                "tokenizer: char, {vocabulary}, those of the data ({origin})"
            ));
            Ok(tokenizer)
        }
        TokenizerKind::Bpe => {
            let asked = config.vocab_size.unwrap_or(DEFAULT_VOCAB_SIZE);
            let made = cached_tokenizer(&format!("bpe {asked}"), source, cache, notes, |texts| {
                Tokenizer::train_bpe(texts.train.iter().flatten().map(String::as_str), asked)
            });
            let (tokenizer, origin) = made?;
            let vocabulary = describe_vocabulary(&tokenizer);
            notes.push(format!(
                "tokenizer: bpe, {vocabulary}, learned on the training split ({origin})"
            ));
            if tokenizer.vocab_size() < asked {
                notes.push(format!(
                    "warning: tokenizer.vocab_size = {asked} is more than this data supports: no pair of tokens \
                     is left that occurs twice; the vocabulary has {}",
                    tokenizer.vocab_size()
                ));
            }
            Ok(tokenizer)
        }
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
            let tokenizer =
                Tokenizer::from_json(json, serde_json::Map::new(), &PathBuf::from("(cached)"))?;
            return Ok((tokenizer, "cache hit"));
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
) -> Result<(HashMap<String, TokenStream>, Summary, String), DataError> {
    let mut key = Key::new("tokens");
    key.add(source.fingerprint().to_hex().as_str());
    key.add(tokenizer.to_json());
    key.add(tokenizer.eos().map_or("", |eos| &eos.text));
    let key = key.finish().to_hex().to_string();
    match cache.tokens(&key) {
        Lookup::Hit(file) => match serde_json::from_str(&file.summary) {
            Ok(summary) => return Ok((file.streams, summary, "cache hit".to_string())),
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
    // A Summary is numbers in structs, which always serialise.
    let summary = serde_json::to_string(&texts.summary).expect("a summary is valid JSON");
    let (streams, origin) = match cache.store_tokens(&key, &summary, &streams) {
        Ok(file) => (file.streams, "cache miss, now cached"),
        Err(error) => {
            notes.push(format!("warning: {error}; the tokens stay in memory"));
            (streams.into_iter().collect(), "not cached")
        }
    };
    Ok((
        streams,
        serde_json::from_str(&summary).unwrap_or_default(),
        origin.to_string(),
    ))
}

/// A hash over several strings that keeps them apart.
struct Key(blake3::Hasher);

impl Key {
    fn new(purpose: &str) -> Self {
        let mut key = Self(blake3::Hasher::new());
        key.add(purpose);
        key
    }

    fn add(&mut self, part: &str) {
        self.0.update(&(part.len() as u64).to_le_bytes());
        self.0.update(part.as_bytes());
    }

    fn finish(self) -> blake3::Hash {
        self.0.finalize()
    }
}
