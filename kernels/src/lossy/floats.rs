//! Little-endian floats of 16 and 32 bits as f32, and back to the nearest, halves to even.
//!
//! Plain integer arithmetic, which compilers vectorise and which gives every NaN the same bits everywhere.

use crate::difference::Element;

/// # Panics
///
/// For elements that are no floats: who calls has checked that.
#[inline(always)]
pub(super) fn widen(element: Element, bytes: &[u8], out: &mut [f32]) {
    match element {
        Element::F32 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        Element::Bf16 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        Element::F16 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = from_half(u16::from_le_bytes(*bytes));
            }
        }
        other => unreachable!("{other:?} is no float"),
    }
}

/// # Panics
///
/// As [`widen`].
#[inline(always)]
pub(super) fn narrow(element: Element, values: &[f32], out: &mut [u8]) {
    match element {
        Element::F32 => {
            for (out, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *out = value.to_le_bytes();
            }
        }
        Element::Bf16 => {
            for (out, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *out = to_bfloat(*value).to_le_bytes();
            }
        }
        Element::F16 => {
            for (out, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *out = to_half(*value).to_le_bytes();
            }
        }
        other => unreachable!("{other:?} is no float"),
    }
}

const INFINITY: u32 = 0x7f80_0000;

#[inline(always)]
fn to_bfloat(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let is_nan = bits & !(1 << 31) > INFINITY;
    ((if is_nan { bits | 1 << 22 } else { rounded }) >> 16) as u16
}

#[inline(always)]
fn from_half(half: u16) -> f32 {
    let half = u32::from(half);
    let magnitude = (half & 0x7fff) << 13;
    // The exponent is 112 less than an f32's: the product is exact, of denormals too.
    let scaled = f32::from_bits(magnitude) * f32::from_bits((112 + 127) << 23);
    let is_finite = half & 0x7c00 != 0x7c00;
    let bits = if is_finite {
        scaled.to_bits()
    } else {
        magnitude | INFINITY
    };
    f32::from_bits(bits | (half & 0x8000) << 16)
}

#[inline(always)]
fn to_half(value: f32) -> u16 {
    let bits = value.to_bits();
    let (sign, magnitude) = ((bits >> 16) & 0x8000, bits & !(1 << 31));
    let normal = (magnitude + 0xfff + ((magnitude >> 13) & 1)).wrapping_sub(112 << 23) >> 13;
    // An f32 between 1/2 and 1 has steps of 2^-24, as denormals of 16 bits have.
    let denormal = (f32::from_bits(magnitude) + 0.5)
        .to_bits()
        .wrapping_sub(0.5f32.to_bits());
    let rounded = if magnitude < (113 << 23) {
        denormal
    } else {
        normal
    };
    let finite = if magnitude >= 0x477f_f000 {
        0x7c00
    } else {
        rounded
    };
    let is_nan = magnitude > INFINITY;
    let nan = 0x7e00 | (magnitude >> 13) & 0x3ff;
    (sign | if is_nan { nan } else { finite }) as u16
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn d3_every_float_of_16_bits_is_widened_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (half, bfloat) = (f16::from_bits(bits), bf16::from_bits(bits));
            for (element, expected) in [
                (Element::F16, half.to_f32()),
                (Element::Bf16, bfloat.to_f32()),
            ] {
                let mut wide = [0.0];
                widen(element, &bits.to_le_bytes(), &mut wide);
                assert!(
                    wide[0] == expected || wide[0].is_nan() && expected.is_nan(),
                    "{element:?} {bits:#x}"
                );
                let mut back = [0; 2];
                narrow(element, &wide, &mut back);
                let back = u16::from_le_bytes(back);
                // Of signalling NaNs the quiet ones come back.
                assert!(
                    back == bits || wide[0].is_nan() && back & bits == bits,
                    "{element:?} {bits:#x}"
                );
            }
        }
    }

    #[test]
    fn d3_floats_are_narrowed_to_the_nearest() {
        let mut state = 1u32;
        for i in 0..2_000_000u32 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Halfway between two, too.
            let bits = match i % 4 {
                0 => state,
                1 => state & !0xfff | (0x1000 * ((i / 4) & 1)),
                2 => (state & 0x8fff_ffff) | 0x3000_0000,
                _ => state & !0xffff | 0x8000,
            };
            let value = f32::from_bits(bits);
            let mut out = [0; 2];
            narrow(Element::F16, &[value], &mut out);
            let half = f16::from_f32(value);
            assert!(
                u16::from_le_bytes(out) == half.to_bits() || value.is_nan(),
                "{value:e}"
            );
            narrow(Element::Bf16, &[value], &mut out);
            let bfloat = bf16::from_f32(value);
            assert!(
                u16::from_le_bytes(out) == bfloat.to_bits() || value.is_nan(),
                "{value:e}"
            );
        }
    }
}
