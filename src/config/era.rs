//! The entropy-regularising activation of the logits: which values it can have, and what they cost.

use serde::Serialize;

/// ERA, an activation after the output head that keeps the entropy of the next token above a bound
/// (Kang et al., 2025, "ERA: Expressive Regularization via Entropy-based Activation", the discrete
/// form with its approximation of Lambert's W).
///
/// For logits z of a vocabulary of n tokens, with C = exp(min_entropy - 1), m = ln 4 / 4,
/// slope = (m - C / n) / (1 - 1 / n) and offset = (C - slope) / n:
///
/// h = slope · softmax(z) + offset, u = -1 - ln h, z' = -1 - sqrt(2 u) - 0.75 u
///
/// h is the share of each token in the entropy, and z' the logit of a token with that share.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EraOutput {
    /// The bound on the entropy, in nats.
    pub min_entropy: f64,
}

/// What the formula is made of for one vocabulary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Constants {
    /// By which a probability is multiplied.
    pub slope: f64,
    /// What is added to it.
    pub offset: f64,
}

/// The largest share of one token in the entropy: ln τ / τ with τ = 4.
const LARGEST_SHARE: f64 = 0.346_573_590_279_972_64;

impl EraOutput {
    /// The bounds between which `min_entropy` has to be for a vocabulary of `n` tokens: outside them
    /// a larger probability would not have a larger logit, or a share would not be above 0.
    pub fn limits(n: usize) -> [f64; 2] {
        [
            1.0 + LARGEST_SHARE.ln(),
            1.0 + (n as f64 * LARGEST_SHARE).ln(),
        ]
    }

    /// The numbers of the formula for a vocabulary of `n` tokens; None if `min_entropy` is not
    /// between its [`limits`](Self::limits).
    pub fn constants(self, n: usize) -> Option<Constants> {
        let [low, high] = Self::limits(n);
        if !(low < self.min_entropy && self.min_entropy < high) {
            return None;
        }
        let (n, total) = (n as f64, (self.min_entropy - 1.0).exp());
        let slope = (LARGEST_SHARE - total / n) / (1.0 - 1.0 / n);
        Some(Constants {
            slope,
            offset: (total - slope) / n,
        })
    }

    /// The lowest cross-entropy, in nats per token, that any logits can have: that of a softmax
    /// with all its weight on the right token. None as for [`constants`](Self::constants).
    pub fn least_loss(self, n: usize) -> Option<f64> {
        let Constants { slope, offset } = self.constants(n)?;
        let others = (logit(offset) - logit(slope + offset)).exp();
        Some((others * (n - 1) as f64).ln_1p())
    }
}

/// z' of h.
fn logit(share: f64) -> f64 {
    let u = -1.0 - share.ln();
    -1.0 - (2.0 * u).sqrt() - 0.75 * u
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_token_has_the_largest_share_and_shares_add_up() {
        for (min_entropy, n) in [(0.5, 65), (1.0, 1024), (3.0, 50_000)] {
            let Constants { slope, offset } = EraOutput { min_entropy }.constants(n).unwrap();
            assert!((slope + offset - LARGEST_SHARE).abs() < 1e-12);
            // Probabilities add up to 1.
            let total = slope + n as f64 * offset;
            assert!((total - (min_entropy - 1.0).exp()).abs() < 1e-12);
            assert!(slope > 0.0 && offset > 0.0);
        }
    }

    #[test]
    fn a_bound_outside_its_limits_has_no_formula() {
        let [low, high] = EraOutput::limits(65);
        for min_entropy in [low, high, low - 1.0, high + 1.0, f64::NAN] {
            assert_eq!(EraOutput { min_entropy }.constants(65), None);
        }
        let inside = EraOutput {
            min_entropy: (low + high) / 2.0,
        };
        assert!(inside.constants(65).is_some());
    }

    /// A loss below the least one cannot be had, and the entropy of that distribution is not below
    /// the bound by more than the approximation's error.
    #[test]
    fn the_least_loss_is_that_of_the_surest_logits() {
        for (min_entropy, n) in [(0.5, 65), (1.0, 1024), (3.0, 50_000)] {
            let era = EraOutput { min_entropy };
            let Constants { slope, offset } = era.constants(n).unwrap();
            let others = (logit(offset) - logit(slope + offset)).exp();
            let sum = 1.0 + others * (n - 1) as f64;
            let (right, wrong) = (1.0 / sum, others / sum);
            assert!((era.least_loss(n).unwrap() + right.ln()).abs() < 1e-9);
            let entropy = -right * right.ln() - (n - 1) as f64 * wrong * wrong.ln();
            assert!(entropy > 0.9 * min_entropy, "{entropy} {min_entropy}");
        }
    }
}
