//! Panels of blockwise weights: codes become numbers, times the scales of their blocks.

use std::borrow::Cow;
use std::ops::Range;

use super::Path;
use crate::blockwise::layout::{BLOCK, BlockwiseView};
use crate::blockwise::{BlockwiseShape, Format};
use crate::panel::{self, DEPTH, LANES, Line, Panels};

/// What a processor has to offer for codes to become numbers.
pub(super) struct Kernel {
    pub panel: &'static panel::Kernel,
    /// Words of a row group, one line for each of their columns, rows in its lanes. `scales` and `zeros` hold a line
    /// for each `run` columns, a power of two.
    pub columns: fn(words: &[u32], decode: Decode, runs: Runs, panel: &mut [Line], stride: usize),
    /// The words of 16 rows and 16 columns, one line for each row, columns in its lanes. Lane i of `scale` and of
    /// `zero` belongs to row i.
    pub rows: fn(
        words: &[u32],
        decode: Decode,
        scale: &Line,
        zero: &Line,
        panel: &mut [Line],
        stride: usize,
    ),
    /// Products of few tokens with words as they are read, if the processor gains by that.
    pub stream: Option<Stream>,
}

/// See [`super::stream`].
pub(super) struct Stream {
    /// The most tokens.
    pub tokens: usize,
    /// For so many tokens, from how many places of the matrix row groups are taken at once: memory is read faster so,
    /// and an activation is used more than once.
    pub places: fn(tokens: usize) -> usize,
    /// Sums of one row group, or of as many as there are places, `[group][token][16 rows]`: all words of each group
    /// times x, `tokens` rows of as many columns.
    pub multiply: Multiply,
}

/// Groups, x, tokens, and sums.
type Multiply = fn(&[Group], Decode, &[f32], usize, &mut [[f32; LANES]]);

/// A row group to be multiplied, whose rows are whole blocks.
#[derive(Clone, Copy)]
pub(super) struct Group<'a> {
    pub words: &'a [u32],
    pub scales: GroupScales<'a>,
    /// For each block of 16 rows, 16 zero points in two words; empty where there are none.
    pub zeros: &'a [u32],
    /// Columns of a block: a multiple of 16.
    pub block: usize,
}

/// For each block of columns, the scales of 16 rows.
#[derive(Clone, Copy)]
pub(super) enum GroupScales<'a> {
    Single(&'a [[f32; LANES]]),
    Double {
        /// Sixteen codes in four words.
        codes: &'a [[u32; LANES / 4]],
        /// Of 256 blocks each.
        scales: &'a [f32],
        mean: f32,
        /// Each row's first block.
        first: [i32; LANES],
    },
}

/// How codes become numbers, before the scale.
#[derive(Debug, Clone, Copy)]
pub(super) enum Decode {
    /// A level for each of sixteen codes.
    Levels(&'static [f32; 16]),
    /// The same less a zero point.
    Shifted(&'static [f32; 16]),
    /// Bytes in two's complement.
    Bytes,
}

impl Decode {
    pub fn new(format: Format) -> Self {
        match format.levels() {
            Some(levels) if format.has_zero_points() => Self::Shifted(levels),
            Some(levels) => Self::Levels(levels),
            None => Self::Bytes,
        }
    }
}

/// Scales and zero points of 16 rows, for runs of columns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Runs<'a> {
    pub scales: &'a [Line],
    /// Of no meaning where there are no zero points.
    pub zeros: &'a [Line],
    /// Columns of a run: a power of two.
    pub run: usize,
}

/// The kernel of a path, if this processor can run it.
pub(super) fn kernel(path: Path) -> Option<&'static Kernel> {
    path.available().then_some(match path {
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 => &super::avx512::KERNEL,
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => &super::avx2::KERNEL,
        _ => &super::portable::KERNEL,
    })
}

/// Weights, their scales in f32, and how far columns share them.
struct Weights<'a> {
    kernel: &'static Kernel,
    view: &'a BlockwiseView<'a>,
    decode: Decode,
    /// By places.
    scales: Cow<'a, [f32]>,
    /// Where rows are whole blocks, how many.
    per_row: Option<usize>,
    /// Columns that share a scale in every row, from multiples of it on: a power of two, [`DEPTH`] at most.
    run: usize,
}

impl<'a> Weights<'a> {
    fn new(kernel: &'static Kernel, view: &'a BlockwiseView<'a>) -> Self {
        let shape = view.shape();
        Self {
            kernel,
            view,
            decode: Decode::new(shape.format),
            scales: view.expanded_scales(),
            per_row: shape.blocks_per_row(),
            run: run(&shape),
        }
    }

    fn zero(&self, place: usize) -> f32 {
        f32::from(self.view.zero_point(place))
    }

    /// Scales and zero points of a row group's blocks of some columns, where rows are so many whole blocks.
    fn lines(&self, group: usize, col: usize, per_row: usize) -> (Line, Line) {
        let place = (group * per_row + col / self.view.shape().block) * LANES;
        let scales = self.scales[place..].first_chunk();
        // There are places for all 16 rows of a group.
        let scale = Line(*scales.expect("a line of scales"));
        let mut zero = Line::ZERO;
        if self.has_zeros() {
            zero = Line(std::array::from_fn(|lane| self.zero(place + lane)));
        }
        (scale, zero)
    }

    fn has_zeros(&self) -> bool {
        self.view.shape().format.has_zero_points()
    }
}

/// Blocks of every row end at multiples of what the row and the block have in common.
pub(super) fn run(shape: &BlockwiseShape) -> usize {
    let common = shape.cols | shape.block | DEPTH;
    1 << common.trailing_zeros()
}

/// Where a weight is among blocks, walked along without a division for every step.
#[derive(Clone, Copy)]
struct Place {
    block: usize,
    within: usize,
}

impl Place {
    fn new(index: usize, size: usize) -> Self {
        Self {
            block: index / size,
            within: index % size,
        }
    }

    /// So many blocks and weights further; `weights` is less than a block.
    fn advance(&mut self, blocks: usize, weights: usize, size: usize) {
        self.block += blocks;
        self.within += weights;
        if self.within >= size {
            self.within -= size;
            self.block += 1;
        }
    }
}

/// Panels of outputs that are rows: the sum runs over columns.
pub(super) struct Forward<'a>(Weights<'a>);

impl<'a> Forward<'a> {
    pub fn new(kernel: &'static Kernel, view: &'a BlockwiseView<'a>) -> Self {
        Self(Weights::new(kernel, view))
    }

    /// Scales, or zero points, of a row group's runs of columns, a line each. Padding has 0.
    fn lines(&self, group: usize, first: usize, lines: &mut [Line], value: impl Fn(usize) -> f32) {
        let BlockwiseShape {
            rows, cols, block, ..
        } = self.0.view.shape();
        let run = self.0.run;
        for lane in 0..LANES {
            let row = group * LANES + lane;
            if row >= rows {
                lines.iter_mut().for_each(|line| line.0[lane] = 0.0);
                continue;
            }
            let mut place = Place::new(row * cols + first, block);
            for (i, line) in lines.iter_mut().enumerate() {
                // A run is no longer than a block, and ends where the block does or before.
                line.0[lane] = if first + i * run < cols {
                    value(place.block)
                } else {
                    0.0
                };
                place.advance(run / block, run % block, block);
            }
        }
    }

    fn fill(&self, group: usize, first: usize, scales: &mut [Line], zeros: &mut [Line]) {
        self.lines(group, first, scales, |block| self.0.scales[block]);
        if self.0.has_zeros() {
            self.lines(group, first, zeros, |block| self.0.zero(block));
        }
    }

    fn unpack_with<const LINES: usize>(
        &self,
        group: usize,
        columns: Range<usize>,
        panel: &mut [Line],
        stride: usize,
    ) {
        let weights = &self.0;
        let count = columns.len().div_ceil(weights.run);
        let mut scales = [Line::ZERO; LINES];
        let mut zeros = [Line::ZERO; LINES];
        let first = columns.start;
        if let Some(per_row) = weights.per_row {
            for i in 0..count {
                (scales[i], zeros[i]) = weights.lines(group, first + i * weights.run, per_row);
            }
        } else {
            self.fill(group, first, &mut scales[..count], &mut zeros[..count]);
        }
        let per_word = weights.view.shape().format.codes_per_word();
        let words = &weights.view.row_group(group)[first / per_word * BLOCK..];
        let words = &words[..columns.len() / per_word * BLOCK];
        let runs = Runs {
            scales: &scales[..count],
            zeros: &zeros[..count],
            run: weights.run,
        };
        (weights.kernel.columns)(words, weights.decode, runs, panel, stride);
    }
}

impl Panels for Forward<'_> {
    fn unpack(&self, group: usize, summands: Range<usize>, panel: &mut [Line], stride: usize) {
        // Lines that are not used cost as much as those that are.
        if self.0.run >= 32 {
            self.unpack_with::<{ DEPTH / 32 }>(group, summands, panel, stride);
        } else {
            self.unpack_with::<DEPTH>(group, summands, panel, stride);
        }
    }
}

/// Panels of outputs that are columns: the sum runs over rows.
pub(super) struct Backward<'a>(Weights<'a>);

impl<'a> Backward<'a> {
    pub fn new(kernel: &'static Kernel, view: &'a BlockwiseView<'a>) -> Self {
        Self(Weights::new(kernel, view))
    }

    /// Times scales that differ within 16 columns.
    fn scale(&self, group: usize, row: usize, line: &mut Line) {
        let BlockwiseShape {
            rows, cols, block, ..
        } = self.0.view.shape();
        if row >= rows {
            *line = Line::ZERO;
            return;
        }
        let mut place = Place::new(row * cols + group * LANES, block);
        for (lane, weight) in line.0.iter_mut().enumerate() {
            *weight = if group * LANES + lane < cols {
                let zero = if self.0.has_zeros() {
                    self.0.zero(place.block)
                } else {
                    0.0
                };
                (*weight - zero) * self.0.scales[place.block]
            } else {
                0.0
            };
            place.advance(1 / block, 1 % block, block);
        }
    }
}

impl Panels for Backward<'_> {
    fn unpack(&self, group: usize, summands: Range<usize>, panel: &mut [Line], stride: usize) {
        let weights = &self.0;
        let BlockwiseShape {
            rows,
            cols,
            block,
            format,
            ..
        } = weights.view.shape();
        let shared = weights.run >= LANES;

        let tile = BLOCK * BLOCK / format.codes_per_word();
        let mut place = Place::new(summands.start * cols + group * LANES, block);
        let (blocks_a_row, rest_of_a_row) = (cols / block, cols % block);
        let (mut scale, mut zero) = (Line([1.0; LANES]), Line::ZERO);
        let lines = panel.chunks_mut(BLOCK * stride);
        for (first, panel) in summands.step_by(BLOCK).zip(lines) {
            if let Some(per_row) = weights.per_row {
                (scale, zero) = weights.lines(first / BLOCK, group * LANES, per_row);
            } else if shared {
                for lane in 0..LANES {
                    let inside = first + lane < rows;
                    scale.0[lane] = if inside {
                        weights.scales[place.block]
                    } else {
                        0.0
                    };
                    if inside && weights.has_zeros() {
                        zero.0[lane] = weights.zero(place.block);
                    }
                    place.advance(blocks_a_row, rest_of_a_row, block);
                }
            }
            let words = &weights.view.row_group(first / BLOCK)[group * tile..][..tile];
            (weights.kernel.rows)(words, weights.decode, &scale, &zero, panel, stride);
            if !shared {
                for (row, line) in panel.iter_mut().step_by(stride).enumerate() {
                    self.scale(group, first + row, line);
                }
            }
        }
    }
}
