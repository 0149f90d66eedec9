//! The baseline: a smoothed bigram model.
//!
//! A language model that has learned anything beyond which token follows which must have a lower
//! loss than this, on the same tokens and the same split. It is interpolated Kneser-Ney of order
//! two (Chen and Goodman, 1999, section 2.7): with c(v, w) how often w follows v, and N a number of
//! *different* tokens,
//!
//! ```text
//! P(w | v) = max(c(v, w) - D, 0) / c(v)  +  D N(v, .) / c(v) * P(w)
//! P(w)     = max(N(., w) - D, 0) / N(., .)  +  D |{w: N(., w) > 0}| / N(., .) / V
//! ```
//!
//! with D = 0.75. A context never seen falls back to P(w), which gives every token of the
//! vocabulary a share.

use std::collections::HashMap;

use super::TokenStream;

/// What is taken off each count that was seen, for those that were not.
const DISCOUNT: f64 = 0.75;

/// A bigram model of token streams.
#[derive(Debug, Clone)]
pub struct Bigram {
    /// How often the second token follows the first.
    pairs: HashMap<(u32, u32), u64>,
    /// Per first token: how often something follows it, and how many different tokens do.
    contexts: HashMap<u32, (u64, u64)>,
    /// Per second token: how many different tokens it follows.
    continuations: HashMap<u32, u64>,
    vocab_size: usize,
}

impl Bigram {
    /// Counts the pairs of each stream. Pairs do not reach across streams.
    pub fn fit<'a>(streams: impl IntoIterator<Item = &'a TokenStream>, vocab_size: usize) -> Self {
        let mut pairs: HashMap<(u32, u32), u64> = HashMap::new();
        for stream in streams {
            for pair in stream.iter().zip(stream.iter().skip(1)) {
                *pairs.entry(pair).or_default() += 1;
            }
        }
        let mut contexts: HashMap<u32, (u64, u64)> = HashMap::new();
        let mut continuations: HashMap<u32, u64> = HashMap::new();
        for (&(first, second), count) in &pairs {
            let context = contexts.entry(first).or_default();
            context.0 += count;
            context.1 += 1;
            *continuations.entry(second).or_default() += 1;
        }
        Self {
            pairs,
            contexts,
            continuations,
            vocab_size,
        }
    }

    /// Probability that `next` follows `context`.
    pub fn probability(&self, context: u32, next: u32) -> f64 {
        let unigram = self.unigram(next);
        let Some(&(total, kinds)) = self.contexts.get(&context) else {
            return unigram;
        };
        let count = self.pairs.get(&(context, next)).copied().unwrap_or(0);
        let seen = (count as f64 - DISCOUNT).max(0.0);
        (seen + DISCOUNT * kinds as f64 * unigram) / total as f64
    }

    fn unigram(&self, next: u32) -> f64 {
        let uniform = 1.0 / self.vocab_size as f64;
        let kinds = self.pairs.len() as f64;
        if kinds == 0.0 {
            return uniform;
        }
        let count = self.continuations.get(&next).copied().unwrap_or(0);
        let seen = (count as f64 - DISCOUNT).max(0.0);
        (seen + DISCOUNT * self.continuations.len() as f64 * uniform) / kinds
    }

    /// Mean loss per token of a stream in nats: every token but the first is predicted, as in
    /// validation. None if there is nothing to predict.
    pub fn nats_per_token(&self, stream: &TokenStream) -> Option<f64> {
        let targets = stream.len().checked_sub(1).filter(|&targets| targets > 0)?;
        let pairs = stream.iter().zip(stream.iter().skip(1));
        let nats: f64 = pairs
            .map(|(context, next)| -self.probability(context, next).ln())
            .sum();
        Some(nats / targets as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn probabilities_sum_to_one(ids in proptest::collection::vec(0u32..12, 0..80), context in 0u32..14) {
            let model = Bigram::fit([&TokenStream::from_ids(&ids, 14)], 14);
            let sum: f64 = (0..14).map(|next| model.probability(context, next)).sum();
            prop_assert!((sum - 1.0).abs() < 1e-12, "{}", sum);
        }
    }

    /// Tokens 0 1 0 1 0 2, vocabulary 4: pairs 01 twice, 10 twice, 02 once.
    #[test]
    fn a_case_by_hand() {
        let model = Bigram::fit([&TokenStream::from_ids(&[0, 1, 0, 1, 0, 2], 4)], 4);
        // Three kinds of pairs; 0, 1 and 2 each follow one token.
        let seen = (0.25 + 0.75 * 3.0 / 4.0) / 3.0;
        let unseen = (0.75 * 3.0 / 4.0) / 3.0;
        assert!((model.probability(3, 1) - seen).abs() < 1e-15);
        assert!((model.probability(3, 3) - unseen).abs() < 1e-15);
        // After 0: three tokens of two kinds.
        assert!((model.probability(0, 1) - (1.25 + 1.5 * seen) / 3.0).abs() < 1e-15);
        assert!((model.probability(0, 3) - 1.5 * unseen / 3.0).abs() < 1e-15);
        let stream = TokenStream::from_ids(&[0, 1, 3], 4);
        let nats = -(model.probability(0, 1).ln() + model.probability(1, 3).ln()) / 2.0;
        assert_eq!(model.nats_per_token(&stream), Some(nats));
        assert_eq!(model.nats_per_token(&TokenStream::from_ids(&[0], 4)), None);
    }
}
