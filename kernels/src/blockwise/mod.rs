//! Weights in four or eight bits, a scale for each block: NF4 and FP4 (Dettmers et al., 2023, "QLoRA", section 3),
//! int4 and int8.
//!
//! A weight matrix W `[out, in]` is taken as one row of numbers, row after row, and cut into blocks of `block` of them.
//! Blocks may go across the end of a row; the last may be short. A block has one scale s, from its largest magnitude a
//! or its ends, and each weight a code q:
//!
//! ```text
//! nf4, fp4          s = a                        W' = level[q] s     the level nearest to x / s
//! int4              s = a / 7                    W' = q s            q = clamp(round(x / s), -7, 7)
//! int4-affine       s = (max - min) / 15         W' = (q - z) s      z = round(-min / s), q = clamp(round(x / s) + z, 0, 15)
//! int8              s = a / 127                  W' = q s            q = clamp(round(x / s), -127, 127)
//! ```
//!
//! `round` is to the nearest, halves to even; max and min of `int4-affine` are those of the block and 0, so that z fits
//! four bits. What is the nearest level is decided as bitsandbytes' CPU path does, byte for byte: x times 1 / s (in the
//! short last block x divided by s), compared with the midpoints of levels, a tie going to the lower one.
//!
//! *Double quantisation* stores the scales in eight bits: their mean over the matrix is subtracted, blocks of 256 of
//! them share an f32 scale, and each becomes the nearest of 256 levels ([`tables::dynamic_map`]).
//! A scale is then `map[code] * scale + mean`, in that order in f32.
//!
//! The product is y = x W'ᵀ for x `[tokens, in]`, its gradient dx = dy W'. W' as a matrix is never formed: products
//! turn codes into numbers a few at a time, in the first-level cache.

mod composed;
pub mod cpu;
#[cfg(feature = "gpu")]
mod cube;
mod double;
mod error;
pub mod layout;
mod op;
mod quantise;
pub mod reference;
mod shape;
pub mod tables;
mod ways;

pub use double::SCALE_BLOCK;
pub use error::BlockwiseError;
pub use op::{BlockwiseOps, blockwise_linear};
pub use quantise::{Quantised, Scales, quantise};
pub use shape::{BlockwiseShape, Format};
pub use ways::ways;
