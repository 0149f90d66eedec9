//! What tokens depend on, in registers, and elements into and out of them.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::super::tokens::{Known, Loop};
use super::available;

/// Elements of a register.
pub(super) const LANES: usize = 16;

/// That what is known is of so many elements.
pub(super) fn check(shape: Loop, known: Known, elements: usize) {
    assert!(available());
    assert!(known.parent.len() >= elements * shape.bits as usize / 8);
    assert!(known.roots.is_empty() || known.roots.len() >= 4 * elements);
}

/// A [`Loop`] in registers.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// All lanes for floats.
    pub float: __mmask16,
    pub sign: __m512i,
    /// How far the sign is shifted.
    pub up: __m512i,
    pub magnitude: __m512i,
    pub mantissa: __m512i,
    pub mantissas: __m512i,
    pub exponents: __m512i,
    pub near: __m512i,
    pub octaves: __m512i,
    pub top: __m512i,
    /// Rotates the exponent to where contexts are wanted.
    rotation: __m512i,
    /// The rest is as contexts are wanted: shifted.
    exponents_there: __m512i,
    context_of_top: __m512i,
    last_context: __m512i,
    shift: __m512i,
}

impl Shape {
    /// Contexts will be shifted by `shift` bits.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(shape: Loop, shift: u32) -> Self {
        let all = |value: u32| _mm512_set1_epi32(value as i32);
        Self {
            float: if shape.magnitude == 0 { 0 } else { u16::MAX },
            sign: all(shape.sign),
            up: all(shape.bits - 1),
            magnitude: all(shape.magnitude),
            mantissa: all(shape.mantissa),
            mantissas: all((1 << shape.mantissa) - 1),
            exponents: all(shape.exponents),
            near: all(shape.near),
            octaves: all(shape.octaves),
            top: all(shape.top),
            rotation: all(shape.mantissa.wrapping_sub(shift)),
            exponents_there: all(shape.exponents << shift),
            context_of_top: all(shape.context_of_top),
            last_context: all(shape.last_context << shift),
            shift: all(shift),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn exponents(self, bits: __m512i) -> __m512i {
        _mm512_and_si512(_mm512_srlv_epi32(bits, self.mantissa), self.exponents)
    }

    /// Contexts, shifted.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn contexts(self, parent: __m512i, scale: __m512i) -> __m512i {
        let above = _mm512_sllv_epi32(_mm512_add_epi32(scale, self.context_of_top), self.shift);
        let exponents = _mm512_rorv_epi32(parent, self.rotation);
        let exponents = _mm512_and_si512(exponents, self.exponents_there);
        let below = _mm512_sub_epi32(above, exponents);
        let below = _mm512_max_epi32(below, _mm512_setzero_si512());
        _mm512_min_epi32(below, self.last_context)
    }

    /// The exponents that elements from the `at`-th on are relative to.
    ///
    /// # Safety
    ///
    /// `known.roots` must be empty or hold 16 of them.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn scales(self, known: Known, at: usize) -> __m512i {
        if known.roots.is_empty() {
            return self.top;
        }
        // SAFETY: the caller's.
        let bits = unsafe { load::<4>(known.roots.as_ptr(), at) };
        let exponents = _mm512_and_si512(_mm512_srli_epi32::<23>(bits), _mm512_set1_epi32(0xff));
        _mm512_srli_epi32::<1>(_mm512_add_epi32(exponents, _mm512_set1_epi32(127)))
    }
}

/// Elements of `WIDTH` bytes from the `at`-th on.
///
/// # Safety
///
/// There must be 16 of them.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn load<const WIDTH: usize>(elements: *const u8, at: usize) -> __m512i {
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
pub(super) unsafe fn store<const WIDTH: usize>(elements: *mut u8, at: usize, values: __m512i) {
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
