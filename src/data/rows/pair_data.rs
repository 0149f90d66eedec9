//! Pairs of answers as training data.
//!
//! The last pairs are held out. Of the others every one comes once per epoch, in a new order each
//! epoch: pair `i` of a run is a function of (seed, i), as sequences of rows are.

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

/// Pairs to train and to validate on.
#[derive(Debug, Clone)]
pub struct PairData {
    pairs: Arc<Pairs>,
    /// Pairs before the ones that are held out.
    train: usize,
}

impl PairData {
    /// Loads the pairs and holds out the last `data.val_fraction` of them.
    ///
    /// # Errors
    /// Whatever is wrong with the data; no pairs to train on, or none held out where some were
    /// asked for.
    pub fn load(
        data: &DataConfig,
        tokenizer: &TokenizerConfig,
        cache: &TokenCache,
    ) -> Result<Self, DataError> {
        Self::load_at(data, tokenizer, cache, Timestamp::now())
    }

    /// The same as if it were another time, which templates may write.
    pub(in crate::data) fn load_at(
        data: &DataConfig,
        tokenizer: &TokenizerConfig,
        cache: &TokenCache,
        time: Timestamp,
    ) -> Result<Self, DataError> {
        let pairs = Pairs::load_at(data, tokenizer, cache, time)?;
        Ok(Self::new(pairs, data.val_fraction)?)
    }

    /// Holds out the last `val_fraction` of the pairs.
    ///
    /// # Errors
    /// No pairs to train on, or none held out where some were asked for.
    pub fn new(pairs: Pairs, val_fraction: f64) -> Result<Self, RowError> {
        let count = pairs.len();
        let train = (count as f64 * (1.0 - val_fraction)) as usize;
        if train == 0 || val_fraction > 0.0 && train == count {
            return Err(RowError::TooFewPairs { count, train });
        }
        let pairs = Arc::new(pairs);
        Ok(Self { pairs, train })
    }

    /// All of them.
    pub fn pairs(&self) -> &Pairs {
        &self.pairs
    }

    fn held_out(&self) -> Range<usize> {
        self.train..self.pairs.len()
    }

    /// Σ over both answers of some pairs.
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

/// Pairs in the order of a seed.
#[derive(Debug)]
struct PairView {
    data: PairData,
    seed: u64,
}

impl PairView {
    /// Which pair is number `number` of the run.
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
