//! Products with blockwise weights on the CPU.
//!
//! A product with many tokens unpacks codes to f32, times their scales, a panel at a time (`panel`). With few, words
//! are multiplied as they are read, once, in the order of memory (`stream`).
//! What differs between processors is a handful of functions, an `unpack::Kernel`; [`Path::detect`] chooses at run time.

mod portable;
mod stream;
mod unpack;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

use super::BlockwiseError;
use super::error::check_length;
use super::layout::BlockwiseView;
pub use crate::panel::Path;
use unpack::{Backward, Forward};

/// y `[tokens, rows]` = x `[tokens, cols]` W'ᵀ in f32.
///
/// Threads are those of the current rayon pool; outputs do not depend on how many.
///
/// # Errors
///
/// If `x` or `y` is not of the length that its shape asks for.
pub fn linear(
    x: &[f32],
    tokens: usize,
    weights: &BlockwiseView,
    y: &mut [f32],
) -> Result<(), BlockwiseError> {
    linear_on(Path::detect(), x, tokens, weights, y)
}

/// [`linear`] by a path of the caller's choice. Paths differ in the order of their sums.
///
/// # Errors
///
/// As [`linear`], and if the processor cannot take this path.
pub fn linear_on(
    path: Path,
    x: &[f32],
    tokens: usize,
    weights: &BlockwiseView,
    y: &mut [f32],
) -> Result<(), BlockwiseError> {
    let kernel = unpack::kernel(path).ok_or(BlockwiseError::Unavailable(path))?;
    let shape = weights.shape();
    check_length("x", x.len(), tokens * shape.cols)?;
    check_length("y", y.len(), tokens * shape.rows)?;
    if let Some(stream) = stream::stream(kernel, tokens, &shape) {
        stream::multiply(stream, x, weights, y);
        return Ok(());
    }
    let panels = Forward::new(kernel, weights);
    crate::panel::product(kernel.panel, x, shape.cols, &panels, shape.rows, y, false);
    Ok(())
}

/// dx `[tokens, cols]` = dy `[tokens, rows]` W' in f32: the gradient of [`linear`] with respect to x.
///
/// # Errors
///
/// If `dy` or `dx` is not of the length that its shape asks for.
pub fn linear_dx(
    dy: &[f32],
    tokens: usize,
    weights: &BlockwiseView,
    dx: &mut [f32],
) -> Result<(), BlockwiseError> {
    linear_dx_on(Path::detect(), dy, tokens, weights, dx)
}

/// [`linear_dx`] by a path of the caller's choice.
///
/// # Errors
///
/// As [`linear_dx`], and if the processor cannot take this path.
pub fn linear_dx_on(
    path: Path,
    dy: &[f32],
    tokens: usize,
    weights: &BlockwiseView,
    dx: &mut [f32],
) -> Result<(), BlockwiseError> {
    let kernel = unpack::kernel(path).ok_or(BlockwiseError::Unavailable(path))?;
    let shape = weights.shape();
    check_length("dy", dy.len(), tokens * shape.rows)?;
    check_length("dx", dx.len(), tokens * shape.cols)?;
    let panels = Backward::new(kernel, weights);
    crate::panel::product(kernel.panel, dy, shape.rows, &panels, shape.cols, dx, false);
    Ok(())
}
