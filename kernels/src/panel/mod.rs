//! Products in f32 with weights that are unpacked on the way, whatever they are packed as.
//!
//! The dense matrix is never formed. A *panel*, 16 or 32 outputs wide and [`DEPTH`] summands deep, is unpacked to f32 in
//! the first-level cache and multiplied with one tile of tokens after another. What unpacks it is the family's
//! ([`Panels`]); how it is multiplied is each processor's ([`Kernel`]).
//!
//! Activations are taken a block at a time that the second-level cache holds, and laid out
//! `[tile][piece of DEPTH summands][token][DEPTH]`: a tile is then read from a few KiB in a row, at distances that the
//! compiler knows. Blocks hold as many tokens as they can, so that weights are unpacked as seldom as can be.

mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::KERNEL as AVX2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::KERNEL as AVX512;
pub(crate) use portable::KERNEL as PORTABLE;

use std::cell::Cell;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::Instant;

use rayon::prelude::*;

/// Outputs of a line of a panel, and of a group.
pub(crate) const LANES: usize = 16;

/// Summands of a panel: 16 KiB where it is 32 outputs wide.
pub(crate) const DEPTH: usize = 128;

/// Bytes of activations of a block.
const BLOCK_BYTES: usize = 1 << 20;

/// Summands of a block at least, about: outputs are written and read again for each block.
const BLOCK_DEPTH: usize = 512;

/// Tasks for each thread, so that one that is held up does not hold up the others for long.
const SHARES: usize = 4;

/// Multiplications below which other threads are not asked to help.
const ALONE: usize = 1 << 18;

/// 16 weights of a panel.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [f32; LANES]);

impl Line {
    pub const ZERO: Self = Self([0.0; LANES]);
}

/// A set of instructions that products in f32 can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// AVX-512: Intel since Skylake-SP, AMD since Zen 4.
    Avx512,
    /// AVX2 with FMA: Intel since Haswell, AMD since Zen.
    Avx2,
    /// What the compiler makes of plain Rust.
    Portable,
}

impl Path {
    /// Every path, the best first.
    pub const ALL: [Self; 3] = [Self::Avx512, Self::Avx2, Self::Portable];

    /// Whether this processor, and this program, can take the path.
    pub fn available(self) -> bool {
        self.kernel().is_some()
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
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Multiplications and additions by its instructions, in registers, on every thread of the current rayon pool at
    /// once: operations, and seconds from the first start to the last end. Some milliseconds. `None` where a path has no
    /// instructions of its own, or this processor not those.
    pub fn float_operations(self) -> Option<(f64, f64)> {
        const ROUNDS: usize = 400_000;
        let probe = match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 if self.available() => avx512::probe,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if self.available() => avx2::probe,
            _ => return None,
        };
        let started = Instant::now();
        let operations: usize = rayon::broadcast(|_| probe(ROUNDS)).into_iter().sum();
        Some((operations as f64, started.elapsed().as_secs_f64()))
    }

    /// Its kernel, if this processor can run it.
    pub(crate) fn kernel(self) -> Option<&'static Kernel> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::available().then_some(&avx512::KERNEL),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::available().then_some(&avx2::KERNEL),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => None,
            Self::Portable => Some(&portable::KERNEL),
        }
    }
}

/// How a processor multiplies a panel. Panels are `[summand][group]` lines, sums `[token][output of the panel]`.
pub(crate) struct Kernel {
    /// Groups of 16 outputs of a panel.
    pub groups: usize,
    /// The most tokens of a tile.
    pub tile: usize,
    /// Adds the products of a panel and a tile of tokens to their sums. Activations are `[token][DEPTH]`.
    pub multiply: Multiply,
    /// The same where activations are `[summand][DEPTH]`, a column for each token.
    pub multiply_columns: Multiply,
}

/// Takes panel, activations, the number of tokens and their sums.
pub(crate) type Multiply = fn(&[Line], &[f32], usize, Sums);

/// How far apart the activations of two tokens are, and those of two summands.
const fn strides(columns: bool) -> [usize; 2] {
    if columns { [1, DEPTH] } else { [DEPTH, 1] }
}

/// Activations that a tile reads.
fn activations_read([by_token, by_summand]: [usize; 2], tokens: usize, summands: usize) -> usize {
    let last = |count: usize| count.saturating_sub(1);
    last(tokens) * by_token + last(summands) * by_summand + 1
}

/// Where the sums of a tile come from and go to.
pub(crate) struct Sums<'a, 'y> {
    /// `[token][output of the panel]`.
    pub kept: &'a mut [f32],
    /// Whether sums start here, from 0.
    pub first: bool,
    /// The outputs of each token, where sums end here; none where they are kept.
    pub out: &'a mut [&'y mut [f32]],
    /// The first output of the panel.
    pub at: usize,
    /// Whether outputs are added to what is there.
    pub add: bool,
}

/// Weights that can be unpacked.
pub(crate) trait Panels: Sync {
    /// Weights of a group of 16 outputs, a line for each summand of a range, into every `stride`-th line of `panel`.
    ///
    /// Ranges start at multiples of [`DEPTH`]. They end at such, or behind the last summand at a multiple of 16; what
    /// is multiplied with summands that are not there is 0, so that these need only be finite.
    fn unpack(&self, group: usize, summands: Range<usize>, panel: &mut [Line], stride: usize);
}

/// Some tokens that are multiplied together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tile {
    /// The first token.
    pub first: usize,
    /// How many.
    pub tokens: usize,
}

/// Cuts tokens into tiles of `most` at most, as even as they can be: a small tile costs nearly what a large one does.
pub(crate) fn tiles(tokens: usize, most: usize) -> Vec<Tile> {
    let count = tokens.div_ceil(most);
    let start = |i: usize| i * tokens / count;
    (0..count)
        .map(|i| Tile {
            first: start(i),
            tokens: start(i + 1) - start(i),
        })
        .collect()
}

/// Ranges of groups of 16 outputs, one a task, each but the last a multiple of `unit`.
pub(crate) fn shares(groups: usize, multiplications: usize, unit: usize) -> Vec<Range<usize>> {
    let units = groups.div_ceil(unit);
    let threads = rayon::current_num_threads();
    let shares = if threads == 1 || multiplications < ALONE {
        1
    } else {
        (SHARES * threads).min(units)
    };
    let start = |i: usize| (i * units / shares * unit).min(groups);
    (0..shares).map(|i| start(i)..start(i + 1)).collect()
}

/// For each range of groups of 16 outputs, its part of y `[tokens, outputs]`: a slice for each token.
pub(crate) fn split<'y>(
    y: &'y mut [f32],
    outputs: usize,
    ranges: &[Range<usize>],
) -> Vec<Vec<&'y mut [f32]>> {
    let tokens = y.len() / outputs;
    let mut parts: Vec<_> = ranges.iter().map(|_| Vec::with_capacity(tokens)).collect();
    for mut y in y.chunks_mut(outputs) {
        for (range, part) in ranges.iter().zip(&mut parts) {
            let end = (range.end * LANES).min(outputs) - range.start * LANES;
            part.push(y.split_off_mut(..end).unwrap_or_default());
        }
    }
    parts
}

/// y `[tokens, outputs]` from x `[tokens, summands]`; added to what is there where `add` says so.
pub(crate) fn product(
    kernel: &Kernel,
    x: &[f32],
    summands: usize,
    weights: &impl Panels,
    outputs: usize,
    y: &mut [f32],
    add: bool,
) {
    if summands == 0 || y.is_empty() {
        if !add {
            y.fill(0.0);
        }
        return;
    }
    let tokens = y.len() / outputs;
    let [block_tokens, block_depth] = block(tokens, summands);
    let ranges = shares(
        outputs.div_ceil(LANES),
        tokens * outputs * summands,
        kernel.groups,
    );
    let mut parts = split(y, outputs, &ranges);
    let pieces = block_depth.div_ceil(DEPTH);
    let mut activations = ACTIVATIONS.take();
    grow(
        &mut activations,
        block_tokens.min(tokens) * pieces * DEPTH,
        0.0,
    );
    for first_token in (0..tokens).step_by(block_tokens) {
        let count = block_tokens.min(tokens - first_token);
        let tiles = tiles(count, kernel.tile);
        for first in (0..summands).step_by(block_depth) {
            let block = Block {
                summands: first..summands.min(first + block_depth),
                outputs,
                tiles: &tiles,
                add: add || first > 0,
            };
            let rows = &x[first_token * summands..][..count * summands];
            block.arrange(rows, summands, &mut activations);
            let work = ranges.par_iter().zip(parts.par_iter_mut());
            work.for_each(|(range, y)| {
                let y = &mut y[first_token..][..count];
                block.share(kernel, weights, &activations, range.clone(), y);
            });
        }
    }
    ACTIVATIONS.set(activations);
}

// Buffers that each thread keeps for the next product: fresh ones cost page faults, a twentieth of a product's time.
// A thread that takes up another product while it waits for its own finds none, and makes some.
thread_local! {
    /// At most a little over [`BLOCK_BYTES`].
    static ACTIVATIONS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// A panel, and the sums of a block.
    static SHARE: Cell<(Vec<Line>, Vec<f32>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

fn grow<T: Clone>(buffer: &mut Vec<T>, length: usize, value: T) {
    if buffer.len() < length {
        buffer.resize(length, value);
    }
}

/// Tokens and summands of a block: about [`BLOCK_BYTES`], as many tokens as can be.
fn block(tokens: usize, summands: usize) -> [usize; 2] {
    let values = BLOCK_BYTES / size_of::<f32>();
    let most_tokens = (values / BLOCK_DEPTH).max(values / summands.next_multiple_of(DEPTH));
    let block_tokens = tokens.min(most_tokens);
    // To the nearest: a block that is a little too large costs less than one that is nearly empty.
    let blocks = (block_tokens * summands + values / 2) / values;
    let depth = summands.div_ceil(blocks.max(1)).next_multiple_of(DEPTH);
    [block_tokens, depth]
}

/// Activations that are multiplied with all weights before the next are.
struct Block<'a> {
    summands: Range<usize>,
    outputs: usize,
    tiles: &'a [Tile],
    /// Whether outputs are added to what is there.
    add: bool,
}

impl Block<'_> {
    fn pieces(&self) -> usize {
        self.summands.len().div_ceil(DEPTH)
    }

    /// The block's part of rows of x, each of `stride` values.
    fn arrange(&self, x: &[f32], stride: usize, mut out: &mut [f32]) {
        let pieces = self.pieces();
        let mut work = Vec::with_capacity(self.tiles.len());
        for tile in self.tiles {
            let length = tile.tokens * pieces * DEPTH;
            work.push((tile, out.split_off_mut(..length).unwrap_or_default()));
        }
        work.into_par_iter().for_each(|(tile, out)| {
            for (i, out) in out.chunks_mut(tile.tokens * DEPTH).enumerate() {
                let first = self.summands.start + i * DEPTH;
                let count = DEPTH.min(self.summands.end - first);
                for (token, out) in out.chunks_mut(DEPTH).enumerate() {
                    let x = &x[(tile.first + token) * stride + first..][..count];
                    out[..count].copy_from_slice(x);
                    out[count..].fill(0.0);
                }
            }
        });
    }

    /// The sums of a range of groups of 16 outputs.
    fn share(
        &self,
        kernel: &Kernel,
        weights: &impl Panels,
        activations: &[f32],
        range: Range<usize>,
        y: &mut [&mut [f32]],
    ) {
        let groups = kernel.groups;
        let last_group = self.outputs.div_ceil(LANES) - 1;
        let (mut panel, mut sums) = SHARE.take();
        grow(&mut panel, DEPTH * groups, Line::ZERO);
        grow(&mut sums, y.len() * groups * LANES, 0.0);
        let end = self.summands.end.next_multiple_of(LANES);
        for group in range.clone().step_by(groups) {
            for first in (self.summands.start..end).step_by(DEPTH) {
                let count = DEPTH.min(end - first);
                let panel = &mut panel[..count * groups];
                for part in 0..groups {
                    // Where the matrix ends within the panel, its last group fills the rest.
                    let group = (group + part).min(last_group);
                    weights.unpack(group, first..first + count, &mut panel[part..], groups);
                }
                let at = (group - range.start) * LANES;
                self.multiply(kernel, panel, first, activations, &mut sums, (&mut *y, at));
            }
        }
        SHARE.set((panel, sums));
    }

    /// Multiplies a panel of summands from `first` on with every tile.
    fn multiply(
        &self,
        kernel: &Kernel,
        panel: &[Line],
        first: usize,
        activations: &[f32],
        mut kept: &mut [f32],
        (mut y, at): (&mut [&mut [f32]], usize),
    ) {
        let lanes = kernel.groups * LANES;
        let piece = (first - self.summands.start) / DEPTH;
        let last = piece + 1 == self.pieces();
        let whole = y.first().is_some_and(|y| y.len() >= at + lanes);
        for tile in self.tiles {
            let kept = kept
                .split_off_mut(..tile.tokens * lanes)
                .unwrap_or_default();
            let out = y.split_off_mut(..tile.tokens).unwrap_or_default();
            let place = tile.first * self.pieces() + piece * tile.tokens;
            let activations = &activations[place * DEPTH..][..tile.tokens * DEPTH];
            let sums = Sums {
                kept: &mut *kept,
                first: piece == 0,
                out: if last && whole { &mut *out } else { &mut [] },
                at,
                add: self.add,
            };
            (kernel.multiply)(panel, activations, tile.tokens, sums);
            if last && !whole {
                store(out, at, kept.chunks(lanes), self.add);
            }
        }
    }
}

/// Puts the sums of a panel that ends beyond the outputs into rows, from an output on.
pub(crate) fn store<'a>(
    rows: &mut [&mut [f32]],
    at: usize,
    sums: impl Iterator<Item = &'a [f32]>,
    add: bool,
) {
    for (row, sums) in rows.iter_mut().zip(sums) {
        let row = &mut row[at..];
        if add {
            row.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum);
        } else {
            row.copy_from_slice(&sums[..row.len()]);
        }
    }
}

/// Calls the function whose constant is the number of tokens; `call[COLUMNS]` has a second one.
macro_rules! by_tokens {
    ($tokens:expr, $call:ident $([$columns:ident])? ($($argument:expr),*), $($count:literal)*) => {
        $crate::panel::by_tokens!(@ $tokens, $call, ($(, $columns)?), ($($argument),*), $($count)*)
    };
    (@ $tokens:expr, $call:ident, $columns:tt, $arguments:tt, $($count:literal)*) => {
        match $tokens {
            $($count => $crate::panel::by_tokens!(@@ $call, $count, $columns, $arguments),)*
            tokens => unreachable!("a tile of {tokens} tokens"),
        }
    };
    (@@ $call:ident, $count:literal, ($(, $columns:ident)?), ($($argument:expr),*)) => {
        $call::<$count $(, $columns)?>($($argument),*)
    };
}
pub(crate) use by_tokens;
