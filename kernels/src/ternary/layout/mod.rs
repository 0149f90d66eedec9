//! Ternary matrices as bytes: what products read, what files hold, and the way from each to each.
//!
//! | name in files | bits a weight | what it is for |
//! |---|---|---|
//! | `ternary-2bit-16x16` | 2 | [`compute`]: products on CPU and GPU |
//! | `ternary-1.6bit` | 1.6 | [`storage`]: five trits a byte |
//! | `ternary-bitplanes` | 2 | [`planes`]: a bit for +1 and a bit for -1, by popcount |
//! | `TQ1_0`, `TQ2_0` | 1.69, 2.06 | [`gguf`]: llama.cpp's blocks, each with an f16 scale |
//!
//! Every layout converts to and from row-major trits, and so to every other. Rows are outputs, columns inputs.

pub mod compute;
pub mod gguf;
pub mod planes;
pub mod storage;
#[cfg(test)]
mod tests;

pub use compute::PackedView;

/// A layout, as file headers name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// [`compute`].
    TwoBit16x16,
    /// [`storage`].
    FiveTritsAByte,
    /// [`planes`].
    BitPlanes,
    /// [`gguf::BlockType::Tq1_0`].
    Tq1_0,
    /// [`gguf::BlockType::Tq2_0`].
    Tq2_0,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 5] = [
        Self::TwoBit16x16,
        Self::FiveTritsAByte,
        Self::BitPlanes,
        Self::Tq1_0,
        Self::Tq2_0,
    ];

    /// Its name in file headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::TwoBit16x16 => "ternary-2bit-16x16",
            Self::FiveTritsAByte => "ternary-1.6bit",
            Self::BitPlanes => "ternary-bitplanes",
            Self::Tq1_0 => "TQ1_0",
            Self::Tq2_0 => "TQ2_0",
        }
    }

    /// The layout of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|layout| layout.name() == name)
    }
}

/// Why bytes are not a ternary matrix, or a matrix not these bytes.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LayoutError {
    /// A slice of another length than the shape asks for.
    #[error("{what}: {expected} are needed for this shape, {found} given")]
    Length {
        /// What the slice holds.
        what: &'static str,
        /// How many the shape asks for.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// A matrix with more columns than sums have bits for.
    #[error("{cols} inputs: the most is {}", compute::MAX_COLS)]
    TooWide {
        /// Its columns.
        cols: usize,
    },
    /// A matrix that no memory holds.
    #[error("a matrix of {rows} x {cols} weights cannot be addressed")]
    TooLarge {
        /// Its rows.
        rows: usize,
        /// Its columns.
        cols: usize,
    },
    /// A group size that blocks cannot be made of.
    #[error("groups of {size} weights: a multiple of 16 is needed")]
    GroupSize {
        /// The size asked for.
        size: usize,
    },
    /// A value other than -1, 0 and 1 where trits were given.
    #[error("{value} in row {row}, column {col} is not a trit")]
    Trit {
        /// The value.
        value: i8,
        /// Its row.
        row: usize,
        /// Its column.
        col: usize,
    },
    /// A code that stands for no trit.
    #[error("a code that stands for no trit, in row {row}, at or after column {col}")]
    Code {
        /// Its row.
        row: usize,
        /// The first column of its word or byte.
        col: usize,
    },
    /// A weight that is both 1 and -1.
    #[error("the bit-planes overlap in row {row}, column {col}")]
    Overlap {
        /// Its row.
        row: usize,
        /// Its column.
        col: usize,
    },
    /// Weights that blocks of 256 cannot be made of.
    #[error("{cols} weights in a row or group: blocks take a multiple of 256")]
    PartialBlock {
        /// How many there are.
        cols: usize,
    },
    /// A scale that f16 does not hold.
    #[error("the scale {scale} is not an f16: it is too large, too small, or not a number")]
    Scale {
        /// The scale.
        scale: f32,
    },
    /// A weight outside the matrix that is not 0.
    #[error("padding in row {row}, column {col} is not zero")]
    Padding {
        /// Its row.
        row: usize,
        /// Its column.
        col: usize,
    },
}

pub(crate) fn check_trits(trits: &[i8], rows: usize, cols: usize) -> Result<(), LayoutError> {
    compute::check_shape(rows, cols, super::Granularity::Tensor)?;
    let (expected, found) = (rows * cols, trits.len());
    if expected != found {
        return Err(LayoutError::Length {
            what: "trits",
            expected,
            found,
        });
    }
    match trits.iter().position(|trit| !(-1..=1).contains(trit)) {
        Some(at) => Err(LayoutError::Trit {
            value: trits[at],
            row: at / cols,
            col: at % cols,
        }),
        None => Ok(()),
    }
}
