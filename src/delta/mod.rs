//! A state as the difference from another: bit for bit, in one file.

mod chunk;
mod container;
mod error;
mod folder;
mod hash;
mod index;
mod predict;
mod read;
mod source;
mod sparse;
mod wide;
mod write;

#[cfg(test)]
mod tests;

pub use chunk::Codec;
pub use error::DeltaError;
pub use folder::{Folder, apply, make};
pub use index::{ArithmeticId, StepRecord, TensorInfo};
pub use read::{Delta, Opened, hashes, open, restore};
pub use source::{Memory, Source};
pub use write::{Moments, Parent, StateHashes, Written, write};
