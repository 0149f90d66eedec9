//! The largest elements of each block, rotated or not.

use firebrick_kernels::sketch::{Kept, Path, SparseCode, SparseError, rotate_back};

use super::{CompressError, Compressor, TensorContext};

/// Sends the largest elements of each block of a matrix. It sends their values (top-k), their signs
/// and one magnitude (ternary), or the signs of the rotated block (rotated).
///
/// A rotation spreads the energy of a block evenly, so that signs and one magnitude describe it well
/// whatever it held. Top-k needs a few large elements, which a rotation removes, so values are never
/// rotated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sparse {
    code: SparseCode,
    is_rotated: bool,
}

/// Elements of a block.
const BLOCK: usize = 4096;

/// A density, if it is one.
pub(super) fn checked(density: f64) -> Result<f64, SparseError> {
    SparseCode::new(1, density, Kept::Values).map(|_| density)
}

/// The code of values in bf16, of blocks of so many elements.
pub(super) fn values(block: usize, density: f64) -> Result<SparseCode, SparseError> {
    SparseCode::new(block, density, Kept::Values)
}

impl Sparse {
    /// Sends the values of the largest elements of each block of 4,096, in bf16.
    ///
    /// # Errors
    /// A density that is not above 0 and at most 1.
    pub fn top_k(density: f64) -> Result<Self, SparseError> {
        Ok(Self {
            code: values(BLOCK, density)?,
            is_rotated: false,
        })
    }

    /// Sends the signs of the largest elements of each block of 4,096, with one magnitude for the
    /// block.
    ///
    /// # Errors
    /// As [`top_k`](Self::top_k).
    pub fn ternary(density: f64) -> Result<Self, SparseError> {
        Ok(Self {
            code: SparseCode::new(BLOCK, density, Kept::Signs)?,
            is_rotated: false,
        })
    }

    /// Binds the matrix to a random key, transforms it by Walsh and Hadamard block by block, and sends
    /// the result as [`ternary`](Self::ternary) does.
    ///
    /// # Errors
    /// As [`top_k`](Self::top_k).
    pub fn rotated(density: f64) -> Result<Self, SparseError> {
        Ok(Self {
            is_rotated: true,
            ..Self::ternary(density)?
        })
    }

    /// The bits that a matrix of `len` elements takes if the elements that are sent lie at random
    /// places.
    pub(super) fn expected_bits(&self, len: usize) -> f64 {
        self.code.expected_bits(len)
    }

    /// The share of the squared norm that a matrix of `len` elements sends at least, δ.
    pub fn delta(&self, len: usize) -> f64 {
        self.code.delta(len)
    }
}

impl Compressor for Sparse {
    fn encode(
        &self,
        tensor: &TensorContext,
        values: &mut [f32],
        bytes: &mut Vec<u8>,
    ) -> Result<(), CompressError> {
        let path = Path::detect();
        let coded = match self.is_rotated {
            true => self.code.encode_rotated(path, tensor.seed, values, bytes),
            false => self.code.encode(path, values, bytes),
        };
        coded.map_err(CompressError::from)
    }

    fn add_decoded(
        &self,
        _tensor: &TensorContext,
        bytes: &[u8],
        sum: &mut [f32],
    ) -> Result<(), CompressError> {
        self.code
            .add_decoded(bytes, 1.0, sum)
            .map_err(CompressError::from)
    }

    fn finish(&self, tensor: &TensorContext, sum: &mut [f32]) {
        if self.is_rotated {
            rotate_back(Path::detect(), tensor.seed, self.code.block(), sum);
        }
    }
}

impl From<SparseError> for CompressError {
    fn from(error: SparseError) -> Self {
        match error {
            SparseError::NotFinite(place) => Self::NotFinite(place),
            other => Self::Damaged(other.to_string()),
        }
    }
}
