//! Everything that a fine-tuning run trains and validates on, as rows of token ids.
//!
//! [`RowCorpus::load`] goes the way of [`Corpus`](crate::data::Corpus): find and hash the files, get
//! the tokenizer and the chat template, look for the rows in the cache under the hash of all that,
//! and only if they are not there read, split, write and tokenise. Nothing is cached of data in
//! which a row is wrong.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use super::findings::RowSummary;
use super::prepare::{Preparation, VAL, train_name};
use super::set::file_paths;
use super::{RowError, RowSet};
use crate::config::{DataConfig, TokenizerConfig, TokenizerKind};
use crate::data::cache::TokenCache;
use crate::data::chat::{ChatTemplate, TemplateError};
use crate::data::corpus::make_tokenizer;
use crate::data::files::FileRecord;
use crate::data::notes::{self, counted};
use crate::data::source::Source;
use crate::data::token_stream::TokenStream;
use crate::data::{DataError, Tokenizer};
use crate::readable::grouped;

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
        Self::load_at(data, tokenizer, cache, Timestamp::now())
    }

    /// The same as [`load`](Self::load), with a fixed time for chat templates.
    pub(in crate::data) fn load_at(
        data: &DataConfig,
        tokenizer: &TokenizerConfig,
        cache: &TokenCache,
        time: Timestamp,
    ) -> Result<Self, DataError> {
        let source = Source::survey(data)?;
        let mut notes = source.warnings();
        let mut files = source.files();
        let place = notes.len();
        let tokenizer = ready_tokenizer(tokenizer, &source, cache, &mut notes, &mut files)?;
        let template = find_template(data, &tokenizer, time)?;
        let preparation = Preparation {
            source: &source,
            tokenizer: &tokenizer,
            template: template.as_ref().map_err(Clone::clone),
            time,
        };
        let (streams, summary, origin) = preparation.rows(cache, &mut notes)?;
        let paths = file_paths(preparation.files().map(|file| file.path.as_path()));
        let (train, val) = take_sets(&source, streams, &summary, &paths)?;
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
            mark_tokenizer(&mut corpus.tokenizer, template, corpus.turn_end);
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
        } else {
            lines.push("no chat template: rows are written plainly".to_string());
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
    time: Timestamp,
) -> Result<Result<ChatTemplate, TemplateError>, DataError> {
    let found = match &data.chat_template {
        Some(choice) => Ok(ChatTemplate::find(choice, tokenizer)?),
        None => ChatTemplate::find("tokenizer", tokenizer),
    };
    Ok(found.map(|template| template.at(time)))
}

/// Gives the tokenizer the template, and the end token that the model learns to end with.
pub(super) fn mark_tokenizer(
    tokenizer: &mut Tokenizer,
    template: &ChatTemplate,
    turn_end: Option<u32>,
) {
    tokenizer.set_chat_template(template.source());
    // A template that writes the end token would write another one then.
    if let Some(end) = turn_end
        && !template.source().contains("eos_token")
    {
        tokenizer.set_eos(end);
    }
}

/// The training rows of each dataset, and the validation rows.
fn take_sets(
    source: &Source,
    mut streams: HashMap<String, TokenStream>,
    summary: &RowSummary,
    paths: &Arc<[PathBuf]>,
) -> Result<(Vec<TrainRows>, Option<RowSet>), RowError> {
    let mut take = |name: &str| {
        let set = RowSet::from_streams(&mut streams, name, paths.clone());
        set.filter(|rows| !rows.is_empty())
    };
    let mut train = Vec::with_capacity(source.datasets.len());
    for (index, dataset) in source.datasets.iter().enumerate() {
        let what = notes::dataset_name(index, &dataset.paths());
        let findings = summary.datasets.get(index);
        let rows = take(&train_name(index)).ok_or_else(|| RowError::NothingLeft {
            what: what.clone(),
            purpose: "train",
            rows: findings.map_or(0, |findings| findings.rows),
        })?;
        train.push(TrainRows {
            rows,
            weight: dataset.config.weight,
            name: what,
        });
    }
    let val = take(VAL);
    if val.is_none() && source.validates() {
        return Err(RowError::NothingLeft {
            what: "the validation split".to_string(),
            purpose: "validate",
            rows: summary.datasets.iter().map(|findings| findings.rows).sum(),
        });
    }
    Ok((train, val))
}
