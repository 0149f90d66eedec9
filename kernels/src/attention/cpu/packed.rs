//! Small products: matrices packed as panels, times rows or columns of activations.

use std::ops::Range;

use crate::panel::{DEPTH, Kernel, LANES, Line, Multiply, Sums, Tile, store};

/// A matrix `[summands, outputs]` as panels: `[panel of outputs][summand][group of 16]`.
#[derive(Default)]
pub struct Packed {
    lines: Vec<Line>,
    summands: usize,
}

impl Packed {
    pub const fn new() -> Self {
        Self {
            lines: Vec::new(),
            summands: 0,
        }
    }

    /// Each row is a summand.
    pub fn rows<'r>(
        &mut self,
        kernel: &Kernel,
        width: usize,
        rows: impl ExactSizeIterator<Item = &'r [f32]>,
    ) {
        self.resize(kernel, rows.len(), width);
        for (summand, row) in rows.enumerate() {
            for (group, values) in row.chunks(LANES).enumerate() {
                let line = self.line(kernel, summand, group);
                line[..values.len()].copy_from_slice(values);
            }
        }
    }

    /// Each row is an output.
    pub fn columns<'r>(
        &mut self,
        kernel: &Kernel,
        width: usize,
        rows: impl ExactSizeIterator<Item = &'r [f32]>,
    ) {
        self.resize(kernel, width, rows.len());
        for (output, row) in rows.enumerate() {
            for (summand, value) in row.iter().enumerate() {
                self.line(kernel, summand, output / LANES)[output % LANES] = *value;
            }
        }
    }

    /// What was there before stays behind the last output: nothing is added to another output's sum.
    fn resize(&mut self, kernel: &Kernel, summands: usize, outputs: usize) {
        self.summands = summands;
        let groups = outputs.div_ceil(LANES).next_multiple_of(kernel.groups);
        let count = groups * summands;
        if self.lines.len() < count {
            self.lines.resize(count, Line::ZERO);
        }
    }

    #[inline]
    fn line(&mut self, kernel: &Kernel, summand: usize, group: usize) -> &mut [f32; LANES] {
        let panel = group / kernel.groups * self.summands + summand;
        &mut self.lines[panel * kernel.groups + group % kernel.groups].0
    }

    fn panel(&self, kernel: &Kernel, index: usize, summands: Range<usize>) -> &[Line] {
        let first = (index * self.summands + summands.start) * kernel.groups;
        &self.lines[first..][..summands.len() * kernel.groups]
    }
}

/// Activations of some tokens.
#[derive(Clone, Copy)]
pub enum Activations<'a> {
    /// `[piece of DEPTH summands][token][DEPTH]`, from a summand on.
    Rows {
        values: &'a [f32],
        tokens: usize,
        origin: usize,
    },
    /// `[summand][DEPTH]`, a column for each token.
    Columns(&'a [f32]),
}

impl<'a> Activations<'a> {
    fn multiply(self, kernel: &Kernel) -> Multiply {
        match self {
            Self::Rows { .. } => kernel.multiply,
            Self::Columns(_) => kernel.multiply_columns,
        }
    }

    /// Of a tile, from a summand on.
    fn of(self, tile: Tile, summand: usize) -> &'a [f32] {
        match self {
            Self::Rows {
                values,
                tokens,
                origin,
            } => {
                let (piece, within) = ((summand - origin) / DEPTH, (summand - origin) % DEPTH);
                &values[(piece * tokens + tile.first) * DEPTH + within..]
            }
            Self::Columns(values) => &values[summand * DEPTH + tile.first..],
        }
    }
}

/// Rows that sums go to.
pub struct Out<'o, 'y> {
    /// One for each token.
    pub rows: &'o mut [&'y mut [f32]],
    /// The output that they begin with.
    pub origin: usize,
    /// Whether sums are added to what is there.
    pub add: bool,
}

/// out `[tokens, outputs]` of activations `[tokens, summands]` and a packed matrix `[summands, outputs]`.
///
/// Summands come in pieces that end where pieces of the activations do; outputs begin at a panel. Tiles are all tokens,
/// `kept` is room for their sums of a panel.
pub fn product(
    kernel: &Kernel,
    activations: Activations,
    matrix: &Packed,
    pieces: &[Range<usize>],
    outputs: Range<usize>,
    (tiles, kept): (&[Tile], &mut [f32]),
    out: Out,
) {
    let lanes = kernel.groups * LANES;
    let multiply = activations.multiply(kernel);
    for output in outputs.step_by(lanes) {
        let at = output - out.origin;
        let whole = out.rows.first().is_some_and(|row| row.len() >= at + lanes);
        for (i, piece) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            let panel = matrix.panel(kernel, output / lanes, piece.clone());
            let (mut rows, mut kept) = (&mut *out.rows, &mut *kept);
            for &tile in tiles {
                let rows = rows.split_off_mut(..tile.tokens).unwrap_or_default();
                let kept = kept
                    .split_off_mut(..tile.tokens * lanes)
                    .unwrap_or_default();
                let sums = Sums {
                    kept: &mut *kept,
                    first: i == 0,
                    out: if last && whole { &mut *rows } else { &mut [] },
                    at,
                    add: out.add,
                };
                multiply(panel, activations.of(tile, piece.start), tile.tokens, sums);
                if last && !whole {
                    store(rows, at, kept.chunks(lanes), out.add);
                }
            }
        }
    }
}
