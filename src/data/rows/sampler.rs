//! Training batches of rows.
//!
//! Every row comes once per epoch, in a new order each epoch; a dataset of weight w gives each of
//! its rows w times, and for a fraction a random part of them, another each epoch. Which rows make
//! sequence `i` of a run is a function of (seed, i): an epoch's rows are put into a random order,
//! packed, and the sequences put into a random order again, all from counter-based random numbers.
//! There is no reader that moves on; the packing of the epoch in use is kept because it is needed
//! for every batch, and made anew when it is another epoch's.
//!
//! In a sequence, rows keep to themselves: each is a segment, which attention does not leave, and
//! positions start anew with it. The targets of a row are its own tokens, so no row is trained to
//! go on into the next.

use std::sync::{Arc, Mutex, PoisonError};

use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

use super::pack::Bins;
use super::{RowError, RowSet, TrainRows};
use crate::data::Batch;
use crate::data::permutation::Permutation;

/// Rows of an epoch that are listed in memory.
const MOST_ROWS: u128 = 1 << 28;

/// Batches have a multiple of this many columns, so that few different shapes occur.
const COLUMNS: usize = 16;

/// Draws training batches of rows.
#[derive(Debug, Clone)]
pub struct RowSampler {
    sets: Vec<Weighted>,
    sequence_len: usize,
    is_packed: bool,
    seed: u64,
    first: FirstEpoch,
    epochs: Arc<Mutex<Epochs>>,
}

/// Sums over the first epoch.
#[derive(Debug, Clone, Copy, Default)]
struct FirstEpoch {
    rows: u64,
    sequences: u64,
    places: u64,
    targets: u64,
    /// Places of the fullest sequence.
    widest: usize,
}

#[derive(Debug, Clone)]
struct Weighted {
    rows: RowSet,
    /// How often every row comes in an epoch.
    passes: u64,
    /// How many rows come once more.
    more: u64,
}

/// What has been worked out about epochs.
#[derive(Debug, Default)]
struct Epochs {
    /// First sequence of each epoch from the beginning on.
    starts: Vec<u64>,
    /// The epoch in use.
    current: Option<(u64, Arc<Epoch>)>,
}

/// The sequences of an epoch.
#[derive(Debug)]
struct Epoch {
    /// Dataset and row of each item.
    rows: Vec<(u32, u32)>,
    bins: Bins,
    order: Permutation,
}

impl Epoch {
    fn sequence(&self, place: u64) -> impl Iterator<Item = (usize, usize)> + '_ {
        let bin = self.bins.get(self.order.apply(place) as usize);
        bin.iter().map(|&item| {
            let (set, row) = self.rows[item as usize];
            (set as usize, row as usize)
        })
    }
}

/// What a random number is for; numbers for different purposes are independent.
#[derive(Clone, Copy)]
enum Purpose {
    /// Order of an epoch's rows.
    Rows,
    /// Order of its sequences.
    Sequences,
    /// Which rows of a dataset come once more.
    Dataset(usize),
}

impl RowSampler {
    /// A sampler of rows, each of which has to fit `sequence_len`.
    ///
    /// # Errors
    /// Weights that repeat rows beyond what fits into memory.
    ///
    /// # Panics
    /// If `sequence_len` is 0, a set is empty, or a row does not fit.
    pub fn new(
        train: &[TrainRows],
        sequence_len: usize,
        is_packed: bool,
        seed: u64,
    ) -> Result<Self, RowError> {
        assert!(sequence_len > 0, "an empty sequence holds no rows");
        let sets: Vec<Weighted> = train
            .iter()
            .map(|set| {
                let rows = set.rows.len() as u64;
                assert!(rows > 0, "an empty set has no rows to draw");
                // At least one: a small weight makes a dataset rare, it does not switch it off.
                let slots = ((set.weight * rows as f64).round() as u64).max(1);
                Weighted {
                    rows: set.rows.clone(),
                    passes: slots / rows,
                    more: slots % rows,
                }
            })
            .collect();
        let longest = sets
            .iter()
            .flat_map(|set| (0..set.rows.len()).map(|row| set.rows.places(row)));
        let longest = longest.max().unwrap_or(0);
        assert!(
            longest <= sequence_len,
            "a row of {longest} places does not fit {sequence_len}"
        );
        let drawn = |set: &Weighted| u128::from(set.passes) * set.rows.len() as u128;
        let rows = sets.iter().map(drawn).sum();
        if rows > MOST_ROWS {
            return Err(RowError::TooManyRows { rows });
        }
        let mut sampler = Self {
            sets,
            sequence_len,
            is_packed,
            seed,
            first: FirstEpoch::default(),
            epochs: Arc::default(),
        };
        sampler.first = sampler.sums(&sampler.epoch(0));
        Ok(sampler)
    }

    fn sums(&self, epoch: &Epoch) -> FirstEpoch {
        let mut sums = FirstEpoch {
            rows: epoch.rows.len() as u64,
            sequences: epoch.bins.len() as u64,
            ..FirstEpoch::default()
        };
        for place in 0..sums.sequences {
            let mut width = 0;
            for (set, row) in epoch.sequence(place) {
                let rows = &self.sets[set].rows;
                width += rows.places(row);
                sums.targets += rows.targets(row) as u64;
            }
            sums.places += width as u64;
            sums.widest = sums.widest.max(width);
        }
        sums
    }

    /// Sequences of the first epoch. Of later ones there are as many, or a few more or less where a
    /// dataset's weight is a fraction.
    pub fn sequences_per_epoch(&self) -> u64 {
        self.first.sequences
    }

    /// Predictions of the first epoch that count.
    pub fn targets_per_epoch(&self) -> u64 {
        self.first.targets
    }

    /// Places of the first epoch's sequences that rows take.
    pub fn places_per_epoch(&self) -> u64 {
        self.first.places
    }

    /// Rows of the first epoch.
    pub fn rows_per_epoch(&self) -> u64 {
        self.first.rows
    }

    /// Columns of the widest batch.
    pub fn widest(&self) -> usize {
        // Of another part of the rows, another sequence may be the fullest.
        let has_fractions = self.sets.iter().any(|set| set.more > 0);
        if has_fractions || self.is_packed {
            return self.sequence_len;
        }
        columns(self.first.widest, self.sequence_len)
    }

    /// The rows of a sequence of the run, as dataset and row.
    pub fn sequence(&self, number: u64) -> Vec<(usize, usize)> {
        let (epoch, place) = self.locate(number);
        epoch.sequence(place).collect()
    }

    /// Sequences `first..first + rows` of the run, as wide as the fullest of them needs: columns are
    /// a multiple of 16, and at most `sequence_len`.
    pub fn batch(&self, first: u64, rows: usize) -> Batch {
        let sequences = (first..first + rows as u64).map(|number| {
            let rows = self.sequence(number).into_iter();
            rows.map(|(set, row)| (&self.sets[set].rows, row)).collect()
        });
        batch_of(&sequences.collect::<Vec<_>>(), self.sequence_len)
    }

    /// The epoch of a sequence, and its place there.
    fn locate(&self, number: u64) -> (Arc<Epoch>, u64) {
        let has_fractions = self.sets.iter().any(|set| set.more > 0);
        if !has_fractions {
            let sequences = self.first.sequences;
            return (self.epoch(number / sequences), number % sequences);
        }
        let mut index = 0;
        loop {
            let start = self.start(index);
            let end = self.start(index + 1);
            if number < end {
                return (self.epoch(index), number - start);
            }
            index += 1;
        }
    }

    /// First sequence of an epoch; that of the one before has to be known.
    fn start(&self, epoch: u64) -> u64 {
        let known = self.lock().starts.get(epoch as usize).copied();
        known.unwrap_or_else(|| {
            let start = match epoch.checked_sub(1) {
                None => 0,
                Some(before) => self.start(before) + self.epoch(before).bins.len() as u64,
            };
            let mut epochs = self.lock();
            if epochs.starts.len() as u64 == epoch {
                epochs.starts.push(start);
            }
            start
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Epochs> {
        // What is behind it is only ever replaced as a whole.
        self.epochs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn epoch(&self, number: u64) -> Arc<Epoch> {
        let mut epochs = self.lock();
        if let Some((current, epoch)) = &epochs.current
            && *current == number
        {
            return epoch.clone();
        }
        let epoch = Arc::new(self.plan(number));
        epochs.current = Some((number, epoch.clone()));
        epoch
    }

    fn plan(&self, number: u64) -> Epoch {
        let mut drawn = Vec::new();
        for (index, set) in self.sets.iter().enumerate() {
            let count = set.rows.len() as u64;
            for _ in 0..set.passes {
                drawn.extend((0..count).map(|row| (index as u32, row as u32)));
            }
            let part = Permutation::new(count, &mut self.rng(Purpose::Dataset(index), number));
            drawn.extend((0..set.more).map(|slot| (index as u32, part.apply(slot) as u32)));
        }
        let order = Permutation::new(drawn.len() as u64, &mut self.rng(Purpose::Rows, number));
        let places = 0..drawn.len() as u64;
        let rows: Vec<(u32, u32)> = places.map(|at| drawn[order.apply(at) as usize]).collect();
        let bins = if self.is_packed {
            let size = |&(set, row): &(u32, u32)| self.sets[set as usize].rows.places(row as usize);
            let sizes: Vec<usize> = rows.iter().map(size).collect();
            Bins::packed(&sizes, self.sequence_len)
        } else {
            Bins::singles(rows.len())
        };
        let mut rng = self.rng(Purpose::Sequences, number);
        Epoch {
            order: Permutation::new(bins.len() as u64, &mut rng),
            rows,
            bins,
        }
    }

    fn rng(&self, purpose: Purpose, counter: u64) -> ChaCha8Rng {
        let purpose: u64 = match purpose {
            Purpose::Rows => 0,
            Purpose::Sequences => 1,
            Purpose::Dataset(index) => 2 + index as u64,
        };
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&purpose.to_le_bytes());
        key[16..].copy_from_slice(b"firebrick rows\0\0");
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(counter);
        rng
    }
}

/// Every row once, `rows` sequences at a time, packed into `room` places or what the longest row
/// takes: for validation. Which rows share a sequence changes nothing about their losses.
pub(super) fn eval_batches(
    set: &RowSet,
    room: usize,
    rows: usize,
) -> impl Iterator<Item = Batch> + '_ {
    let sizes: Vec<usize> = (0..set.len()).map(|row| set.places(row)).collect();
    let sequence_len = sizes.iter().copied().fold(room, usize::max);
    let bins = Bins::packed(&sizes, sequence_len);
    (0..bins.len()).step_by(rows.max(1)).map(move |first| {
        let end = bins.len().min(first + rows.max(1));
        let sequences: Vec<Vec<(&RowSet, usize)>> = (first..end)
            .map(|bin| {
                bins.get(bin)
                    .iter()
                    .map(|&row| (set, row as usize))
                    .collect()
            })
            .collect();
        batch_of(&sequences, sequence_len)
    })
}

/// Rows as sequences of a batch.
pub(super) fn batch_of(sequences: &[Vec<(&RowSet, usize)>], sequence_len: usize) -> Batch {
    let places =
        |rows: &Vec<(&RowSet, usize)>| rows.iter().map(|(set, row)| set.places(*row)).sum();
    let longest: usize = sequences.iter().map(places).max().unwrap_or(0);
    let cols = columns(longest, sequence_len);
    let mut batch = Batch {
        rows: sequences.len(),
        cols,
        tokens: Vec::with_capacity(sequences.len() * cols),
        targets: Vec::with_capacity(sequences.len() * cols),
        weights: Vec::with_capacity(sequences.len() * cols),
        segment_ids: Vec::with_capacity(sequences.len() * cols),
        positions: Vec::with_capacity(sequences.len() * cols),
    };
    for (index, rows) in sequences.iter().enumerate() {
        for (segment, (set, row)) in rows.iter().enumerate() {
            push_row(&mut batch, set, *row, segment as u32);
        }
        // Padding is a segment of its own, which nothing attends to and nothing is trained on.
        let padding = (index + 1) * cols - batch.tokens.len();
        batch.tokens.extend(std::iter::repeat_n(0, padding));
        batch.targets.extend(std::iter::repeat_n(0, padding));
        batch.weights.extend(std::iter::repeat_n(0.0, padding));
        batch
            .segment_ids
            .extend(std::iter::repeat_n(rows.len() as u32, padding));
        batch.positions.extend(0..padding as u32);
    }
    batch
}

/// Columns of a batch whose fullest sequence takes so many places.
pub(super) fn columns(longest: usize, sequence_len: usize) -> usize {
    let rounded = longest.max(1).next_multiple_of(COLUMNS);
    rounded.min(sequence_len.max(longest))
}

fn push_row(batch: &mut Batch, set: &RowSet, row: usize, segment: u32) {
    let tokens = set.tokens(row);
    let places = tokens.len().saturating_sub(1);
    let start = batch.weights.len();
    batch.tokens.extend(&tokens[..places]);
    batch.targets.extend(&tokens[tokens.len() - places..]);
    batch.weights.extend(std::iter::repeat_n(0.0, places));
    for span in set.trained(row) {
        // The target at a place is the token after it.
        let targets = span.start.max(1) - 1..span.end - 1;
        batch.weights[start + targets.start..start + targets.end].fill(1.0);
    }
    batch
        .segment_ids
        .extend(std::iter::repeat_n(segment, places));
    batch.positions.extend(0..places as u32);
}
