//! Computes the mean loss and the other metrics of an objective over a whole validation split.

use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize};

use super::{CrossEntropy, Metrics, Objective, Sums};
use crate::collective::{Collective, CollectiveError};
use crate::data::{Batch, TokenStream, eval_batches};
use crate::device::lanes;
use crate::model::{Decoder, ModelError};

/// The result of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The mean loss, in the objective's unit.
    #[serde(deserialize_with = "nan_if_null")]
    pub val_loss: f64,
    /// Trained tokens that were predicted.
    #[serde(skip)]
    pub tokens: u64,
    /// The other metrics of the objective.
    #[serde(flatten)]
    pub metrics: Metrics,
}

/// Reads null as NaN: JSON has no NaN, so a number that is not finite is written as null.
fn nan_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Option::deserialize(deserializer).map(|number| number.unwrap_or(f64::NAN))
}

/// Evaluates `model` (on a plain device) on batches, whose trained tokens stand for `bytes` UTF-8
/// bytes of text.
///
/// # Errors
/// Any error of the model about a batch, such as a sequence that is longer than its learned
/// positions.
pub fn evaluate(
    model: &Decoder,
    objective: &dyn Objective,
    batches: impl Iterator<Item = Batch>,
    bytes: u64,
) -> Result<Evaluation, ModelError> {
    let (sums, counts) = measure(model, objective, batches)?;
    Ok(evaluation(objective, &sums, counts, bytes))
}

/// The same on several ranks, each of which evaluates its share of the batches. All ranks get the
/// same result, which differs from that of one rank in the rounding of sums.
///
/// # Errors
/// As [`evaluate`], and those of the exchange.
pub fn evaluate_together(
    model: &Decoder,
    objective: &dyn Objective,
    batches: impl Iterator<Item = Batch>,
    bytes: u64,
    collective: &dyn Collective,
) -> Result<Evaluation, EvaluateError> {
    let (rank, ranks) = (collective.rank(), collective.ranks());
    let own = batches.skip(rank).step_by(ranks);
    let (mut sums, mut counts) = measure(model, objective, own)?;
    collective.sum(std::slice::from_mut(&mut sums.loss))?;
    // A rank without a batch does not know how many sums there are.
    let mut many = vec![0.0; ranks];
    many[rank] = sums.others.len() as f64;
    collective.sum(&mut many)?;
    let others = many.iter().fold(0.0f64, |most, many| most.max(*many));
    sums.others.resize(others as usize, 0.0);
    collective.sum(&mut sums.others)?;
    collective.sum(&mut counts)?;
    Ok(evaluation(objective, &sums, counts, bytes))
}

/// Why several ranks could not evaluate a model.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// The model refuses a batch.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An exchange between ranks failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

/// The sums over batches, their weight and their trained tokens.
fn measure(
    model: &Decoder,
    objective: &dyn Objective,
    batches: impl Iterator<Item = Batch>,
) -> Result<(Sums, [f64; 2]), ModelError> {
    let lanes = lanes(&model.device());
    let mut sums = Sums::default();
    let (mut weight, mut tokens) = (0.0, 0.0);
    let mut batches = batches.peekable();
    while batches.peek().is_some() {
        // Evaluates as many batches at a time as the device can take. The sums are added in order,
        // so that the result does not depend on timing.
        let group: Vec<Batch> = batches.by_ref().take(lanes).collect();
        let found: Vec<Sums> = group
            .par_iter()
            .map(|batch| objective.measure(model, batch))
            .collect::<Result<_, _>>()?;
        found.iter().for_each(|found| sums.add(found));
        weight += group
            .iter()
            .map(|batch| objective.weight(batch))
            .sum::<f64>();
        tokens += group.iter().map(Batch::weight).sum::<f64>();
    }
    Ok((sums, [weight, tokens]))
}

fn evaluation(
    objective: &dyn Objective,
    sums: &Sums,
    [weight, tokens]: [f64; 2],
    bytes: u64,
) -> Evaluation {
    Evaluation {
        val_loss: sums.loss / weight,
        tokens: tokens as u64,
        metrics: objective.evaluation_metrics(sums, weight, bytes),
    }
}

/// Evaluates `model` (on a plain device) on `stream` by cross-entropy. `bytes` is the length of the
/// stream's text in UTF-8. The stream is cut into chunks of `sequence_len` + 1 tokens that overlap
/// by one, so that every token but the first is predicted once; `rows` chunks form a batch.
///
/// # Errors
/// A sequence length that exceeds the model's learned positions.
pub fn evaluate_text(
    model: &Decoder,
    stream: &TokenStream,
    bytes: u64,
    sequence_len: usize,
    rows: usize,
) -> Result<Evaluation, ModelError> {
    let batches = eval_batches(stream, sequence_len, rows);
    evaluate(model, &CrossEntropy, batches, bytes)
}
