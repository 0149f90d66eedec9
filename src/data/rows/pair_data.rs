//! Pairs of answers as training data.
//!
//! The last pairs are the validation split. The training pairs each come once per epoch, in a new
//! order each epoch. As with sequences of rows, pair `i` of a run is a function of (seed, i).

use std::ops::Range;
use std::sync::Arc;

use jiff::Timestamp;
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

use super::data::{check_length, segment};
use super::{Pairs, RowError, RowSet};
use crate::config::{DataConfig, TokenizerConfig};
use crate::data::permutation::Permutation;
use crate::data::{
    Batch, ChatTemplate, DataError, DataView, EpochSize, FileRecord, Segment, TokenCache,
    Tokenizer, TrainingData, ViewSpec,
};

/// Pairs for training and validation.
#[derive(Debug, Clone)]
pub struct PairData {
    pairs: Arc<Pairs>,
    /// Number of training pairs, which come before the validation pairs.
    train: usize,
}

impl PairData {
    /// Loads the pairs and takes the last `data.val_fraction` of them as the validation split.
    ///
    /// # Errors
    /// Any error in the data; no pairs to train on; no validation pairs although `val_fraction`
    /// asks for them.
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
        let pairs = Pairs::load_at(data, tokenizer, cache, time)?;
        Ok(Self::new(pairs, data.val_fraction)?)
    }

    /// Takes the last `val_fraction` of the pairs as the validation split.
    ///
    /// # Errors
    /// No pairs to train on; no validation pairs although `val_fraction` asks for them.
    pub fn new(pairs: Pairs, val_fraction: f64) -> Result<Self, RowError> {
        let count = pairs.len();
        let train = (count as f64 * (1.0 - val_fraction)) as usize;
        if train == 0 || val_fraction > 0.0 && train == count {
            return Err(RowError::TooFewPairs { count, train });
        }
        let pairs = Arc::new(pairs);
        Ok(Self { pairs, train })
    }

    /// All pairs, for training and validation.
    pub fn pairs(&self) -> &Pairs {
        &self.pairs
    }

    fn held_out(&self) -> Range<usize> {
        self.train..self.pairs.len()
    }

    /// The sum of `of` over both answers of each pair in a range.
    fn sum(&self, pairs: Range<usize>, of: impl Fn(&RowSet, usize) -> usize) -> u64 {
        let both = |pair| of(&self.pairs.chosen, pair) + of(&self.pairs.rejected, pair);
        pairs.map(|pair| both(pair) as u64).sum()
    }
}

impl TrainingData for PairData {
    fn tokenizer(&self) -> &Tokenizer {
        &self.pairs.tokenizer
    }

    fn notes(&self) -> &[String] {
        &self.pairs.notes
    }

    fn files(&self) -> &[FileRecord] {
        &self.pairs.files
    }

    fn chat_template(&self) -> Option<&ChatTemplate> {
        self.pairs.chat_template.as_ref()
    }

    fn turn_end(&self) -> Option<u32> {
        self.pairs.turn_end
    }

    fn train_tokens(&self) -> u64 {
        self.sum(0..self.train, |rows, row| rows.tokens(row).len())
    }

    fn val_tokens(&self) -> Option<u64> {
        let held_out = self.held_out();
        (!held_out.is_empty()).then(|| self.sum(held_out, |rows, row| rows.tokens(row).len()))
    }

    fn val_bytes(&self) -> u64 {
        0
    }

    fn token_bytes(&self) -> u64 {
        self.pairs.chosen.bytes() + self.pairs.rejected.bytes()
    }

    fn view(&self, spec: &ViewSpec) -> Result<Box<dyn DataView>, DataError> {
        let sets = [&self.pairs.chosen, &self.pairs.rejected];
        check_length(sets.into_iter(), spec.sequence_len)?;
        Ok(Box::new(PairView {
            data: self.clone(),
            seed: spec.seed,
        }))
    }
}

/// Pairs in an order that depends on a seed.
#[derive(Debug)]
struct PairView {
    data: PairData,
    seed: u64,
}

impl PairView {
    /// The index of the pair that is number `number` of the run.
    fn pair(&self, number: u64) -> usize {
        let count = self.data.train as u64;
        let (epoch, place) = (number / count, number % count);
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[16..].copy_from_slice(b"firebrick pairs.");
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(epoch);
        Permutation::new(count, &mut rng).apply(place) as usize
    }
}

impl DataView for PairView {
    fn batch(&self, first: u64, count: usize) -> Batch {
        let numbers = first..first + count as u64;
        let pairs: Vec<usize> = numbers.map(|number| self.pair(number)).collect();
        self.data.pairs.batch(&pairs).batch
    }

    fn sequence(&self, number: u64) -> Vec<Segment> {
        let (pairs, pair) = (&self.data.pairs, self.pair(number));
        vec![segment(&pairs.chosen, pair), segment(&pairs.rejected, pair)]
    }

    fn epoch(&self) -> EpochSize {
        let train = 0..self.data.train;
        EpochSize {
            sequences: self.data.train as u64,
            targets: self.data.sum(train, |rows, row| rows.targets(row)),
        }
    }

    fn eval_batches(&self, count: usize) -> Option<Box<dyn Iterator<Item = Batch> + '_>> {
        let held_out = self.data.held_out();
        if held_out.is_empty() {
            return None;
        }
        let count = count.max(1);
        let starts = held_out.clone().step_by(count);
        Some(Box::new(starts.map(move |first| {
            let last = (first + count).min(held_out.end);
            let pairs: Vec<usize> = (first..last).collect();
            self.data.pairs.batch(&pairs).batch
        })))
    }

    fn widest(&self) -> usize {
        self.data.pairs.widest()
    }

    fn rows_per_sequence(&self) -> usize {
        2
    }
}
