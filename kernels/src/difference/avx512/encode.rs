//! rANS coding with a register of 16 coders at a time.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::frequencies::{PRECISION, WHOLE};
use super::super::rans::{
    BIAS_BITS, CODERS, Encoder, RAW_AT, REGISTER, REST_AT, SHIFT_AT, STATE_BITS,
};
use super::super::tokens::{CONTEXTS, TOKENS};
use super::available;

/// As [`encode_plainly`](super::super::rans): whole turns of the coders.
pub(in super::super) fn encode(
    encoder: &Encoder,
    symbols: &[u32],
    coders: usize,
    states: &mut [u32; CODERS],
    words: &mut Vec<u8>,
) {
    assert!(available());
    assert!(symbols.len().is_multiple_of(coders) && coders <= CODERS);
    assert!(encoder.pairs.len() == CONTEXTS * TOKENS);
    // Two words an element at most, and what a store writes beyond them.
    words.reserve(2 * (2 * symbols.len() + REGISTER));
    // SAFETY: the instructions are there, there is room for the words, and the table has an entry for whatever symbol.
    unsafe {
        match coders / REGISTER {
            1 => encode_turns::<1>(encoder, symbols, states, words),
            2 => encode_turns::<2>(encoder, symbols, states, words),
            _ => encode_turns::<4>(encoder, symbols, states, words),
        }
    }
}

/// # Safety
///
/// `symbols` must be a multiple of `R` registers; the encoder's table `CONTEXTS * TOKENS` long;
/// `words` must have room for two words an element and a register.
#[target_feature(enable = "avx512f,popcnt")]
unsafe fn encode_turns<const R: usize>(
    encoder: &Encoder,
    symbols: &[u32],
    states: &mut [u32; CODERS],
    words: &mut Vec<u8>,
) {
    let mut x = [_mm512_setzero_si512(); R];
    for (x, states) in x.iter_mut().zip(states.as_chunks::<REGISTER>().0) {
        // SAFETY: a register is 16 states.
        *x = unsafe { _mm512_loadu_si512(states.as_ptr().cast()) };
    }
    let turns = symbols.len() / (R * REGISTER);
    let table = encoder.pairs.as_ptr().cast();
    let start = words.as_mut_ptr();
    let mut written = words.len();
    let ones = _mm512_set1_epi32(-1);
    let symbol_of = _mm512_set1_epi64((CONTEXTS * TOKENS - 1) as i64);
    let bias = _mm512_set1_epi32((1 << BIAS_BITS) - 1);
    let rest_of = _mm512_set1_epi32(WHOLE as i32 - 1);
    let four_bits = _mm512_set1_epi32(15);
    let most = _mm512_set1_epi32(1 << STATE_BITS);
    let limit_of_whole = _mm512_set1_epi32((WHOLE << (STATE_BITS - PRECISION)) as i32);
    for turn in (0..turns).rev() {
        // All registers at each stage, so that none has to wait for another.
        let mut raw = [_mm512_setzero_si512(); R];
        let (mut packed, mut even, mut odd) = (raw, raw, raw);
        for r in 0..R {
            let at = (turn * R + r) * REGISTER;
            // SAFETY: `at` is within the slice, and the table is as long as symbols are large.
            unsafe {
                let symbol = _mm512_loadu_si512(symbols.as_ptr().add(at).cast());
                raw[r] = _mm512_srli_epi32::<16>(symbol);
                // Of even lanes and of odd ones the pairs.
                let place = _mm512_and_si512(symbol, symbol_of);
                even[r] = _mm512_i64gather_epi64::<8>(place, table);
                let place = _mm512_and_si512(_mm512_srli_epi64::<32>(symbol), symbol_of);
                odd[r] = _mm512_i64gather_epi64::<8>(place, table);
            }
            packed[r] = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64::<32>(even[r]), odd[r]);
        }
        for r in (0..R).rev() {
            let bits = _mm512_srli_epi32::<RAW_AT>(packed[r]);
            let full = _mm512_cmpge_epu32_mask(x[r], _mm512_srlv_epi32(most, bits));
            // SAFETY: of at most two words an element, and 16 more, no one is past the room there is.
            written += unsafe { put(start.add(written), full, x[r]) };
            x[r] = _mm512_mask_srli_epi32::<16>(x[r], full, x[r]);
            let raw = _mm512_andnot_si512(_mm512_sllv_epi32(ones, bits), raw[r]);
            x[r] = _mm512_or_si512(_mm512_sllv_epi32(x[r], bits), raw);
        }
        for r in (0..R).rev() {
            let rest = _mm512_and_si512(_mm512_srli_epi32::<REST_AT>(packed[r]), rest_of);
            let limit = _mm512_slli_epi32::<{ STATE_BITS - PRECISION }>(rest);
            let limit = _mm512_sub_epi32(limit_of_whole, limit);
            let full = _mm512_cmpge_epu32_mask(x[r], limit);
            // SAFETY: as above.
            written += unsafe { put(start.add(written), full, x[r]) };
            x[r] = _mm512_mask_srli_epi32::<16>(x[r], full, x[r]);
            let even = _mm512_srli_epi64::<32>(_mm512_mul_epu32(x[r], even[r]));
            let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(x[r]), odd[r]);
            let high = _mm512_mask_blend_epi32(0xaaaa, even, odd);
            let shift = _mm512_and_si512(_mm512_srli_epi32::<SHIFT_AT>(packed[r]), four_bits);
            let quotient = _mm512_srlv_epi32(high, shift);
            let product = _mm512_mullo_epi32(quotient, rest);
            let sum = _mm512_add_epi32(product, _mm512_and_si512(packed[r], bias));
            x[r] = _mm512_add_epi32(x[r], sum);
        }
    }
    // SAFETY: so many bytes were written.
    unsafe { words.set_len(written) };
    for (x, states) in x.iter().zip(states.as_chunks_mut::<REGISTER>().0) {
        // SAFETY: a register is 16 states.
        unsafe { _mm512_storeu_si512(states.as_mut_ptr().cast(), *x) };
    }
}

/// Writes the lower halves of the states in `full`, in order. Returns how many bytes.
///
/// # Safety
///
/// There must be room for 16 words.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
unsafe fn put(words: *mut u8, full: __mmask16, states: __m512i) -> usize {
    let together = _mm512_maskz_compress_epi32(full, states);
    // SAFETY: the caller's.
    unsafe { _mm256_storeu_si256(words.cast(), _mm512_cvtepi32_epi16(together)) };
    2 * full.count_ones() as usize
}
