//! Few tokens: codes become numbers as they are read, times x, and a block's sums times its scale.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::array;

use crate::blockwise::SCALE_BLOCK;
use crate::blockwise::cpu::Path;
use crate::blockwise::cpu::unpack::{Decode, Group, GroupScales, Stream};
use crate::blockwise::layout::BLOCK;
use crate::blockwise::tables::DYNAMIC_MAP;
use crate::panel::LANES;

pub(super) const STREAM: Stream = Stream {
    tokens: 4,
    places: |tokens| match tokens {
        1 => 4,
        2 => 2,
        _ => 1,
    },
    multiply,
};

/// How far ahead of its use a word is asked for, in bytes.
const AHEAD: usize = 2048;

fn multiply(groups: &[Group], decode: Decode, x: &[f32], tokens: usize, sums: &mut [[f32; LANES]]) {
    assert!(Path::Avx512.available());
    let cols = x.len() / tokens;
    assert!(x.len() == tokens * cols && sums.len() == tokens * groups.len());
    let shifted = matches!(decode, Decode::Shifted(_));
    let wide = matches!(decode, Decode::Bytes);
    for group in groups {
        group.check(cols, shifted, if wide { 4 } else { 8 });
    }
    let (x, sums) = (x.as_ptr(), sums.as_mut_ptr());
    // SAFETY: the instructions are there, the groups have been checked, and x and the sums are as long as they should.
    unsafe {
        // The order of a token's sums does not depend on how many groups there are.
        match (tokens, groups) {
            (1, [a, b, c, d]) => tile::<1, 4, 1>([a, b, c, d], decode, x, cols, sums),
            (2, [a, b]) => tile::<2, 2, 1>([a, b], decode, x, cols, sums),
            (1, [group]) => tile::<1, 1, 1>([group], decode, x, cols, sums),
            (2, [group]) => tile::<2, 1, 1>([group], decode, x, cols, sums),
            (3, [group]) => tile::<3, 1, 2>([group], decode, x, cols, sums),
            (4, [group]) => tile::<4, 1, 2>([group], decode, x, cols, sums),
            (tokens, groups) => unreachable!("{tokens} tokens, {} groups", groups.len()),
        }
    }
}

/// T tokens, G row groups, and C sums of each that are added to in turn.
///
/// # Safety
///
/// The groups must be of `cols` columns, as [`Group::check`] checks; `x` must hold T rows of them, `sums` `G * T` lines.
#[target_feature(enable = "avx512f")]
unsafe fn tile<const T: usize, const G: usize, const C: usize>(
    groups: [&Group; G],
    decode: Decode,
    x: *const f32,
    cols: usize,
    sums: *mut [f32; LANES],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        match decode {
            Decode::Levels(levels) => nibbles::<T, G, C, false>(groups, levels, x, cols, sums),
            Decode::Shifted(levels) => nibbles::<T, G, C, true>(groups, levels, x, cols, sums),
            Decode::Bytes => bytes::<T, G, C>(groups, x, cols, sums),
        }
    }
}

/// The scales of a group's blocks, one after the other.
struct Blocks<'a> {
    group: &'a Group<'a>,
    next: usize,
    /// In double quantisation, which 256 blocks each row is in, and their scales.
    blocks: __m512i,
    scales: __m512,
}

impl<'a> Blocks<'a> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(group: &'a Group<'a>) -> Self {
        Self {
            group,
            next: 0,
            blocks: _mm512_set1_epi32(-1),
            scales: _mm512_setzero_ps(),
        }
    }

    /// The zero points of the next blocks.
    ///
    /// # Safety
    ///
    /// The group must have zero points, and blocks left.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn zeros(&self) -> __m512 {
        // SAFETY: by the caller's promise.
        let [low, high] = unsafe {
            let words = self.group.zeros.as_ptr().add(2 * self.next);
            [*words as i32, *words.add(1) as i32]
        };
        let shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        let words = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xFF00, high);
        let codes = _mm512_and_si512(_mm512_srlv_epi32(words, shifts), _mm512_set1_epi32(15));
        _mm512_cvtepi32_ps(codes)
    }

    /// The scales of the next blocks.
    ///
    /// # Safety
    ///
    /// The group must have passed [`Group::check`], and have blocks left.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scales(&mut self) -> __m512 {
        let next = self.next;
        self.next += 1;
        match &self.group.scales {
            // SAFETY: by the caller's promise, here and below.
            GroupScales::Single(lines) => unsafe {
                _mm512_loadu_ps(lines.get_unchecked(next).as_ptr())
            },
            GroupScales::Double {
                codes,
                scales,
                mean,
                first,
            } => unsafe {
                let block = _mm512_set1_epi32(next as i32);
                let block = _mm512_add_epi32(_mm512_loadu_si512(first.as_ptr().cast()), block);
                let blocks = _mm512_srli_epi32::<{ SCALE_BLOCK.ilog2() }>(block);
                if _mm512_cmpneq_epi32_mask(blocks, self.blocks) != 0 {
                    self.blocks = blocks;
                    self.scales = _mm512_i32gather_ps::<4>(blocks, scales.as_ptr());
                }
                let codes = _mm_loadu_si128(codes.get_unchecked(next).as_ptr().cast());
                let codes = _mm512_cvtepu8_epi32(codes);
                // A map has levels for all values of a byte.
                let levels = _mm512_i32gather_ps::<4>(codes, DYNAMIC_MAP.as_ptr());
                // Rounded twice, as everywhere.
                _mm512_add_ps(_mm512_mul_ps(levels, self.scales), _mm512_set1_ps(*mean))
            },
        }
    }
}

/// Sums of a block of columns.
type Tile<const T: usize, const G: usize, const C: usize> = [[[__m512; C]; T]; G];

/// Adds the products of a column of every group.
///
/// # Safety
///
/// `x` must hold T values, a `stride` apart.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_column<const T: usize, const G: usize, const C: usize>(
    weights: [__m512; G],
    x: *const f32,
    stride: usize,
    tile: &mut Tile<T, G, C>,
    chain: usize,
) {
    for token in 0..T {
        // SAFETY: by the caller's promise.
        let x = unsafe { _mm512_set1_ps(*x.add(token * stride)) };
        for (sums, weight) in tile.iter_mut().zip(weights) {
            let sum = &mut sums[token][chain];
            *sum = _mm512_fmadd_ps(weight, x, *sum);
        }
    }
}

/// Adds the sums of blocks, times their scales, to the totals.
///
/// # Safety
///
/// The groups must have passed [`Group::check`], and have blocks left.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_blocks<const T: usize, const G: usize, const C: usize>(
    tile: Tile<T, G, C>,
    blocks: &mut [Blocks; G],
    totals: &mut [[__m512; T]; G],
) {
    for ((sums, blocks), totals) in tile.into_iter().zip(blocks).zip(totals) {
        // SAFETY: by the caller's promise.
        let scale = unsafe { blocks.scales() };
        for (total, chains) in totals.iter_mut().zip(sums) {
            let sum = chains.into_iter().reduce(|a, b| _mm512_add_ps(a, b));
            *total = _mm512_fmadd_ps(sum.unwrap_or(_mm512_setzero_ps()), scale, *total);
        }
    }
}

/// # Safety
///
/// As [`tile`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn nibbles<const T: usize, const G: usize, const C: usize, const SHIFTED: bool>(
    groups: [&Group; G],
    levels: &[f32; 16],
    mut x: *const f32,
    cols: usize,
    sums: *mut [f32; LANES],
) {
    // SAFETY: by the caller's promise, here and below.
    let levels = unsafe { _mm512_loadu_ps(levels.as_ptr()) };
    let mut blocks = groups.map(|group| Blocks::new(group));
    let mut totals = [[_mm512_setzero_ps(); T]; G];
    let mut words = groups.map(|group| group.words.as_ptr());
    let block = groups[0].block;
    let mut left = cols / 8;
    for _ in 0..cols / block {
        let mut tile = [[[_mm512_setzero_ps(); C]; T]; G];
        let mut zeros = [_mm512_setzero_ps(); G];
        if SHIFTED {
            // SAFETY: see above.
            zeros = array::from_fn(|g| unsafe { blocks[g].zeros() });
        }
        for _ in 0..block / 8 {
            left -= 1;
            for byte in 0..4 {
                let mut codes: [__m512i; G] = array::from_fn(|g| {
                    // A load does for nothing what a shift by a byte does, but at the end, where it would go beyond.
                    // SAFETY: see above. A prefetch reads nothing.
                    unsafe {
                        if left > 0 {
                            let words = words[g].byte_add(byte).cast::<__m512i>();
                            if byte == 0 {
                                _mm_prefetch::<_MM_HINT_T0>(words.wrapping_byte_add(AHEAD).cast());
                            }
                            _mm512_loadu_si512(words)
                        } else {
                            let shift = _mm_cvtsi32_si128(8 * byte as i32);
                            _mm512_srl_epi32(_mm512_loadu_si512(words[g].cast()), shift)
                        }
                    }
                });
                for half in 0..2 {
                    let weights = array::from_fn(|g| {
                        let weight = _mm512_permutexvar_ps(codes[g], levels);
                        if SHIFTED {
                            _mm512_sub_ps(weight, zeros[g])
                        } else {
                            weight
                        }
                    });
                    // SAFETY: see above.
                    unsafe {
                        let x = x.add(2 * byte + half);
                        add_column(weights, x, cols, &mut tile, (2 * byte + half) % C);
                    }
                    codes = codes.map(|codes| _mm512_srli_epi32::<4>(codes));
                }
            }
            // SAFETY: see above.
            unsafe {
                words = words.map(|words| words.add(BLOCK));
                x = x.add(8);
            }
        }
        // SAFETY: see above.
        unsafe { add_blocks(tile, &mut blocks, &mut totals) };
    }
    // SAFETY: see above.
    unsafe { store(totals, sums) };
}

/// # Safety
///
/// As [`tile`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn bytes<const T: usize, const G: usize, const C: usize>(
    groups: [&Group; G],
    mut x: *const f32,
    cols: usize,
    sums: *mut [f32; LANES],
) {
    let mut blocks = groups.map(|group| Blocks::new(group));
    let mut totals = [[_mm512_setzero_ps(); T]; G];
    let mut words = groups.map(|group| group.words.as_ptr());
    let block = groups[0].block;
    for _ in 0..cols / block {
        let mut tile = [[[_mm512_setzero_ps(); C]; T]; G];
        for _ in 0..block / 4 {
            // SAFETY: by the caller's promise, here and below. A prefetch reads nothing.
            let codes: [__m512i; G] = array::from_fn(|g| unsafe {
                _mm_prefetch::<_MM_HINT_T0>(words[g].wrapping_byte_add(AHEAD).cast());
                _mm512_loadu_si512(words[g].cast())
            });
            let columns = [
                codes.map(|codes| _mm512_slli_epi32::<24>(codes)),
                codes.map(|codes| _mm512_slli_epi32::<16>(codes)),
                codes.map(|codes| _mm512_slli_epi32::<8>(codes)),
                codes,
            ];
            for (i, high) in columns.into_iter().enumerate() {
                let weights = high.map(|high| _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(high)));
                // SAFETY: see above.
                unsafe { add_column(weights, x.add(i), cols, &mut tile, i % C) };
            }
            // SAFETY: see above.
            unsafe {
                words = words.map(|words| words.add(BLOCK));
                x = x.add(4);
            }
        }
        // SAFETY: see above.
        unsafe { add_blocks(tile, &mut blocks, &mut totals) };
    }
    // SAFETY: see above.
    unsafe { store(totals, sums) };
}

/// # Safety
///
/// `sums` must hold `G * T` lines.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const T: usize, const G: usize>(totals: [[__m512; T]; G], sums: *mut [f32; LANES]) {
    for (i, total) in totals.into_iter().flatten().enumerate() {
        // SAFETY: by the caller's promise.
        unsafe { _mm512_storeu_ps(sums.add(i).cast(), total) };
    }
}
