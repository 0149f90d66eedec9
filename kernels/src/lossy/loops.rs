//! Loops over pieces of arrays, once for each set of instructions.

use super::floats::{narrow, widen};
use super::{Loss, NO_LIMIT};
use crate::difference::Element;
use crate::vector::vectorised;

/// Elements that are worked on at once: whole blocks of every kind, and a buffer in the first-level cache.
pub(super) const PIECE: usize = 1024;

/// bf16 as f32.
#[inline(always)]
fn scale_of(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The next bf16 that is no smaller; of finite numbers from 0 that are far from the largest.
#[inline(always)]
fn rounded_up(value: f32) -> u16 {
    ((value.to_bits() + 0xffff) >> 16) as u16
}

#[inline(always)]
fn rounded(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The nearest integer, halves to even, of -most to most.
#[inline(always)]
fn integer(value: f32, most: f32) -> i8 {
    // Numbers beyond this have no fraction, and the integer in their lowest bits.
    const SHIFT: f32 = 12_582_912.0; // 1.5 x 2^23
    (value.clamp(-most, most) + SHIFT).to_bits() as i8
}

/// child - parent of a piece, with zeros for what `exact` lists.
#[inline(always)]
fn piece<'a>(
    element: Element,
    (parent, child): (&[u8], &[u8]),
    limit: f32,
    start: usize,
    [a, b]: &'a mut [[f32; PIECE]; 2],
    exact: &mut Vec<u32>,
) -> &'a [f32; PIECE] {
    let elements = parent.len() / element.width();
    widen(element, parent, &mut a[..elements]);
    widen(element, child, &mut b[..elements]);
    let mut far = 0u32;
    for (a, b) in a[..elements].iter_mut().zip(&b[..elements]) {
        *a = *b - *a;
        far |= u32::from(is_far(*a, limit));
    }
    a[elements..].fill(0.0);
    if far != 0 {
        for (i, d) in a.iter_mut().enumerate() {
            if is_far(*d, limit) {
                exact.push((start + i) as u32);
                *d = 0.0;
            }
        }
    }
    a
}

/// Infinite and NaN, too.
#[inline(always)]
#[allow(clippy::neg_cmp_op_on_partial_ord)]
fn is_far(d: f32, limit: f32) -> bool {
    !(d.abs() <= limit)
}

vectorised! {
    pub(super) fn integers<const B: usize>(
        element: Element,
        how: (f32, bool),
        limit: f32,
        of: (&[u8], &[u8]),
        into: (&mut [u16], &mut [i8], &mut Vec<u32>),
    ) {
        let ((most, up), (parent, child), (scales, codes, exact)) = (how, of, into);
        let mut buffers = [[0.0; PIECE]; 2];
        let width = element.width();
        let pieces = parent.chunks(PIECE * width).zip(child.chunks(PIECE * width));
        let rest = scales.chunks_mut(PIECE / B).zip(codes.chunks_mut(PIECE));
        for (i, (of, (scales, codes))) in pieces.zip(rest).enumerate() {
            let d = piece(element, of, limit, i * PIECE, &mut buffers, exact);
            let mut all = [0i8; PIECE];
            let blocks = d.as_chunks::<B>().0.iter().zip(all.as_chunks_mut::<B>().0);
            for ((d, codes), scale) in blocks.zip(scales.iter_mut()) {
                // A largest of its own for each lane: one alone would wait for itself.
                let mut largest = [0.0f32; 16];
                for d in d.as_chunks::<16>().0 {
                    for (largest, d) in largest.iter_mut().zip(d) {
                        *largest = if d.abs() > *largest { d.abs() } else { *largest };
                    }
                }
                let largest = largest.iter().fold(0.0f32, |a, b| a.max(*b));
                *scale = rounded_up(largest / most);
                let scale = scale_of(*scale);
                if scale == 0.0 {
                    continue;
                }
                // A product takes a fraction of the time of a quotient.
                let inverse = 1.0 / scale;
                if !inverse.is_finite() {
                    for (code, d) in codes.iter_mut().zip(d) {
                        let q = d / scale;
                        *code = integer(if up { q.ceil() } else { q }, most);
                    }
                } else if up {
                    for (code, d) in codes.iter_mut().zip(d) {
                        *code = integer((d * inverse).ceil(), most);
                    }
                } else {
                    for (code, d) in codes.iter_mut().zip(d) {
                        *code = integer(d * inverse, most);
                    }
                }
            }
            codes.copy_from_slice(&all[..codes.len()]);
        }
    }

    pub(super) fn signs<const B: usize>(
        element: Element,
        limit: f32,
        of: (&[u8], &[u8]),
        into: (&mut [u16], &mut [i8], &mut Vec<u32>),
    ) {
        let ((parent, child), (scales, codes, exact)) = (of, into);
        let mut buffers = [[0.0; PIECE]; 2];
        let width = element.width();
        let pieces = parent.chunks(PIECE * width).zip(child.chunks(PIECE * width));
        let rest = scales.chunks_mut(PIECE / B).zip(codes.chunks_mut(PIECE));
        for (i, (of, (scales, codes))) in pieces.zip(rest).enumerate() {
            let d = piece(element, of, limit, i * PIECE, &mut buffers, exact);
            let of_blocks = d.as_chunks::<B>().0.iter().zip(codes.chunks_mut(B));
            for ((d, codes), scale) in of_blocks.zip(scales.iter_mut()) {
                // A sum of its own for each lane, so that the order is the same whatever the width of registers.
                let mut sums = [0.0f32; 16];
                for d in d.as_chunks::<16>().0 {
                    for (sum, d) in sums.iter_mut().zip(d) {
                        // Of many near the largest number the sum would be infinite.
                        *sum += d.abs() / B as f32;
                    }
                }
                let mean: f32 = sums.iter().sum();
                *scale = rounded(mean * (B as f32 / codes.len() as f32));
                for (code, d) in codes.iter_mut().zip(d) {
                    *code = if *d < 0.0 { -1 } else { 1 };
                }
            }
        }
    }

    pub(super) fn sums<const B: usize>(element: Element, coded: (&[u16], &[i8]), parent: &[u8], out: &mut [u8]) {
        let (scales, codes) = coded;
        let width = element.width();
        let mut values = [0.0; PIECE];
        let pieces = parent.chunks(PIECE * width).zip(out.chunks_mut(PIECE * width));
        let rest = scales.chunks(PIECE / B).zip(codes.chunks(PIECE));
        for ((parent, out), (scales, codes)) in pieces.zip(rest) {
            let values = &mut values[..codes.len()];
            widen(element, parent, values);
            let blocks = values.chunks_mut(B).zip(codes.chunks(B)).zip(scales);
            for ((values, codes), scale) in blocks {
                let scale = scale_of(*scale);
                for (value, code) in values.iter_mut().zip(codes) {
                    *value += f32::from(*code) * scale;
                }
            }
            narrow(element, values, out);
        }
    }

    pub(super) fn losses(element: Element, parent: &[u8], child: &[u8], back: &[u8]) -> Loss {
        let width = element.width();
        let [mut a, mut b, mut c] = [[0.0; PIECE]; 3];
        let mut largest = [0.0f32; 16];
        let mut sums = [[0.0f64; 16]; 2];
        let mut untold = false;
        let pieces = child.chunks(PIECE * width).zip(back.chunks(PIECE * width));
        for (parent, (child, back)) in parent.chunks(PIECE * width).zip(pieces) {
            let elements = child.len() / width;
            for (values, bytes) in [(&mut a, parent), (&mut b, child), (&mut c, back)] {
                widen(element, bytes, &mut values[..elements]);
                values[elements..].fill(0.0);
            }
            let lanes = a.as_chunks::<16>().0.iter().zip(b.as_chunks::<16>().0).zip(c.as_chunks::<16>().0);
            for ((a, b), c) in lanes {
                for i in 0..16 {
                    // The same bits are no error, NaN or not.
                    let error = if b[i].to_bits() == c[i].to_bits() { 0.0 } else { c[i] - b[i] };
                    let change = b[i] - a[i];
                    let change = if change.abs() <= f32::MAX { change } else { 0.0 };
                    untold |= is_far(error, NO_LIMIT);
                    largest[i] = largest[i].max(error.abs());
                    sums[0][i] += f64::from(error) * f64::from(error);
                    sums[1][i] += f64::from(change) * f64::from(change);
                }
            }
        }
        let largest = largest.iter().fold(0.0f32, |a, b| a.max(*b));
        Loss {
            largest: if untold { f32::INFINITY } else { largest },
            error: sums[0].iter().sum(),
            change: sums[1].iter().sum(),
        }
    }

    pub(super) fn missed(element: Element, up: bool, child: &[u8], back: &[u8]) -> Vec<u32> {
        let width = element.width();
        let [mut a, mut b] = [[0.0; PIECE]; 2];
        let mut missed = Vec::new();
        let pieces = child.chunks(PIECE * width).zip(back.chunks(PIECE * width));
        for (i, (child, back)) in pieces.enumerate() {
            let elements = child.len() / width;
            let (a, b) = (&mut a[..elements], &mut b[..elements]);
            widen(element, child, a);
            widen(element, back, b);
            let is_missed = |a: f32, b: f32| is_far(b - a, NO_LIMIT) | (up & (b < a));
            let mut any = false;
            for (a, b) in a.iter().zip(b.iter()) {
                any |= is_missed(*a, *b);
            }
            if any {
                let pairs = a.iter().zip(b.iter()).enumerate();
                let places = pairs.filter(|(_, (a, b))| is_missed(**a, **b));
                missed.extend(places.map(|(j, _)| (i * PIECE + j) as u32));
            }
        }
        missed
    }

    pub(super) fn differences(element: Element, parent: &[u8], child: &[u8], out: &mut [f32]) {
        let width = element.width();
        let mut before = [0.0; PIECE];
        let pieces = parent.chunks(PIECE * width).zip(child.chunks(PIECE * width));
        for ((parent, child), out) in pieces.zip(out.chunks_mut(PIECE)) {
            let before = &mut before[..out.len()];
            widen(element, parent, before);
            widen(element, child, out);
            for (out, before) in out.iter_mut().zip(before) {
                let d = *out - *before;
                *out = if d.abs() <= f32::MAX { d } else { 0.0 };
            }
        }
    }

    pub(super) fn pack_bytes(codes: &[i8], out: &mut [u8]) {
        for (byte, code) in out.iter_mut().zip(codes) {
            *byte = *code as u8;
        }
    }

    pub(super) fn pack_nibbles(codes: &[i8], out: &mut [u8]) {
        let (pairs, last) = codes.as_chunks::<2>();
        for (byte, [low, high]) in out.iter_mut().zip(pairs) {
            *byte = (*low as u8 & 15) | (*high as u8) << 4;
        }
        if let ([last], Some(byte)) = (last, out.last_mut()) {
            *byte = *last as u8 & 15;
        }
    }

    pub(super) fn pack_signs(codes: &[i8], out: &mut [u8]) {
        for (byte, codes) in out.iter_mut().zip(codes.chunks(8)) {
            *byte = codes.iter().enumerate().fold(0, |byte, (i, code)| byte | u8::from(*code > 0) << i);
        }
    }

    pub(super) fn unpack_bytes(bytes: &[u8], codes: &mut [i8]) {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = *byte as i8;
        }
    }

    pub(super) fn unpack_nibbles(bytes: &[u8], codes: &mut [i8]) {
        let (pairs, last) = codes.as_chunks_mut::<2>();
        for ([low, high], byte) in pairs.iter_mut().zip(bytes) {
            *low = (*byte << 4) as i8 >> 4;
            *high = *byte as i8 >> 4;
        }
        if let ([last], Some(byte)) = (last, bytes.last()) {
            *last = (*byte << 4) as i8 >> 4;
        }
    }

    pub(super) fn unpack_signs(bytes: &[u8], codes: &mut [i8]) {
        for (codes, byte) in codes.chunks_mut(8).zip(bytes) {
            for (i, code) in codes.iter_mut().enumerate() {
                *code = ((byte >> i) & 1) as i8 * 2 - 1;
            }
        }
    }
}
