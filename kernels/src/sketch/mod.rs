//! Rotations and sketches of long vectors of f32, such as gradients.
//!
//! [`rotate`] spreads what a vector holds evenly over its elements: it flips signs by a seed and
//! transforms each block by Walsh and Hadamard. The rotated elements of a block are near Gaussian
//! whatever the block held, so that few levels describe them well (Suresh et al., 2017,
//! "Distributed mean estimation with limited communication", section 3; Vargaftik et al., 2021,
//! "DRIVE"). [`SparseCode`] describes each block by its largest
//! elements, as signs with one level or as values.

mod bits;
mod hadamard;
pub mod reference;
mod sparse;
#[cfg(test)]
mod tests;

pub use crate::panel::Path;
pub use hadamard::{hadamard, rotate, rotate_back};
pub use sparse::{Kept, SparseCode, SparseError};
