//! What a blockwise matrix is, and how many bytes each of its parts has.

use super::BlockwiseError;
use super::double::SCALE_BLOCK;
use super::tables;

/// What a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Sixteen levels at quantiles of a normal distribution, 0 among them.
    Nf4,
    /// A sign, two bits of exponent and one of fraction.
    Fp4,
    /// -7 to 7, stored with 8 added.
    Int4Symmetric,
    /// 0 to 15, less a zero point of the block.
    Int4Affine,
    /// -127 to 127, in two's complement.
    Int8,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 5] = [
        Self::Nf4,
        Self::Fp4,
        Self::Int4Symmetric,
        Self::Int4Affine,
        Self::Int8,
    ];

    /// Its name in files and configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
            Self::Int4Symmetric => "int4",
            Self::Int4Affine => "int4-affine",
            Self::Int8 => "int8",
        }
    }

    /// The format of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Bits of a code.
    pub fn bits(self) -> usize {
        match self {
            Self::Int8 => 8,
            _ => 4,
        }
    }

    /// Whether each block has a zero point.
    pub fn has_zero_points(self) -> bool {
        self == Self::Int4Affine
    }

    /// What stands behind the last of an odd number of codes, and what a 0 becomes in NF4, FP4 and int4.
    pub(super) fn code_of_zero(self) -> u8 {
        match self {
            Self::Nf4 => 7,
            Self::Int4Symmetric => 8,
            Self::Fp4 | Self::Int4Affine | Self::Int8 => 0,
        }
    }

    /// What each code of four bits stands for, before the zero point and the scale. None for eight bits.
    pub fn levels(self) -> Option<&'static [f32; 16]> {
        match self {
            Self::Nf4 => Some(&tables::NF4),
            Self::Fp4 => Some(&tables::FP4),
            Self::Int4Symmetric => Some(&tables::INT4),
            Self::Int4Affine => Some(&tables::UINT4),
            Self::Int8 => None,
        }
    }
}

/// A quantised matrix beside its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockwiseShape {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// What a code stands for.
    pub format: Format,
    /// Weights that share a scale, next to each other along rows: as many as columns for a scale a row.
    pub block: usize,
    /// Whether scales are in eight bits themselves.
    pub double: bool,
}

impl BlockwiseShape {
    /// Checks that such a matrix can be.
    ///
    /// # Errors
    ///
    /// Blocks of nothing; a matrix with more weights than memory has addresses.
    pub fn check(&self) -> Result<(), BlockwiseError> {
        let Self { rows, cols, .. } = *self;
        if self.block == 0 {
            return Err(BlockwiseError::EmptyBlock);
        }
        // Rows and columns that pad the layout of products count, and so do four bytes for a weight.
        let padded = |n: usize| n.checked_next_multiple_of(16);
        let bytes = padded(rows)
            .zip(padded(cols))
            .and_then(|(rows, cols)| rows.checked_mul(cols)?.checked_mul(4));
        match bytes {
            Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
            _ => Err(BlockwiseError::TooLarge { rows, cols }),
        }
    }

    /// Weights.
    pub fn elements(&self) -> usize {
        self.rows * self.cols
    }

    /// Blocks, and so scales.
    pub fn blocks(&self) -> usize {
        self.elements().div_ceil(self.block)
    }

    /// Bytes of codes in files and in [`Quantised`](super::Quantised).
    pub fn code_bytes(&self) -> usize {
        (self.elements() * self.format.bits()).div_ceil(8)
    }

    /// Scales of eight-bit scales.
    pub fn scale_blocks(&self) -> usize {
        self.blocks().div_ceil(SCALE_BLOCK)
    }

    /// Bytes of scales.
    pub fn scale_bytes(&self) -> usize {
        if self.double {
            // The mean is one more.
            self.blocks() + 4 * (self.scale_blocks() + 1)
        } else {
            4 * self.blocks()
        }
    }

    /// Bytes of zero points, two a byte.
    pub fn zero_bytes(&self) -> usize {
        if self.format.has_zero_points() {
            self.blocks().div_ceil(2)
        } else {
            0
        }
    }

    /// Bytes of everything together.
    pub fn bytes(&self) -> usize {
        self.code_bytes() + self.scale_bytes() + self.zero_bytes()
    }

    /// Bits for a weight, scales counted; 0 where there is none.
    pub fn bits_per_parameter(&self) -> f64 {
        match self.elements() {
            0 => 0.0,
            elements => 8.0 * self.bytes() as f64 / elements as f64,
        }
    }
}
