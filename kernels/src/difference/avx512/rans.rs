//! rANS with a register of 16 coders at a time.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::frequencies::{PRECISION, WHOLE};
use super::super::rans::{
    BIAS_BITS, BITS_AT, CODERS, Decoder, Decoding, Encoder, FREQUENCY_AT, LEAST, RAW_AT, REGISTER,
    REST_AT, SHIFT_AT, TOKEN_AT,
};
use super::super::tokens::{CONTEXTS, TOKENS};

use super::available;

/// As [`encode_plainly`](super::super::rans): whole turns of the coders.
pub(in super::super) fn encode(
    encoder: &Encoder,
    (symbols, raws): (&[u16], &[u16]),
    coders: usize,
    states: &mut [u32; CODERS],
    words: &mut Vec<u16>,
) {
    assert!(available());
    assert!(
        symbols.len().is_multiple_of(coders) && symbols.len() == raws.len() && coders <= CODERS
    );
    assert!(
        encoder.packed.len() == CONTEXTS * TOKENS && encoder.reciprocal.len() == CONTEXTS * TOKENS
    );
    assert!(
        symbols
            .iter()
            .all(|&symbol| usize::from(symbol) < CONTEXTS * TOKENS)
    );
    // Two words an element at most, and what a store writes beyond them.
    words.reserve(2 * symbols.len() + REGISTER);
    // SAFETY: the instructions are there, there is room for the words, and the tables have an entry for whatever symbol.
    unsafe {
        match coders / REGISTER {
            1 => encode_turns::<1>(encoder, symbols, raws, states, words),
            2 => encode_turns::<2>(encoder, symbols, raws, states, words),
            _ => encode_turns::<4>(encoder, symbols, raws, states, words),
        }
    }
}

/// # Safety
///
/// `symbols` and `raws` must be equally many, a multiple of `R` registers; the encoder's tables `CONTEXTS * TOKENS` long; `words` must have room for two words an element and a register.
#[target_feature(enable = "avx512f")]
unsafe fn encode_turns<const R: usize>(
    encoder: &Encoder,
    symbols: &[u16],
    raws: &[u16],
    states: &mut [u32; CODERS],
    words: &mut Vec<u16>,
) {
    let mut x = [_mm512_setzero_si512(); R];
    for (x, states) in x.iter_mut().zip(states.as_chunks::<REGISTER>().0) {
        // SAFETY: a register is 16 states.
        *x = unsafe { _mm512_loadu_si512(states.as_ptr().cast()) };
    }
    let turns = symbols.len() / (R * REGISTER);
    let start = words.as_mut_ptr();
    let mut written = words.len();
    let bias = _mm512_set1_epi32((1 << BIAS_BITS) - 1);
    let rest_of = _mm512_set1_epi32(WHOLE as i32 - 1);
    let four_bits = _mm512_set1_epi32(15);
    let whole = _mm512_set1_epi32(WHOLE as i32);
    let most = _mm512_set1_epi32(31);
    let symbols_of = _mm512_set1_epi32((CONTEXTS * TOKENS - 1) as i32);
    for turn in (0..turns).rev() {
        for r in (0..R).rev() {
            let at = (turn * R + r) * REGISTER;
            // SAFETY: `at` is within the slices, the tables are as long as symbols are large, and of at most two words an
            // element, and 16 more, no one is past the room there is.
            unsafe {
                let symbol =
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256(symbols.as_ptr().add(at).cast()));
                let symbol = _mm512_and_si512(symbol, symbols_of);
                let raw = _mm512_cvtepu16_epi32(_mm256_loadu_si256(raws.as_ptr().add(at).cast()));
                let packed = _mm512_i32gather_epi32::<4>(symbol, encoder.packed.as_ptr().cast());
                let reciprocal =
                    _mm512_i32gather_epi32::<4>(symbol, encoder.reciprocal.as_ptr().cast());

                let bits = _mm512_srli_epi32::<RAW_AT>(packed);
                if _mm512_test_epi32_mask(bits, bits) != 0 {
                    let high = _mm512_srlv_epi32(x[r], _mm512_sub_epi32(most, bits));
                    let full = _mm512_test_epi32_mask(high, high);
                    written += put(start.add(written), full, x[r]);
                    x[r] = _mm512_mask_srli_epi32::<16>(x[r], full, x[r]);
                    x[r] = _mm512_or_si512(_mm512_sllv_epi32(x[r], bits), raw);
                }

                let rest = _mm512_and_si512(_mm512_srli_epi32::<REST_AT>(packed), rest_of);
                let limit = _mm512_slli_epi32::<{ 31 - PRECISION }>(_mm512_sub_epi32(whole, rest));
                let full = _mm512_cmpge_epu32_mask(x[r], limit);
                written += put(start.add(written), full, x[r]);
                x[r] = _mm512_mask_srli_epi32::<16>(x[r], full, x[r]);
                let even = _mm512_srli_epi64::<32>(_mm512_mul_epu32(x[r], reciprocal));
                let odd = _mm512_mul_epu32(
                    _mm512_srli_epi64::<32>(x[r]),
                    _mm512_srli_epi64::<32>(reciprocal),
                );
                let high = _mm512_mask_blend_epi32(0xaaaa, even, odd);
                let shift = _mm512_and_si512(_mm512_srli_epi32::<SHIFT_AT>(packed), four_bits);
                let quotient = _mm512_srlv_epi32(high, shift);
                let product = _mm512_mullo_epi32(quotient, rest);
                let sum = _mm512_add_epi32(product, _mm512_and_si512(packed, bias));
                x[r] = _mm512_add_epi32(x[r], sum);
            }
        }
    }
    // SAFETY: so many words were written.
    unsafe { words.set_len(written) };
    for (x, states) in x.iter().zip(states.as_chunks_mut::<REGISTER>().0) {
        // SAFETY: a register is 16 states.
        unsafe { _mm512_storeu_si512(states.as_mut_ptr().cast(), *x) };
    }
}

/// Writes the lower halves of the states in `full`, in order. Returns how many.
///
/// # Safety
///
/// There must be room for 16 words.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn put(words: *mut u16, full: __mmask16, states: __m512i) -> usize {
    let together = _mm512_maskz_compress_epi32(full, states);
    // SAFETY: the caller's.
    unsafe { _mm256_storeu_si256(words.cast(), _mm512_cvtepi32_epi16(together)) };
    full.count_ones() as usize
}

/// Decodes whole turns for as long as no load can begin before the first word. Returns the elements.
pub(in super::super) fn decode(
    decoding: &mut Decoding,
    decoder: &Decoder,
    contexts: &[u8],
    tokens: &mut [u8],
    raws: &mut [u16],
) -> usize {
    assert!(available());
    assert!(contexts.len() == tokens.len() && contexts.len() == raws.len());
    if decoding.words.len() - decoding.left < REGISTER {
        return 0;
    }
    let in_table = decoder.slots.len() / WHOLE as usize;
    assert!(in_table.is_power_of_two());
    // SAFETY: the instructions are there, the table has a power of two of contexts, and the slices are equally long.
    unsafe {
        match decoding.coders / REGISTER {
            1 => decode_turns::<1>(decoding, decoder, contexts, tokens, raws),
            2 => decode_turns::<2>(decoding, decoder, contexts, tokens, raws),
            4 => decode_turns::<4>(decoding, decoder, contexts, tokens, raws),
            _ => 0,
        }
    }
}

/// # Safety
///
/// `contexts`, `tokens` and `raws` must be equally many, the decoder's table must have a power of two of contexts, and a
/// register of words must have been taken.
#[target_feature(enable = "avx512f")]
unsafe fn decode_turns<const R: usize>(
    decoding: &mut Decoding,
    decoder: &Decoder,
    contexts: &[u8],
    tokens: &mut [u8],
    raws: &mut [u16],
) -> usize {
    let turns = contexts.len() / (R * REGISTER);
    let mut x = [_mm512_setzero_si512(); R];
    for (x, states) in x.iter_mut().zip(decoding.states.as_chunks::<REGISTER>().0) {
        // SAFETY: a register is 16 states.
        *x = unsafe { _mm512_loadu_si512(states.as_ptr().cast()) };
    }
    let contexts_of = _mm512_set1_epi32((decoder.slots.len() / WHOLE as usize - 1) as i32);
    let slot_of = _mm512_set1_epi32(WHOLE as i32 - 1);
    let frequency_of = _mm512_set1_epi32(2 * WHOLE as i32 - 1);
    let all = _mm512_set1_epi32(-1);
    let token_of = _mm512_set1_epi32(TOKENS as i32 - 1);
    let words = decoding.words.as_ptr();
    let mut left = decoding.left;
    let mut turn = 0;
    // A register takes at most 16 words for its tokens and 16 for raw bits.
    while turn < turns && left >= 2 * R * REGISTER {
        for (r, x) in x.iter_mut().enumerate() {
            let at = (turn * R + r) * REGISTER;
            // SAFETY: `at` is within the slices; indices are below the table's length, since contexts are made to be; `left` is at
            // least as many words as the registers from this on can take, and 16 come after them.
            unsafe {
                let context =
                    _mm512_cvtepu8_epi32(_mm_loadu_si128(contexts.as_ptr().add(at).cast()));
                let context = _mm512_and_si512(context, contexts_of);
                let slot = _mm512_or_si512(
                    _mm512_slli_epi32::<PRECISION>(context),
                    _mm512_and_si512(*x, slot_of),
                );
                let slot = _mm512_i32gather_epi32::<4>(slot, decoder.slots.as_ptr().cast());
                let frequency =
                    _mm512_and_si512(_mm512_srli_epi32::<FREQUENCY_AT>(slot), frequency_of);
                let product = _mm512_mullo_epi32(_mm512_srli_epi32::<PRECISION>(*x), frequency);
                *x = _mm512_add_epi32(product, _mm512_and_si512(slot, slot_of));
                let token = _mm512_and_si512(_mm512_srli_epi32::<TOKEN_AT>(slot), token_of);
                _mm_storeu_si128(
                    tokens.as_mut_ptr().add(at).cast(),
                    _mm512_cvtepi32_epi8(token),
                );
                *x = take(words, &mut left, *x);

                let bits = _mm512_srli_epi32::<BITS_AT>(slot);
                let mut raw = _mm512_setzero_si512();
                if _mm512_test_epi32_mask(bits, bits) != 0 {
                    raw = _mm512_andnot_si512(_mm512_sllv_epi32(all, bits), *x);
                    *x = take(words, &mut left, _mm512_srlv_epi32(*x, bits));
                }
                _mm256_storeu_si256(raws.as_mut_ptr().add(at).cast(), _mm512_cvtepi32_epi16(raw));
            }
        }
        turn += 1;
    }
    decoding.left = left;
    for (x, states) in x.iter().zip(decoding.states.as_chunks_mut::<REGISTER>().0) {
        // SAFETY: a register is 16 states.
        unsafe { _mm512_storeu_si512(states.as_mut_ptr().cast(), *x) };
    }
    turn * R * REGISTER
}

/// Shifts a word into each state that is too small, the last of `left` words into the last of them.
///
/// # Safety
///
/// There must be 16 words left, and 16 after them.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn take(words: *const [u8; 2], left: &mut usize, states: __m512i) -> __m512i {
    let low = _mm512_cmplt_epu32_mask(states, _mm512_set1_epi32(LEAST as i32));
    *left -= low.count_ones() as usize;
    // SAFETY: the states that are too small take words from `left` on; what lies after these is read and not used.
    let next = unsafe { _mm256_loadu_si256(words.add(*left).cast()) };
    let next = _mm512_maskz_expand_epi32(low, _mm512_cvtepu16_epi32(next));
    _mm512_or_si512(_mm512_mask_slli_epi32::<16>(states, low, states), next)
}
