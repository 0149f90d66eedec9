//! Pairs of answers in the order of a run.
//!
//! The last pairs are held out. Of the others every one comes once per epoch, in a new order each
//! epoch: pair `i` of a run is a function of (seed, i), as sequences of rows are.

use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

use super::{Pairs, RowError};
use crate::data::Batch;
use crate::data::permutation::Permutation;

/// Pairs to train and to validate on.
#[derive(Debug, Clone)]
pub struct PairFeed {
    pairs: Pairs,
    /// Pairs before the ones that are held out.
    train: usize,
    seed: u64,
}

impl PairFeed {
    /// Holds out the last `val_fraction` of the pairs.
    ///
    /// # Errors
    /// No pairs to train on, or none held out where some were asked for.
    pub fn new(pairs: Pairs, val_fraction: f64, seed: u64) -> Result<Self, RowError> {
        let count = pairs.len();
        let train = (count as f64 * (1.0 - val_fraction)) as usize;
        if train == 0 || val_fraction > 0.0 && train == count {
            return Err(RowError::TooFewPairs { count, train });
        }
        Ok(Self { pairs, train, seed })
    }

    /// All of them.
    pub fn pairs(&self) -> &Pairs {
        &self.pairs
    }

    /// Which pair is number `number` of the run.
    pub(in crate::data) fn pair(&self, number: u64) -> usize {
        let count = self.train as u64;
        let (epoch, place) = (number / count, number % count);
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[16..].copy_from_slice(b"firebrick pairs.");
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(epoch);
        Permutation::new(count, &mut rng).apply(place) as usize
    }

    /// Pairs `first..first + count` of the run.
    pub(in crate::data) fn batch(&self, first: u64, count: usize) -> Batch {
        let numbers = first..first + count as u64;
        let pairs: Vec<usize> = numbers.map(|number| self.pair(number)).collect();
        self.pairs.batch(&pairs).batch
    }

    /// The pairs that are held out, `count` at a time; none where there are none.
    pub(in crate::data) fn val_batches(
        &self,
        count: usize,
    ) -> Option<impl Iterator<Item = Batch> + '_> {
        let held_out = self.train..self.pairs.len();
        if held_out.is_empty() {
            return None;
        }
        let starts = held_out.clone().step_by(count.max(1));
        Some(starts.map(move |first| {
            let last = (first + count.max(1)).min(held_out.end);
            self.pairs.batch(&(first..last).collect::<Vec<_>>()).batch
        }))
    }

    /// Pairs to train on.
    pub fn train_pairs(&self) -> u64 {
        self.train as u64
    }

    /// Trained tokens of the pairs to train on.
    pub fn train_targets(&self) -> u64 {
        self.sum(0..self.train, |rows, row| rows.targets(row))
    }

    /// Tokens of the pairs to train on.
    pub fn train_tokens(&self) -> u64 {
        self.sum(0..self.train, |rows, row| rows.tokens(row).len())
    }

    /// Tokens of the pairs that are held out; none where there are none.
    pub fn val_tokens(&self) -> Option<u64> {
        let held_out = self.train..self.pairs.len();
        (!held_out.is_empty()).then(|| self.sum(held_out, |rows, row| rows.tokens(row).len()))
    }

    fn sum(
        &self,
        pairs: std::ops::Range<usize>,
        of: impl Fn(&super::RowSet, usize) -> usize,
    ) -> u64 {
        let both = |pair| of(&self.pairs.chosen, pair) + of(&self.pairs.rejected, pair);
        pairs.map(|pair| both(pair) as u64).sum()
    }
}
