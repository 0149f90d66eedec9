//! The layout of files: five trits a byte, 1.6 bits a weight.
//!
//! A row is `ceil(cols / 5)` bytes, and rows follow each other. Byte b of a row holds columns 5b to 5b + 4 as the
//! number `Σ (T + 1) 3^i`, i = 0 for the first column, 242 at most. Columns that pad the last byte have a trit of 0.

use super::LayoutError;
use super::compute::check_shape;
use crate::ternary::Granularity;

/// Trits of a byte.
pub const TRITS: usize = 5;

/// Bytes of a matrix.
pub fn bytes(rows: usize, cols: usize) -> usize {
    rows * cols.div_ceil(TRITS)
}

/// Stores row-major trits `[rows, cols]`.
///
/// # Errors
///
/// A wrong length, or a value that is not a trit.
pub fn pack(trits: &[i8], rows: usize, cols: usize) -> Result<Vec<u8>, LayoutError> {
    super::check_trits(trits, rows, cols)?;
    let mut bytes = Vec::with_capacity(self::bytes(rows, cols));
    for row in trits.chunks(cols.max(1)) {
        for trits in row.chunks(TRITS) {
            let digit = |i: usize| trits.get(i).map_or(1, |&trit| (trit + 1) as u8);
            bytes.push((0..TRITS).rev().fold(0, |byte, i| 3 * byte + digit(i)));
        }
    }
    Ok(bytes)
}

/// The row-major trits `[rows, cols]` of stored bytes.
///
/// # Errors
///
/// A wrong length, a byte above 242, or padding that is not 0.
pub fn unpack(bytes: &[u8], rows: usize, cols: usize) -> Result<Vec<i8>, LayoutError> {
    check_shape(rows, cols, Granularity::Tensor)?;
    let (expected, found) = (self::bytes(rows, cols), bytes.len());
    if expected != found {
        return Err(LayoutError::Length {
            what: "bytes",
            expected,
            found,
        });
    }
    let mut trits = Vec::with_capacity(rows * cols);
    for (row, bytes) in bytes.chunks(cols.div_ceil(TRITS).max(1)).enumerate() {
        for (i, &byte) in bytes.iter().enumerate() {
            let mut rest = byte;
            for col in TRITS * i..TRITS * (i + 1) {
                let trit = (rest % 3) as i8 - 1;
                rest /= 3;
                if col < cols {
                    trits.push(trit);
                } else if trit != 0 {
                    return Err(LayoutError::Padding { row, col });
                }
            }
            if rest != 0 {
                return Err(LayoutError::Code {
                    row,
                    col: TRITS * i,
                });
            }
        }
    }
    Ok(trits)
}
