//! What a run trains and validates on, whatever its task.
//!
//! Pretraining draws windows from streams of text, fine-tuning puts rows into sequences. The loop
//! asks for sequences by number and does not care.

use super::rows::eval_batches as eval_row_batches;
use super::{
    Batch, Chat, ChatTemplate, Corpus, DataError, FileRecord, PairFeed, Pairs, Place, RowCorpus,
    RowSampler, RowSet, Sampler, TokenCache, Tokenizer, eval_batches,
};
use crate::config::{Config, Task};
use crate::readable::grouped;

/// The data of a run, and its order.
#[derive(Debug, Clone)]
pub enum Feed {
    /// Windows of text.
    Text {
        /// The text.
        corpus: Box<Corpus>,
        /// Draws windows from it.
        sampler: Sampler,
    },
    /// Rows, whole.
    Rows {
        /// The rows.
        corpus: Box<RowCorpus>,
        /// Puts them into sequences.
        sampler: RowSampler,
    },
    /// Pairs of answers, two rows of a batch each.
    Pairs(Box<PairFeed>),
}

/// One pass over the training data, weights of datasets included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pass {
    /// Sequences.
    pub sequences: u64,
    /// Trained tokens in them.
    pub targets: u64,
}

/// A part of a sequence that attends to itself alone: a window of text, or a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Where a row comes from; none for a window.
    pub place: Option<Place>,
    /// Its tokens: inputs, and the last target.
    pub tokens: Vec<u32>,
    /// Which of them are trained. The first is given and never is.
    pub trained: Vec<bool>,
}

impl Part {
    /// Trained tokens.
    pub fn targets(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }
}

impl Feed {
    /// Loads what the config describes.
    ///
    /// # Errors
    /// Whatever is wrong with the data.
    pub fn load(config: &Config, cache: &TokenCache) -> Result<Self, DataError> {
        let data = &config.data;
        match config.task {
            Task::Pretrain => {
                let corpus = Corpus::load(data, &config.tokenizer, cache)?;
                let sampler = Sampler::new(&corpus, data.sampling, data.sequence_len, config.seed)?;
                let corpus = Box::new(corpus);
                Ok(Self::Text { corpus, sampler })
            }
            Task::Sft => {
                let mut corpus = RowCorpus::load(data, &config.tokenizer, cache)?;
                let is_packed = data.sample_packing.unwrap_or(true);
                let sampler =
                    RowSampler::new(&corpus.train, data.sequence_len, is_packed, config.seed)?;
                corpus
                    .notes
                    .push(describe(&sampler, data.sequence_len, is_packed));
                let corpus = Box::new(corpus);
                Ok(Self::Rows { corpus, sampler })
            }
            Task::Dpo => {
                let pairs = Pairs::load(data, &config.tokenizer, cache)?;
                let feed = PairFeed::new(pairs, data.val_fraction, config.seed)?;
                Ok(Self::Pairs(Box::new(feed)))
            }
        }
    }

    /// What made the token ids.
    pub fn tokenizer(&self) -> &Tokenizer {
        match self {
            Self::Text { corpus, .. } => &corpus.tokenizer,
            Self::Rows { corpus, .. } => &corpus.tokenizer,
            Self::Pairs(feed) => &feed.pairs().tokenizer,
        }
    }

    /// Lines for the user.
    pub fn notes(&self) -> &[String] {
        match self {
            Self::Text { corpus, .. } => &corpus.notes,
            Self::Rows { corpus, .. } => &corpus.notes,
            Self::Pairs(feed) => &feed.pairs().notes,
        }
    }

    /// Every file read, the tokenizer's included.
    pub fn files(&self) -> &[FileRecord] {
        match self {
            Self::Text { corpus, .. } => &corpus.files,
            Self::Rows { corpus, .. } => &corpus.files,
            Self::Pairs(feed) => &feed.pairs().files,
        }
    }

    /// Sequences `first..first + rows` of the run; of pairs, two rows for each.
    pub fn batch(&self, first: u64, rows: usize) -> Batch {
        match self {
            Self::Text { sampler, .. } => sampler.batch(first, rows),
            Self::Rows { sampler, .. } => sampler.batch(first, rows),
            Self::Pairs(feed) => feed.batch(first, rows),
        }
    }

    /// What sequence `number` of the run is made of.
    pub fn sequence(&self, number: u64) -> Vec<Part> {
        match self {
            Self::Text { sampler, .. } => {
                let batch = sampler.batch(number, 1);
                let first = batch.tokens.first().copied();
                let tokens: Vec<u32> = first.into_iter().chain(batch.targets).collect();
                vec![Part {
                    place: None,
                    trained: (0..tokens.len()).map(|at| at > 0).collect(),
                    tokens,
                }]
            }
            Self::Rows { corpus, sampler } => {
                let rows = sampler.sequence(number).into_iter();
                rows.map(|(set, row)| part(&corpus.train[set].rows, row))
                    .collect()
            }
            Self::Pairs(feed) => {
                let (pairs, pair) = (feed.pairs(), feed.pair(number));
                vec![part(&pairs.chosen, pair), part(&pairs.rejected, pair)]
            }
        }
    }

    /// The chat template that rows are written with, where one is.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        match self {
            Self::Text { .. } => None,
            Self::Rows { corpus, .. } => corpus.chat_template.as_ref(),
            Self::Pairs(feed) => feed.pairs().chat_template.as_ref(),
        }
    }

    /// One pass over the training data.
    pub fn pass(&self) -> Pass {
        match self {
            Self::Text { sampler, .. } => Pass {
                sequences: sampler.windows_per_epoch(),
                targets: sampler.tokens_per_epoch(),
            },
            Self::Rows { sampler, .. } => Pass {
                sequences: sampler.sequences_per_epoch(),
                targets: sampler.targets_per_epoch(),
            },
            Self::Pairs(feed) => Pass {
                sequences: feed.train_pairs(),
                targets: feed.train_targets(),
            },
        }
    }

    /// Tokens of the training split, each dataset once.
    pub fn train_tokens(&self) -> u64 {
        match self {
            Self::Text { corpus, .. } => corpus.train_tokens(),
            Self::Rows { corpus, .. } => corpus.train_tokens(),
            Self::Pairs(feed) => feed.train_tokens(),
        }
    }

    /// Tokens of the validation split; none without one.
    pub fn val_tokens(&self) -> Option<u64> {
        match self {
            Self::Text { corpus, .. } => Some(corpus.val.as_ref()?.len() as u64),
            Self::Rows { corpus, .. } => Some(corpus.val.as_ref()?.token_count()),
            Self::Pairs(feed) => feed.val_tokens(),
        }
    }

    /// UTF-8 bytes that bits per byte are measured by: of the validation text, or of the trained
    /// text of the validation rows.
    pub fn val_bytes(&self) -> u64 {
        match self {
            Self::Text { corpus, .. } => corpus.val_bytes,
            Self::Rows { corpus, .. } => corpus.val_bytes,
            // A loss of pairs has no bytes.
            Self::Pairs(_) => 0,
        }
    }

    /// The validation split once, `rows` sequences at a time; none without one.
    pub fn eval_batches(
        &self,
        sequence_len: usize,
        rows: usize,
    ) -> Option<Box<dyn Iterator<Item = Batch> + '_>> {
        match self {
            Self::Text { corpus, .. } => {
                let val = corpus.val.as_ref()?;
                Some(Box::new(eval_batches(val, sequence_len, rows)))
            }
            Self::Rows { corpus, sampler } => {
                let val = corpus.val.as_ref()?;
                let room = sampler.widest().min(sequence_len);
                Some(Box::new(eval_row_batches(val, room, rows)))
            }
            Self::Pairs(feed) => Some(Box::new(feed.val_batches(rows)?)),
        }
    }

    /// Rows of a batch for each sequence of the run.
    pub fn rows_per_sequence(&self) -> usize {
        match self {
            Self::Pairs(_) => 2,
            _ => 1,
        }
    }

    /// Columns of the widest batch there will be.
    pub fn widest(&self, sequence_len: usize) -> usize {
        match self {
            Self::Text { .. } => sequence_len,
            Self::Rows { sampler, .. } => sampler.widest(),
            Self::Pairs(feed) => feed.pairs().widest(),
        }
    }

    /// Bytes of all tokens, in memory or mapped into it.
    pub fn token_bytes(&self) -> u64 {
        match self {
            Self::Text { corpus, .. } => corpus.token_bytes(),
            Self::Rows { corpus, .. } => corpus.token_bytes(),
            Self::Pairs(feed) => feed.pairs().chosen.bytes() + feed.pairs().rejected.bytes(),
        }
    }

    /// The token that ends what the model writes: the end of a turn where there are turns, else the
    /// end of a document.
    pub fn end_token(&self) -> Option<u32> {
        let turn_end = match self {
            Self::Text { .. } => None,
            Self::Rows { corpus, .. } => corpus.turn_end,
            Self::Pairs(feed) => feed.pairs().turn_end,
        };
        turn_end.or(self.tokenizer().eos().map(|eos| eos.id))
    }

    /// A prompt as the model has learned to be asked: by the chat template, where there is one.
    ///
    /// # Errors
    /// A template that does not take it.
    pub fn prompt(&self, prompt: &str) -> Result<String, DataError> {
        let Some(template) = self.chat_template() else {
            return Ok(prompt.to_string());
        };
        let messages = [serde_json::json!({"role": "user", "content": prompt})];
        let rendered = template.render(&Chat::new(&messages).with_generation_prompt())?;
        Ok(rendered.text)
    }
}

fn part(rows: &RowSet, row: usize) -> Part {
    let tokens = rows.tokens(row);
    let mut trained = vec![false; tokens.len()];
    for span in rows.trained(row) {
        trained[span].fill(true);
    }
    if let Some(first) = trained.first_mut() {
        *first = false;
    }
    Part {
        place: Some(rows.place(row)),
        tokens,
        trained,
    }
}

/// "packing: 7,000 rows in 2,100 sequences of up to 512 tokens, 98.3 % full"
fn describe(sampler: &RowSampler, sequence_len: usize, is_packed: bool) -> String {
    let rows = grouped(sampler.rows_per_epoch());
    let sequences = sampler.sequences_per_epoch();
    if !is_packed {
        return format!("no packing: {rows} rows per epoch, one in each sequence");
    }
    let full = sampler.places_per_epoch() as f64 / (sequences * sequence_len as u64) as f64;
    format!(
        "packing: {rows} rows per epoch in {} sequences of {sequence_len} tokens, {:.1} % full",
        grouped(sequences),
        100.0 * full,
    )
}
