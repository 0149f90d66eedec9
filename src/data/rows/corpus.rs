//! Everything that a fine-tuning run trains and validates on, as rows of token ids.
//!
//! [`RowCorpus::load`] goes the way of [`Corpus`](crate::data::Corpus): find and hash the files, get
//! the tokenizer and the chat template, look for the rows in the cache under the hash of all that,
//! and only if they are not there read, split, write and tokenise. Nothing is cached of data in
//! which a row is wrong.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::encode::{Encoder, Outcome};
use super::example::Example;
use super::findings::{Counts, Findings, RowSummary};
use super::record::Record;
use super::set::{RowSetBuilder, file_paths};
use super::write::Writer;
use super::{Place, RowError, RowFormat, RowSet};
use crate::config::{DataConfig, DatasetConfig, Overlong, TokenizerConfig, TokenizerKind};
use crate::data::cache::{Lookup, TokenCache};
use crate::data::chat::{ChatTemplate, TemplateError};
use crate::data::corpus::make_tokenizer;
use crate::data::files::FileRecord;
use crate::data::notes::{self, counted};
use crate::data::source::{Key, Source};
use crate::data::split::train_share;
use crate::data::token_stream::TokenStream;
use crate::data::{DataError, Tokenizer, records};
use crate::readable::grouped;

/// Part of every cache key. Raise it when the same files and config give other rows.
const CACHE_VERSION: &str = "firebrick rows 1";

/// Rows to train and validate on, and where they came from.
#[derive(Debug, Clone)]
pub struct RowCorpus {
    /// What made the ids. It carries the chat template that the rows were written with.
    pub tokenizer: Tokenizer,
    /// That template; none if the rows were written without.
    pub chat_template: Option<ChatTemplate>,
    /// The training part of each dataset, in the order of the config.
    pub train: Vec<TrainRows>,
    /// The validation part of all datasets, or the validation file. None if `val_fraction` is 0.
    pub val: Option<RowSet>,
    /// UTF-8 bytes of the trained text of the validation rows, special tokens left out.
    pub val_bytes: u64,
    /// The special token that every answer ends with, if it is always the same.
    pub turn_end: Option<u32>,
    /// Lines for the user.
    pub notes: Vec<String>,
    /// Every file read, the tokenizer's included.
    pub files: Vec<FileRecord>,
}

/// The training part of one dataset.
#[derive(Debug, Clone)]
pub struct TrainRows {
    /// The dataset, in words, for messages.
    pub name: String,
    /// Its rows.
    pub rows: RowSet,
    /// How often they are seen relative to those of other datasets.
    pub weight: f64,
}

impl RowCorpus {
    /// Loads what the config describes.
    ///
    /// # Errors
    /// Whatever is wrong with files, tokenizer, template or rows.
    pub fn load(
        data: &DataConfig,
        tokenizer: &TokenizerConfig,
        cache: &TokenCache,
    ) -> Result<Self, DataError> {
        let source = Source::survey(data)?;
        let mut notes = source.warnings();
        let mut files = source.files();
        let place = notes.len();
        let tokenizer = ready_tokenizer(tokenizer, &source, cache, &mut notes, &mut files)?;
        let template = find_template(data, &tokenizer)?;
        let preparation = Preparation {
            source: &source,
            tokenizer: &tokenizer,
            template: template.as_ref().map_err(Clone::clone),
        };
        let (mut streams, summary, origin) = preparation.rows(cache, &mut notes)?;
        let paths = file_paths(preparation.files().map(|file| file.path.as_path()));
        let take = |streams: &mut HashMap<String, TokenStream>, name: &str| {
            RowSet::from_streams(streams, name, paths.clone())
        };
        let mut train = Vec::with_capacity(source.datasets.len());
        for (index, dataset) in source.datasets.iter().enumerate() {
            let name = notes::dataset_name(index, &dataset.paths());
            let rows = take(&mut streams, &train_name(index)).filter(|rows| !rows.is_empty());
            train.push(TrainRows {
                rows: rows.ok_or_else(|| RowError::NothingLeft {
                    what: name.clone(),
                    purpose: "train",
                    rows: summary
                        .datasets
                        .get(index)
                        .map_or(0, |findings| findings.rows),
                })?,
                weight: dataset.config.weight,
                name,
            });
        }
        let val = take(&mut streams, VAL).filter(|rows| !rows.is_empty());
        if val.is_none() && source.validates() {
            return Err(RowError::NothingLeft {
                what: "the validation split".to_string(),
                purpose: "validate",
                rows: summary.datasets.iter().map(|findings| findings.rows).sum(),
            }
            .into());
        }
        notes.splice(place..place, preparation.describe(&summary));
        let used = preparation.uses_template(&summary);
        let mut corpus = Self {
            chat_template: template.ok().filter(|_| used),
            train,
            val,
            val_bytes: summary.val_bytes,
            turn_end: summary.turn_end,
            notes,
            files,
            tokenizer: tokenizer.clone(),
        };
        if let Some(template) = &corpus.chat_template {
            corpus.tokenizer.set_chat_template(template.source());
            // The model ends its answers as it has learned to; a template that writes the end token
            // would write another one then.
            if let Some(end) = corpus.turn_end
                && !template.source().contains("eos_token")
            {
                corpus.tokenizer.set_eos(end);
            }
        }
        let more = corpus.describe(&summary, data.sequence_len, origin);
        corpus.notes.extend(more);
        Ok(corpus)
    }

    /// Tokens of all training rows, each dataset once.
    pub fn train_tokens(&self) -> u64 {
        self.train.iter().map(|set| set.rows.token_count()).sum()
    }

    /// Bytes of all rows, in memory or mapped into it.
    pub fn token_bytes(&self) -> u64 {
        let train = self.train.iter().map(|set| &set.rows);
        train.chain(&self.val).map(RowSet::bytes).sum()
    }

    fn describe(&self, summary: &RowSummary, sequence_len: usize, origin: &str) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(template) = &self.chat_template {
            let how = if template.marks_generation() {
                "turns by {% generation %}"
            } else {
                "turns by comparing prefixes"
            };
            lines.push(format!("chat template {}: {how}", template.name()));
        }
        lines.extend(summary.rows.describe(sequence_len, &self.tokenizer));
        let rows: u64 = self.train.iter().map(|set| set.rows.len() as u64).sum();
        let targets: u64 = self.train.iter().map(|set| set.rows.target_count()).sum();
        let tokens = self.train_tokens();
        let val = match &self.val {
            Some(val) => format!("{} to validate on", counted(val.len() as u64, "row")),
            None => "none to validate on".to_string(),
        };
        lines.push(format!(
            "rows: {} to train on with {} tokens, {} of them trained ({:.1} %), {val} ({origin})",
            grouped(rows),
            grouped(tokens),
            grouped(targets),
            100.0 * targets as f64 / tokens as f64,
        ));
        lines
    }
}

/// A tokenizer that does not have to be learned from the data.
pub(super) fn ready_tokenizer(
    config: &TokenizerConfig,
    source: &Source,
    cache: &TokenCache,
    notes: &mut Vec<String>,
    files: &mut Vec<FileRecord>,
) -> Result<Tokenizer, DataError> {
    match config.kind {
        TokenizerKind::Bpe | TokenizerKind::Char => Err(RowError::LearnedTokenizer.into()),
        _ => make_tokenizer(config, source, cache, notes, files),
    }
}

/// The template that is asked for has to be there; the tokenizer's is looked for.
pub(super) fn find_template(
    data: &DataConfig,
    tokenizer: &Tokenizer,
) -> Result<Result<ChatTemplate, TemplateError>, DataError> {
    match &data.chat_template {
        Some(choice) => Ok(Ok(ChatTemplate::find(choice, tokenizer)?)),
        None => Ok(ChatTemplate::find("tokenizer", tokenizer)),
    }
}

const VAL: &str = "val";

fn train_name(index: usize) -> String {
    format!("train.{index}")
}

/// A record that has been read.
pub(super) struct Row {
    pub(super) example: Example,
    /// Number of its file among all files.
    pub(super) file: usize,
    pub(super) line: usize,
}

/// What it takes to make rows of a source.
pub(super) struct Preparation<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) template: Result<&'a ChatTemplate, TemplateError>,
}

impl<'a> Preparation<'a> {
    /// All files: those of the datasets in order, and the validation file.
    pub(super) fn files(&self) -> impl Iterator<Item = &'a FileRecord> {
        let datasets = self
            .source
            .datasets
            .iter()
            .flat_map(|dataset| &dataset.files);
        datasets.chain(&self.source.val_file)
    }

    /// Everything that decides the rows.
    fn key(&self) -> String {
        let data = self.source.config;
        let mut key = Key::new(CACHE_VERSION);
        key.add(self.source.fingerprint().to_hex().as_str());
        for dataset in &self.source.datasets {
            key.add(dataset.config.kind.name());
            for (name, field) in dataset.config.fields.all() {
                key.add(name);
                key.add(field);
            }
        }
        for file in self.files() {
            let ending = file.path.extension().unwrap_or_default();
            key.add(&ending.to_string_lossy().to_lowercase());
        }
        key.add(&data.sequence_len.to_string());
        key.add(data.overlong.unwrap_or_default().name());
        key.add(data.train_on.unwrap_or_default().name());
        key.add(if data.chat_template.is_some() {
            "chat"
        } else {
            ""
        });
        let template = self
            .template
            .as_ref()
            .map_or("", |template| template.source());
        key.add(template);
        if template.contains("strftime_now") {
            // Such a template writes another text every day.
            key.add(&jiff::Timestamp::now().strftime("%F").to_string());
        }
        key.add(self.tokenizer.to_json());
        for token in [self.tokenizer.bos(), self.tokenizer.eos()] {
            key.add(token.map_or("", |token| &token.text));
        }
        key.finish().to_hex().to_string()
    }

    /// The rows as streams by name, what is known about them, and where they came from.
    fn rows(
        &self,
        cache: &TokenCache,
        notes: &mut Vec<String>,
    ) -> Result<(HashMap<String, TokenStream>, RowSummary, &'static str), DataError> {
        let key = self.key();
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
        let (streams, summary) = self.make()?;
        // Numbers, names and places in structs, which always serialise.
        let json = serde_json::to_string(&summary).expect("a summary is valid JSON");
        match cache.store_tokens(&key, &json, &streams) {
            Ok(file) => Ok((file.streams, summary, "cache miss, now cached")),
            Err(error) => {
                notes.push(format!("warning: {error}; the rows stay in memory"));
                Ok((streams.into_iter().collect(), summary, "not cached"))
            }
        }
    }

    fn make(&self) -> Result<(Vec<(String, TokenStream)>, RowSummary), DataError> {
        let data = self.source.config;
        let mut summary = RowSummary::default();
        let mut faults = Faults::default();
        let mut val = RowSetBuilder::default();
        let mut streams = Vec::new();
        let mut first_file = 0;
        let vocab_size = self.tokenizer.vocab_size();
        let val_fraction = match self.source.val_file {
            Some(_) => 0.0,
            None => data.val_fraction,
        };
        for (index, dataset) in self.source.datasets.iter().enumerate() {
            let name = notes::dataset_name(index, &dataset.paths());
            let (mut rows, findings) =
                self.read(&name, dataset.config, &dataset.files, first_file)?;
            self.check_format(&name, findings.format)?;
            summary.datasets.push(findings);
            let tail = rows.split_off(train_share(rows.len(), val_fraction));
            let mut train = RowSetBuilder::default();
            self.encode(rows, &mut train, &mut summary.rows, &mut faults)?;
            summary.val_bytes += self.encode(tail, &mut val, &mut summary.rows, &mut faults)?;
            streams.extend(train.streams(&train_name(index), vocab_size));
            first_file += dataset.files.len();
        }
        if let Some(file) = &self.source.val_file {
            let config = self.source.datasets[0].config;
            let name = format!("the validation file `{}`", file.path.display());
            let (rows, findings) =
                self.read(&name, config, std::slice::from_ref(file), first_file)?;
            self.check_format(&name, findings.format)?;
            summary.val = Some(findings);
            summary.val_bytes = self.encode(rows, &mut val, &mut summary.rows, &mut faults)?;
        }
        streams.extend(val.streams(VAL, vocab_size));
        let datasets = summary.datasets.iter().chain(&summary.val);
        let rows = datasets.map(|findings| findings.rows).sum();
        faults.check(rows, data.sequence_len)?;
        summary.turn_end = summary.rows.turn_end();
        Ok((streams, summary))
    }

    fn check_format(&self, what: &str, format: RowFormat) -> Result<(), RowError> {
        match (&self.template, format) {
            (_, RowFormat::Preference) => Err(RowError::Preference {
                what: what.to_string(),
                chosen: super::format::CHOSEN.to_string(),
            }),
            (Err(source), format) if format.is_conversation() => Err(RowError::NoTemplate {
                what: what.to_string(),
                source: source.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Reads a dataset's records.
    pub(super) fn read(
        &self,
        what: &str,
        config: &DatasetConfig,
        files: &[FileRecord],
        first_file: usize,
    ) -> Result<(Vec<Row>, Findings), DataError> {
        let names = &config.fields;
        let mut format = RowFormat::of_kind(config.kind);
        let mut rows = Vec::new();
        let mut findings = Findings {
            format: RowFormat::Text,
            rows: 0,
            unused: Default::default(),
            bad_labels: 0,
        };
        for (index, file) in files.iter().enumerate() {
            let number = first_file + index;
            if !records::holds_records(&file.path) {
                let text = file.read_text()?.text;
                let example = Example::Text(text);
                rows.push(Row {
                    example,
                    file: number,
                    line: 1,
                });
                continue;
            }
            records::read(file, &mut |fields, line| {
                let place = || Place {
                    path: file.path.clone(),
                    line,
                };
                let known = format.or_else(|| RowFormat::detect(&fields, names));
                let known = known.ok_or_else(|| RowError::UnknownFormat {
                    place: place(),
                    fields: fields.keys().cloned().collect(),
                })?;
                format = Some(known);
                let used = known.fields(names);
                let others = fields.keys().filter(|key| !used.contains(&key.as_str()));
                findings.unused.extend(others.cloned());
                findings.bad_labels += u64::from(fields.get("label") == Some(&false.into()));
                let mut record = Record {
                    fields,
                    path: &file.path,
                    line,
                    format: known,
                };
                let example = Example::read(&mut record, names)?;
                rows.push(Row {
                    example,
                    file: number,
                    line,
                });
                Ok(())
            })?;
        }
        if rows.is_empty() {
            return Err(DataError::Empty {
                what: what.to_string(),
            });
        }
        findings.format = format.unwrap_or(RowFormat::Text);
        findings.rows = rows.len() as u64;
        Ok((rows, findings))
    }

    pub(super) fn writer(&self) -> Writer<'a> {
        let data = self.source.config;
        Writer {
            template: self.template.as_ref().ok().copied(),
            always_chat: data.chat_template.is_some(),
            eos: self.tokenizer.eos().map_or("", |eos| &eos.text),
            train_on: data.train_on.unwrap_or_default(),
        }
    }

    pub(super) fn encoder(&self) -> Encoder<'a> {
        Encoder {
            tokenizer: self.tokenizer,
            sequence_len: self.source.config.sequence_len,
            overlong: self.source.config.overlong.unwrap_or_default(),
        }
    }

    /// Writes and tokenises rows on all cores. Returns the bytes of their trained text.
    fn encode(
        &self,
        rows: Vec<Row>,
        set: &mut RowSetBuilder,
        counts: &mut Counts,
        faults: &mut Faults,
    ) -> Result<u64, DataError> {
        let paths: Arc<[PathBuf]> = file_paths(self.files().map(|file| file.path.as_path()));
        let (writer, encoder) = (self.writer(), self.encoder());
        let mut bytes = 0;
        let mut rows = rows.into_iter().peekable();
        while rows.peek().is_some() {
            let group: Vec<Row> = rows.by_ref().take(GROUP).collect();
            // Collected before the first error is looked for, so that it is always the same one.
            let encoded: Vec<Result<_, DataError>> = group
                .into_par_iter()
                .map(|row| {
                    let place = place_of(&paths, &row);
                    let written = writer.write(row.example, &|| place.clone())?;
                    let noticed = (written.empty_answers, written.tools_left_out);
                    Ok((place, row.file, noticed, encoder.encode(written)?))
                })
                .collect();
            for row in encoded {
                let (place, file, (empty_answers, tools_left_out), outcome) = row?;
                let at = || place.clone();
                counts.empty_answers.add(empty_answers, &at);
                counts.tools_left_out.add(u64::from(tools_left_out), &at);
                match outcome {
                    Outcome::Row(row) => {
                        bytes += row.trained_bytes;
                        counts.add(&row, &at);
                        set.push(&row, file, place.line);
                    }
                    Outcome::TooLong { .. } if encoder.overlong == Overlong::Drop => {
                        counts.dropped.add(1, &at);
                    }
                    Outcome::TooLong { tokens, is_bound } => {
                        faults.too_long(place, (tokens, is_bound));
                    }
                    Outcome::Untrainable { reason, is_cut } => {
                        faults.untrainable(place, reason, is_cut);
                    }
                }
            }
        }
        Ok(bytes)
    }

    /// Whether any rows are written with the chat template.
    fn uses_template(&self, summary: &RowSummary) -> bool {
        let mut formats = summary.datasets.iter().map(|findings| findings.format);
        let always = self.source.config.chat_template.is_some();
        formats.any(|format| format.is_conversation() || (always && format != RowFormat::Text))
    }

    /// A line per dataset, and one for the validation file.
    fn describe(&self, summary: &RowSummary) -> Vec<String> {
        let mut lines = Vec::new();
        for (index, (dataset, findings)) in self
            .source
            .datasets
            .iter()
            .zip(&summary.datasets)
            .enumerate()
        {
            let files = counted(dataset.files.len() as u64, "file");
            let said = describe(dataset.config, findings);
            lines.push(format!("data.datasets[{index}]: {files} ({said}"));
            lines.extend(warn_of_labels(findings));
        }
        if let Some(findings) = &summary.val {
            let said = describe(self.source.datasets[0].config, findings);
            lines.push(format!("data.val_path: 1 file ({said}"));
        }
        lines
    }
}

/// "auto: completion rows of `question`, `answer`): 7,473 rows, fields not used: id"
fn describe(config: &DatasetConfig, findings: &Findings) -> String {
    let auto = match RowFormat::of_kind(config.kind) {
        None => "auto: ",
        Some(_) => "",
    };
    let mut said = format!(
        "{auto}{}, from {}): {}",
        findings.format,
        findings.format.required(&config.fields).join(", "),
        counted(findings.rows, "row"),
    );
    if !findings.unused.is_empty() {
        let unused: Vec<&str> = findings
            .unused
            .iter()
            .map(String::as_str)
            .take(10)
            .collect();
        said.push_str(&format!(", fields not used: {}", unused.join(", ")));
    }
    said
}

fn warn_of_labels(findings: &Findings) -> Option<String> {
    (findings.bad_labels > 0 && findings.unused.contains("label")).then(|| {
        format!(
            "warning: {} have label = false, which marks a bad answer; they are trained like the others",
            counted(findings.bad_labels, "row")
        )
    })
}

/// Rows that are in the works at one time.
const GROUP: usize = 4096;

pub(super) fn place_of(paths: &[PathBuf], row: &Row) -> Place {
    Place {
        path: paths
            .get(row.file)
            .map_or_else(PathBuf::new, |path| Path::new(path).to_path_buf()),
        line: row.line,
    }
}

/// Rows that cannot be trained on, counted so that one error speaks of all.
#[derive(Default)]
pub(super) struct Faults {
    too_long: u64,
    first_too_long: Option<(Place, (u64, bool))>,
    longest: (u64, bool),
    untrainable: u64,
    first_untrainable: Option<(Place, String, bool)>,
}

impl Faults {
    pub(super) fn too_long(&mut self, place: Place, tokens: (u64, bool)) {
        self.too_long += 1;
        self.longest = self.longest.max(tokens);
        self.first_too_long.get_or_insert((place, tokens));
    }

    pub(super) fn untrainable(&mut self, place: Place, reason: String, is_cut: bool) {
        self.untrainable += 1;
        self.first_untrainable
            .get_or_insert((place, reason, is_cut));
    }

    /// One error for all of them; `rows` is how many there were.
    pub(super) fn check(self, rows: u64, sequence_len: usize) -> Result<(), RowError> {
        if let Some((place, tokens)) = self.first_too_long {
            return Err(RowError::Overlong {
                count: self.too_long,
                rows,
                place,
                tokens,
                longest: self.longest,
                sequence_len,
            });
        }
        match self.first_untrainable {
            None => Ok(()),
            Some((place, reason, cut)) => Err(RowError::Untrainable {
                count: self.untrainable,
                rows,
                place,
                reason,
                cut,
            }),
        }
    }
}
