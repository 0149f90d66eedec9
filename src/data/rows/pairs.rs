//! Preference data: for each prompt a chosen and a rejected answer.

use rayon::prelude::*;

use super::corpus::{Faults, Preparation, find_template, place_of, ready_tokenizer};
use super::encode::{Encoder, Outcome};
use super::example::Example;
use super::findings::Counts;
use super::sampler::batch_of;
use super::set::{RowSetBuilder, file_paths};
use super::write::Writer;
use super::{Place, RowError, RowFormat, RowSet};
use crate::config::{DataConfig, Overlong, TokenizerConfig};
use crate::data::cache::TokenCache;
use crate::data::notes::{self, counted};
use crate::data::source::Source;
use crate::data::{Batch, ChatTemplate, DataError, FileRecord, Tokenizer};

/// Pairs of answers to the same prompt, as token ids; only the answers are trained.
#[derive(Debug, Clone)]
pub struct Pairs {
    /// What made the ids. It carries the chat template that the answers were written with.
    pub tokenizer: Tokenizer,
    /// The better answers, each with its prompt.
    pub chosen: RowSet,
    /// The worse answers, in the same order.
    pub rejected: RowSet,
    /// Lines for the user.
    pub notes: Vec<String>,
    /// Every file read, the tokenizer's included.
    pub files: Vec<FileRecord>,
    /// The template that answers were written with, where there is one.
    pub chat_template: Option<ChatTemplate>,
    /// The token that ends an answer, where it is not the end token.
    pub turn_end: Option<u32>,
    sequence_len: usize,
}

/// A batch of pairs: row `2 i` holds the chosen answer of pair `i`, row `2 i + 1` the rejected one.
/// Rows are padded, not packed.
#[derive(Debug, Clone, PartialEq)]
pub struct PairBatch {
    /// The rows `[2 x pairs, cols]`.
    pub batch: Batch,
}

impl PairBatch {
    /// Number of pairs.
    pub fn pairs(&self) -> usize {
        self.batch.rows / 2
    }
}

impl Pairs {
    /// Loads all pairs of the datasets, whose records are preference data by their fields.
    ///
    /// # Errors
    /// As [`RowCorpus::load`](super::RowCorpus::load), and records that are no pairs.
    pub fn load(
        data: &DataConfig,
        tokenizer: &TokenizerConfig,
        cache: &TokenCache,
    ) -> Result<Self, DataError> {
        let source = Source::survey(data)?;
        let mut notes = source.warnings();
        let mut files = source.files();
        let mut tokenizer = ready_tokenizer(tokenizer, &source, cache, &mut notes, &mut files)?;
        let template = find_template(data, &tokenizer)?;
        let preparation = Preparation {
            source: &source,
            tokenizer: &tokenizer,
            template: template.as_ref().map_err(Clone::clone),
        };
        let paths = file_paths(preparation.files().map(|file| file.path.as_path()));
        let mut sets = [RowSetBuilder::default(), RowSetBuilder::default()];
        let (writer, encoder) = (preparation.writer(), preparation.encoder());
        let mut faults = Faults::default();
        let (mut first_file, mut count, mut kept) = (0, 0, 0);
        let mut seen = Counts::default();
        for (index, dataset) in source.datasets.iter().enumerate() {
            let name = notes::dataset_name(index, &dataset.paths());
            let (rows, findings) =
                preparation.read(&name, dataset.config, &dataset.files, first_file)?;
            first_file += dataset.files.len();
            count += findings.rows;
            if findings.format != RowFormat::Preference {
                let (what, format) = (name, findings.format);
                return Err(RowError::NotPreference { what, format }.into());
            }
            let encoded: Vec<Result<_, DataError>> = rows
                .into_par_iter()
                .map(|row| {
                    let place = place_of(&paths, &row);
                    let answers = encode(row.example, &place, &writer, &encoder)?;
                    Ok((place, row.file, answers))
                })
                .collect();
            for pair in encoded {
                let (place, file, answers) = pair?;
                let [chosen, rejected] = answers.map(|outcome| match outcome {
                    Outcome::Row(row) => Some(row),
                    Outcome::TooLong { .. } if encoder.overlong == Overlong::Drop => None,
                    Outcome::TooLong { tokens, is_bound } => {
                        faults.too_long(place.clone(), (tokens, is_bound));
                        None
                    }
                    Outcome::Untrainable { reason, is_cut } => {
                        faults.untrainable(place.clone(), reason, is_cut);
                        None
                    }
                });
                // A pair with one answer is no pair.
                if let (Some(chosen), Some(rejected)) = (chosen, rejected) {
                    seen.add(&chosen, &|| place.clone());
                    seen.add(&rejected, &|| place.clone());
                    sets[0].push(&chosen, file, place.line);
                    sets[1].push(&rejected, file, place.line);
                    kept += 1;
                }
            }
        }
        faults.check(count, data.sequence_len)?;
        notes.push(format!(
            "{}, {} left out as longer than sequence_len = {}",
            counted(kept, "preference pair"),
            count - kept,
            data.sequence_len,
        ));
        let turn_end = seen.turn_end();
        let vocab_size = tokenizer.vocab_size();
        let [chosen, rejected] = sets.map(|set| {
            let mut streams = set.streams("pairs", vocab_size).into_iter().collect();
            // Made just now by the other half of the same code.
            RowSet::from_streams(&mut streams, "pairs", paths.clone()).expect("the streams fit")
        });
        if let Ok(template) = &template {
            tokenizer.set_chat_template(template.source());
        }
        Ok(Self {
            tokenizer,
            chosen,
            rejected,
            notes,
            files,
            turn_end,
            chat_template: template.ok(),
            sequence_len: data.sequence_len,
        })
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.chosen.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chosen.is_empty()
    }

    /// Places of the longest answer.
    pub fn widest(&self) -> usize {
        let sets = [&self.chosen, &self.rejected];
        let places = sets
            .iter()
            .flat_map(|set| (0..set.len()).map(|row| set.places(row)));
        places.max().unwrap_or(0)
    }

    /// The given pairs as a batch, as wide as the longest of them needs.
    ///
    /// # Panics
    /// If there is no such pair.
    pub fn batch(&self, pairs: &[usize]) -> PairBatch {
        let rows = pairs
            .iter()
            .flat_map(|&pair| [vec![(&self.chosen, pair)], vec![(&self.rejected, pair)]]);
        PairBatch {
            batch: batch_of(&rows.collect::<Vec<_>>(), self.sequence_len),
        }
    }
}

/// Both answers of a pair.
fn encode(
    pair: Example,
    place: &Place,
    writer: &Writer,
    encoder: &Encoder,
) -> Result<[Outcome; 2], DataError> {
    let encode = |example: Example| {
        let written = writer.write(example, &|| place.clone())?;
        encoder.encode(written)
    };
    match pair {
        Example::Pair { chosen, rejected } => Ok([encode(*chosen)?, encode(*rejected)?]),
        // Records of preference data are pairs; another would stand for both its answers.
        other => {
            let both = encode(other)?;
            Ok([both.clone(), both])
        }
    }
}
