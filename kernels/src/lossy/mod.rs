//! Lossy differences: what a child is beside its parent, in few bits an element.
//!
//! d = child - parent in f32 is cut into blocks, each with a scale s in bf16 and for each element a code q:
//!
//! ```text
//! int8      64 elements    s = max |d| / 127, rounded up     q = round(d (1 / s))     in -127..=127
//! int4      32 elements    s = max |d| / 7, rounded up       q = round(d (1 / s))     in -7..=7
//! sign     128 elements    s = mean |d|                      q = 1 or -1, d's sign
//! ```
//!
//! `round` is to the nearest, halves to even; `sign` is the 1-bit code of least squared error for its scale (Seide et al.,
//! 2014; for fine-tunes Liu et al., 2024, "BitDelta", with a scale for each matrix). The child comes back as parent +
//! q s, rounded to its own type: [`reconstruct`]. What is not finite, and what is further from the parent than a limit, is
//! told apart, to be stored as it is: [`quantise`] lists the places.
//!
//! A matrix of differences can also be the product of two narrow ones, U `[rows, rank]` and V `[rank, cols]`, whose
//! columns and rows have one scale each and codes as `int8` has: [`Factors`].
//!
//! Everything that both sides compute is elementwise in f32, one operation at a time, so that every [`Path`] and every
//! processor comes to the same bits.

mod factors;
mod floats;
mod reference;
#[cfg(test)]
mod tests;

pub use crate::panel::Path;
pub use factors::Factors;

use crate::difference::Element;
use crate::vector::vectorised;
use floats::{narrow, widen};

/// How a block is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Levels {
    /// 255 levels, blocks of 64.
    Int8,
    /// 15 levels, blocks of 32.
    Int4,
    /// Two levels, blocks of 128.
    Sign,
}

impl Levels {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Int8, Self::Int4, Self::Sign];

    /// Elements that share a scale.
    pub const fn block(self) -> usize {
        match self {
            Self::Int8 => 64,
            Self::Int4 => 32,
            Self::Sign => 128,
        }
    }

    /// Bits of a code.
    pub const fn bits(self) -> usize {
        match self {
            Self::Int8 => 8,
            Self::Int4 => 4,
            Self::Sign => 1,
        }
    }

    /// Bytes of so many codes, packed.
    pub const fn packed(self, codes: usize) -> usize {
        (codes * self.bits()).div_ceil(8)
    }
}

/// Where codes are between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest.
    Nearest,
    /// To the next level above: what comes back is no less than it was, but for the rounding of sums. Not of signs.
    Up,
}

/// The element has no difference that could be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no float of 16 or 32 bits")]
pub struct NoFloat(pub Element);

/// What [`quantise`] makes of a difference; one of it serves for many.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Quantised {
    /// One for each block, in bf16.
    pub scales: Vec<u16>,
    /// One for each element.
    pub codes: Vec<i8>,
    /// Places of elements to be stored as they are, ascending: their codes say nothing of them.
    pub exact: Vec<u32>,
}

/// How far what came back is from what it was.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Loss {
    /// The largest magnitude of an element's error; infinite or NaN if one cannot be told.
    pub largest: f32,
    /// The sum of squares of errors.
    pub error: f64,
    /// The sum of squares of what child and parent differ by, where that is finite.
    pub change: f64,
}

impl Loss {
    /// Both.
    pub fn and(self, other: Self) -> Self {
        // NaN is to stay.
        let larger = if self.largest >= other.largest {
            self.largest
        } else {
            other.largest
        };
        let largest = if self.largest.is_nan() {
            self.largest
        } else {
            larger
        };
        Self {
            largest,
            error: self.error + other.error,
            change: self.change + other.change,
        }
    }

    /// √(error / change), the share of the change that is lost, in the L2 norm; 0 where nothing is lost.
    pub fn relative(&self) -> f64 {
        if self.error == 0.0 {
            0.0
        } else {
            (self.error / self.change).sqrt()
        }
    }
}

/// Elements that are worked on at once: whole blocks of every kind, and a buffer in the first-level cache.
const PIECE: usize = 1024;

/// Rounds the difference of two arrays of little-endian elements, equally long. Elements further than `limit` from their
/// parents are listed, and those whose difference is not finite.
///
/// # Errors
///
/// Elements that are no floats.
///
/// # Panics
///
/// If the arrays are not equally long, or no whole number of elements.
pub fn quantise(
    path: Path,
    element: Element,
    (levels, rounding): (Levels, Rounding),
    limit: f32,
    (parent, child): (&[u8], &[u8]),
    into: &mut Quantised,
) -> Result<(), NoFloat> {
    check(element)?;
    let elements = count(element, parent, child);
    into.scales.clear();
    into.scales.resize(elements.div_ceil(levels.block()), 0);
    into.codes.clear();
    into.codes.resize(elements, 0);
    into.exact.clear();
    let Quantised {
        scales,
        codes,
        exact,
    } = into;
    let up = rounding == Rounding::Up;
    match levels {
        Levels::Int8 => integers::<64>(
            path,
            element,
            (127.0, up),
            limit,
            (parent, child),
            (scales, codes, exact),
        ),
        Levels::Int4 => integers::<32>(
            path,
            element,
            (7.0, up),
            limit,
            (parent, child),
            (scales, codes, exact),
        ),
        Levels::Sign => signs::<128>(
            path,
            element,
            limit,
            (parent, child),
            (scales, codes, exact),
        ),
    }
    Ok(())
}

/// Puts parent + code x scale into `out`, of as many bytes as `parent`.
///
/// # Errors
///
/// Elements that are no floats.
///
/// # Panics
///
/// If the arrays do not fit each other.
pub fn reconstruct(
    path: Path,
    element: Element,
    levels: Levels,
    (scales, codes): (&[u16], &[i8]),
    parent: &[u8],
    out: &mut [u8],
) -> Result<(), NoFloat> {
    check(element)?;
    let elements = count(element, parent, out);
    assert_eq!(
        (codes.len(), scales.len()),
        (elements, elements.div_ceil(levels.block()))
    );
    match levels {
        Levels::Int8 => sums::<64>(path, element, (scales, codes), parent, out),
        Levels::Int4 => sums::<32>(path, element, (scales, codes), parent, out),
        Levels::Sign => sums::<128>(path, element, (scales, codes), parent, out),
    }
    Ok(())
}

/// How far `back` is from `child`, and that from its parent.
///
/// # Errors
///
/// Elements that are no floats.
///
/// # Panics
///
/// If the arrays are not equally long, or no whole number of elements.
pub fn loss(
    path: Path,
    element: Element,
    parent: &[u8],
    child: &[u8],
    back: &[u8],
) -> Result<Loss, NoFloat> {
    check(element)?;
    count(element, parent, child);
    count(element, child, back);
    Ok(losses(path, element, parent, child, back))
}

/// Places of elements that come back as what they must not: not finite where the child is, and, rounded up, less than it.
///
/// # Errors
///
/// Elements that are no floats.
///
/// # Panics
///
/// If the arrays are not equally long, or no whole number of elements.
pub fn misses(
    element: Element,
    rounding: Rounding,
    child: &[u8],
    back: &[u8],
) -> Result<Vec<u32>, NoFloat> {
    check(element)?;
    count(element, child, back);
    Ok(missed(
        Path::detect(),
        element,
        rounding == Rounding::Up,
        child,
        back,
    ))
}

/// The mean square of what child and parent differ by, where that is finite.
///
/// # Errors
///
/// Elements that are no floats.
///
/// # Panics
///
/// If the arrays are not equally long, or no whole number of elements.
pub fn mean_square(
    path: Path,
    element: Element,
    parent: &[u8],
    child: &[u8],
) -> Result<f64, NoFloat> {
    let change = loss(path, element, parent, child, child)?.change;
    Ok(change / (child.len() / element.width()).max(1) as f64)
}

/// Puts child - parent into `out`, an f32 for each element; what is not finite is 0.
///
/// # Errors
///
/// Elements that are no floats.
///
/// # Panics
///
/// If the arrays do not fit each other.
pub fn subtract(
    path: Path,
    element: Element,
    (parent, child): (&[u8], &[u8]),
    out: &mut [f32],
) -> Result<(), NoFloat> {
    check(element)?;
    assert_eq!(count(element, parent, child), out.len());
    differences(path, element, parent, child, out);
    Ok(())
}

/// Packs codes, the first in the lowest bits.
pub fn pack(path: Path, levels: Levels, codes: &[i8], out: &mut [u8]) {
    assert_eq!(out.len(), levels.packed(codes.len()));
    match levels {
        Levels::Int8 => pack_bytes(path, codes, out),
        Levels::Int4 => pack_nibbles(path, codes, out),
        // 1 is a set bit, -1 none.
        Levels::Sign => pack_signs(path, codes, out),
    }
}

/// [`pack`], back.
pub fn unpack(path: Path, levels: Levels, bytes: &[u8], codes: &mut [i8]) {
    assert_eq!(bytes.len(), levels.packed(codes.len()));
    match levels {
        Levels::Int8 => unpack_bytes(path, bytes, codes),
        Levels::Int4 => unpack_nibbles(path, bytes, codes),
        Levels::Sign => unpack_signs(path, bytes, codes),
    }
}

fn check(element: Element) -> Result<(), NoFloat> {
    match element {
        Element::F32 | Element::F16 | Element::Bf16 => Ok(()),
        other => Err(NoFloat(other)),
    }
}

fn count(element: Element, parent: &[u8], child: &[u8]) -> usize {
    assert_eq!(parent.len(), child.len());
    assert!(child.len().is_multiple_of(element.width()));
    child.len() / element.width()
}

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

/// A limit that only what is not finite is beyond.
pub const NO_LIMIT: f32 = f32::MAX;

vectorised! {
    fn integers<const B: usize>(
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

    fn signs<const B: usize>(
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

    fn sums<const B: usize>(element: Element, coded: (&[u16], &[i8]), parent: &[u8], out: &mut [u8]) {
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

    fn losses(element: Element, parent: &[u8], child: &[u8], back: &[u8]) -> Loss {
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

    fn missed(element: Element, up: bool, child: &[u8], back: &[u8]) -> Vec<u32> {
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

    fn differences(element: Element, parent: &[u8], child: &[u8], out: &mut [f32]) {
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

    fn pack_bytes(codes: &[i8], out: &mut [u8]) {
        for (byte, code) in out.iter_mut().zip(codes) {
            *byte = *code as u8;
        }
    }

    fn pack_nibbles(codes: &[i8], out: &mut [u8]) {
        let (pairs, last) = codes.as_chunks::<2>();
        for (byte, [low, high]) in out.iter_mut().zip(pairs) {
            *byte = (*low as u8 & 15) | (*high as u8) << 4;
        }
        if let ([last], Some(byte)) = (last, out.last_mut()) {
            *byte = *last as u8 & 15;
        }
    }

    fn pack_signs(codes: &[i8], out: &mut [u8]) {
        for (byte, codes) in out.iter_mut().zip(codes.chunks(8)) {
            *byte = codes.iter().enumerate().fold(0, |byte, (i, code)| byte | u8::from(*code > 0) << i);
        }
    }

    fn unpack_bytes(bytes: &[u8], codes: &mut [i8]) {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = *byte as i8;
        }
    }

    fn unpack_nibbles(bytes: &[u8], codes: &mut [i8]) {
        let (pairs, last) = codes.as_chunks_mut::<2>();
        for ([low, high], byte) in pairs.iter_mut().zip(bytes) {
            *low = (*byte << 4) as i8 >> 4;
            *high = *byte as i8 >> 4;
        }
        if let ([last], Some(byte)) = (last, bytes.last()) {
            *last = (*byte << 4) as i8 >> 4;
        }
    }

    fn unpack_signs(bytes: &[u8], codes: &mut [i8]) {
        for (codes, byte) in codes.chunks_mut(8).zip(bytes) {
            for (i, code) in codes.iter_mut().enumerate() {
                *code = ((byte >> i) & 1) as i8 * 2 - 1;
            }
        }
    }
}
