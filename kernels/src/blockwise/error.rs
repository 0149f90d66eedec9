//! What can be wrong with blockwise weights.

use super::cpu::Path;

/// Why a matrix was not quantised, not read, or not multiplied.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BlockwiseError {
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
    /// Blocks of no weights.
    #[error("blocks of 0 weights: one at least is needed")]
    EmptyBlock,
    /// A matrix that no memory holds.
    #[error("a matrix of {rows} x {cols} weights cannot be addressed")]
    TooLarge {
        /// Its rows.
        rows: usize,
        /// Its columns.
        cols: usize,
    },
    /// A weight that cannot be quantised.
    #[error("weight {index} is {value}: only finite weights can be quantised")]
    NotFinite {
        /// Where it is, row after row.
        index: usize,
        /// The weight.
        value: f32,
    },
    /// A scale that makes weights infinite or no numbers.
    #[error("scale {index} is {value}, which is not finite")]
    Scale {
        /// Its block, or its place among the scales of scales, where the mean comes last.
        index: usize,
        /// The scale.
        value: f32,
    },
    /// Scales in f32 where the shape says eight bits, or the other way round.
    #[error("the shape has {expected} scales, {found} ones were given")]
    ScaleKind {
        /// What the shape says.
        expected: &'static str,
        /// What there is.
        found: &'static str,
    },
    /// Instructions that this processor does not have.
    #[error("this processor has no {}", .0.name())]
    Unavailable(Path),
}

pub(super) fn check_length(
    what: &'static str,
    found: usize,
    expected: usize,
) -> Result<(), BlockwiseError> {
    if found == expected {
        Ok(())
    } else {
        Err(BlockwiseError::Length {
            what,
            expected,
            found,
        })
    }
}
