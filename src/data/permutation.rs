//! Pseudo-random permutations of `0..n` without a table.
//!
//! Shuffling billions of windows would take a table of them per epoch. A Feistel network is a
//! permutation by construction, whatever its round function: here of the smallest `2^(2b) >= n`,
//! restricted to `0..n` by applying it again until the result falls inside (cycle walking; Black
//! and Rogaway, 2002). The domain is less than 4n, so that takes less than 4 rounds on average.

use rand::Rng;

const ROUNDS: usize = 8;

/// A permutation of `0..n`.
#[derive(Debug, Clone)]
pub(super) struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `0..n` that the generator's next numbers select.
    pub(super) fn new(n: u64, rng: &mut impl Rng) -> Self {
        let bits = 64 - n.saturating_sub(1).leading_zeros();
        Self {
            n,
            half_bits: bits.div_ceil(2).max(1),
            keys: std::array::from_fn(|_| rng.next_u64()),
        }
    }

    /// Where `index`, which must be less than n, goes.
    pub(super) fn apply(&self, index: u64) -> u64 {
        debug_assert!(index < self.n);
        let mut image = self.shuffle(index);
        while image >= self.n {
            image = self.shuffle(image);
        }
        image
    }

    fn shuffle(&self, index: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (index >> self.half_bits, index & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64: every bit of the result depends on every bit of the input.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::ChaCha8Rng;

    proptest! {
        #[test]
        fn every_index_is_hit_once(n in 1u64..3000, seed in any::<u64>()) {
            let permutation = Permutation::new(n, &mut ChaCha8Rng::seed_from_u64(seed));
            let mut images: Vec<u64> = (0..n).map(|i| permutation.apply(i)).collect();
            images.sort_unstable();
            prop_assert_eq!(images, (0..n).collect::<Vec<_>>());
        }

        #[test]
        fn huge_domains_work(index in 0..u64::MAX / 2) {
            let permutation = Permutation::new(u64::MAX / 2, &mut ChaCha8Rng::seed_from_u64(1));
            prop_assert!(permutation.apply(index) < u64::MAX / 2);
        }
    }

    /// Where an index lands is uniform over keys, also for small n: chi-squared over 16 cells.
    #[test]
    fn images_are_uniform() {
        for n in [2u64, 3, 5, 16] {
            let mut counts = vec![0f64; n as usize];
            let draws = 16_000;
            let mut rng = ChaCha8Rng::seed_from_u64(7);
            for _ in 0..draws {
                counts[Permutation::new(n, &mut rng).apply(n / 2) as usize] += 1.0;
            }
            let expected = f64::from(draws) / n as f64;
            let chi2: f64 = counts
                .iter()
                .map(|c| (c - expected).powi(2) / expected)
                .sum();
            assert!(chi2 < 45.0, "n = {n}: chi2 = {chi2}, {counts:?}");
        }
    }
}
