//! rANS decoding, and elements out of tokens, with a register of 16 coders at a time.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::DifferenceError;
use super::super::frequencies::{PRECISION, WHOLE};
use super::super::rans::{BITS_AT, Decoder, Decoding, FREQUENCY_AT, LEAST, REGISTER, TOKEN_AT};
use super::super::tokens::{ABOVE, ESCAPE, FAR, Known, Loop, TOKENS};
use super::by_width;
use super::shape::{Shape, check, load, store};

/// Decodes whole turns: elements from the first on. Returns how many; those whose places are added to `escaped` are not
/// restored.
pub(in super::super) fn decode(
    decoding: &mut Decoding,
    decoder: &Decoder,
    shape: Loop,
    (known, lows): (Known, &[u8]),
    child: &mut [u8],
    escaped: &mut Vec<usize>,
) -> Result<usize, DifferenceError> {
    let elements = child.len() / (shape.bits as usize / 8);
    check(shape, known, elements);
    assert!(lows.len() >= elements * shape.low as usize / 8);
    assert!(
        decoder.slots.len() > (shape.last_context as usize) << PRECISION | (WHOLE as usize - 1)
    );
    assert!(decoding.words.len() >= decoding.left + REGISTER);
    let work = Work {
        decoder,
        shape,
        known,
        lows,
        elements,
    };
    // SAFETY: the instructions are there, the table has slots for all contexts, all slices hold so many elements, and a
    // register of words can be read from the last one on.
    unsafe {
        match decoding.coders / REGISTER {
            1 => by_width!(shape, decode_turns::<1>(work, decoding, child, escaped)),
            2 => by_width!(shape, decode_turns::<2>(work, decoding, child, escaped)),
            4 => by_width!(shape, decode_turns::<4>(work, decoding, child, escaped)),
            _ => Ok(0),
        }
    }
}

/// What is decoded.
#[derive(Clone, Copy)]
struct Work<'a> {
    decoder: &'a Decoder,
    shape: Loop,
    known: Known<'a>,
    lows: &'a [u8],
    elements: usize,
}

/// # Safety
///
/// All slices must hold the work's elements, the decoder's table must have slots for all contexts, and it must be possible
/// to read 16 words from the last one that is left on.
#[target_feature(enable = "avx512f,popcnt")]
unsafe fn decode_turns<const WIDTH: usize, const LOW: usize, const R: usize>(
    work: Work,
    decoding: &mut Decoding,
    child: &mut [u8],
    escaped: &mut Vec<usize>,
) -> Result<usize, DifferenceError> {
    let Work { known, .. } = work;
    let turns = work.elements / (R * REGISTER);
    let mut x = [_mm512_setzero_si512(); R];
    for (x, states) in x.iter_mut().zip(decoding.states.as_chunks::<REGISTER>().0) {
        // SAFETY: a register is 16 states.
        *x = unsafe { _mm512_loadu_si512(states.as_ptr().cast()) };
    }
    let shape = Shape::new(work.shape, PRECISION);
    let slot_of = _mm512_set1_epi32(WHOLE as i32 - 1);
    let frequency_of = _mm512_set1_epi32(2 * WHOLE as i32 - 1);
    let token_of = _mm512_set1_epi32(TOKENS as i32 - 1);
    let ones = _mm512_set1_epi32(-1);
    let one = _mm512_set1_epi32(1);
    let two = _mm512_set1_epi32(2);
    let escape = _mm512_set1_epi32(ESCAPE as i32);
    let slots = work.decoder.slots.as_ptr().cast();
    let mut words = Words {
        words: decoding.words.as_ptr(),
        left: decoding.left,
    };
    for turn in 0..turns {
        let start = turn * R * REGISTER;
        // All registers at each stage, so that none has to wait for another.
        let mut slots_of = [_mm512_setzero_si512(); R];
        let mut raws = slots_of;
        for r in 0..R {
            let at = start + r * REGISTER;
            // SAFETY: `at` is within the slices; contexts and so indices are below the table's length.
            unsafe {
                let parent = load::<WIDTH>(known.parent.as_ptr(), at);
                let context = shape.contexts(parent, shape.scales(known, at));
                let slot = _mm512_or_si512(context, _mm512_and_si512(x[r], slot_of));
                slots_of[r] = _mm512_i32gather_epi32::<4>(slot, slots);
            }
        }
        for (x, slot) in x.iter_mut().zip(slots_of) {
            let frequency = _mm512_and_si512(_mm512_srli_epi32::<FREQUENCY_AT>(slot), frequency_of);
            let product = _mm512_mullo_epi32(_mm512_srli_epi32::<PRECISION>(*x), frequency);
            *x = _mm512_add_epi32(product, _mm512_and_si512(slot, slot_of));
        }
        for x in &mut x {
            // SAFETY: a register can be read from the last word that is left on.
            *x = unsafe { words.take(*x) }.ok_or(DifferenceError::Truncated)?;
        }
        for r in 0..R {
            let bits = _mm512_srli_epi32::<BITS_AT>(slots_of[r]);
            raws[r] = _mm512_andnot_si512(_mm512_sllv_epi32(ones, bits), x[r]);
            x[r] = _mm512_srlv_epi32(x[r], bits);
        }
        for x in &mut x {
            // SAFETY: as above.
            *x = unsafe { words.take(*x) }.ok_or(DifferenceError::Truncated)?;
        }
        for r in 0..R {
            let (slot, raw) = (slots_of[r], raws[r]);
            let at = start + r * REGISTER;
            // SAFETY: `at` is within the slices.
            unsafe {
                let parent = load::<WIDTH>(known.parent.as_ptr(), at);
                let low = match LOW {
                    0 => _mm512_setzero_si512(),
                    1 => load::<1>(work.lows.as_ptr(), at),
                    _ => load::<2>(work.lows.as_ptr(), at),
                };
                let token = _mm512_and_si512(_mm512_srli_epi32::<TOKEN_AT>(slot), token_of);
                // Of tokens below 2 the token itself.
                let highest = _mm512_or_si512(_mm512_and_si512(token, one), two);
                let highest = _mm512_min_epu32(highest, token);
                let bits = _mm512_srli_epi32::<BITS_AT>(slot);
                let value = _mm512_or_si512(_mm512_sllv_epi32(highest, bits), raw);
                let folded = above_low::<LOW>(value, low);
                let odd = _mm512_test_epi32_mask(folded, one);
                let half = _mm512_srli_epi32::<1>(folded);
                let difference = _mm512_mask_xor_epi32(half, odd, half, ones);
                let mut restored = shape.moved(parent, difference);

                let away = _mm512_cmpge_epu32_mask(token, escape);
                if away != 0 {
                    let scale = shape.scales(known, at);
                    let far = shape.far::<LOW>(parent, scale, token, raw, low);
                    restored = _mm512_mask_mov_epi32(restored, away, far);
                    let mut left = _mm512_mask_cmpeq_epi32_mask(away, token, escape);
                    while left != 0 {
                        escaped.push(at + left.trailing_zeros() as usize);
                        left &= left - 1;
                    }
                }
                store::<WIDTH>(child.as_mut_ptr(), at, restored);
            }
        }
    }
    decoding.left = words.left;
    for (x, states) in x.iter().zip(decoding.states.as_chunks_mut::<REGISTER>().0) {
        // SAFETY: a register is 16 states.
        unsafe { _mm512_storeu_si512(states.as_mut_ptr().cast(), *x) };
    }
    Ok(turns * R * REGISTER)
}

/// The stream, of which the last word comes next.
struct Words {
    words: *const [u8; 2],
    left: usize,
}

impl Words {
    /// Shifts a word into each state that is too small, the last of those that are left into the last of them; `None` if
    /// there are too few.
    ///
    /// # Safety
    ///
    /// It must be possible to read 16 words from the last one that is left on.
    #[inline]
    #[target_feature(enable = "avx512f,popcnt")]
    unsafe fn take(&mut self, states: __m512i) -> Option<__m512i> {
        let low = _mm512_cmplt_epu32_mask(states, _mm512_set1_epi32(LEAST as i32));
        self.left = self.left.checked_sub(low.count_ones() as usize)?;
        // SAFETY: the states that are too small take words from `left` on; what lies after these is read and not used.
        let next = unsafe { _mm256_loadu_si256(self.words.add(self.left).cast()) };
        let next = _mm512_maskz_expand_epi32(low, _mm512_cvtepu16_epi32(next));
        let shifted = _mm512_mask_slli_epi32::<16>(states, low, states);
        Some(_mm512_or_si512(shifted, next))
    }
}

/// Bits above those that are stored as they are.
#[inline]
#[target_feature(enable = "avx512f")]
fn above_low<const LOW: usize>(value: __m512i, low: __m512i) -> __m512i {
    match LOW {
        0 => value,
        1 => _mm512_or_si512(_mm512_slli_epi32::<8>(value), low),
        _ => _mm512_or_si512(_mm512_slli_epi32::<16>(value), low),
    }
}

impl Shape {
    /// The numbers that are so many further on; bits above an element's width are anything.
    ///
    /// Among positive floats that is a sum of bits, among negative ones a difference; one that comes out with another sign
    /// has passed zero.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn moved(self, parent: __m512i, difference: __m512i) -> __m512i {
        let negative = _mm512_mask_test_epi32_mask(self.float, parent, self.sign);
        let sum = _mm512_add_epi32(parent, difference);
        let moved = _mm512_mask_sub_epi32(sum, negative, parent, difference);
        let signs = _mm512_xor_si512(parent, moved);
        let passed = _mm512_mask_test_epi32_mask(self.float, signs, self.sign);
        _mm512_mask_xor_epi32(moved, passed, moved, self.magnitude)
    }

    /// What far tokens say.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn far<const LOW: usize>(
        self,
        parent: __m512i,
        scale: __m512i,
        token: __m512i,
        raw: __m512i,
        low: __m512i,
    ) -> __m512i {
        let far = _mm512_sub_epi32(token, _mm512_set1_epi32(FAR as i32));
        let octave = _mm512_srli_epi32::<1>(far);
        let above = _mm512_set1_epi32(ABOVE as i32);
        let exponent = _mm512_sub_epi32(_mm512_add_epi32(scale, above), octave);
        let exponent = _mm512_and_si512(exponent, self.exponents);
        let sign = _mm512_xor_si512(parent, _mm512_sllv_epi32(far, self.up));
        let sign = _mm512_and_si512(sign, self.sign);
        let upper = _mm512_or_si512(sign, _mm512_sllv_epi32(exponent, self.mantissa));
        _mm512_or_si512(upper, above_low::<LOW>(raw, low))
    }
}
