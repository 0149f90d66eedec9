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
use crate::vector::vectorised;

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

    /// Of a length that compilers know.
    fn table(&self) -> &[[u32; 2]; CONTEXTS * TOKENS] {
        self.pairs
            .first_chunk()
            .expect("a pair for each token of each context")
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
    let (symbols, last) = symbols.split_at(whole);
    encode_turns(path, encoder, last, coders, &mut states, words);
    match path {
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 => super::avx512::encode(encoder, symbols, coders, &mut states, words),
        _ => encode_turns(path, encoder, symbols, coders, &mut states, words),
    }
    states
}

vectorised! {
    /// The first symbol is the first coder's.
    fn encode_turns(
        encoder: &Encoder,
        symbols: &[u32],
        coders: usize,
        states: &mut [u32; CODERS],
        words: &mut Vec<u8>,
    ) {
        // What is done with registers, and what is done number by number, is done in loops of their own; these end at a
        // number that is not known beforehand, or they would be unrolled before they are vectorised.
        let table = encoder.table();
        let mut out = Spilled::default();
        let (mut reciprocals, mut packed) = ([0; CODERS], [0; CODERS]);
        let mut full = [false; CODERS];
        for symbols in symbols.chunks(coders).rev() {
            let count = symbols.len().min(CODERS);
            let (states, full) = (&mut states[..count], &mut full[..count]);
            let (reciprocals, packed) = (&mut reciprocals[..count], &mut packed[..count]);
            for ((symbol, reciprocal), packed) in symbols.iter().zip(&mut *reciprocals).zip(&mut *packed) {
                [*reciprocal, *packed] = table[*symbol as usize % table.len()];
            }

            // Of a turn the words of raw bits come before those of tokens, so that a decoder need not wait for the raw
            // bits of one register to find the words of the next.
            for ((full, state), packed) in full.iter_mut().zip(&*states).zip(&*packed) {
                *full = *state >= 1 << (STATE_BITS - (packed >> RAW_AT));
            }
            out.spill(states, full);
            for (((state, full), packed), symbol) in states.iter_mut().zip(&*full).zip(&*packed).zip(symbols) {
                let kept = if *full { *state >> 16 } else { *state };
                let bits = packed >> RAW_AT;
                *state = kept << bits | (symbol >> 16) & ((1 << bits) - 1);
            }

            for ((full, state), packed) in full.iter_mut().zip(&*states).zip(&*packed) {
                let frequency = WHOLE - ((packed >> REST_AT) & (WHOLE - 1));
                *full = *state >= frequency << (STATE_BITS - PRECISION);
            }
            out.spill(states, full);
            let pairs = reciprocals.iter().zip(&*packed);
            for ((state, full), (reciprocal, packed)) in states.iter_mut().zip(&*full).zip(pairs) {
                let kept = if *full { *state >> 16 } else { *state };
                let product = u64::from(kept) * u64::from(*reciprocal);
                let quotient = (product >> 32) as u32 >> ((packed >> SHIFT_AT) & 15);
                let rest = (packed >> REST_AT) & (WHOLE - 1);
                *state = kept + (packed & ((1 << BIAS_BITS) - 1)) + quotient * rest;
            }
            out.move_if_full(words);
        }
        out.move_to(words);
    }
}

/// What turns move to the stream.
struct Spilled {
    words: [[u8; 2]; Self::ROOM],
    count: usize,
}

impl Default for Spilled {
    fn default() -> Self {
        Self {
            words: [[0; 2]; Self::ROOM],
            count: 0,
        }
    }
}

impl Spilled {
    /// A power of two, so that it takes no branch to see that a place is within bounds.
    const ROOM: usize = 1024;

    /// Moves 16 bits of full states: register by register, the last first, and each in the order of its coders, so that a
    /// decoder that is a register wide takes them at once. No branches: whether a state is full is as good as random.
    #[inline(always)]
    fn spill(&mut self, states: &[u32], full: &[bool]) {
        let registers = states.chunks(REGISTER).zip(full.chunks(REGISTER));
        for (states, full) in registers.rev() {
            for (state, full) in states.iter().zip(full) {
                self.words[self.count % Self::ROOM] = (*state as u16).to_le_bytes();
                self.count += usize::from(*full);
            }
        }
    }

    /// If another turn might not find room.
    #[inline(always)]
    fn move_if_full(&mut self, words: &mut Vec<u8>) {
        if self.count > Self::ROOM - 2 * CODERS - 1 {
            self.move_to(words);
        }
    }

    fn move_to(&mut self, words: &mut Vec<u8>) {
        words.extend_from_slice(self.words[..self.count].as_flattened());
        self.count = 0;
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
        path: Path,
        decoder: &Decoder,
        contexts: &[u16],
        tokens: &mut [u16],
        raws: &mut [u16],
    ) -> Result<(), DifferenceError> {
        decode_turns(path, self, decoder, contexts, (tokens, raws))
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

/// Most words of a turn.
const TURN: usize = 2 * CODERS;

vectorised! {
    fn decode_turns(
        decoding: &mut Decoding,
        decoder: &Decoder,
        contexts: &[u16],
        out: (&mut [u16], &mut [u16]),
    ) -> Result<(), DifferenceError> {
        let coders = decoding.coders;
        let out = out.0.chunks_mut(coders).zip(out.1.chunks_mut(coders));
        let table = decoder.slots.as_slice();
        let mut slots = [0; CODERS];
        for (contexts, (tokens, raws)) in contexts.chunks(coders).zip(out) {
            let count = contexts.len().min(CODERS);
            let (states, slots) = (&mut decoding.states[..count], &mut slots[..count]);
            let mut last = [[0; 2]; TURN];
            let mut words = Words::new(&decoding.words[..decoding.left], &mut last);

            for ((slot, context), state) in slots.iter_mut().zip(contexts).zip(&*states) {
                *slot = table[usize::from(*context) * WHOLE as usize + (*state % WHOLE) as usize];
            }
            for ((state, token), slot) in states.iter_mut().zip(tokens).zip(&*slots) {
                let frequency = (slot >> FREQUENCY_AT) & (2 * WHOLE - 1);
                *state = frequency * (*state >> PRECISION) + slot % WHOLE;
                *token = (slot >> TOKEN_AT) as u16 % TOKENS as u16;
            }
            words.refill(states);

            for ((state, raw), slot) in states.iter_mut().zip(raws).zip(&*slots) {
                let bits = slot >> BITS_AT;
                *raw = (*state & ((1 << bits) - 1)) as u16;
                *state >>= bits;
            }
            words.refill(states);
            let taken = TURN - words.left;
            let left = decoding.left.checked_sub(taken);
            decoding.left = left.ok_or(DifferenceError::Truncated)?;
        }
        Ok(())
    }
}

/// Words that a turn can take.
struct Words<'a> {
    words: &'a [[u8; 2]; TURN],
    left: usize,
}

impl<'a> Words<'a> {
    /// The last ones. Where there are fewer than a turn might take zeros come before them, in `room`.
    #[inline(always)]
    fn new(words: &'a [[u8; 2]], room: &'a mut [[u8; 2]; TURN]) -> Self {
        let words = match words.last_chunk() {
            Some(words) => words,
            None => {
                room[TURN - words.len()..].copy_from_slice(words);
                room
            }
        };
        Self { words, left: TURN }
    }

    /// As [`Spilled::spill`], the other way: the last coder's word was written last.
    #[inline(always)]
    fn refill(&mut self, states: &mut [u32]) {
        for states in states.chunks_mut(REGISTER) {
            for state in states.iter_mut().rev() {
                let low = *state < LEAST;
                self.left -= usize::from(low);
                // Where nothing is taken it does not matter what is read.
                let word = u16::from_le_bytes(self.words[self.left % TURN]);
                let refilled = *state << 16 | u32::from(word);
                *state = if low { refilled } else { *state };
            }
        }
    }
}

const _: () =
    assert!(SHIFT_AT + 4 <= RAW_AT && RAW_AT + 4 <= 32 && BITS_AT + 4 <= 32 && MOST_RAW < 16);
