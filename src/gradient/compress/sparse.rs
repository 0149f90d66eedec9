//! The largest elements of each block, rotated or not.

use firebrick_kernels::sketch::{Kept, Path, SparseCode, SparseError, rotate_back};

use super::{CompressError, Compressor, TensorContext};

/// Sends the largest elements of each block of a matrix: their values (top-k), or their signs and
/// one level (ternary), of the matrix itself or of its rotation.
///
/// A rotation spreads the energy of a block evenly, so that signs and one level describe it well
/// whatever it was. It takes from top-k what top-k lives of, a few large elements, and so does not
/// go together with values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sparse {
    code: SparseCode,
    is_rotated: bool,
}

/// Elements of a block.
const BLOCK: usize = 4096;

impl Sparse {
    /// The values of the largest elements of each block of 4,096, in bf16.
    ///
    /// # Errors
    /// A density that is not above 0 and at most 1.
    pub fn top_k(density: f64) -> Result<Self, SparseError> {
        Ok(Self {
            code: SparseCode::new(BLOCK, density, Kept::Values)?,
            is_rotated: false,
        })
    }

    /// The signs of the largest elements of each block of 4,096, with one level.
    ///
    /// # Errors
    /// As [`top_k`](Self::top_k).
    pub fn ternary(density: f64) -> Result<Self, SparseError> {
        Ok(Self {
            code: SparseCode::new(BLOCK, density, Kept::Signs)?,
            is_rotated: false,
        })
    }

    /// The same of the matrix bound to a random key and transformed by Walsh and Hadamard, block by
    /// block.
    ///
    /// # Errors
    /// As [`top_k`](Self::top_k).
    pub fn rotated(density: f64) -> Result<Self, SparseError> {
        Ok(Self {
            is_rotated: true,
            ..Self::ternary(density)?
        })
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
