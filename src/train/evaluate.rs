//! Validation: the mean loss over the whole split, every token but the first predicted once.

use burn::module::Module;
use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize};

use super::run::Trainer;
use super::{Event, TrainError};
use crate::checkpoint::BestEvaluation;
use crate::data::{Batch, TokenStream, eval_batches};
use crate::device::lanes;
use crate::generate::{GenerateError, Sampling, TextRequest, complete};
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

impl Trainer {
    pub(super) fn evaluate_if_due(
        &mut self,
        model: &Decoder,
    ) -> Result<Option<Evaluation>, TrainError> {
        if self.is_due(self.plan.config.eval.eval_steps) {
            self.evaluate(model)
        } else {
            Ok(None)
        }
    }

    /// Measures the validation split and completes the sample prompts.
    pub(super) fn evaluate(&mut self, model: &Decoder) -> Result<Option<Evaluation>, TrainError> {
        // Off the autodiff device: a tracked forward without a backward keeps its graph for good.
        let model = model.valid().for_inference().cast(self.dtype);
        let step = self.progress.step;
        let mut result = None;
        let config = &self.plan.config;
        // All lanes together hold as much as a training step does.
        let lanes = lanes(&model.device());
        let rows = config.train.micro_batch_size.div_ceil(lanes);
        let seq = config.data.sequence_len;
        let batches = self.feed.eval_batches(seq, rows);
        let measured = batches
            .map(|batches| match self.preference() {
                Some((preference, reference)) => {
                    evaluate_pairs([&model, reference], batches, preference)
                }
                None => evaluate_batches(&model, batches, self.feed.val_bytes()),
            })
            .transpose()?;
        if let Some(evaluation) = measured {
            let val_loss = evaluation.val_loss;
            let lower = |best: BestEvaluation| val_loss < best.val_loss;
            let best = val_loss.is_finite() && self.progress.best.is_none_or(lower);
            self.progress.val_loss = Some(val_loss);
            self.progress.evaluations_since_best += 1;
            if best {
                self.progress.best = Some(BestEvaluation { step, val_loss });
                self.progress.evaluations_since_best = 0;
            }
            self.tell(&Event::Evaluated {
                step,
                evaluation,
                best,
            })?;
            result = Some(evaluation);
        }
        for prompt in self.plan.config.eval.sample_prompts.clone() {
            // What cannot be shown is no reason to lose what has been trained.
            let event = match self.sample(&model, &prompt) {
                Ok(completion) => Event::Sample {
                    step,
                    prompt,
                    completion,
                },
                Err(error) => Event::Note {
                    text: format!("warning: no sample of {prompt:?}: {error}"),
                },
            };
            self.tell(&event)?;
        }
        Ok(result)
    }

    fn sample(&self, model: &Decoder, prompt: &str) -> Result<String, GenerateError> {
        let eval = &self.plan.config.eval;
        let sampling = Sampling {
            temperature: eval.sample_temperature,
            ..Sampling::default()
        };
        let prompt = self.feed.prompt(prompt)?;
        let request = TextRequest {
            prompt: &prompt,
            max_new_tokens: eval.sample_tokens,
            sampling,
            seed: self.plan.config.seed,
            stop: &[],
        };
        Ok(complete(model, self.feed.tokenizer(), &request, |_| {})?.0)
    }
}
