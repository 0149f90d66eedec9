//! Ternary weights: BitNet b1.58 (Ma et al., 2024, "The Era of 1-bit LLMs", section 2).
//!
//! A weight matrix W `[out, in]` becomes trits T in {-1, 0, 1} and scales g:
//!
//! ```text
//! g = max(mean |W|, 1e-5)        over the matrix, a row, or a group of a row
//! T = clamp(round(W / g), -1, 1)
//! W' = g T
//! ```
//!
//! An activation x `[tokens, in]` becomes eight-bit codes q and one scale s per token:
//!
//! ```text
//! s = max(max |x|, 1e-5) / 127
//! q = clamp(round(x / s), -128, 127)
//! ```
//!
//! so that y = x W'ᵀ is s g Σ q T: an integer sum, and one multiplication per output. `round` is to the
//! nearest, halves to even.

pub mod fake_quantize;
mod op;

pub use op::{TernaryOps, fake_quantize_activations, fake_quantize_weight};

/// What one scale of a ternary weight stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    /// The whole matrix.
    Tensor,
    /// The weights of one output.
    Row,
    /// So many weights of one output, next to each other along the input dimension.
    Group(usize),
}

/// Scales below this are raised to it: an all-zero matrix has a scale too.
pub const SMALLEST_MEAN: f32 = 1e-5;

/// So with the largest magnitude of a token.
pub const SMALLEST_ACTIVATION: f32 = 1e-5;
