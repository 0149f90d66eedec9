//! Products with packed ternary weights on the CPU.
//!
//! A product has three parts. The activations are quantised once and laid out in tiles of a few tokens
//! (`panels`). Weights are taken from the 2-bit layout a panel of row groups at a time (`integer`): with many
//! tokens a block of the panel is unpacked to bytes in the first-level cache, and every tile of tokens is
//! multiplied with it; with few, the words are used as they are read, once, in the order of memory. The sums
//! become outputs in the order that [`super`] fixes.
//!
//! What differs between processors is a handful of functions, a `kernel::IntegerKernel`; [`Path::detect`] chooses at
//! run time.

mod float;
mod integer;
mod kernel;
pub mod latent;
mod panels;
mod portable;
pub mod probe;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use float::Direction;

use super::Granularity;
use super::layout::{LayoutError, PackedView};
pub use latent::Order;

/// A set of instructions that products can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// AVX-512 with VNNI: Intel since Cascade Lake, AMD since Zen 4.
    Avx512Vnni,
    /// AVX2 with VNNI on 256 bits: Intel since Alder Lake, AMD since Zen 5.
    AvxVnni,
    /// AVX2 with FMA: Intel since Haswell, AMD since Zen.
    Avx2,
    /// What the compiler makes of plain Rust.
    Portable,
}

impl Path {
    /// Every path, the best first.
    pub const ALL: [Self; 4] = [Self::Avx512Vnni, Self::AvxVnni, Self::Avx2, Self::Portable];

    /// Whether this processor, and this program, can take the path.
    pub fn available(self) -> bool {
        kernel::integer(self).is_some()
    }

    /// The best path that this processor can take, found out once.
    pub fn detect() -> Self {
        static BEST: OnceLock<Path> = OnceLock::new();
        let best = || Self::ALL.into_iter().find(|path| path.available());
        *BEST.get_or_init(|| best().unwrap_or(Self::Portable))
    }

    /// The instructions' name, for records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Vnni => "avx512-vnni",
            Self::AvxVnni => "avx-vnni",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}

/// Why a product was not computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CpuError {
    /// A slice of another length than its shape.
    #[error("{what}: {expected} values are needed for this shape, {found} given")]
    Length {
        /// What the slice holds.
        what: &'static str,
        /// How many values the shape asks for.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// Instructions that this processor does not have.
    #[error("this processor has no {}", .0.name())]
    Unavailable(Path),
    /// A shape that weights cannot have.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

fn check(what: &'static str, found: usize, expected: usize) -> Result<(), CpuError> {
    if found == expected {
        Ok(())
    } else {
        Err(CpuError::Length {
            what,
            expected,
            found,
        })
    }
}

/// y `[tokens, rows]` = x `[tokens, cols]` W'ᵀ, with x quantised to eight bits a token.
///
/// Threads are those of the current rayon pool; outputs do not depend on how many. A token with a value that is not
/// finite gives NaN outputs.
///
/// # Errors
///
/// If `x` or `y` is not of the length that its shape asks for.
pub fn packed_linear(
    x: &[f32],
    tokens: usize,
    weights: &PackedView,
    y: &mut [f32],
) -> Result<(), CpuError> {
    packed_linear_on(Path::detect(), x, tokens, weights, y)
}

/// [`packed_linear`] by a path of the caller's choice: the same bits whichever it is.
///
/// # Errors
///
/// As [`packed_linear`], and if the processor cannot take this path.
pub fn packed_linear_on(
    path: Path,
    x: &[f32],
    tokens: usize,
    weights: &PackedView,
    y: &mut [f32],
) -> Result<(), CpuError> {
    let kernel = kernel::integer(path).ok_or(CpuError::Unavailable(path))?;
    check("x", x.len(), tokens * weights.cols())?;
    check("y", y.len(), tokens * weights.rows())?;
    if y.is_empty() {
        return Ok(());
    }
    let activations =
        panels::Quantised::new(kernel, x, tokens, weights.cols(), weights.granularity());
    integer::multiply(kernel, &activations, weights, y);
    Ok(())
}

/// y `[tokens, rows]` = x `[tokens, cols]` W'ᵀ in f32, for models whose activations are not quantised.
///
/// # Errors
///
/// If `x` or `y` is not of the length that its shape asks for.
pub fn packed_linear_f32(
    x: &[f32],
    tokens: usize,
    weights: &PackedView,
    y: &mut [f32],
) -> Result<(), CpuError> {
    float_product(Path::detect(), Direction::Forward, x, tokens, weights, y)
}

/// dx `[tokens, cols]` = dy `[tokens, rows]` W' in f32: the gradient of [`packed_linear`] with respect to x, where
/// the quantisation of x passes gradients straight through.
///
/// # Errors
///
/// If `dy` or `dx` is not of the length that its shape asks for.
pub fn packed_linear_dx(
    dy: &[f32],
    tokens: usize,
    weights: &PackedView,
    dx: &mut [f32],
) -> Result<(), CpuError> {
    float_product(Path::detect(), Direction::Backward, dy, tokens, weights, dx)
}

/// Paths differ in the order of their sums.
fn float_product(
    path: Path,
    direction: Direction,
    x: &[f32],
    tokens: usize,
    weights: &PackedView,
    y: &mut [f32],
) -> Result<(), CpuError> {
    let kernel = kernel::float(path).ok_or(CpuError::Unavailable(path))?;
    let (rows, cols) = (tokens * weights.rows(), tokens * weights.cols());
    match direction {
        Direction::Forward => check("x", x.len(), cols).and(check("y", y.len(), rows))?,
        Direction::Backward => check("dy", x.len(), rows).and(check("dx", y.len(), cols))?,
    }
    float::multiply(kernel, x, weights, direction, y);
    Ok(())
}

/// y `[m, n]` = x `[m, k]` w `[k, n]` of operands that are quantised already and held in f32: x by tokens to eight bits,
/// w to g T, with one g for the matrix, a column, or a group of a column, as `granularity` says of outputs.
///
/// The codes are found again (a token's s is its largest magnitude / 127, g the largest magnitude of its weights), so
/// the result is the product of x and w up to rounding. What is not so quantised is quantised so, silently.
///
/// # Errors
///
/// If a slice is not of the length that its shape asks for, or groups are not of a multiple of 16.
pub fn int8_matmul(
    x: &[f32],
    m: usize,
    k: usize,
    w: &[f32],
    n: usize,
    granularity: Granularity,
    y: &mut [f32],
) -> Result<(), CpuError> {
    let packed = latent::pack_quantised(w, [n, k], Order::Transposed, granularity)?;
    packed_linear(x, m, &packed.view(), y)
}
