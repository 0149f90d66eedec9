//! Two bit-planes: where trits are 1, and where they are -1. Dot products of such rows are population counts.
//!
//! A row is `ceil(cols / 64)` words in each plane; bit i of word w is column 64w + i. Padding is 0 in both.

use super::LayoutError;
use super::compute::check_shape;
use crate::ternary::Granularity;

/// Columns of a word.
pub const WORD: usize = 64;

/// The planes of a matrix, `[rows, ceil(cols / 64)]` each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planes {
    /// Where trits are 1.
    pub plus: Vec<u64>,
    /// Where trits are -1.
    pub minus: Vec<u64>,
}

/// Words of one plane of a matrix.
pub fn words(rows: usize, cols: usize) -> usize {
    rows * cols.div_ceil(WORD)
}

/// The planes of row-major trits `[rows, cols]`.
///
/// # Errors
///
/// A wrong length, or a value that is not a trit.
pub fn pack(trits: &[i8], rows: usize, cols: usize) -> Result<Planes, LayoutError> {
    super::check_trits(trits, rows, cols)?;
    let plane = |wanted: i8| {
        let bits = |trits: &[i8]| {
            let bit = |(i, &trit): (usize, &i8)| u64::from(trit == wanted) << i;
            trits.iter().enumerate().map(bit).sum()
        };
        trits
            .chunks(cols.max(1))
            .flat_map(|row| row.chunks(WORD).map(bits))
            .collect()
    };
    Ok(Planes {
        plus: plane(1),
        minus: plane(-1),
    })
}

/// The row-major trits `[rows, cols]` of planes.
///
/// # Errors
///
/// A wrong length, a bit that is set in both planes, or padding that is not 0.
pub fn unpack(planes: &Planes, rows: usize, cols: usize) -> Result<Vec<i8>, LayoutError> {
    check_shape(rows, cols, Granularity::Tensor)?;
    let expected = words(rows, cols);
    for (what, plane) in [
        ("words of the plus plane", &planes.plus),
        ("words of the minus plane", &planes.minus),
    ] {
        let found = plane.len();
        if expected != found {
            return Err(LayoutError::Length {
                what,
                expected,
                found,
            });
        }
    }
    let per_row = cols.div_ceil(WORD);
    let mut trits = Vec::with_capacity(rows * cols);
    for (index, (&plus, &minus)) in planes.plus.iter().zip(&planes.minus).enumerate() {
        let (row, first) = (index / per_row, index % per_row * WORD);
        if plus & minus != 0 {
            let col = first + (plus & minus).trailing_zeros() as usize;
            return Err(LayoutError::Overlap { row, col });
        }
        let valid = (cols - first).min(WORD);
        let padding = (plus | minus).checked_shr(valid as u32).unwrap_or(0);
        if padding != 0 {
            let col = first + valid + padding.trailing_zeros() as usize;
            return Err(LayoutError::Padding { row, col });
        }
        trits.extend((0..valid).map(|i| (plus >> i & 1) as i8 - (minus >> i & 1) as i8));
    }
    Ok(trits)
}
