//! What a set of instructions has to offer for products to be built of it.

use super::Path;

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

/// Calls the function whose constant is the number of tokens.
macro_rules! by_tokens {
    ($tokens:expr, $call:ident $arguments:tt, $($count:literal)*) => {
        match $tokens {
            $($count => by_tokens!(@ $call, $count, $arguments),)*
            tokens => unreachable!("a tile of {tokens} tokens"),
        }
    };
    (@ $call:ident, $count:literal, ($($argument:expr),*)) => { $call::<$count>($($argument),*) };
}
pub(super) use by_tokens;
