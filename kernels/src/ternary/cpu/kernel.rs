//! What a set of instructions has to offer for products to be built of it.

use super::Path;
use crate::panel;
use crate::ternary::layout::compute::BLOCK;

/// 64 bytes of a panel, where vector loads like them.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u8; 64]);

impl Line {
    pub const ZERO: Self = Self([0; 64]);
}

/// The parts of integer products.
///
/// A *quad* is four neighbouring columns. Activations lie in tiles `[quad][token][4 bytes]`, a word for each quad of a
/// token. Weights lie in panels `[quad][row group]`, a [`Line`] for each quad of 16 rows, whose order within
/// the line is each kernel's own. Sums lie as `[token][row of the panel]`.
pub(super) struct IntegerKernel {
    /// Row groups of a panel.
    pub groups: usize,
    /// The most tokens of a tile.
    pub tile: usize,
    /// Up to so many tokens, words are multiplied as they are read.
    pub stream_tokens: usize,
    /// The largest magnitude as bits: at least those of infinity if a value is not finite.
    pub absmax: fn(x: &[f32]) -> u32,
    /// Codes of x / scale into every `stride`-th word of `out`, padded with 0 to whole blocks; their sum.
    pub quantise: fn(x: &[f32], scale: f32, out: &mut [u32], stride: usize) -> i32,
    /// Packed blocks of one row group into every `stride`-th line of `panel`.
    pub unpack: fn(words: &[u32], panel: &mut [Line], stride: usize),
    /// `sums += panel x activations` for a tile of `tokens`.
    pub multiply: fn(panel: &[Line], activations: &[u32], tokens: usize, sums: &mut [i32]),
    /// The same from packed words: for row group i, the blocks that start at word `i * stride`. Here `sums` are
    /// `[row group][token][16 rows]`.
    pub stream:
        fn(words: &[u32], stride: usize, activations: &[u32], tokens: usize, sums: &mut [i32]),
}

/// The parts of products in f32.
pub(super) struct FloatKernel {
    /// How panels are multiplied.
    pub panel: &'static panel::Kernel,
    /// A packed block times the scales of its rows, one column a line, rows in its lanes.
    pub unpack_columns: UnpackFloats,
    /// The same, one row a line, columns in its lanes.
    pub unpack_rows: UnpackFloats,
}

/// Words, scales of rows, and a panel of whose lines every so many-th is filled.
type UnpackFloats = fn(&[u32; BLOCK], &[f32; BLOCK], &mut [panel::Line], usize);

/// The kernel of a path, if this processor can run it.
pub(super) fn integer(path: Path) -> Option<&'static IntegerKernel> {
    match path {
        #[cfg(target_arch = "x86_64")]
        Path::Avx512Vnni => super::avx512::available().then_some(&super::avx512::INTEGER),
        #[cfg(target_arch = "x86_64")]
        Path::AvxVnni => super::avx2::vnni_available().then_some(&super::avx2::INTEGER_VNNI),
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => super::avx2::available().then_some(&super::avx2::INTEGER),
        #[cfg(not(target_arch = "x86_64"))]
        Path::Avx512Vnni | Path::AvxVnni | Path::Avx2 => None,
        Path::Portable => Some(&super::portable::INTEGER),
    }
}

/// The kernel of a path for products in f32, if this processor can run it.
pub(super) fn float(path: Path) -> Option<&'static FloatKernel> {
    integer(path)?;
    Some(match path {
        #[cfg(target_arch = "x86_64")]
        Path::Avx512Vnni => &super::avx512::FLOAT,
        #[cfg(target_arch = "x86_64")]
        Path::AvxVnni | Path::Avx2 => &super::avx2::FLOAT,
        _ => &super::portable::FLOAT,
    })
}

/// The part of packing: 16 columns of 16 rows of f32 weights, each column a `stride` after the last, to the words of
/// a block. A weight beyond the threshold of its row is 1 or -1. Returns the bits of each row's largest magnitude.
pub(super) struct PackKernel {
    pub pack: Pack,
}

/// Columns, their stride, thresholds of the rows, and words to be filled.
type Pack = fn(&[f32], usize, &[f32; BLOCK], &mut [u32]) -> [u32; BLOCK];

/// The kernel of a path for packing: the portable one if the processor cannot run it.
pub(super) fn pack(path: Path) -> &'static PackKernel {
    match path {
        #[cfg(target_arch = "x86_64")]
        Path::Avx512Vnni if path.available() => &super::avx512::PACK,
        #[cfg(target_arch = "x86_64")]
        Path::AvxVnni | Path::Avx2 if path.available() => &super::avx2::PACK,
        _ => &super::portable::PACK,
    }
}

/// A loop of a path's integer multiplications alone, so many rounds: how many operations it did.
pub(super) fn probe(path: Path) -> Option<fn(usize) -> usize> {
    match path {
        #[cfg(target_arch = "x86_64")]
        Path::Avx512Vnni if path.available() => Some(super::avx512::probe),
        #[cfg(target_arch = "x86_64")]
        Path::AvxVnni if path.available() => Some(super::avx2::probe_vnni),
        _ => None,
    }
}
