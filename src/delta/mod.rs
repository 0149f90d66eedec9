//! A state as the difference from another: bit for bit, in one file.
//!
//! A *state* is a set of named tensors: a checkpoint, or a model folder ([`Folder`]). [`write`](fn@write) puts into a file what a state
//! is beside its parent; [`open`] and [`Opened::beside`] make of file and parent a [`Source`] that tensors are read from, so
//! that a difference can be the parent of the next; [`restore`] reads them all and holds each against its BLAKE3.
//! [`make`] and [`apply`] do this with folders, [`encode_slice`] and [`decode_slice`] with the bytes of one tensor.
//!
//! Tensors go chunk by chunk, on all threads of the current rayon pool, and memory holds some chunks a thread: never a
//! tensor. A chunk is coded in the way that takes the fewest bytes ([`Codec`]). A section of a file is a tensor, or a mean
//! of gradients with that of their squares and perhaps the parameter, which help to tell each other ([`Moments`]).
//!
//! ```
//! use firebrick::delta::{Memory, Options, Parent, TensorInfo, open, restore, write};
//! use safetensors::Dtype;
//!
//! let info = TensorInfo { name: "w".to_string(), dtype: Dtype::F32, shape: vec![1000] };
//! let bytes = |by: f32| (0..1000).flat_map(|i| ((i as f32).sin() + by).to_le_bytes()).collect::<Vec<u8>>();
//! let (before, after) = (bytes(0.0), bytes(1e-5));
//! let parent = Memory::new([(info.clone(), before.as_slice())]);
//! let child = Memory::new([(info, after.as_slice())]);
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("delta.safetensors");
//! let written = write(&path, Some(&Parent::new(&parent)), &child, &Options::default())?;
//! assert!(written.bytes < written.state_bytes);
//!
//! let delta = open(&path)?.beside(Some(Box::new(parent)))?;
//! let mut read = Vec::new();
//! restore(&delta, |_| true, |_, bytes| Ok(read.extend_from_slice(bytes)))?;
//! assert_eq!(read, after);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod chunk;
mod container;
mod error;
mod folder;
mod hash;
mod index;
mod lossy;
mod plan;
mod predict;
mod product;
mod read;
mod slice;
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
pub use lossy::{LossRecord, Lossy, Method};
pub use read::{Delta, Opened, hashes, open, restore};
pub use slice::{decode_slice, encode_slice};
pub use source::{Memory, Source};
pub use write::{Moments, Options, Parent, StateHashes, Written, write};
