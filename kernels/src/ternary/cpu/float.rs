//! Products in f32: of activations that are not quantised, and of gradients.
//!
//! Trits times their scales are unpacked a panel at a time ([`crate::panel`]). Forward, outputs are rows and the sum
//! runs over columns; backward it is the other way round.

use std::array;
use std::ops::Range;

use super::kernel::FloatKernel;
use crate::panel::{self, Line, Panels};
use crate::ternary::Granularity;
use crate::ternary::layout::PackedView;
use crate::ternary::layout::compute::BLOCK;

/// Which dimension of the weights is summed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// Over columns: x W'ᵀ.
    Forward,
    /// Over rows: dy W'.
    Backward,
}

/// y `[tokens, outputs]` from x `[tokens, summands]`.
pub(super) fn multiply(
    kernel: &FloatKernel,
    x: &[f32],
    weights: &PackedView,
    direction: Direction,
    y: &mut [f32],
) {
    let (outputs, summands) = match direction {
        Direction::Forward => (weights.rows(), weights.cols()),
        Direction::Backward => (weights.cols(), weights.rows()),
    };
    let trits = Trits {
        kernel,
        weights,
        direction,
    };
    panel::product(kernel.panel, x, summands, &trits, outputs, y, false);
}

struct Trits<'a> {
    kernel: &'a FloatKernel,
    weights: &'a PackedView<'a>,
    direction: Direction,
}

impl Trits<'_> {
    /// g of the rows of a block: groups of columns are of whole blocks. Rows that pad the matrix have 0.
    fn scales(&self, row_group: usize, block: usize) -> [f32; BLOCK] {
        let (scales, rows) = (self.weights.scales(), self.weights.rows());
        let of_row = |row: usize| match self.weights.granularity() {
            Granularity::Tensor => scales[0],
            Granularity::Row => scales[row],
            Granularity::Group(size) => {
                let per_row = self.weights.cols().div_ceil(size);
                scales[row * per_row + block * BLOCK / size]
            }
        };
        array::from_fn(|lane| {
            let row = row_group * BLOCK + lane;
            if row < rows { of_row(row) } else { 0.0 }
        })
    }
}

impl Panels for Trits<'_> {
    fn unpack(&self, group: usize, summands: Range<usize>, panel: &mut [Line], stride: usize) {
        let panels = panel.chunks_mut(BLOCK * stride);
        for (along, panel) in (summands.start / BLOCK..summands.end / BLOCK).zip(panels) {
            let (unpack, row_group, block) = match self.direction {
                Direction::Forward => (self.kernel.unpack_columns, group, along),
                Direction::Backward => (self.kernel.unpack_rows, along, group),
            };
            let words = self.weights.row_group(row_group).as_chunks().0;
            unpack(&words[block], &self.scales(row_group, block), panel, stride);
        }
    }
}
