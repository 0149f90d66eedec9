//! Seeds of random bits. A seed is made of numbers and names.

/// The seed of a sequence of random words. Seeds that are made of the same numbers and names are
/// equal in every process and on every machine.
///
/// The words of a seed are the sequence of splitmix64 (Steele, Lea and Flood, 2014, "Fast splittable
/// pseudorandom number generators") that begins at it. They are not secure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seed(u64);

/// 2^64 divided by the golden ratio: the distance of splitmix64's states.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Seed {
    /// Makes a seed of a number.
    pub fn new(number: u64) -> Self {
        Self(mix(number ^ GOLDEN))
    }

    /// Makes a new seed of this one and a number, such as a step.
    pub fn with(self, number: u64) -> Self {
        Self(mix(
            self.0.rotate_left(32) ^ mix(number.wrapping_add(GOLDEN))
        ))
    }

    /// Makes a new seed of this one and a name, such as the path of a parameter.
    pub fn with_name(self, name: &str) -> Self {
        let words = name.as_bytes().chunks(8).map(|bytes| {
            let word = bytes.iter().rev();
            word.fold(0u64, |word, byte| word << 8 | u64::from(*byte))
        });
        // The length tells names apart that differ by zero bytes at the end, the complement tells it from a number.
        words.fold(self.with(!(name.len() as u64)), Self::with)
    }

    /// The word at an index of the sequence: 64 random bits.
    #[inline(always)]
    pub fn word(self, place: u64) -> u64 {
        mix(self
            .0
            .wrapping_add(place.wrapping_add(1).wrapping_mul(GOLDEN)))
    }
}

#[inline(always)]
fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_that_of_splitmix64() {
        // The first outputs of the published generator, begun at 0 and at 1234567.
        assert_eq!(Seed(0).word(0), 0xe220_a839_7b1d_cdaf);
        let words = [0, 1].map(|place| Seed(1_234_567).word(place));
        assert_eq!(
            words,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]
        );
    }

    #[test]
    fn other_names_and_numbers_give_other_seeds() {
        let run = Seed::new(1);
        let seeds = [
            run,
            Seed::new(2),
            run.with(0),
            run.with(1),
            run.with(0).with(0),
            run.with_name(""),
            run.with_name("a"),
            run.with_name("a\0"),
            run.with_name("layers.0"),
            run.with_name("layers.1"),
            run.with_name("layers.0.weight"),
        ];
        for (i, a) in seeds.iter().enumerate() {
            assert!(seeds[..i].iter().all(|b| a != b), "seed {i} is not new");
        }
        assert_eq!(
            run.with_name("layers.0"),
            Seed::new(1).with_name("layers.0")
        );
    }
}
