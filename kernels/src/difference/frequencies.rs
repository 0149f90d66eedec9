//! How often each token comes in each context, as coder and decoder both have to know it.

use std::sync::LazyLock;

use super::DifferenceError;
use super::tokens::{CONTEXTS, TOKENS};

/// Frequencies of a context add up to 2^this.
pub(super) const PRECISION: u32 = 10;
/// What frequencies of a context add up to.
pub(super) const WHOLE: u32 = 1 << PRECISION;

/// Bits of a frequency that are stored below its highest.
const KEPT: u32 = 2;
/// A code in place of a frequency's length: that all other tokens never come.
const END: u32 = 15;
/// A code in place of a frequency's length: that some tokens never come; how many less 2 follows in four bits.
const GAP: u32 = 14;

/// For each context, the frequencies of its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frequencies {
    /// `[context][token]`; a context's are all 0, or add up to [`WHOLE`].
    pub of: Vec<[u16; TOKENS]>,
    /// What is stored: in the same proportions, roughly.
    codes: Vec<[u16; TOKENS]>,
}

impl Frequencies {
    /// From how often tokens came, rounded to what is stored of them.
    pub(super) fn of_counts(counts: &[[u32; TOKENS]]) -> Self {
        let codes = counts.iter().map(|counts| {
            let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
            let mut codes = [0; TOKENS];
            for (code, &count) in codes.iter_mut().zip(counts) {
                if count > 0 {
                    let share = (u64::from(count) * u64::from(WHOLE) + total / 2) / total;
                    *code = rounded((share as u32).max(1)) as u16;
                }
            }
            codes
        });
        Self::of_codes(codes.collect())
    }

    fn of_codes(codes: Vec<[u16; TOKENS]>) -> Self {
        let of = codes.iter().map(whole).collect();
        Self { of, codes }
    }

    /// Bits that storing them and coding tokens of such counts takes.
    pub(super) fn cost(&self, counts: &[[u32; TOKENS]]) -> f64 {
        /// log2 of [`WHOLE`] / frequency.
        static BITS: LazyLock<Vec<f64>> = LazyLock::new(|| {
            let bits = |frequency: u32| f64::from(PRECISION) - f64::from(frequency).log2();
            (0..=WHOLE).map(bits).collect()
        });
        let mut cost = 0.0;
        for (frequencies, counts) in self.of.iter().zip(counts) {
            for (&frequency, &count) in frequencies.iter().zip(counts) {
                if count > 0 {
                    // About what storing one takes.
                    cost += 6.0 + f64::from(count) * BITS[usize::from(frequency)];
                }
            }
        }
        cost
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let mut bits = BitWriter {
            out,
            kept: 0,
            count: 0,
        };
        for codes in &self.codes {
            let mut token = 0;
            while token < TOKENS {
                let rest = &codes[token..];
                let gap = rest.iter().take_while(|&&code| code == 0).count();
                match gap {
                    _ if gap == rest.len() => break,
                    0 => {
                        let code = u32::from(rest[0]);
                        let length = 32 - code.leading_zeros();
                        let below = (length - 1).min(KEPT);
                        bits.put(length, 4);
                        bits.put((code >> (length - 1 - below)) & ((1 << below) - 1), below);
                        token += 1;
                    }
                    1 => {
                        bits.put(0, 4);
                        token += 1;
                    }
                    _ => {
                        let gap = gap.min(17);
                        bits.put(GAP, 4);
                        bits.put(gap as u32 - 2, 4);
                        token += gap;
                    }
                }
            }
            if token < TOKENS {
                bits.put(END, 4);
            }
        }
        bits.end();
    }

    /// Returns them and the bytes they took.
    pub(super) fn read(contexts: usize, bytes: &[u8]) -> Result<(Self, usize), DifferenceError> {
        let mut bits = BitReader { bytes, at: 0 };
        let mut of_contexts = Vec::with_capacity(contexts.min(CONTEXTS));
        for _ in 0..contexts {
            let mut codes = [0; TOKENS];
            let mut token = 0;
            while token < TOKENS {
                match bits.take(4)? {
                    END => break,
                    GAP => token += bits.take(4)? as usize + 2,
                    0 => token += 1,
                    length if length <= PRECISION + 1 => {
                        let below = (length - 1).min(KEPT);
                        let highest = (1 << below) | bits.take(below)?;
                        codes[token] = (highest << (length - 1 - below)) as u16;
                        token += 1;
                    }
                    _ => return Err(DifferenceError::Corrupt("frequency")),
                }
            }
            if token > TOKENS || codes.iter().any(|&code| u32::from(code) > WHOLE) {
                return Err(DifferenceError::Corrupt("frequency"));
            }
            of_contexts.push(codes);
        }
        Ok((Self::of_codes(of_contexts), bits.at.div_ceil(8)))
    }
}

/// The nearest number with no more bits than are stored.
fn rounded(share: u32) -> u32 {
    let length = 32 - share.leading_zeros();
    match length.saturating_sub(KEPT + 1) {
        0 => share,
        dropped => ((share + (1 << (dropped - 1))) >> dropped) << dropped,
    }
}

/// Numbers in about the same proportions that add up to [`WHOLE`], none of them 0 where the code is not.
fn whole(codes: &[u16; TOKENS]) -> [u16; TOKENS] {
    let total: u32 = codes.iter().map(|&code| u32::from(code)).sum();
    let mut frequencies = [0; TOKENS];
    if total == 0 {
        return frequencies;
    }
    for (frequency, &code) in frequencies.iter_mut().zip(codes) {
        if code > 0 {
            let share = (u32::from(code) * WHOLE + total / 2) / total;
            *frequency = share.clamp(1, WHOLE) as u16;
        }
    }
    let mut sum: u32 = frequencies
        .iter()
        .map(|&frequency| u32::from(frequency))
        .sum();
    // There are fewer tokens than there is to share out, so that the largest of too many is more than 1.
    while sum != WHOLE {
        let largest = (0..TOKENS).max_by_key(|&token| (frequencies[token], TOKENS - token));
        let largest = &mut frequencies[largest.unwrap_or(0)];
        if sum < WHOLE {
            *largest += (WHOLE - sum) as u16;
            sum = WHOLE;
        } else {
            let excess = (sum - WHOLE).min(u32::from(*largest) / 2);
            *largest -= excess as u16;
            sum -= excess;
        }
    }
    frequencies
}

struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    kept: u64,
    count: u32,
}

impl BitWriter<'_> {
    fn put(&mut self, value: u32, bits: u32) {
        self.kept |= u64::from(value) << self.count;
        self.count += bits;
        while self.count >= 8 {
            self.out.push(self.kept as u8);
            self.kept >>= 8;
            self.count -= 8;
        }
    }

    fn end(self) {
        if self.count > 0 {
            self.out.push(self.kept as u8);
        }
    }
}

struct BitReader<'a> {
    bytes: &'a [u8],
    /// In bits.
    at: usize,
}

impl BitReader<'_> {
    fn take(&mut self, bits: u32) -> Result<u32, DifferenceError> {
        let mut value = 0;
        for i in 0..bits {
            let byte = self
                .bytes
                .get(self.at / 8)
                .ok_or(DifferenceError::Truncated)?;
            value |= u32::from((byte >> (self.at % 8)) & 1) << i;
            self.at += 1;
        }
        Ok(value)
    }
}
