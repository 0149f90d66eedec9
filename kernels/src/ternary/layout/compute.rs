//! The layout that products read: two bits a weight.
//!
//! Rows (outputs) come in groups of 16, columns (inputs) in blocks of 16. A block of a row group is 16 words,
//! 64 bytes: word i belongs to row i of the group. Byte j of a word (little-endian) holds four codes T + 1 in
//! {0, 1, 2}; plane p of it, bits 2p and 2p + 1, is column 4p + j of the block. The blocks of a row group follow
//! each other along the columns, and the row groups follow each other. Rows and columns that pad the matrix have
//! the code 1, a trit of 0.
//!
//! So `(words >> 2p) & 0x03030303` are, byte for byte, the weights of 16 rows and four neighbouring columns:
//! one operand of an instruction that multiplies bytes and adds fours (`vpdpbusd`, `dp4a`), with the four
//! activations broadcast as the other. No sum crosses lanes. Codes are T + 1, so Σ q is subtracted once.

use super::LayoutError;
use crate::ternary::Granularity;

/// Rows of a group and columns of a block.
pub const BLOCK: usize = 16;

/// The most columns a matrix can have: Σ (T + 1) q of so many stays within 31 bits.
pub const MAX_COLS: usize = 1 << 23;

/// A word whose 16 trits are 0.
pub const ZERO_WORD: u32 = 0x5555_5555;

/// Words of a packed matrix.
pub fn words(rows: usize, cols: usize) -> usize {
    rows.div_ceil(BLOCK) * cols.div_ceil(BLOCK) * BLOCK
}

/// A packed matrix of `rows` outputs and `cols` inputs, and its scales.
#[derive(Debug, Clone, Copy)]
pub struct PackedView<'a> {
    words: &'a [u32],
    rows: usize,
    cols: usize,
    scales: &'a [f32],
    granularity: Granularity,
}

impl<'a> PackedView<'a> {
    /// Checks that the slices have the lengths that the shape asks for.
    ///
    /// The codes are not looked at: a word that [`check`] would refuse gives wrong sums, nothing worse.
    ///
    /// # Errors
    ///
    /// Wrong lengths, more than [`MAX_COLS`] columns, a group size that is not a multiple of 16.
    pub fn new(
        words: &'a [u32],
        rows: usize,
        cols: usize,
        scales: &'a [f32],
        granularity: Granularity,
    ) -> Result<Self, LayoutError> {
        check_shape(rows, cols, granularity)?;
        let expected = self::words(rows, cols);
        if words.len() != expected {
            let found = words.len();
            return Err(LayoutError::Length {
                what: "words",
                expected,
                found,
            });
        }
        let expected = granularity.scales(rows, cols);
        if scales.len() != expected {
            let found = scales.len();
            return Err(LayoutError::Length {
                what: "scales",
                expected,
                found,
            });
        }
        Ok(Self {
            words,
            rows,
            cols,
            scales,
            granularity,
        })
    }

    /// The packed codes.
    pub fn words(&self) -> &'a [u32] {
        self.words
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Scales, as many as [`Granularity::scales`] says, row by row.
    pub fn scales(&self) -> &'a [f32] {
        self.scales
    }

    /// What one scale stands for.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Groups of 16 rows.
    pub fn row_groups(&self) -> usize {
        self.rows.div_ceil(BLOCK)
    }

    /// Blocks of 16 columns.
    pub fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// The words of one row group.
    pub fn row_group(&self, group: usize) -> &'a [u32] {
        let size = self.blocks() * BLOCK;
        &self.words[group * size..][..size]
    }
}

/// A packed matrix that owns its words and scales.
#[derive(Debug, Clone, PartialEq)]
pub struct Packed {
    words: Vec<u32>,
    rows: usize,
    cols: usize,
    scales: Vec<f32>,
    granularity: Granularity,
}

impl Packed {
    /// Checks what [`PackedView::new`] checks.
    ///
    /// # Errors
    ///
    /// As [`PackedView::new`].
    pub fn new(
        words: Vec<u32>,
        rows: usize,
        cols: usize,
        scales: Vec<f32>,
        granularity: Granularity,
    ) -> Result<Self, LayoutError> {
        PackedView::new(&words, rows, cols, &scales, granularity)?;
        Ok(Self {
            words,
            rows,
            cols,
            scales,
            granularity,
        })
    }

    /// The matrix, borrowed.
    pub fn view(&self) -> PackedView<'_> {
        PackedView {
            words: &self.words,
            rows: self.rows,
            cols: self.cols,
            scales: &self.scales,
            granularity: self.granularity,
        }
    }

    /// Its words and scales.
    pub fn into_parts(self) -> (Vec<u32>, Vec<f32>) {
        (self.words, self.scales)
    }
}

pub(crate) fn check_shape(
    rows: usize,
    cols: usize,
    granularity: Granularity,
) -> Result<(), LayoutError> {
    if cols > MAX_COLS {
        return Err(LayoutError::TooWide { cols });
    }
    // What is asked for must not overflow, whoever asks.
    if rows
        .checked_add(BLOCK)
        .and_then(|rows| rows.checked_mul(cols + BLOCK))
        .is_none()
    {
        return Err(LayoutError::TooLarge { rows, cols });
    }
    match granularity {
        Granularity::Group(size) if size == 0 || size % BLOCK != 0 => {
            Err(LayoutError::GroupSize { size })
        }
        _ => Ok(()),
    }
}

/// Where in its word the code of `col` is.
pub const fn shift(col: usize) -> u32 {
    let within = col % BLOCK;
    (8 * (within % 4) + 2 * (within / 4)) as u32
}

/// The index of the word that holds the code of `row` and `col`.
pub fn index(cols: usize, row: usize, col: usize) -> usize {
    (row / BLOCK * cols.div_ceil(BLOCK) + col / BLOCK) * BLOCK + row % BLOCK
}

/// Packs row-major trits `[rows, cols]`.
///
/// # Errors
///
/// A wrong length, or a value that is not a trit.
pub fn pack(trits: &[i8], rows: usize, cols: usize) -> Result<Vec<u32>, LayoutError> {
    super::check_trits(trits, rows, cols)?;
    let mut words = vec![ZERO_WORD; self::words(rows, cols)];
    for (row, trits) in trits.chunks(cols.max(1)).enumerate() {
        for (col, &trit) in trits.iter().enumerate() {
            // From 1, a trit of 0, to T + 1.
            let change = (trit + 1) as u32 ^ 1;
            words[index(cols, row, col)] ^= change << shift(col);
        }
    }
    Ok(words)
}

/// The row-major trits `[rows, cols]` of a packed matrix.
///
/// # Errors
///
/// A wrong length, or what [`check`] finds.
pub fn unpack(words: &[u32], rows: usize, cols: usize) -> Result<Vec<i8>, LayoutError> {
    check(words, rows, cols)?;
    let mut trits = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        for col in 0..cols {
            let code = words[index(cols, row, col)] >> shift(col) & 3;
            trits.push(code as i8 - 1);
        }
    }
    Ok(trits)
}

/// Whether every code is a trit, and all padding 0.
///
/// # Errors
///
/// A wrong length, the code 3, or padding that is not 0.
pub fn check(words: &[u32], rows: usize, cols: usize) -> Result<(), LayoutError> {
    check_shape(rows, cols, Granularity::Tensor)?;
    let expected = self::words(rows, cols);
    if words.len() != expected {
        let found = words.len();
        return Err(LayoutError::Length {
            what: "words",
            expected,
            found,
        });
    }
    let blocks = cols.div_ceil(BLOCK);
    for (index, &word) in words.iter().enumerate() {
        let row = index / BLOCK / blocks * BLOCK + index % BLOCK;
        let first_col = index / BLOCK % blocks * BLOCK;
        if word & word >> 1 & ZERO_WORD != 0 {
            return Err(LayoutError::Code {
                row,
                col: first_col,
            });
        }
        let valid = if row < rows {
            (cols - first_col).min(BLOCK)
        } else {
            0
        };
        for col in valid..BLOCK {
            if word >> shift(col) & 3 != 1 {
                return Err(LayoutError::Padding {
                    row,
                    col: first_col + col,
                });
            }
        }
    }
    Ok(())
}
