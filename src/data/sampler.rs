//! Training batches.
//!
//! Row `i` of a run is a function of (seed, i) alone. There is no reader that moves on, so a
//! resumed run needs to know only how many rows came before, and cutting a step into other
//! micro-batches gives the same rows. Randomness is counter-based: ChaCha8 keyed by the seed, one
//! of its 2^64 streams per row (or per epoch).
//!
//! - `random`: windows at uniformly random offsets, as nanoGPT draws them. A dataset is chosen
//!   with a probability proportional to weight x tokens.
//! - `epoch`: the data is cut into windows side by side, and every window comes once per epoch, in
//!   a new order each epoch. A dataset of weight w gives w times its windows; a fraction is a
//!   random part of them, another each epoch. The last tokens that do not fill a window are not
//!   always the same ones: the cuts are shifted by a random part of that remainder each epoch.
//!
//! A window is sequence_len tokens and the one after them, which is the last target.

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};

use super::permutation::Permutation;
use super::{Batch, Corpus, DataError, TokenStream};
use crate::config::Sampling;

/// Draws training batches.
#[derive(Debug, Clone)]
pub struct Sampler {
    sources: Vec<WindowSource>,
    sampling: Sampling,
    sequence_len: usize,
    seed: u64,
    windows_per_epoch: u64,
}

#[derive(Debug, Clone)]
struct WindowSource {
    tokens: TokenStream,
    weight: f64,
    /// Windows side by side: `(tokens - 1) / sequence_len`.
    windows: u64,
    /// How many windows of an epoch come from here: weight x windows.
    slots: u64,
}

/// What a random number is for; numbers for different purposes are independent.
#[derive(Clone, Copy)]
enum Purpose {
    /// Dataset and offset of a row (`random`).
    Offset,
    /// Order of an epoch's windows.
    Order,
    /// Which windows of a dataset make up the fraction of its weight, and where its cuts are.
    Dataset(usize),
}

impl Sampler {
    /// A sampler of windows of `sequence_len` tokens. An error if a dataset has not one.
    ///
    /// # Panics
    /// If `sequence_len` is 0.
    pub fn new(
        corpus: &Corpus,
        sampling: Sampling,
        sequence_len: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        let weights: Vec<f64> = corpus.train.iter().map(|stream| stream.weight).collect();
        Self::mixed(corpus, &weights, sampling, sequence_len, seed)
    }

    /// The same sampler with other weights for the datasets.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    ///
    /// # Panics
    /// As [`new`](Self::new), and if the numbers of weights and datasets differ.
    pub fn mixed(
        corpus: &Corpus,
        weights: &[f64],
        sampling: Sampling,
        sequence_len: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        assert!(sequence_len > 0, "an empty window holds no tokens");
        assert_eq!(
            weights.len(),
            corpus.train.len(),
            "a weight for each dataset"
        );
        let mut sources = Vec::with_capacity(corpus.train.len());
        for (stream, &weight) in corpus.train.iter().zip(weights) {
            let tokens = stream.tokens.len();
            if tokens <= sequence_len {
                return Err(DataError::TooShort {
                    what: stream.name.clone(),
                    tokens: tokens as u64,
                    sequence_len,
                });
            }
            let windows = ((tokens - 1) / sequence_len) as u64;
            sources.push(WindowSource {
                tokens: stream.tokens.clone(),
                weight,
                windows,
                // At least one: a small weight makes a dataset rare, it does not switch it off.
                slots: ((weight * windows as f64).round() as u64).max(1),
            });
        }
        Ok(Self {
            windows_per_epoch: sources.iter().map(|source| source.slots).sum(),
            sources,
            sampling,
            sequence_len,
            seed,
        })
    }

    /// Rows that make one pass over the data, weights included. With `random` sampling, rows with
    /// as many tokens as one pass.
    pub fn windows_per_epoch(&self) -> u64 {
        self.windows_per_epoch
    }

    /// Trained tokens of one pass.
    pub fn tokens_per_epoch(&self) -> u64 {
        self.windows_per_epoch * self.sequence_len as u64
    }

    /// Rows `first..first + rows` of the run, `[rows, sequence_len]`.
    pub fn batch(&self, first: u64, rows: usize) -> Batch {
        let cols = self.sequence_len;
        let mut batch = Batch {
            rows,
            cols,
            tokens: Vec::with_capacity(rows * cols),
            targets: Vec::with_capacity(rows * cols),
            weights: vec![1.0; rows * cols],
            segment_ids: vec![0; rows * cols],
            positions: (0..rows).flat_map(|_| 0..cols as u32).collect(),
        };
        for row in first..first + rows as u64 {
            let (source, start) = match self.sampling {
                Sampling::Random => self.random_window(row),
                Sampling::Epoch => self.epoch_window(row),
            };
            let tokens = &self.sources[source].tokens;
            batch.tokens.extend(tokens.ids(start..start + cols));
            batch
                .targets
                .extend(tokens.ids(start + 1..start + cols + 1));
        }
        batch
    }

    /// Dataset and first token of a row.
    fn random_window(&self, row: u64) -> (usize, usize) {
        let mut rng = self.rng(Purpose::Offset, row);
        let share = |source: &WindowSource| source.weight * source.tokens.len() as f64;
        let total: f64 = self.sources.iter().map(share).sum();
        let mut point = unit(rng.next_u64()) * total;
        let mut chosen = 0;
        for (index, source) in self.sources.iter().enumerate() {
            chosen = index;
            point -= share(source);
            if point < 0.0 {
                break;
            }
        }
        let offsets = (self.sources[chosen].tokens.len() - self.sequence_len) as u64;
        (chosen, below(offsets, rng.next_u64()) as usize)
    }

    /// Dataset and first token of a row.
    fn epoch_window(&self, row: u64) -> (usize, usize) {
        let (epoch, place) = (row / self.windows_per_epoch, row % self.windows_per_epoch);
        let order = Permutation::new(self.windows_per_epoch, &mut self.rng(Purpose::Order, epoch));
        let mut slot = order.apply(place);
        let mut index = 0;
        while slot >= self.sources[index].slots {
            slot -= self.sources[index].slots;
            index += 1;
        }
        let source = &self.sources[index];
        let mut rng = self.rng(Purpose::Dataset(index), epoch);
        let remainder = (source.tokens.len() - 1) % self.sequence_len;
        let shift = below(remainder as u64 + 1, rng.next_u64()) as usize;
        let whole_passes = source.slots / source.windows;
        let window = if slot < whole_passes * source.windows {
            slot % source.windows
        } else {
            let part = Permutation::new(source.windows, &mut rng);
            part.apply(slot - whole_passes * source.windows)
        };
        (index, shift + window as usize * self.sequence_len)
    }

    fn rng(&self, purpose: Purpose, counter: u64) -> ChaCha8Rng {
        let purpose: u64 = match purpose {
            Purpose::Offset => 0,
            Purpose::Order => 1,
            Purpose::Dataset(index) => 2 + index as u64,
        };
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&purpose.to_le_bytes());
        key[16..].copy_from_slice(b"firebrick sample");
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(counter);
        rng
    }
}

// Written out rather than taken from the library, whose ways of drawing a range may change
// between versions: a run must draw the same data after an update.

/// 64 random bits as a number in `0..1`.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// 64 random bits as a number in `0..n`, to within n / 2^64 of uniform.
fn below(n: u64, bits: u64) -> u64 {
    ((u128::from(bits) * u128::from(n)) >> 64) as u64
}
