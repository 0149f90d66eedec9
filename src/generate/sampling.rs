//! Choosing the next token from its logits.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// How the next token is chosen. The default takes the most likely one.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 = always the most likely token.
    pub temperature: f64,
    /// Keep only the k most likely tokens; 0 = all.
    pub top_k: usize,
    /// Keep the fewest most likely tokens whose probabilities reach this sum; 1 = all
    /// (Holtzman et al., 2020).
    pub top_p: f64,
    /// Drop tokens less likely than this share of the most likely one; 0 = none.
    pub min_p: f64,
    /// Divides the positive and multiplies the negative logits of tokens already in the text;
    /// 1 = off (Keskar et al., 2019, section 4.1).
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

/// The state of a choice: settings and a random stream of its own.
pub(super) struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    pub(super) fn new(sampling: &Sampling, seed: u64) -> Self {
        Self {
            sampling: sampling.clone(),
            rng: ChaCha8Rng::seed_from_u64(seed),
        }
    }

    /// The token after `text`; none when a logit is not a number.
    pub(super) fn next(&mut self, logits: &[f32], text: &[u32]) -> Option<u32> {
        let mut candidates: Vec<(u32, f64)> = (0u32..)
            .zip(logits)
            .map(|(id, &logit)| (id, f64::from(logit)))
            .collect();
        penalise(&mut candidates, text, self.sampling.repetition_penalty);
        let best = candidates
            .iter()
            .map(|&(_, logit)| logit)
            .fold(f64::NEG_INFINITY, f64::max);
        if !best.is_finite() || candidates.iter().any(|(_, logit)| logit.is_nan()) {
            return None;
        }
        // Ties go to the smaller id, so that the choice does not depend on the sort.
        let by_likelihood =
            |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if self.sampling.temperature == 0.0 {
            return candidates
                .iter()
                .copied()
                .min_by(by_likelihood)
                .map(|(id, _)| id);
        }
        if self.sampling.top_k > 0 && self.sampling.top_k < candidates.len() {
            candidates.select_nth_unstable_by(self.sampling.top_k - 1, by_likelihood);
            candidates.truncate(self.sampling.top_k);
        }
        candidates.sort_unstable_by(by_likelihood);
        for (_, logit) in &mut candidates {
            *logit = ((*logit - best) / self.sampling.temperature).exp();
        }
        // Weights are now relative to the most likely token's, which is 1.
        candidates.retain(|&(_, weight)| weight >= self.sampling.min_p);
        keep_top_p(&mut candidates, self.sampling.top_p);
        Some(self.draw(&candidates))
    }

    fn draw(&mut self, candidates: &[(u32, f64)]) -> u32 {
        let total: f64 = candidates.iter().map(|&(_, weight)| weight).sum();
        let mut left = self.rng.random::<f64>() * total;
        for &(id, weight) in candidates {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        // Rounding can leave a sliver past the last candidate. There is always a first one: the
        // most likely token has weight 1 and no filter drops it.
        candidates[candidates.len() - 1].0
    }
}

/// Each token of the text is made less likely once, however often it occurs.
fn penalise(candidates: &mut [(u32, f64)], text: &[u32], penalty: f64) {
    if penalty == 1.0 {
        return;
    }
    let distinct: std::collections::BTreeSet<u32> = text.iter().copied().collect();
    for id in distinct {
        if let Some((_, logit)) = candidates.get_mut(id as usize) {
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
        }
    }
}

/// Cuts descending weights after the first that brings the sum to the share `top_p`.
fn keep_top_p(candidates: &mut Vec<(u32, f64)>, top_p: f64) {
    let total: f64 = candidates.iter().map(|&(_, weight)| weight).sum();
    let mut sum = 0.0;
    let reached = candidates.iter().position(|&(_, weight)| {
        sum += weight;
        sum >= top_p * total
    });
    if let Some(last) = reached {
        candidates.truncate(last + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 2.0, 1.0, 2.0, -1.0];

    fn seen(sampling: Sampling) -> std::collections::BTreeMap<u32, usize> {
        let mut sampler = Sampler::new(&sampling, 7);
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..20_000 {
            *counts
                .entry(sampler.next(&LOGITS, &[]).unwrap())
                .or_default() += 1;
        }
        counts
    }

    fn at(temperature: f64) -> Sampling {
        Sampling {
            temperature,
            ..Sampling::default()
        }
    }

    #[test]
    fn i2_greedy_takes_the_first_of_the_most_likely() {
        assert_eq!(Sampler::new(&at(0.0), 0).next(&LOGITS, &[]), Some(1));
    }

    #[test]
    fn i2_frequencies_follow_the_softmax_at_the_temperature() {
        let weights: Vec<f64> = LOGITS.iter().map(|&l| (f64::from(l) / 0.7).exp()).collect();
        let total: f64 = weights.iter().sum();
        let counts = seen(at(0.7));
        for (id, weight) in (0..).zip(&weights) {
            let share = counts[&id] as f64 / 20_000.0;
            assert!(
                (share - weight / total).abs() < 0.01,
                "{id}: {share} {}",
                weight / total
            );
        }
    }

    #[test]
    fn i2_top_k_top_p_and_min_p_drop_the_unlikely() {
        let kept = |sampling: Sampling| seen(sampling).into_keys().collect::<Vec<_>>();
        assert_eq!(
            kept(Sampling {
                top_k: 2,
                ..at(1.0)
            }),
            [1, 3]
        );
        assert_eq!(
            kept(Sampling {
                top_k: 3,
                ..at(1.0)
            }),
            [1, 2, 3]
        );
        // Shares: 0.39, 0.39, 0.14, 0.05, 0.02.
        assert_eq!(
            kept(Sampling {
                top_p: 0.3,
                ..at(1.0)
            }),
            [1]
        );
        assert_eq!(
            kept(Sampling {
                top_p: 0.8,
                ..at(1.0)
            }),
            [1, 2, 3]
        );
        assert_eq!(
            kept(Sampling {
                min_p: 0.5,
                ..at(1.0)
            }),
            [1, 3]
        );
    }

    #[test]
    fn i2_a_repetition_penalty_makes_every_seen_token_less_likely() {
        let penalised = Sampling {
            repetition_penalty: 2.0,
            ..at(0.0)
        };
        let mut sampler = Sampler::new(&penalised, 0);
        assert_eq!(sampler.next(&LOGITS, &[1, 1, 1]), Some(3));
        assert_eq!(sampler.next(&LOGITS, &[1, 3]), Some(1));
        assert_eq!(sampler.next(&[-1.0, -1.5], &[0]), Some(1));
    }

    #[test]
    fn i2_the_same_seed_gives_the_same_tokens() {
        assert_eq!(seen(at(1.0)), seen(at(1.0)));
    }

    #[test]
    fn logits_that_are_not_numbers_give_no_token() {
        assert_eq!(Sampler::new(&at(1.0), 0).next(&[0.0, f32::NAN], &[]), None);
        assert_eq!(Sampler::new(&at(0.0), 0).next(&[], &[]), None);
        let overflowing = Sampling {
            repetition_penalty: 1e-308,
            min_p: 0.1,
            ..at(1.0)
        };
        let wild = Sampler::new(&overflowing, 0).next(&[1e10, 1.0], &[0]);
        assert_eq!(wild, None);
    }
}
