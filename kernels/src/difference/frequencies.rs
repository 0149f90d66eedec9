//! How often each token comes in each context, as coder and decoder both have to know it.

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

/// How often each token comes in each context, with tables that take turns: equal symbols in a row would wait for each
/// other. `[context * TOKENS + token]`.
#[derive(Debug)]
pub(super) struct Counts([[u32; CONTEXTS * TOKENS]; 4]);

impl Default for Counts {
    fn default() -> Self {
        Self([[0; CONTEXTS * TOKENS]; 4])
    }
}

impl Counts {
    /// One in four, and each token in `seen` once more in each context: so that none that comes has no frequency.
    pub(super) fn add_some(&mut self, symbols: &[u32], seen: u64) {
        const RUN: usize = 16;
        for four in symbols.chunks(4 * RUN) {
            self.add(&four[..RUN.min(four.len())]);
        }
        for counts in self.0[0].as_chunks_mut::<TOKENS>().0 {
            for (token, count) in counts.iter_mut().enumerate() {
                *count += (seen >> token) as u32 & 1;
            }
        }
    }

    /// All of them.
    #[inline]
    pub(super) fn add(&mut self, symbols: &[u32]) {
        let (fours, rest) = symbols.as_chunks::<4>();
        for four in fours {
            for (table, &symbol) in self.0.iter_mut().zip(four) {
                table[symbol as usize % (CONTEXTS * TOKENS)] += 1;
            }
        }
        for &symbol in rest {
            self.0[0][symbol as usize % (CONTEXTS * TOKENS)] += 1;
        }
    }

    /// `[context][token]`.
    pub(super) fn sums(&self) -> [[u32; TOKENS]; CONTEXTS] {
        let mut sums = [[0; TOKENS]; CONTEXTS];
        for table in &self.0 {
            for (sum, count) in sums.as_flattened_mut().iter_mut().zip(table) {
                *sum += count;
            }
        }
        sums
    }
}

/// For each context, the frequencies of its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frequencies {
    /// `[context][token]`; a context's are all 0, or add up to [`WHOLE`].
    pub of: Vec<[u16; TOKENS]>,
    /// What is stored: in the same proportions, roughly.
    codes: Vec<[u16; TOKENS]>,
}

/// About what storing one frequency takes, in bits.
const STORED: f32 = 6.0;

impl Frequencies {
    /// With as many contexts as pay for themselves.
    pub(super) fn best(counts: &[[u32; TOKENS]; CONTEXTS]) -> Self {
        let mut costs = [0.0; CONTEXTS];
        for (cost, counts) in costs.iter_mut().zip(counts) {
            *cost = entropy(counts);
        }
        // From the last context on: those that are merged.
        let mut tail = [0; TOKENS];
        let mut best = (f32::INFINITY, 1, tail);
        for contexts in (1..=CONTEXTS).rev() {
            for (sum, count) in tail.iter_mut().zip(&counts[contexts - 1]) {
                *sum += count;
            }
            if [1, 4, 8, CONTEXTS].contains(&contexts) {
                let own: f32 = costs[..contexts - 1].iter().sum();
                let cost = own + entropy(&tail);
                if cost <= best.0 {
                    best = (cost, contexts, tail);
                }
            }
        }
        let (_, contexts, tail) = best;
        let mut merged = counts[..contexts].to_vec();
        merged[contexts - 1] = tail;
        Self::of_counts(&merged)
    }

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
        let mut bits = BitReader {
            bytes,
            at: 0,
            kept: 0,
            count: 0,
        };
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
        Ok((Self::of_codes(of_contexts), bits.at))
    }
}

/// Bits that coding tokens of such counts takes, and storing how often they come.
fn entropy(counts: &[u32; TOKENS]) -> f32 {
    let total: u32 = counts.iter().sum();
    if total == 0 {
        return 0.0;
    }
    // Some sums at a time, for as many lanes.
    let mut sums = [0.0; 8];
    for counts in counts.as_chunks::<8>().0 {
        for (sum, &count) in sums.iter_mut().zip(counts) {
            let stored = if count > 0 { STORED } else { 0.0 };
            *sum += stored - count as f32 * log2(count);
        }
    }
    total as f32 * log2(total) + sums.iter().sum::<f32>()
}

/// log2 to within 0.01; of 0 anything.
fn log2(count: u32) -> f32 {
    let bits = (count as f32).to_bits();
    let mantissa = f32::from_bits((bits & 0x007f_ffff) | 1f32.to_bits());
    let exponent = (bits >> 23) as f32 - 127.0;
    // The parabola through 1, sqrt 2 and 2, about.
    exponent + (mantissa - 1.0) * (1.0 + 0.344 * (2.0 - mantissa))
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
        let mut largest = 0;
        for token in 1..TOKENS {
            if frequencies[token] > frequencies[largest] {
                largest = token;
            }
        }
        let largest = &mut frequencies[largest];
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
    /// Bytes of it that were taken up.
    at: usize,
    kept: u64,
    count: u32,
}

impl BitReader<'_> {
    fn take(&mut self, bits: u32) -> Result<u32, DifferenceError> {
        while self.count < bits {
            let byte = self.bytes.get(self.at).ok_or(DifferenceError::Truncated)?;
            self.kept |= u64::from(*byte) << self.count;
            self.count += 8;
            self.at += 1;
        }
        let value = self.kept as u32 & ((1 << bits) - 1);
        self.kept >>= bits;
        self.count -= bits;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_near() {
        for count in 1..=1 << 17 {
            let error = log2(count) - (count as f32).log2();
            assert!(error.abs() < 0.01, "{count}: {error}");
        }
    }
}
