//! What a run trains and validates on, whatever its task.
//!
//! [`TrainingData`] is what has been read and tokenised; a [`DataView`] is an order of it: a mix of
//! the datasets in sequences of one length, by a seed. Views are cheap, so that every phase of a run
//! has one of its own. A view gives sequences by number: there is no reader that moves on, and
//! nothing to save but the number.

use std::fmt::Debug;
use std::time::SystemTime;

use jiff::Timestamp;

use super::{Batch, Chat, ChatTemplate, Corpus, DataError, FileRecord, PairData, Place, RowCorpus};
use super::{TokenCache, Tokenizer};
use crate::config::{DataConfig, PhasePlan, Sampling, Task, TokenizerConfig};

/// What has been read, and tokenised: the training part and the validation part of all datasets.
pub trait TrainingData: Debug + Send + Sync {
    /// What made the token ids.
    fn tokenizer(&self) -> &Tokenizer;

    /// Lines for the user.
    fn notes(&self) -> &[String];

    /// Every file read, the tokenizer's included.
    fn files(&self) -> &[FileRecord];

    /// The chat template that rows are written with, where one is.
    fn chat_template(&self) -> Option<&ChatTemplate> {
        None
    }

    /// The special token that ends a turn, where there are turns.
    fn turn_end(&self) -> Option<u32> {
        None
    }

    /// Tokens of the training split, each dataset once.
    fn train_tokens(&self) -> u64;

    /// Tokens of the validation split; none without one.
    fn val_tokens(&self) -> Option<u64>;

    /// UTF-8 bytes that bits per byte are measured by: of the validation text, or of the trained
    /// text of the validation rows; 0 for pairs, which are not measured by them.
    fn val_bytes(&self) -> u64;

    /// Bytes of all tokens, in memory or mapped into it.
    fn token_bytes(&self) -> u64;

    /// The data as running text, where it is that.
    fn text(&self) -> Option<&Corpus> {
        None
    }

    /// The data in an order.
    ///
    /// # Errors
    /// Data that cannot be put into sequences of that length.
    fn view(&self, spec: &ViewSpec) -> Result<Box<dyn DataView>, DataError>;
}

/// The order of the data: which sequence of a run is which.
pub trait DataView: Debug + Send + Sync {
    /// Sequences `first..first + count`; a pair of answers is a sequence of two rows.
    fn batch(&self, first: u64, count: usize) -> Batch;

    /// What sequence `number` is made of.
    fn sequence(&self, number: u64) -> Vec<Segment>;

    /// One pass over the training data.
    fn epoch(&self) -> EpochSize;

    /// The validation split once, `count` sequences at a time; none without one.
    fn eval_batches(&self, count: usize) -> Option<Box<dyn Iterator<Item = Batch> + '_>>;

    /// Columns of the widest batch there will be.
    fn widest(&self) -> usize;

    /// Rows of a batch for each sequence.
    fn rows_per_sequence(&self) -> usize {
        1
    }

    /// A line for the user, where there is something to say about the order.
    fn note(&self) -> Option<String> {
        None
    }
}

/// What decides the order of the data.
#[derive(Debug, Clone, PartialEq)]
pub struct ViewSpec {
    /// Tokens of a sequence.
    pub sequence_len: usize,
    /// How often the tokens of each dataset are seen relative to those of the others.
    pub weights: Vec<f64>,
    /// How windows of text are drawn.
    pub sampling: Sampling,
    /// Whether several rows share a sequence.
    pub is_packed: bool,
    /// What the order is a function of.
    pub seed: u64,
}

impl ViewSpec {
    /// The view that `data` asks for.
    pub fn new(data: &DataConfig, seed: u64) -> Self {
        Self {
            sequence_len: data.sequence_len,
            weights: data.datasets.iter().map(|dataset| dataset.weight).collect(),
            sampling: data.sampling,
            is_packed: data.sample_packing.unwrap_or(true),
            seed,
        }
    }

    /// The view of a phase, by its number. Each phase begins a new order; that of the first is the
    /// one of a run without phases.
    pub fn of_phase(phase: &PhasePlan, number: usize, seed: u64) -> Self {
        if number == 0 {
            return Self::new(&phase.data, seed);
        }
        let mut key = blake3::Hasher::new_derive_key("firebrick data order of a phase v1");
        key.update(&seed.to_le_bytes());
        key.update(&(number as u64).to_le_bytes());
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&key.finalize().as_bytes()[..8]);
        Self::new(&phase.data, u64::from_le_bytes(bytes))
    }
}

/// One pass over the training data, weights of datasets included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EpochSize {
    /// Sequences.
    pub sequences: u64,
    /// Trained tokens in them.
    pub targets: u64,
}

/// A part of a sequence that attends to itself alone: a window of text, or a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// Where a row comes from; none for a window.
    pub place: Option<Place>,
    /// Its tokens: inputs, and the last target.
    pub tokens: Vec<u32>,
    /// Which of them are trained. The first is given and never is.
    pub trained: Vec<bool>,
}

impl Segment {
    /// Trained tokens.
    pub fn targets(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }
}

/// Reads and tokenises the data of a task. `time` is the time that chat templates may write: that
/// at which the run was started.
///
/// # Errors
/// Whatever is wrong with the data.
pub fn load_training_data(
    task: Task,
    data: &DataConfig,
    tokenizer: &TokenizerConfig,
    cache: &TokenCache,
    time: SystemTime,
) -> Result<Box<dyn TrainingData>, DataError> {
    // A clock that stands before 1970 by more than the format allows is as good as none.
    let time = Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH);
    Ok(match task {
        Task::Pretrain => Box::new(Corpus::load(data, tokenizer, cache)?),
        Task::Sft => Box::new(RowCorpus::load_at(data, tokenizer, cache, time)?),
        Task::Dpo => Box::new(PairData::load_at(data, tokenizer, cache, time)?),
    })
}

impl dyn TrainingData + '_ {
    /// The token that ends what the model writes: the end of a turn where there are turns, else the
    /// end of a document.
    pub fn end_token(&self) -> Option<u32> {
        let eos = || self.tokenizer().eos().map(|eos| eos.id);
        self.turn_end().or_else(eos)
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
