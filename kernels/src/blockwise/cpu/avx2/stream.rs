//! Few tokens: codes become numbers as they are read, times x, and a block's sums times its scale.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{HALF, Levels};
use crate::blockwise::cpu::Path;
use crate::blockwise::cpu::unpack::{Decode, Group, Stream};
use crate::blockwise::layout::BLOCK;
use crate::panel::{LANES, by_tokens};

pub(super) const STREAM: Stream = Stream {
    tokens: 2,
    places: |_| 1,
    multiply,
};

/// How far ahead of its use a word is asked for, in bytes.
const AHEAD: usize = 2048;

/// Sums of a token that are added to in turn, so that they do not wait for each other.
const CHAINS: usize = 2;

fn multiply(groups: &[Group], decode: Decode, x: &[f32], tokens: usize, sums: &mut [[f32; LANES]]) {
    assert!(Path::Avx2.available());
    let [group] = groups else {
        unreachable!("{} groups", groups.len());
    };
    let cols = x.len() / tokens;
    assert!(x.len() == tokens * cols && sums.len() == tokens);
    let wide = matches!(decode, Decode::Bytes);
    let shifted = matches!(decode, Decode::Shifted(_));
    group.check(cols, shifted, if wide { 4 } else { 8 });
    // SAFETY: the instructions are there, the group has been checked, and x and the sums are as long as they should.
    unsafe { by_tokens!(tokens, tile(group, decode, x, sums), 1 2) }
}

/// # Safety
///
/// The group must be of as many columns as a token of x, as [`Group::check`] checks; `x` must hold T tokens, `sums` T
/// lines.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const T: usize>(
    group: &Group,
    decode: Decode,
    x: &[f32],
    sums: &mut [[f32; LANES]],
) {
    let cols = x.len() / T;
    let per_word = if matches!(decode, Decode::Bytes) {
        4
    } else {
        8
    };
    let mut totals = [[_mm256_setzero_ps(); 2]; T];
    let blocks = group.words.chunks_exact(group.block / per_word * BLOCK);
    for (index, words) in blocks.enumerate() {
        let x = x.as_ptr().wrapping_add(index * group.block);
        let scales = group.scales_of(index);
        let zeros = group.zeros_of(index);
        for half in 0..2 {
            // SAFETY: by the caller's promise, and of arrays of 16.
            unsafe {
                let zero = _mm256_loadu_ps(zeros.as_ptr().add(half * HALF));
                let words = words.as_ptr().add(half * HALF);
                let count = group.block / per_word;
                let tile: [__m256; T] = match decode {
                    Decode::Levels(levels) => {
                        nibbles::<T, false>(words, count, levels, zero, x, cols)
                    }
                    Decode::Shifted(levels) => {
                        nibbles::<T, true>(words, count, levels, zero, x, cols)
                    }
                    Decode::Bytes => bytes::<T>(words, count, x, cols),
                };
                let scale = _mm256_loadu_ps(scales.as_ptr().add(half * HALF));
                for (totals, sum) in totals.iter_mut().zip(tile) {
                    totals[half] = _mm256_fmadd_ps(sum, scale, totals[half]);
                }
            }
        }
    }
    for (sums, totals) in sums.iter_mut().zip(totals) {
        for (half, total) in totals.into_iter().enumerate() {
            // SAFETY: an array of 16.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(half * HALF), total) };
        }
    }
}

/// Sums of half the rows of a block of columns, before their scale.
///
/// # Safety
///
/// `words` must hold eight words at each of `count` places, 16 words apart; `x` T tokens, `cols` apart, of eight columns
/// for each word.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn nibbles<const T: usize, const SHIFTED: bool>(
    words: *const u32,
    count: usize,
    levels: &[f32; 16],
    zero: __m256,
    x: *const f32,
    cols: usize,
) -> [__m256; T] {
    let levels = Levels::new(levels);
    let mut sums = [[_mm256_setzero_ps(); CHAINS]; T];
    for i in 0..count {
        // SAFETY: by the caller's promise, here and below; the prefetch reads nothing.
        let mut codes = unsafe {
            let words = words.add(i * BLOCK);
            _mm_prefetch::<_MM_HINT_T0>(words.wrapping_byte_add(AHEAD).cast());
            _mm256_loadu_si256(words.cast())
        };
        for col in 0..8 {
            let mut weight = levels.of(codes);
            if SHIFTED {
                weight = _mm256_sub_ps(weight, zero);
            }
            codes = _mm256_srli_epi32::<4>(codes);
            for (token, sums) in sums.iter_mut().enumerate() {
                // SAFETY: see above.
                let x = unsafe { _mm256_set1_ps(*x.add(token * cols + 8 * i + col)) };
                sums[col % CHAINS] = _mm256_fmadd_ps(weight, x, sums[col % CHAINS]);
            }
        }
    }
    sums.map(|[even, odd]| _mm256_add_ps(even, odd))
}

/// # Safety
///
/// As [`nibbles`], with four columns for each word.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn bytes<const T: usize>(
    words: *const u32,
    count: usize,
    x: *const f32,
    cols: usize,
) -> [__m256; T] {
    let mut sums = [[_mm256_setzero_ps(); CHAINS]; T];
    for i in 0..count {
        // SAFETY: by the caller's promise, here and below; the prefetch reads nothing.
        let word = unsafe {
            let words = words.add(i * BLOCK);
            _mm_prefetch::<_MM_HINT_T0>(words.wrapping_byte_add(AHEAD).cast());
            _mm256_loadu_si256(words.cast())
        };
        let columns = [
            _mm256_slli_epi32::<24>(word),
            _mm256_slli_epi32::<16>(word),
            _mm256_slli_epi32::<8>(word),
            word,
        ];
        for (col, high) in columns.into_iter().enumerate() {
            let weight = _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(high));
            for (token, sums) in sums.iter_mut().enumerate() {
                // SAFETY: see above.
                let x = unsafe { _mm256_set1_ps(*x.add(token * cols + 4 * i + col)) };
                sums[col % CHAINS] = _mm256_fmadd_ps(weight, x, sums[col % CHAINS]);
            }
        }
    }
    sums.map(|[even, odd]| _mm256_add_ps(even, odd))
}
