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
//!
//! Every path computes outputs in this order, so that all give the same bits:
//!
//! ```text
//! y = f32(Σ q T) (s g)                      one scale per matrix or row
//! y = (Σ over groups of f32(Σ q T) g) s     one scale per group: multiplied, then added, first group first
//! ```
//!
//! Numbers that are not finite stay visible: a token with a NaN or an infinity has the scale NaN, and with it
//! every output of that token is NaN; weights that share a scale with one that is not finite have the scale NaN, and
//! the trit 0, so that their outputs are NaN.

mod composed;
pub mod cpu;
#[cfg(feature = "gpu")]
mod cube;
pub mod fake_quantize;
pub mod layout;
mod op;
pub mod reference;
mod ways;

pub use op::{
    PackedShape, TernaryOps, fake_quantize_activations, fake_quantize_weight, int8_matmul,
    ternary_linear,
};
pub use ways::{Way, ways};

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

impl Granularity {
    /// Scales of one row, when the matrix has `cols` inputs. The last group may be short.
    pub fn scales_per_row(self, cols: usize) -> usize {
        match self {
            Self::Tensor | Self::Row => 1,
            Self::Group(size) => cols.div_ceil(size),
        }
    }

    /// Scales of a matrix of `rows` outputs and `cols` inputs.
    pub fn scales(self, rows: usize, cols: usize) -> usize {
        match self {
            Self::Tensor => 1,
            Self::Row => rows,
            Self::Group(_) => rows * self.scales_per_row(cols),
        }
    }
}

/// Scales below this are raised to it: an all-zero matrix has a scale too.
pub const SMALLEST_MEAN: f32 = 1e-5;

/// Activations whose largest magnitude is below this are quantised as if it were this.
pub const SMALLEST_ACTIVATION: f32 = 1e-5;
