//! Validation: the mean loss over the whole split, every token but the first predicted once.

use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize};

use crate::data::{Batch, TokenStream, eval_batches};
use crate::device::lanes;
use crate::gradient::{Preference, evaluate_preference};
use crate::model::{Decoder, ModelError};

/// A validation result.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Nats per token.
    #[serde(deserialize_with = "nan_if_null")]
    pub val_loss: f64,
    /// Bits per UTF-8 byte of the split: comparable between tokenizers.
    #[serde(deserialize_with = "nan_if_null")]
    pub bits_per_byte: f64,
    /// Of pairs of answers, the share whose chosen one is preferred; there `val_loss` is that of a
    /// pair, and bits per byte are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_accuracy: Option<f64>,
    /// Tokens predicted.
    #[serde(skip)]
    pub tokens: u64,
}

/// JSON has no NaN: what is not finite is written as null.
fn nan_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Option::deserialize(deserializer).map(|number| number.unwrap_or(f64::NAN))
}

/// Evaluates `model` (on a plain device) on `stream`, which stands for `bytes` UTF-8 bytes of text,
/// in chunks of `sequence_len` + 1 tokens overlapping by one, `rows` chunks at a time.
///
/// # Errors
/// A sequence length the model has no positions for.
pub fn evaluate(
    model: &Decoder,
    stream: &TokenStream,
    bytes: u64,
    sequence_len: usize,
    rows: usize,
) -> Result<Evaluation, ModelError> {
    evaluate_batches(model, eval_batches(stream, sequence_len, rows), bytes)
}

/// Evaluates `model` (on a plain device) on batches, whose trained tokens stand for `bytes` UTF-8
/// bytes of text.
pub(super) fn evaluate_batches(
    model: &Decoder,
    batches: impl Iterator<Item = Batch>,
    bytes: u64,
) -> Result<Evaluation, ModelError> {
    let lanes = lanes(&model.device());
    let (mut nats, mut tokens) = (0.0, 0.0);
    let mut batches = batches.peekable();
    while batches.peek().is_some() {
        // As many batches at a time as the device takes; added up in order, so that the sum does not depend on timing.
        let group: Vec<Batch> = batches.by_ref().take(lanes).collect();
        let sums: Vec<f32> = group
            .par_iter()
            .map(|batch| model.evaluate(batch).map(|sum| sum.into_scalar::<f32>()))
            .collect::<Result<_, _>>()?;
        nats += sums.into_iter().map(f64::from).sum::<f64>();
        tokens += group.iter().map(Batch::weight).sum::<f64>();
    }
    let bits_per_byte = nats / std::f64::consts::LN_2 / bytes as f64;
    Ok(Evaluation {
        val_loss: nats / tokens,
        bits_per_byte,
        reward_accuracy: None,
        tokens: tokens as u64,
    })
}

/// Evaluates `model` on pairs of answers, against `reference`; both on a plain device.
pub(super) fn evaluate_pairs(
    [model, reference]: [&Decoder; 2],
    batches: impl Iterator<Item = Batch>,
    preference: Preference,
) -> Result<Evaluation, ModelError> {
    let lanes = lanes(&model.device());
    let ([mut nats, mut won], mut pairs, mut tokens) = ([0.0; 2], 0.0, 0.0);
    let mut batches = batches.peekable();
    while batches.peek().is_some() {
        let group: Vec<Batch> = batches.by_ref().take(lanes).collect();
        let scores: Vec<[f64; 3]> = group
            .par_iter()
            .map(|batch| evaluate_preference(model, reference, batch, preference))
            .collect::<Result<_, _>>()?;
        for [loss, wins, _] in scores {
            nats += loss;
            won += wins;
        }
        pairs += group
            .iter()
            .map(|batch| (batch.rows / 2) as f64)
            .sum::<f64>();
        tokens += group.iter().map(Batch::weight).sum::<f64>();
    }
    Ok(Evaluation {
        val_loss: nats / pairs,
        bits_per_byte: f64::NAN,
        reward_accuracy: Some(won / pairs),
        tokens: tokens as u64,
    })
}
