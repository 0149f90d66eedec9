//! Tokens of 16 elements at a time.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::tokens::{ABOVE, ESCAPE, FAR, Known, Loop, Read, TOKENS, Tokens};
use super::available;

/// Elements of a register.
const LANES: usize = 16;

/// Elements that registers hold whole.
fn whole(elements: usize) -> usize {
    elements / LANES * LANES
}

/// That what is known is of so many elements.
fn check(shape: Loop, known: Known, elements: usize) {
    assert!(available());
    assert!(known.parent.len() >= elements * shape.bits as usize / 8);
    assert!(known.roots.is_empty() || known.roots.len() >= 4 * elements);
}

/// As [`Spec::tokenise`](super::super::tokens::Spec), of the first elements. Returns how many.
pub(in super::super) fn tokenise(
    shape: Loop,
    known: Known,
    child: &[u8],
    out: &mut Tokens,
) -> usize {
    let width = shape.bits as usize / 8;
    let elements = child.len() / width;
    check(shape, known, elements);
    assert!(out.symbols.len() >= elements && out.raws.len() >= elements);
    assert!(out.lows.len() >= elements * shape.low as usize / 8);
    let count = whole(elements);
    // SAFETY: the instructions are there, and all slices hold so many elements.
    unsafe {
        match width {
            1 => tokenise_all::<1>(shape, known, child, count, out),
            2 => tokenise_all::<2>(shape, known, child, count, out),
            _ => tokenise_all::<4>(shape, known, child, count, out),
        }
    }
    count
}

/// As [`Spec::contextualise`](super::super::tokens::Spec), of the first elements. Returns how many.
pub(in super::super) fn contextualise(shape: Loop, known: Known, contexts: &mut [u8]) -> usize {
    let width = shape.bits as usize / 8;
    let elements = known.parent.len() / width;
    check(shape, known, elements);
    assert!(contexts.len() >= elements);
    let count = whole(elements);
    // SAFETY: the instructions are there, and all slices hold so many elements.
    unsafe {
        match width {
            1 => contexts_of_all::<1>(shape, known, contexts, count),
            2 => contexts_of_all::<2>(shape, known, contexts, count),
            _ => contexts_of_all::<4>(shape, known, contexts, count),
        }
    }
    count
}

/// As [`Spec::restore`](super::super::tokens::Spec), of the first elements. Returns how many, and how many of them are
/// escaped.
pub(in super::super) fn restore(
    shape: Loop,
    known: Known,
    read: Read,
    child: &mut [u8],
) -> (usize, u32) {
    let width = shape.bits as usize / 8;
    let elements = child.len() / width;
    check(shape, known, elements);
    assert!(read.tokens.len() >= elements && read.raws.len() >= elements);
    assert!(read.lows.len() >= elements * shape.low as usize / 8);
    let count = whole(elements);
    // SAFETY: the instructions are there, and all slices hold so many elements.
    let escaped = unsafe {
        match width {
            1 => restore_all::<1>(shape, known, read, child, count),
            2 => restore_all::<2>(shape, known, read, child, count),
            _ => restore_all::<4>(shape, known, read, child, count),
        }
    };
    (count, escaped)
}

/// A [`Loop`] in registers.
#[derive(Clone, Copy)]
struct Shape {
    unused: __m128i,
    /// To the sign.
    up: __m128i,
    float: __mmask16,
    sign: __m512i,
    ones: __m512i,
    mantissa: __m128i,
    mantissas: __m512i,
    exponents: __m512i,
    low: __m128i,
    lows: __m512i,
    near: __m512i,
    octaves: __m512i,
    low_bytes: usize,
    top: __m512i,
    context_of_top: __m512i,
    last_context: __m512i,
}

impl Shape {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(shape: Loop) -> Self {
        let all = |value: u32| _mm512_set1_epi32(value as i32);
        let by = |bits: u32| _mm_cvtsi32_si128(bits as i32);
        Self {
            unused: by(32 - shape.bits),
            up: by(shape.bits - 1),
            float: if shape.magnitude == 0 { 0 } else { u16::MAX },
            sign: all(shape.sign),
            ones: all(shape.sign | shape.magnitude),
            mantissa: by(shape.mantissa),
            mantissas: all((1 << shape.mantissa) - 1),
            exponents: all(shape.exponents),
            low: by(shape.low),
            lows: all((1 << shape.low) - 1),
            near: all(shape.near),
            octaves: all(shape.octaves),
            low_bytes: shape.low as usize / 8,
            top: all(shape.top),
            context_of_top: all(shape.context_of_top),
            last_context: all(shape.last_context),
        }
    }

    /// Integers that grow with the numbers.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn ordered(self, bits: __m512i) -> __m512i {
        let negative = _mm512_mask_test_epi32_mask(self.float, bits, self.sign);
        let flips = _mm512_mask_blend_epi32(negative, self.sign, self.ones);
        _mm512_mask_xor_epi32(bits, self.float, bits, flips)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn unordered(self, ordered: __m512i) -> __m512i {
        let positive = _mm512_mask_test_epi32_mask(self.float, ordered, self.sign);
        let flips = _mm512_mask_blend_epi32(positive, self.ones, self.sign);
        _mm512_mask_xor_epi32(ordered, self.float, ordered, flips)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn exponents(self, bits: __m512i) -> __m512i {
        _mm512_and_si512(_mm512_srl_epi32(bits, self.mantissa), self.exponents)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn contexts(self, parent: __m512i, scale: __m512i) -> __m512i {
        let above = _mm512_add_epi32(scale, self.context_of_top);
        let below = _mm512_sub_epi32(above, self.exponents(parent));
        let below = _mm512_max_epi32(below, _mm512_setzero_si512());
        _mm512_min_epi32(below, self.last_context)
    }
}

/// The exponents that elements from the `at`-th on are relative to.
///
/// # Safety
///
/// `known.roots` must be empty or hold 16 of them.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn scales(shape: Shape, known: Known, at: usize) -> __m512i {
    if known.roots.is_empty() {
        return shape.top;
    }
    // SAFETY: the caller's.
    let bits = unsafe { load::<4>(known.roots.as_ptr(), at) };
    let exponents = _mm512_and_si512(_mm512_srli_epi32::<23>(bits), _mm512_set1_epi32(0xff));
    _mm512_srli_epi32::<1>(_mm512_add_epi32(exponents, _mm512_set1_epi32(127)))
}

/// Elements of `WIDTH` bytes from the `at`-th on.
///
/// # Safety
///
/// There must be 16 of them.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load<const WIDTH: usize>(elements: *const u8, at: usize) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let from = elements.add(at * WIDTH);
        match WIDTH {
            1 => _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())),
            2 => _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())),
            _ => _mm512_loadu_si512(from.cast()),
        }
    }
}

/// # Safety
///
/// There must be room for 16 elements of `WIDTH` bytes from the `at`-th on.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const WIDTH: usize>(elements: *mut u8, at: usize, values: __m512i) {
    // SAFETY: the caller's.
    unsafe {
        let to = elements.add(at * WIDTH);
        match WIDTH {
            1 => _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(values)),
            2 => _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(values)),
            _ => _mm512_storeu_si512(to.cast(), values),
        }
    }
}

/// # Safety
///
/// All slices must hold `count` elements, a multiple of 16.
#[target_feature(enable = "avx512f")]
unsafe fn tokenise_all<const WIDTH: usize>(
    shape: Loop,
    known: Known,
    children: &[u8],
    count: usize,
    out: &mut Tokens,
) {
    let shape = Shape::new(shape);
    let (zero, one) = (_mm512_setzero_si512(), _mm512_set1_epi32(1));
    let two = _mm512_set1_epi32(2);
    let minus_one = _mm512_set1_epi32(-1);
    let bias = _mm512_set1_epi32(254);
    let above = _mm512_set1_epi32(ABOVE as i32);
    let (escape, far) = (
        _mm512_set1_epi32(ESCAPE as i32),
        _mm512_set1_epi32(FAR as i32),
    );
    for at in (0..count).step_by(LANES) {
        // SAFETY: the caller's.
        let (parent, child, scale) = unsafe {
            (
                load::<WIDTH>(known.parent.as_ptr(), at),
                load::<WIDTH>(children.as_ptr(), at),
                scales(shape, known, at),
            )
        };

        let difference = _mm512_sub_epi32(shape.ordered(child), shape.ordered(parent));
        let difference = _mm512_sra_epi32(_mm512_sll_epi32(difference, shape.unused), shape.unused);
        let folded = _mm512_xor_si512(
            _mm512_add_epi32(difference, difference),
            _mm512_srai_epi32::<31>(difference),
        );
        let value = _mm512_srl_epi32(folded, shape.low);
        let as_float = _mm512_castps_si512(_mm512_cvtepi32_ps(value));
        let token = _mm512_sub_epi32(_mm512_srli_epi32::<22>(as_float), bias);
        let few = _mm512_cmplt_epu32_mask(value, two);
        let token = _mm512_mask_mov_epi32(token, few, value);
        let raw_bits = _mm512_sub_epi32(_mm512_max_epi32(_mm512_srli_epi32::<1>(token), one), one);
        let raw = _mm512_andnot_si512(_mm512_sllv_epi32(minus_one, raw_bits), value);
        let context = shape.contexts(parent, scale);

        let away = _mm512_cmpgt_epu32_mask(folded, shape.near);
        let (mut token, mut raw, mut low) = (token, raw, folded);
        if away != 0 {
            let octave = _mm512_sub_epi32(_mm512_add_epi32(scale, above), shape.exponents(child));
            let is_far = _mm512_mask_cmplt_epu32_mask(away, octave, shape.octaves);
            let flipped = _mm512_and_si512(
                _mm512_srl_epi32(_mm512_xor_si512(parent, child), shape.up),
                one,
            );
            let of_far = _mm512_add_epi32(
                _mm512_add_epi32(octave, octave),
                _mm512_add_epi32(flipped, far),
            );
            let mantissa = _mm512_and_si512(child, shape.mantissas);
            token = _mm512_mask_mov_epi32(token, away, escape);
            token = _mm512_mask_mov_epi32(token, is_far, of_far);
            raw = _mm512_mask_mov_epi32(raw, away, zero);
            raw = _mm512_mask_srl_epi32(raw, is_far, mantissa, shape.low);
            low = _mm512_mask_mov_epi32(low, away, mantissa);
            let mut escaped = away & !is_far;
            while escaped != 0 {
                let lane = at + escaped.trailing_zeros() as usize;
                out.escaped
                    .extend_from_slice(&children[lane * WIDTH..][..WIDTH]);
                escaped &= escaped - 1;
            }
        }
        let symbol = _mm512_add_epi32(_mm512_slli_epi32::<{ TOKENS.ilog2() }>(context), token);
        let low = _mm512_and_si512(low, shape.lows);
        // SAFETY: the caller's.
        unsafe {
            store::<2>(out.symbols.as_mut_ptr().cast(), at, symbol);
            store::<2>(out.raws.as_mut_ptr().cast(), at, raw);
            match shape.low_bytes {
                0 => {}
                1 => store::<1>(out.lows.as_mut_ptr(), at, low),
                _ => store::<2>(out.lows.as_mut_ptr(), at, low),
            }
        }
    }
}

/// # Safety
///
/// All slices must hold `count` elements, a multiple of 16.
#[target_feature(enable = "avx512f")]
unsafe fn contexts_of_all<const WIDTH: usize>(
    shape: Loop,
    known: Known,
    contexts: &mut [u8],
    count: usize,
) {
    let shape = Shape::new(shape);
    for at in (0..count).step_by(LANES) {
        // SAFETY: the caller's.
        unsafe {
            let parent = load::<WIDTH>(known.parent.as_ptr(), at);
            let contexts_here = shape.contexts(parent, scales(shape, known, at));
            store::<1>(contexts.as_mut_ptr(), at, contexts_here);
        }
    }
}

/// # Safety
///
/// All slices must hold `count` elements, a multiple of 16.
#[target_feature(enable = "avx512f")]
unsafe fn restore_all<const WIDTH: usize>(
    shape: Loop,
    known: Known,
    read: Read,
    child: &mut [u8],
    count: usize,
) -> u32 {
    let shape = Shape::new(shape);
    let one = _mm512_set1_epi32(1);
    let two = _mm512_set1_epi32(2);
    let above = _mm512_set1_epi32(ABOVE as i32);
    let (escape, far) = (
        _mm512_set1_epi32(ESCAPE as i32),
        _mm512_set1_epi32(FAR as i32),
    );
    let mut escaped = 0;
    for at in (0..count).step_by(LANES) {
        // SAFETY: the caller's.
        let (parent, token, raw, low) = unsafe {
            (
                load::<WIDTH>(known.parent.as_ptr(), at),
                load::<1>(read.tokens.as_ptr(), at),
                load::<2>(read.raws.as_ptr().cast(), at),
                match shape.low_bytes {
                    0 => _mm512_setzero_si512(),
                    1 => load::<1>(read.lows.as_ptr(), at),
                    _ => load::<2>(read.lows.as_ptr(), at),
                },
            )
        };
        let raw_bits = _mm512_sub_epi32(_mm512_max_epi32(_mm512_srli_epi32::<1>(token), one), one);
        let highest = _mm512_or_si512(_mm512_and_si512(token, one), two);
        let value = _mm512_or_si512(_mm512_sllv_epi32(highest, raw_bits), raw);
        let value = _mm512_mask_mov_epi32(value, _mm512_cmplt_epu32_mask(token, two), token);
        let folded = _mm512_or_si512(_mm512_sll_epi32(value, shape.low), low);
        let flips = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_and_si512(folded, one));
        let difference = _mm512_xor_si512(_mm512_srli_epi32::<1>(folded), flips);
        let ordered = _mm512_add_epi32(shape.ordered(parent), difference);
        let mut bits = shape.unordered(ordered);

        let away = _mm512_cmpge_epu32_mask(token, escape);
        if away != 0 {
            // SAFETY: as above.
            let scale = unsafe { scales(shape, known, at) };
            let far = _mm512_sub_epi32(token, far);
            let octave = _mm512_srli_epi32::<1>(far);
            let exponent = _mm512_sub_epi32(_mm512_add_epi32(scale, above), octave);
            let exponent = _mm512_and_si512(exponent, shape.exponents);
            let sign = _mm512_xor_si512(parent, _mm512_sll_epi32(far, shape.up));
            let sign = _mm512_and_si512(sign, shape.sign);
            let mantissa = _mm512_or_si512(_mm512_sll_epi32(raw, shape.low), low);
            let upper = _mm512_or_si512(sign, _mm512_sll_epi32(exponent, shape.mantissa));
            bits = _mm512_mask_or_epi32(bits, away, upper, mantissa);
            escaped += _mm512_cmpeq_epu32_mask(token, escape).count_ones();
        }
        // SAFETY: as above.
        unsafe { store::<WIDTH>(child.as_mut_ptr(), at, bits) };
    }
    escaped
}
