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

use std::borrow::Cow;

use super::passes::{Reweigh, forward_backward};
use super::{MetricSpec, Metrics, Objective, ObjectiveSpec, ShardPass, Sums};
use crate::config::DpoConfig;
use crate::data::Batch;
use crate::gradient::Gradient;
use crate::model::{Decoder, ModelError};

/// Mean loss of pairs of answers. In a batch, row `2 i` is the chosen answer of pair `i` and row `2
/// i + 1` the rejected one.
#[derive(Debug, Clone)]
pub struct Preference {
    /// The loss as a function of the rewards of a pair.
    pub loss: PairLoss,
    /// The frozen model that rewards are measured against, on the plain device, in the dtype that
    /// the forward and backward passes compute in.
    pub reference: Decoder,
}

/// The loss of a pair of answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    /// How far the model may move from the reference: the smaller, the farther.
    pub beta: f64,
    /// Probability that the worse answer was marked as the better.
    pub label_smoothing: f64,
}

impl From<&DpoConfig> for PairLoss {
    fn from(dpo: &DpoConfig) -> Self {
        Self {
            beta: dpo.beta,
            label_smoothing: dpo.label_smoothing,
        }
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

/// Sums over the pairs of one or more rows.
#[derive(Debug, Default, Clone, Copy)]
struct Score {
    /// Σ loss.
    nats: f64,
    /// Pairs whose chosen answer has the larger reward.
    won: f64,
    /// Σ r(chosen) - r(rejected).
    margin: f64,
}

impl From<Score> for Sums {
    fn from(score: Score) -> Self {
        Self {
            loss: score.nats,
            others: vec![score.won, score.margin],
        }
    }
}

static STEP: [MetricSpec; 2] = [
    MetricSpec::higher("reward_accuracy", "share of pairs"),
    MetricSpec::higher("reward_margin", "nats"),
];
static EVALUATION: [MetricSpec; 1] = [MetricSpec::higher("val_reward_accuracy", "share of pairs")];

impl Preference {
    /// The names and units of the numbers that the objective measures.
    pub const SPEC: ObjectiveSpec = ObjectiveSpec {
        name: Cow::Borrowed("dpo"),
        loss_unit: Cow::Borrowed("nats per pair"),
        step: Cow::Borrowed(&STEP),
        evaluation: Cow::Borrowed(&EVALUATION),
    };
}

impl Objective for Preference {
    fn spec(&self) -> ObjectiveSpec {
        Self::SPEC
    }

    /// The number of pairs.
    fn weight(&self, batch: &Batch) -> f64 {
        (batch.rows / 2) as f64
    }

    fn rows_together(&self) -> usize {
        2
    }

    fn shard(
        &self,
        model: &Decoder,
        batch: &Batch,
        pass: &ShardPass,
    ) -> Result<(Sums, Gradient), ModelError> {
        let reference = row_nats(&self.reference, batch)?;
        let mut score = Score::default();
        let mut reweigh = |nats: &[f32], batch: &Batch| {
            let rows = sums(nats, batch.cols);
            let (found, weights) = self.loss.score(&rows, &reference);
            score = found;
            let cells = batch.weights.iter().enumerate();
            cells
                .map(|(i, weight)| weight * weights[i / batch.cols] as f32)
                .collect()
        };
        let reweigh: Option<&mut Reweigh> = Some(&mut reweigh);
        let (_, gradient) = forward_backward(model, batch, pass, reweigh)?;
        Ok((score.into(), gradient))
    }

    fn measure(&self, model: &Decoder, batch: &Batch) -> Result<Sums, ModelError> {
        let [model, reference] = [model, &self.reference].map(|model| row_nats(model, batch));
        let (score, _) = self.loss.score(&model?, &reference?);
        Ok(score.into())
    }

    /// The share of pairs whose chosen answer has the larger reward, and the mean margin.
    fn step_metrics(&self, sums: &Sums, weight: f64) -> Metrics {
        Metrics::of(&STEP, sums.others.iter().map(|sum| sum / weight))
    }

    fn evaluation_metrics(&self, sums: &Sums, weight: f64, _bytes: u64) -> Metrics {
        Metrics::of(&EVALUATION, sums.others.iter().map(|sum| sum / weight))
    }
}

impl PairLoss {
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
        let preference = PairLoss {
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

        let smoothed = PairLoss {
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
