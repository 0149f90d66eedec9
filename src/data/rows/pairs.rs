//! Preference data: for each prompt a chosen and a rejected answer.

use jiff::Timestamp;
use rayon::prelude::*;

use super::corpus::{find_template, mark_tokenizer, ready_tokenizer};
use super::encode::{Encoder, Outcome};
use super::example::Example;
use super::faults::Faults;
use super::findings::Counts;
use super::prepare::{Preparation, place_of};
use super::sampler::{batch_of, columns};
use super::set::{RowSetBuilder, file_paths};
use super::write::Writer;
use super::{Place, RowError, RowFormat, RowSet};
use crate::config::{DataConfig, Overlong, TokenizerConfig, TrainOn};
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
    /// The special token that every answer ends with, if it is always the same.
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
        let mut tokenizer = ready_tokenizer(tokenizer, &source, cache, &mut notes, &mut files)?;
        let template = find_template(data, &tokenizer, time)?;
        let preparation = Preparation {
            source: &source,
            tokenizer: &tokenizer,
            template: template.as_ref().map_err(Clone::clone),
            time,
        };
        let paths = file_paths(preparation.files().map(|file| file.path.as_path()));
        let writer = Writer {
            // What both answers follow is the prompt, whatever the config says of rows.
            train_on: TrainOn::Assistant,
            ..preparation.writer()
        };
        let encoder = preparation.encoder();
        let mut kept = Kept::default();
        let mut first_file = 0;
        for (index, dataset) in source.datasets.iter().enumerate() {
            let name = notes::dataset_name(index, &dataset.paths());
            let (rows, findings) =
                preparation.read(&name, dataset.config, &dataset.files, first_file)?;
            first_file += dataset.files.len();
            kept.all += findings.rows;
            if findings.format != RowFormat::Preference {
                let (what, format) = (name, findings.format);
                return Err(RowError::NotPreference { what, format }.into());
            }
            kept.has_chats |= rows.iter().any(|row| is_chat(&row.example));
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
                kept.add(answers, &place, file, encoder.overlong);
            }
        }
        kept.faults.check(kept.all, data.sequence_len)?;
        notes.push(format!(
            "{}, {} left out as longer than sequence_len = {}",
            counted(kept.pairs, "preference pair"),
            kept.all - kept.pairs,
            data.sequence_len,
        ));
        let vocab_size = tokenizer.vocab_size();
        let sets = kept.sets;
        let [chosen, rejected] = sets.map(|set| {
            let mut streams = set.streams("pairs", vocab_size).into_iter().collect();
            // Made just now by the other half of the same code.
            RowSet::from_streams(&mut streams, "pairs", paths.clone()).expect("the streams fit")
        });
        let turn_end = kept.counts.turn_end();
        let used = kept.has_chats || data.chat_template.is_some();
        let chat_template = template.ok().filter(|_| used);
        if let Some(template) = &chat_template {
            mark_tokenizer(&mut tokenizer, template, turn_end);
        }
        Ok(Self {
            tokenizer,
            chosen,
            rejected,
            notes,
            files,
            turn_end,
            chat_template,
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

    /// Columns of the widest batch.
    pub fn widest(&self) -> usize {
        let sets = [&self.chosen, &self.rejected];
        let places = sets
            .iter()
            .flat_map(|set| (0..set.len()).map(|row| set.places(row)));
        columns(places.max().unwrap_or(0), self.sequence_len)
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

/// Pairs as they come in.
#[derive(Default)]
struct Kept {
    /// Chosen and rejected answers.
    sets: [RowSetBuilder; 2],
    faults: Faults,
    counts: Counts,
    /// Whether any are conversations, which take a template.
    has_chats: bool,
    pairs: u64,
    /// Those that were left out, too.
    all: u64,
}

impl Kept {
    /// Keeps a pair if both its answers can be used; one answer is no pair.
    fn add(&mut self, answers: [Outcome; 2], place: &Place, file: usize, overlong: Overlong) {
        let [chosen, rejected] = answers.map(|outcome| match outcome {
            Outcome::Row(row) => Some(row),
            Outcome::TooLong { .. } if overlong == Overlong::Drop => None,
            Outcome::TooLong { tokens, is_bound } => {
                self.faults.too_long(place.clone(), (tokens, is_bound));
                None
            }
            Outcome::Untrainable { reason, is_cut } => {
                self.faults.untrainable(place.clone(), reason, is_cut);
                None
            }
        });
        if let (Some(chosen), Some(rejected)) = (chosen, rejected) {
            for answer in [&chosen, &rejected] {
                self.counts.add(answer, &|| place.clone());
            }
            self.sets[0].push(&chosen, file, place.line);
            self.sets[1].push(&rejected, file, place.line);
            self.pairs += 1;
        }
    }
}

fn is_chat(example: &Example) -> bool {
    matches!(example, Example::Pair { chosen, .. } if matches!(**chosen, Example::Chat(_)))
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
