//! Tokens of 16 elements at a time.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::tokens::{ABOVE, ESCAPE, FAR, Known, Loop, TOKENS, Tokens};
use super::by_width;
use super::shape::{LANES, Shape, check, load, store};

/// As [`Spec::tokenise`](super::super::tokens::Spec), of the first elements. Returns how many.
pub(in super::super) fn tokenise(
    shape: Loop,
    known: Known,
    child: &[u8],
    out: &mut Tokens,
) -> usize {
    let elements = child.len() / (shape.bits as usize / 8);
    check(shape, known, elements);
    assert!(out.symbols.len() >= elements);
    assert!(out.lows.len() >= elements * shape.low as usize / 8);
    let count = elements / LANES * LANES;
    // SAFETY: the instructions are there, and all slices hold so many elements.
    unsafe { by_width!(shape, tokenise_all(shape, known, child, count, out)) }
    count
}

/// Bytes between what is worked on and what is asked for of the memory: processors look ahead by themselves, but not
/// beyond a page.
const AHEAD: usize = 2048;

/// # Safety
///
/// All slices must hold `count` elements, a multiple of 16.
#[target_feature(enable = "avx512f")]
unsafe fn tokenise_all<const WIDTH: usize, const LOW: usize>(
    shape: Loop,
    known: Known,
    children: &[u8],
    count: usize,
    out: &mut Tokens,
) {
    let shape = Shape::new(shape, TOKENS.ilog2());
    let one = _mm512_set1_epi32(1);
    let two = _mm512_set1_epi32(2);
    let bias = _mm512_set1_epi32(254);
    let above = _mm512_set1_epi32(ABOVE as i32);
    let (escape, far) = (
        _mm512_set1_epi32(ESCAPE as i32),
        _mm512_set1_epi32(FAR as i32),
    );
    let half = _mm512_set1_epi32(32);
    let mut seen = [_mm512_setzero_si512(); 2];
    for at in (0..count).step_by(LANES) {
        for from in [known.parent.as_ptr(), children.as_ptr()] {
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at * WIDTH + AHEAD).cast());
        }
        // SAFETY: the caller's.
        let (parent, child, scale) = unsafe {
            (
                load::<WIDTH>(known.parent.as_ptr(), at),
                load::<WIDTH>(children.as_ptr(), at),
                shape.scales(known, at),
            )
        };

        let difference = _mm512_sub_epi32(shape.ordered(child), shape.ordered(parent));
        let difference = match WIDTH {
            1 => _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(difference)),
            2 => _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(difference)),
            _ => difference,
        };
        let folded = _mm512_xor_si512(
            _mm512_add_epi32(difference, difference),
            _mm512_srai_epi32::<31>(difference),
        );
        let value = match LOW {
            0 => folded,
            1 => _mm512_srli_epi32::<8>(folded),
            _ => _mm512_srli_epi32::<16>(folded),
        };
        let as_float = _mm512_castps_si512(_mm512_cvtepi32_ps(value));
        let token = _mm512_sub_epi32(_mm512_srli_epi32::<22>(as_float), bias);
        let few = _mm512_cmplt_epu32_mask(value, two);
        let token = _mm512_mask_mov_epi32(token, few, value);

        let away = _mm512_cmpgt_epu32_mask(folded, shape.near);
        let (mut token, mut raw, mut low) = (token, value, folded);
        if away != 0 {
            let octave = _mm512_sub_epi32(_mm512_add_epi32(scale, above), shape.exponents(child));
            let is_far = _mm512_mask_cmplt_epu32_mask(away, octave, shape.octaves);
            let signs = _mm512_xor_si512(parent, child);
            let flipped = _mm512_and_si512(_mm512_srlv_epi32(signs, shape.up), one);
            let of_far = _mm512_add_epi32(
                _mm512_add_epi32(octave, octave),
                _mm512_add_epi32(flipped, far),
            );
            let mantissa = _mm512_and_si512(child, shape.mantissas);
            token = _mm512_mask_mov_epi32(token, away, escape);
            token = _mm512_mask_mov_epi32(token, is_far, of_far);
            raw = match LOW {
                0 => _mm512_mask_mov_epi32(raw, is_far, mantissa),
                1 => _mm512_mask_srli_epi32::<8>(raw, is_far, mantissa),
                _ => _mm512_mask_srli_epi32::<16>(raw, is_far, mantissa),
            };
            low = _mm512_mask_mov_epi32(low, away, mantissa);
            let mut escaped = away & !is_far;
            while escaped != 0 {
                let lane = at + escaped.trailing_zeros() as usize;
                out.escaped
                    .extend_from_slice(&children[lane * WIDTH..][..WIDTH]);
                escaped &= escaped - 1;
            }
        }
        // A shift by 32 or more leaves nothing.
        seen[0] = _mm512_or_si512(seen[0], _mm512_sllv_epi32(one, token));
        let above = _mm512_sllv_epi32(one, _mm512_sub_epi32(token, half));
        seen[1] = _mm512_or_si512(seen[1], above);
        let symbol = _mm512_add_epi32(shape.contexts(parent, scale), token);
        // SAFETY: the caller's.
        unsafe {
            let symbol = _mm512_or_si512(_mm512_slli_epi32::<16>(raw), symbol);
            store::<4>(out.symbols.as_mut_ptr().cast(), at, symbol);
            // What is lower is cut off.
            match LOW {
                0 => {}
                1 => store::<1>(out.lows.as_mut_ptr(), at, low),
                _ => store::<2>(out.lows.as_mut_ptr(), at, low),
            }
        }
    }
    let [below, above] = seen.map(|seen| _mm512_reduce_or_epi32(seen) as u32);
    out.seen |= u64::from(above) << 32 | u64::from(below);
}

impl Shape {
    /// Integers that grow with the numbers.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn ordered(self, bits: __m512i) -> __m512i {
        let negative = _mm512_mask_test_epi32_mask(self.float, bits, self.sign);
        let flipped = _mm512_mask_xor_epi32(bits, self.float, bits, self.sign);
        _mm512_mask_xor_epi32(flipped, negative, flipped, self.magnitude)
    }
}
