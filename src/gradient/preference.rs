//! Direct preference optimisation (Rafailov et al., 2023): from pairs of answers, without a reward
//! model.
//!
//! With the log-probability of an answer y to x under the model, log p(y), and under the reference,
//! log q(y), the reward of an answer is r(y) = beta (log p(y) - log q(y)), and the loss of a pair is
//! -log sigmoid(z) of z = r(chosen) - r(rejected), section 4. With label smoothing e the labels are
//! taken to be wrong with that probability (Mitchell, 2023): -(1 - e) log sigmoid(z) - e log
//! sigmoid(-z).
//!
//! The gradient is that of weighted cross-entropy: the tokens of each answer have one weight, the
//! derivative of the loss with respect to the answer's nats, which is known once both answers have
//! been seen. So the output head is passed through twice, once for z and once for the gradient.

use burn::tensor::FloatDType;
use rayon::prelude::*;

use super::Gradient;
use super::backward::{Precision, computing, shares};
use super::share::{Reweigh, by_block, whole};
use crate::config::DpoConfig;
use crate::data::Batch;
use crate::device::lanes;
use crate::model::{Decoder, Dropout, ModelError};

/// What turns answers into a loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preference {
    /// How far the model may move from the reference: the smaller, the farther.
    pub beta: f64,
    /// Probability that the worse answer was marked as the better.
    pub label_smoothing: f64,
}

impl From<&DpoConfig> for Preference {
    fn from(dpo: &DpoConfig) -> Self {
        Self {
            beta: dpo.beta,
            label_smoothing: dpo.label_smoothing,
        }
    }
}

/// What one optimizer step needs to know about its pairs.
#[derive(Debug)]
pub struct PreferenceBackward {
    /// Σ loss over all pairs.
    pub nats: f64,
    /// Number of pairs.
    pub pairs: f64,
    /// Pairs whose chosen answer has the larger reward.
    pub won: f64,
    /// Σ r(chosen) - r(rejected).
    pub margin: f64,
    /// Gradient of nats / pairs.
    pub gradient: Gradient,
}

impl PreferenceBackward {
    /// Mean loss of a pair; ln 2 where the model is the reference.
    pub fn loss(&self) -> f64 {
        self.nats / self.pairs
    }
}

/// The loss of a pair with the margin z, and its derivative.
fn loss_of(z: f64, smoothing: f64) -> (f64, f64) {
    // log(1 + e^-z) without overflow.
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let loss = (1.0 - smoothing) * softplus(-z) + smoothing * softplus(z);
    let slope = smoothing * sigmoid(z) - (1.0 - smoothing) * sigmoid(-z);
    (loss, slope)
}

/// What the pairs of one share come to.
#[derive(Debug, Default, Clone, Copy)]
struct Score {
    nats: f64,
    won: f64,
    margin: f64,
}

impl Preference {
    /// Scores the pairs whose answers take so many nats under model and reference, row `2 i` the
    /// chosen one; with the weight of each row in the gradient.
    fn score(&self, model: &[f64], reference: &[f64]) -> (Score, Vec<f64>) {
        let mut score = Score::default();
        let mut weights = Vec::with_capacity(model.len());
        for (model, reference) in model.chunks_exact(2).zip(reference.chunks_exact(2)) {
            let reward = |i: usize| self.beta * (reference[i] - model[i]);
            let z = reward(0) - reward(1);
            let (loss, slope) = loss_of(z, self.label_smoothing);
            score.nats += loss;
            score.won += f64::from(u8::from(z > 0.0));
            score.margin += z;
            // A nat more of the chosen answer lowers z by beta.
            weights.extend([-self.beta * slope, self.beta * slope]);
        }
        (score, weights)
    }
}

/// Runs `model` (on an autodiff device) forward and backward over the pairs of one step, whose row
/// `2 i` is the chosen answer of pair `i` and row `2 i + 1` the rejected one. `reference` is on the
/// plain device and takes no part in training; it is computed in the precision's dtype, which costs
/// nothing where it is in that already.
///
/// # Errors
/// A sequence longer than the model's learned positions.
///
/// # Panics
/// If a batch has an odd number of rows.
pub fn backward_preference(
    model: &Decoder,
    reference: &Decoder,
    batches: &[Batch],
    (preference, precision): (Preference, Precision),
) -> Result<PreferenceBackward, ModelError> {
    assert!(
        batches.iter().all(|batch| batch.rows % 2 == 0),
        "rows come in pairs"
    );
    let pairs: f64 = batches.iter().map(|batch| (batch.rows / 2) as f64).sum();
    let mut total = PreferenceBackward {
        nats: 0.0,
        pairs,
        won: 0.0,
        margin: 0.0,
        gradient: Gradient::default(),
    };
    let compute = computing(model, precision);
    let reference = reference.clone().cast(precision.dtype);
    let lanes = lanes(&model.device());
    let mut first = 0;
    for batch in batches {
        let shares: Vec<(Score, Gradient)> = shares(batch.rows / 2, lanes)
            .into_par_iter()
            .map(|pairs| {
                let rows = 2 * pairs.start..2 * pairs.end;
                let dropout = precision.dropout_seed.map(|seed| Dropout {
                    seed,
                    first: first + rows.start as u64,
                    dims: [rows.len(), batch.cols],
                });
                let batch = batch.rows(rows);
                let scale = precision.loss_scale / total.pairs;
                share(
                    &compute,
                    &reference,
                    &batch,
                    (preference, precision),
                    (scale, dropout),
                )
            })
            .collect::<Result<_, _>>()?;
        first += batch.rows as u64;
        for (score, gradient) in shares {
            total.nats += score.nats;
            total.won += score.won;
            total.margin += score.margin;
            total.gradient = total.gradient.accumulate(gradient, model);
        }
    }
    if precision.loss_scale != 1.0 {
        total.gradient = total.gradient.scale(1.0 / precision.loss_scale, model);
    }
    Ok(total)
}

/// Σ loss, won pairs and Σ margin of pairs without a gradient, for evaluation. Both models are on the
/// plain device.
///
/// # Errors
/// As [`backward_preference`].
pub fn evaluate_preference(
    model: &Decoder,
    reference: &Decoder,
    batch: &Batch,
    preference: Preference,
) -> Result<[f64; 3], ModelError> {
    let [model, reference] = [model, reference].map(|model| row_nats(model, batch));
    let (score, _) = preference.score(&model?, &reference?);
    Ok([score.nats, score.won, score.margin])
}

fn share(
    model: &Decoder,
    reference: &Decoder,
    batch: &Batch,
    (preference, precision): (Preference, Precision),
    (scale, dropout): (f64, Option<Dropout>),
) -> Result<(Score, Gradient), ModelError> {
    let reference = row_nats(reference, batch)?;
    // Leaves of its own: shares of one graph would wait for each other.
    let model = model.clone().cast(precision.dtype);
    let mut score = Score::default();
    let mut reweigh = |nats: &[f32], batch: &Batch| {
        let rows = sums(nats, batch.cols);
        let (found, weights) = preference.score(&rows, &reference);
        score = found;
        let cells = batch.weights.iter().enumerate();
        cells
            .map(|(i, weight)| weight * weights[i / batch.cols] as f32)
            .collect()
    };
    let reweigh: Option<&mut Reweigh> = Some(&mut reweigh);
    let (_, gradient) = if precision.gradient_checkpointing {
        by_block(&model, batch, scale, dropout, reweigh)?
    } else {
        whole(&model, batch, scale, dropout, reweigh)?
    };
    Ok((score, gradient.cast(FloatDType::F32, &model)))
}

/// Σ weight · nats of each row.
fn row_nats(model: &Decoder, batch: &Batch) -> Result<Vec<f64>, ModelError> {
    let hidden = model.hidden(batch)?;
    Ok(sums(&model.token_nats(hidden, batch), batch.cols))
}

fn sums(nats: &[f32], cols: usize) -> Vec<f64> {
    let rows = nats.chunks(cols.max(1));
    rows.map(|row| row.iter().map(|&nats| f64::from(nats)).sum())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dpo_losses_are_those_of_the_paper_in_closed_form() {
        let preference = Preference {
            beta: 0.5,
            label_smoothing: 0.0,
        };
        // log p(chosen) = -3, log p(rejected) = -5; log q = -4 for both: z = 0.5 (1 + 1) = 1.
        let (score, weights) = preference.score(&[3.0, 5.0], &[4.0, 4.0]);
        let sigmoid = 1.0 / (1.0 + (-1f64).exp());
        assert!((score.nats - -sigmoid.ln()).abs() < 1e-12);
        assert_eq!((score.won, score.margin), (1.0, 1.0));
        // d loss / d nats(chosen) = beta sigmoid(-z).
        assert!((weights[0] - 0.5 * (1.0 - sigmoid)).abs() < 1e-12);
        assert_eq!(weights[1], -weights[0]);

        let (same, _) = preference.score(&[7.0, 2.0], &[7.0, 2.0]);
        assert!((same.nats - std::f64::consts::LN_2).abs() < 1e-15);

        let smoothed = Preference {
            label_smoothing: 0.2,
            ..preference
        };
        let (score, weights) = smoothed.score(&[3.0, 5.0], &[4.0, 4.0]);
        let expected = -0.8 * sigmoid.ln() - 0.2 * (1.0 - sigmoid).ln();
        assert!((score.nats - expected).abs() < 1e-12);
        let slope = 0.2 * sigmoid - 0.8 * (1.0 - sigmoid);
        assert!((weights[0] - -0.5 * slope).abs() < 1e-12);
    }

    #[test]
    fn dpo_slopes_are_derivatives_and_nothing_overflows() {
        for smoothing in [0.0, 0.1, 0.5] {
            for z in [-3.0, -0.5, 0.0, 0.7, 4.0] {
                let (_, slope) = loss_of(z, smoothing);
                let [up, down] = [z + 1e-5, z - 1e-5].map(|z| loss_of(z, smoothing).0);
                assert!((slope - (up - down) / 2e-5).abs() < 1e-9);
            }
            for z in [-1e4, 1e4] {
                let (loss, slope) = loss_of(z, smoothing);
                assert!(loss.is_finite() && slope.is_finite());
            }
        }
    }
}
