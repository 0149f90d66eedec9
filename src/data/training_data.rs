//! The training and validation data of a run, for every task.
//!
//! [`TrainingData`] has been read and tokenised; a [`DataView`] is one order of it: a mix of the
//! datasets in sequences of one length, chosen by a seed. Views are cheap, so every phase of a run
//! has its own. A view returns sequences by number, so there is no reader state, and only the
//! number has to be saved.

use std::fmt::Debug;
use std::time::SystemTime;

use jiff::Timestamp;

use super::{Batch, Chat, ChatTemplate, Corpus, DataError, FileRecord, PairData, Place, RowCorpus};
use super::{TokenCache, Tokenizer};
use crate::config::{DataConfig, PhasePlan, Sampling, Task, TokenizerConfig};

/// Data that has been read and tokenised: the training and validation splits of all datasets.
pub trait TrainingData: Debug + Send + Sync {
    /// The tokenizer that made the token ids.
    fn tokenizer(&self) -> &Tokenizer;

    /// Lines for the user.
    fn notes(&self) -> &[String];

    /// Every file read, the tokenizer's included.
    fn files(&self) -> &[FileRecord];

    /// The chat template that rows are rendered with, if any.
    fn chat_template(&self) -> Option<&ChatTemplate> {
        None
    }

    /// The special token that ends a turn, if the data has turns.
    fn turn_end(&self) -> Option<u32> {
        None
    }

    /// Tokens of the training split; each dataset counts once.
    fn train_tokens(&self) -> u64;

    /// Tokens of the validation split; None without one.
    fn val_tokens(&self) -> Option<u64>;

    /// UTF-8 bytes for the metric bits per byte: of the validation text, or of the trained text of
    /// the validation rows; 0 for pairs, which do not have this metric.
    fn val_bytes(&self) -> u64;

    /// Bytes of all tokens, in memory or mapped into it.
    fn token_bytes(&self) -> u64;

    /// The data as running text; None for rows and pairs.
    fn text(&self) -> Option<&Corpus> {
        None
    }

    /// A view of the data with the order that `spec` describes.
    ///
    /// # Errors
    /// Data that does not fit into sequences of the requested length.
    fn view(&self, spec: &ViewSpec) -> Result<Box<dyn DataView>, DataError>;
}

/// An order of the data: maps the numbers of a run's sequences to their content.
pub trait DataView: Debug + Send + Sync {
    /// Sequences `first..first + count`; a pair of answers is a sequence of two rows.
    fn batch(&self, first: u64, count: usize) -> Batch;

    /// The segments of sequence `number`.
    fn sequence(&self, number: u64) -> Vec<Segment>;

    /// The size of one epoch of the training data.
    fn epoch(&self) -> EpochSize;

    /// Passes over the validation split once, `count` sequences at a time; None without one.
    fn eval_batches(&self, count: usize) -> Option<Box<dyn Iterator<Item = Batch> + '_>>;

    /// The largest number of columns of any batch.
    fn widest(&self) -> usize;

    /// Rows of a batch for each sequence.
    fn rows_per_sequence(&self) -> usize {
        1
    }

    /// A line for the user about the order, if there is anything to report.
    fn note(&self) -> Option<String> {
        None
    }
}

/// The settings that determine the order of the data.
#[derive(Debug, Clone, PartialEq)]
pub struct ViewSpec {
    /// Tokens of a sequence.
    pub sequence_len: usize,
    /// How often the tokens of each dataset are seen, relative to the other datasets.
    pub weights: Vec<f64>,
    /// How windows of text are drawn.
    pub sampling: Sampling,
    /// Whether several rows share a sequence.
    pub is_packed: bool,
    /// The seed of the order.
    pub seed: u64,
}

impl ViewSpec {
    /// The view that the settings `data` describe.
    pub fn new(data: &DataConfig, seed: u64) -> Self {
        Self {
            sequence_len: data.sequence_len,
            weights: data.datasets.iter().map(|dataset| dataset.weight).collect(),
            sampling: data.sampling,
            is_packed: data.sample_packing.unwrap_or(true),
            seed,
        }
    }

    /// The view of phase `number`. Each phase begins a new order; the first phase has the same
    /// order as a run without phases.
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

/// The size of one pass over the training data, with the weights of the datasets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EpochSize {
    /// Number of sequences.
    pub sequences: u64,
    /// Number of trained tokens in these sequences.
    pub targets: u64,
}

/// A part of a sequence that attends only to itself: a window of text, or a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// The file and line of a row; None for a window.
    pub place: Option<Place>,
    /// The tokens: inputs, and the last target.
    pub tokens: Vec<u32>,
    /// Whether each token is trained. The first is only an input and never trained.
    pub trained: Vec<bool>,
}

impl Segment {
    /// Number of trained tokens.
    pub fn targets(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }
}

/// Reads and tokenises the data of a task. `time` is the current time for chat templates: the start
/// time of the run.
///
/// # Errors
/// Any error in the data.
pub fn load_training_data(
    task: Task,
    data: &DataConfig,
    tokenizer: &TokenizerConfig,
    cache: &TokenCache,
    time: SystemTime,
) -> Result<Box<dyn TrainingData>, DataError> {
    // A clock far before 1970 cannot be represented, and 1970 serves as well.
    let time = Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH);
    Ok(match task {
        Task::Pretrain => Box::new(Corpus::load(data, tokenizer, cache)?),
        Task::Sft => Box::new(RowCorpus::load_at(data, tokenizer, cache, time)?),
        Task::Dpo => Box::new(PairData::load_at(data, tokenizer, cache, time)?),
    })
}

impl dyn TrainingData + '_ {
    /// The token that ends the model's output: the end of a turn if the data has turns, otherwise
    /// the end of a document.
    pub fn end_token(&self) -> Option<u32> {
        let eos = || self.tokenizer().eos().map(|eos| eos.id);
        self.turn_end().or_else(eos)
    }

    /// Renders a prompt with the chat template if there is one, so that it looks like the training
    /// data.
    ///
    /// # Errors
    /// The template cannot render the prompt.
    pub fn prompt(&self, prompt: &str) -> Result<String, DataError> {
        let Some(template) = self.chat_template() else {
            return Ok(prompt.to_string());
        };
        let messages = [serde_json::json!({"role": "user", "content": prompt})];
        let rendered = template.render(&Chat::new(&messages).with_generation_prompt())?;
        Ok(rendered.text)
    }
}
