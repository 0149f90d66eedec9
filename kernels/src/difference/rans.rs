//! Tokens and raw bits through interleaved rANS coders.
//!
//! A coder's state x is in [2^15, 2^31). A token of frequency f, whose first slot of 2^10 is s, takes x to
//! (x / f) 2^10 + s + x mod f; n raw bits take it to x 2^n + raw. 16 bits are moved to the stream first where the result
//! would be too large. The decoder goes the other way, from the last word to the first, so that coding goes from the last
//! element to the first. Element i belongs to coder i modulo their number.

use std::sync::LazyLock;

use super::frequencies::{Frequencies, PRECISION, WHOLE};
use super::tokens::{CONTEXTS, MOST_RAW, Spec, TOKENS};
use super::{DifferenceError, Path};

/// Coders of one register.
pub(super) const REGISTER: usize = 16;
/// Most registers of coders.
pub(super) const REGISTERS: usize = 4;
/// Most coders.
pub(super) const CODERS: usize = REGISTERS * REGISTER;

/// Least state, where every coder starts and every decoder ends.
pub(super) const LEAST: u32 = 1 << 15;
/// States are below 2^this.
pub(super) const STATE_BITS: u32 = 31;

/// Coders that take turns for so many elements: with more of them a processor waits less for each, with fewer there are
/// fewer states to store.
pub(super) fn registers_for(elements: usize) -> usize {
    match elements {
        0..=16_384 => 1,
        16_385..=65_536 => 2,
        _ => REGISTERS,
    }
}

/// What coding a symbol takes: `[context * TOKENS + token]`.
pub(super) struct Encoder {
    /// 1 / frequency, as a fraction of 2^(32 + shift), rounded up; bias | [`WHOLE`] less the frequency | shift | raw bits.
    pub(super) pairs: Vec<[u32; 2]>,
}

/// Bits of what is added to the state after division.
pub(super) const BIAS_BITS: u32 = 11;
/// Where [`WHOLE`] less the frequency begins.
pub(super) const REST_AT: u32 = BIAS_BITS;
/// Where the shift after the reciprocal's product begins.
pub(super) const SHIFT_AT: u32 = REST_AT + PRECISION;
/// Where the number of raw bits begins: nothing is above it.
pub(super) const RAW_AT: u32 = 28;

impl Encoder {
    /// Contexts after the last with frequencies of its own share its.
    pub(super) fn new(frequencies: &Frequencies, spec: &Spec) -> Self {
        let dividers = &*DIVIDERS;
        let mut pairs = vec![[0; 2]; CONTEXTS * TOKENS];
        for context in 0..CONTEXTS {
            let of = &frequencies.of[context.min(frequencies.of.len() - 1)];
            let mut start = 0;
            for (token, &frequency) in of.iter().enumerate().filter(|(_, f)| **f > 0) {
                let frequency = u32::from(frequency);
                let at = context * TOKENS + token;
                let (inverse, shift, bias) = dividers[frequency as usize];
                let packed = (start + bias)
                    | (WHOLE - frequency) << REST_AT
                    | shift << SHIFT_AT
                    | spec.raw_bits(token as u32) << RAW_AT;
                pairs[at] = [inverse, packed];
                start += frequency;
            }
        }
        Self { pairs }
    }

    fn of(&self, symbol: u32) -> (u32, u32) {
        let [reciprocal, packed] = self.pairs[symbol as usize % (CONTEXTS * TOKENS)];
        (reciprocal, packed)
    }
}

/// For each frequency, what division of a state by it is as a product: 2^(32 + shift) / frequency, the shift, and what is
/// added afterwards besides the first slot (the method is Fabian Giesen's, after Alverson, 1991, "Integer division using
/// reciprocals").
static DIVIDERS: LazyLock<Vec<(u32, u32, u32)>> =
    LazyLock::new(|| (0..=WHOLE).map(divider).collect());

fn divider(frequency: u32) -> (u32, u32, u32) {
    if frequency <= 1 {
        // The product comes out as x - 1, which the sum makes good.
        return (u32::MAX, 0, WHOLE - 1);
    }
    let shift = (frequency - 1).ilog2() + 1;
    let inverse = (1u64 << (shift + 31)).div_ceil(u64::from(frequency));
    (inverse as u32, shift - 1, 0)
}

/// Takes symbols and raw bits in, the last first; `words` grows by up to two an element.
pub(super) fn encode(
    path: Path,
    encoder: &Encoder,
    symbols: &[u32],
    coders: usize,
    words: &mut Vec<u8>,
) -> [u32; CODERS] {
    let mut states = [LEAST; CODERS];
    let whole = symbols.len() / coders * coders;
    encode_plainly(encoder, &symbols[whole..], coders, &mut states, words);
    let symbols = &symbols[..whole];
    match path {
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 => super::avx512::encode(encoder, symbols, coders, &mut states, words),
        _ => encode_plainly(encoder, symbols, coders, &mut states, words),
    }
    states
}

/// The first symbol is the first coder's.
fn encode_plainly(
    encoder: &Encoder,
    symbols: &[u32],
    coders: usize,
    states: &mut [u32; CODERS],
    words: &mut Vec<u8>,
) {
    // Of a turn the words of raw bits come before those of tokens, so that a decoder need not wait for the raw bits of one
    // register to find the words of the next; register by register, each in the order of its coders, so that a decoder
    // that is a register wide takes them at once.
    let mut out = Turn::default();
    for symbols in symbols.chunks(coders).rev() {
        for (symbols, states) in registers(symbols, states) {
            for (&symbol, state) in symbols.iter().zip(states) {
                let bits = encoder.of(symbol).1 >> RAW_AT;
                out.spill(state, *state >> (STATE_BITS - bits) != 0);
                *state = *state << bits | (symbol >> 16) & ((1 << bits) - 1);
            }
        }
        for (symbols, states) in registers(symbols, states) {
            for (&symbol, state) in symbols.iter().zip(states) {
                let (reciprocal, packed) = encoder.of(symbol);
                let rest = (packed >> REST_AT) & (WHOLE - 1);
                out.spill(state, *state >= (WHOLE - rest) << (STATE_BITS - PRECISION));
                let product = u64::from(*state) * u64::from(reciprocal);
                let quotient = (product >> 32) as u32 >> ((packed >> SHIFT_AT) & 15);
                *state += (packed & ((1 << BIAS_BITS) - 1)) + quotient * rest;
            }
        }
        words.extend_from_slice(out.words[..out.count].as_flattened());
        out.count = 0;
    }
}

/// The symbols of each register and its states, the last first.
fn registers<'a>(
    symbols: &'a [u32],
    states: &'a mut [u32; CODERS],
) -> impl Iterator<Item = (&'a [u32], &'a mut [u32; REGISTER])> {
    let states = states.as_chunks_mut().0.iter_mut();
    symbols.chunks(REGISTER).zip(states).rev()
}

/// What one turn of the coders moves to the stream.
struct Turn {
    words: [[u8; 2]; 2 * CODERS + 1],
    count: usize,
}

impl Default for Turn {
    fn default() -> Self {
        Self {
            words: [[0; 2]; 2 * CODERS + 1],
            count: 0,
        }
    }
}

impl Turn {
    /// Moves 16 bits of a full state. No branch: whether a state is full is as good as random.
    #[inline(always)]
    fn spill(&mut self, state: &mut u32, full: bool) {
        self.words[self.count] = (*state as u16).to_le_bytes();
        self.count += usize::from(full);
        *state >>= 16 * u32::from(full);
    }
}

/// What a slot stands for: `[context * WHOLE + slot]`.
pub(super) struct Decoder {
    /// Slot less the token's first | frequency | token | raw bits.
    pub(super) slots: Vec<u32>,
}

/// Where a slot's frequency begins.
pub(super) const FREQUENCY_AT: u32 = PRECISION;
/// Where its token begins.
pub(super) const TOKEN_AT: u32 = FREQUENCY_AT + PRECISION + 1;
/// Where its number of raw bits begins.
pub(super) const BITS_AT: u32 = TOKEN_AT + 6;

impl Decoder {
    pub(super) fn new(frequencies: &Frequencies, spec: &Spec) -> Self {
        let whole = WHOLE as usize;
        // Slots are filled some at a time, the last ones past their end.
        let mut slots = vec![0; frequencies.of.len() * whole + FILLED];
        for (context, frequencies) in frequencies.of.iter().enumerate() {
            let mut at = context * whole;
            for (token, &frequency) in frequencies.iter().enumerate() {
                let token = token as u32;
                let first = u32::from(frequency) << FREQUENCY_AT
                    | token << TOKEN_AT
                    | spec.raw_bits(token) << BITS_AT;
                for offset in (0..usize::from(frequency)).step_by(FILLED) {
                    for (i, slot) in slots[at + offset..][..FILLED].iter_mut().enumerate() {
                        *slot = first + (offset + i) as u32;
                    }
                }
                at += usize::from(frequency);
            }
            if at == context * whole {
                // It never comes, and decodes to something, whatever it is.
                slots[at..][..whole].fill(WHOLE << FREQUENCY_AT);
            }
        }
        slots.truncate(frequencies.of.len() * whole);
        Self { slots }
    }
}

/// Slots that are filled at a time.
const FILLED: usize = 16;

/// A decoder on its way.
pub(super) struct Decoding<'a> {
    pub states: [u32; CODERS],
    /// The stream, and what comes after it: enough that a register can be read from its last word on.
    pub words: &'a [[u8; 2]],
    /// Words that are left, of which the last comes next.
    pub left: usize,
    pub coders: usize,
}

impl Decoding<'_> {
    /// Tokens and raw bits of the next elements, whose contexts are known; all but the last call are for whole turns of
    /// the coders.
    pub(super) fn decode(
        &mut self,
        decoder: &Decoder,
        contexts: &[u8],
        tokens: &mut [u8],
        raws: &mut [u16],
    ) -> Result<(), DifferenceError> {
        let turns = contexts.chunks(self.coders);
        let out = tokens
            .chunks_mut(self.coders)
            .zip(raws.chunks_mut(self.coders));
        for (contexts, (tokens, raws)) in turns.zip(out) {
            let mut bits = [0; CODERS];
            // A register after the other; in each the last coder's word was written last.
            for start in (0..contexts.len()).step_by(REGISTER) {
                for i in (start..contexts.len().min(start + REGISTER)).rev() {
                    let state = &mut self.states[i];
                    let slot =
                        usize::from(contexts[i]) * WHOLE as usize + (*state % WHOLE) as usize;
                    let slot = decoder.slots[slot];
                    let frequency = (slot >> FREQUENCY_AT) & (2 * WHOLE - 1);
                    *state = frequency * (*state >> PRECISION) + slot % WHOLE;
                    tokens[i] = (slot >> TOKEN_AT) as u8 & (TOKENS as u8 - 1);
                    bits[i] = slot >> BITS_AT;
                    refill(state, self.words, &mut self.left)?;
                }
            }
            for start in (0..contexts.len()).step_by(REGISTER) {
                for i in (start..contexts.len().min(start + REGISTER)).rev() {
                    let state = &mut self.states[i];
                    raws[i] = (*state & ((1 << bits[i]) - 1)) as u16;
                    *state >>= bits[i];
                    refill(state, self.words, &mut self.left)?;
                }
            }
        }
        Ok(())
    }

    /// Whether everything was taken out that was put in.
    pub(super) fn check_end(&self) -> Result<(), DifferenceError> {
        let is_start = self.states[..self.coders]
            .iter()
            .all(|&state| state == LEAST);
        if self.left == 0 && is_start {
            Ok(())
        } else {
            Err(DifferenceError::Corrupt("end"))
        }
    }
}

/// As [`spill`], the other way.
#[inline(always)]
fn refill(state: &mut u32, words: &[[u8; 2]], left: &mut usize) -> Result<(), DifferenceError> {
    let low = *state < LEAST;
    let next = left.checked_sub(usize::from(low));
    let next = next.ok_or(DifferenceError::Truncated)?;
    // Where nothing is taken it does not matter what is read.
    let word = words.get(next).copied().unwrap_or_default();
    *left = next;
    *state = if low {
        *state << 16 | u32::from(u16::from_le_bytes(word))
    } else {
        *state
    };
    Ok(())
}

const _: () =
    assert!(SHIFT_AT + 4 <= RAW_AT && RAW_AT + 4 <= 32 && BITS_AT + 4 <= 32 && MOST_RAW < 16);
