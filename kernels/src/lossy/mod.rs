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
mod loops;
mod reference;
#[cfg(test)]
mod tests;

pub use crate::panel::Path;
pub use factors::Factors;

use crate::difference::Element;
use loops::{
    differences, integers, losses, missed, pack_bytes, pack_nibbles, pack_signs, signs, sums,
    unpack_bytes, unpack_nibbles, unpack_signs,
};

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

/// A limit that only what is not finite is beyond.
pub const NO_LIMIT: f32 = f32::MAX;

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
