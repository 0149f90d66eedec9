//! Rows as training data, packed into sequences and in a defined order.

use super::{RowCorpus, RowError, RowSampler, RowSet, TrainRows, eval_batches};
use crate::data::{
    Batch, ChatTemplate, DataError, DataView, EpochSize, FileRecord, Segment, Tokenizer,
    TrainingData, ViewSpec,
};
use crate::readable::grouped;

impl TrainingData for RowCorpus {
    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn files(&self) -> &[FileRecord] {
        &self.files
    }

    fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    fn turn_end(&self) -> Option<u32> {
        self.turn_end
    }

    fn train_tokens(&self) -> u64 {
        Self::train_tokens(self)
    }

    fn val_tokens(&self) -> Option<u64> {
        Some(self.val.as_ref()?.token_count())
    }

    fn val_bytes(&self) -> u64 {
        self.val_bytes
    }

    fn token_bytes(&self) -> u64 {
        Self::token_bytes(self)
    }

    fn view(&self, spec: &ViewSpec) -> Result<Box<dyn DataView>, DataError> {
        let sets = self.train.iter().zip(&spec.weights);
        let train: Vec<TrainRows> = sets
            .map(|(set, &weight)| TrainRows {
                weight,
                ..set.clone()
            })
            .collect();
        check_length(train.iter().map(|set| &set.rows), spec.sequence_len)?;
        let sampler = RowSampler::new(&train, spec.sequence_len, spec.is_packed, spec.seed)?;
        Ok(Box::new(RowView {
            sampler,
            train,
            val: self.val.clone(),
            spec: spec.clone(),
        }))
    }
}

/// Checks that every row fits into a sequence: rows were read for sequences of one length, and
/// shorter ones may not hold them.
pub(super) fn check_length<'a>(
    sets: impl Iterator<Item = &'a RowSet>,
    sequence_len: usize,
) -> Result<(), RowError> {
    let places = sets.flat_map(|set| (0..set.len()).map(|row| set.places(row)));
    match places.max() {
        Some(longest) if longest > sequence_len => Err(RowError::ShorterView {
            longest,
            sequence_len,
        }),
        _ => Ok(()),
    }
}

/// Rows packed into sequences of one length.
#[derive(Debug)]
struct RowView {
    sampler: RowSampler,
    train: Vec<TrainRows>,
    val: Option<RowSet>,
    spec: ViewSpec,
}

impl DataView for RowView {
    fn batch(&self, first: u64, count: usize) -> Batch {
        self.sampler.batch(first, count)
    }

    fn sequence(&self, number: u64) -> Vec<Segment> {
        let rows = self.sampler.sequence(number).into_iter();
        rows.map(|(set, row)| segment(&self.train[set].rows, row))
            .collect()
    }

    fn epoch(&self) -> EpochSize {
        EpochSize {
            sequences: self.sampler.sequences_per_epoch(),
            targets: self.sampler.targets_per_epoch(),
        }
    }

    fn eval_batches(&self, count: usize) -> Option<Box<dyn Iterator<Item = Batch> + '_>> {
        let val = self.val.as_ref()?;
        let room = self.sampler.widest().min(self.spec.sequence_len);
        Some(Box::new(eval_batches(val, room, count)))
    }

    fn widest(&self) -> usize {
        self.sampler.widest()
    }

    /// For example "packing: 7,000 rows in 2,100 sequences of up to 512 tokens, 98.3 % full".
    fn note(&self) -> Option<String> {
        let (sampler, sequence_len) = (&self.sampler, self.spec.sequence_len);
        let rows = grouped(sampler.rows_per_epoch());
        let sequences = sampler.sequences_per_epoch();
        if !self.spec.is_packed {
            return Some(format!(
                "no packing: {rows} rows per epoch, one in each sequence"
            ));
        }
        let full = sampler.places_per_epoch() as f64 / (sequences * sequence_len as u64) as f64;
        Some(format!(
            "packing: {rows} rows per epoch in {} sequences of {sequence_len} tokens, {:.1} % full",
            grouped(sequences),
            100.0 * full,
        ))
    }
}

/// A row as a segment, for display.
pub(super) fn segment(rows: &RowSet, row: usize) -> Segment {
    let tokens = rows.tokens(row);
    let mut trained = vec![false; tokens.len()];
    for span in rows.trained(row) {
        trained[span].fill(true);
    }
    if let Some(first) = trained.first_mut() {
        *first = false;
    }
    Segment {
        place: Some(rows.place(row)),
        tokens,
        trained,
    }
}
