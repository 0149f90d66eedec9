//! AVX2: `vpermps` takes eight levels for eight codes by their low three bits, twice; the fourth bit chooses.
#![allow(unsafe_code)]

mod stream;

use std::arch::x86_64::*;

use super::Path;
use super::unpack::{Decode, Kernel, Runs};
use crate::blockwise::layout::BLOCK;
use crate::panel::{AVX2, Line};

pub(super) static KERNEL: Kernel = Kernel {
    panel: &AVX2,
    columns,
    rows,
    stream: Some(stream::STREAM),
};

/// Half a line.
const HALF: usize = 8;

/// Sixteen levels in two registers.
#[derive(Clone, Copy)]
struct Levels(__m256, __m256);

impl Levels {
    #[target_feature(enable = "avx2,fma")]
    fn new(levels: &[f32; 16]) -> Self {
        // SAFETY: an array of 16.
        unsafe {
            Self(
                _mm256_loadu_ps(levels.as_ptr()),
                _mm256_loadu_ps(levels.as_ptr().add(HALF)),
            )
        }
    }

    /// The levels of codes in the low bits of lanes; what stands above them is ignored.
    #[target_feature(enable = "avx2,fma")]
    fn of(self, codes: __m256i) -> __m256 {
        let below = _mm256_permutevar8x32_ps(self.0, codes);
        let above = _mm256_permutevar8x32_ps(self.1, codes);
        let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
        _mm256_blendv_ps(below, above, fourth)
    }
}

fn columns(words: &[u32], decode: Decode, runs: Runs, panel: &mut [Line], stride: usize) {
    assert!(Path::Avx2.available());
    let words = words.as_chunks::<BLOCK>().0;
    let per_word = match decode {
        Decode::Bytes => 4,
        Decode::Levels(_) | Decode::Shifted(_) => 8,
    };
    let Some(last) = (words.len() * per_word).checked_sub(1) else {
        return;
    };
    assert!(panel.len() > last * stride);
    assert!(runs.run.is_power_of_two() && runs.scales.len() > last / runs.run);
    assert!(runs.zeros.len() > last / runs.run);
    // SAFETY: the instructions are there, and the last line that is touched of each slice is within it.
    unsafe {
        match decode {
            Decode::Levels(levels) => nibble_columns::<false>(words, levels, runs, panel, stride),
            Decode::Shifted(levels) => nibble_columns::<true>(words, levels, runs, panel, stride),
            Decode::Bytes => byte_columns(words, runs, panel, stride),
        }
    }
}

/// # Safety
///
/// `panel` must hold a line at `(8 * words.len() - 1) * stride`, and `runs` one for each run of as many columns.
#[target_feature(enable = "avx2,fma")]
unsafe fn nibble_columns<const SHIFTED: bool>(
    words: &[[u32; BLOCK]],
    levels: &[f32; 16],
    runs: Runs,
    panel: &mut [Line],
    stride: usize,
) {
    let levels = Levels::new(levels);
    let shift = runs.run.trailing_zeros();
    for (i, word) in words.iter().enumerate() {
        for half in [0, HALF] {
            // SAFETY: by the caller's promise, here and below.
            let mut codes = unsafe { _mm256_loadu_si256(word.as_ptr().add(half).cast()) };
            for col in 8 * i..8 * i + 8 {
                let mut weight = levels.of(codes);
                codes = _mm256_srli_epi32::<4>(codes);
                // SAFETY: see above.
                unsafe {
                    let run = col >> shift;
                    if SHIFTED {
                        let zero = runs.zeros.get_unchecked(run).0.as_ptr().add(half);
                        weight = _mm256_sub_ps(weight, _mm256_load_ps(zero));
                    }
                    let scale = runs.scales.get_unchecked(run).0.as_ptr().add(half);
                    let line = panel.get_unchecked_mut(col * stride).0.as_mut_ptr();
                    let weight = _mm256_mul_ps(weight, _mm256_load_ps(scale));
                    _mm256_store_ps(line.add(half), weight);
                }
            }
        }
    }
}

/// # Safety
///
/// `panel` must hold a line at `(4 * words.len() - 1) * stride`, and `runs` one for each run of as many columns.
#[target_feature(enable = "avx2,fma")]
unsafe fn byte_columns(words: &[[u32; BLOCK]], runs: Runs, panel: &mut [Line], stride: usize) {
    let shift = runs.run.trailing_zeros();
    for (i, word) in words.iter().enumerate() {
        for half in [0, HALF] {
            // SAFETY: by the caller's promise, here and below.
            let word = unsafe { _mm256_loadu_si256(word.as_ptr().add(half).cast()) };
            let columns = [
                _mm256_slli_epi32::<24>(word),
                _mm256_slli_epi32::<16>(word),
                _mm256_slli_epi32::<8>(word),
                word,
            ];
            for (col, high) in (4 * i..).zip(columns) {
                let weight = _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(high));
                // SAFETY: see above.
                unsafe {
                    let scale = runs.scales.get_unchecked(col >> shift).0.as_ptr().add(half);
                    let line = panel.get_unchecked_mut(col * stride).0.as_mut_ptr();
                    let weight = _mm256_mul_ps(weight, _mm256_load_ps(scale));
                    _mm256_store_ps(line.add(half), weight);
                }
            }
        }
    }
}

fn rows(
    words: &[u32],
    decode: Decode,
    scale: &Line,
    zero: &Line,
    panel: &mut [Line],
    stride: usize,
) {
    assert!(Path::Avx2.available());
    let wide = matches!(decode, Decode::Bytes);
    assert!(words.len() >= if wide { 4 * BLOCK } else { 2 * BLOCK });
    assert!(panel.len() > (BLOCK - 1) * stride);
    let (words, panel) = (words.as_ptr(), panel.as_mut_ptr());
    // SAFETY: the instructions are there, and the slices hold 16 rows.
    unsafe {
        match decode {
            Decode::Levels(levels) => {
                nibble_rows::<false>(words, levels, scale, zero, panel, stride);
            }
            Decode::Shifted(levels) => {
                nibble_rows::<true>(words, levels, scale, zero, panel, stride);
            }
            Decode::Bytes => byte_rows(words, scale, panel, stride),
        }
    }
}

/// # Safety
///
/// `words` must hold 32 words, `panel` a line at `15 * stride`.
#[target_feature(enable = "avx2,fma")]
unsafe fn nibble_rows<const SHIFTED: bool>(
    words: *const u32,
    levels: &[f32; 16],
    scale: &Line,
    zero: &Line,
    panel: *mut Line,
    stride: usize,
) {
    let levels = Levels::new(levels);
    let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    for row in 0..BLOCK {
        for half in 0..2 {
            // SAFETY: by the caller's promise.
            unsafe {
                let word = _mm256_set1_epi32(*words.add(half * BLOCK + row) as i32);
                let mut weight = levels.of(_mm256_srlv_epi32(word, shifts));
                if SHIFTED {
                    weight = _mm256_sub_ps(weight, _mm256_set1_ps(zero.0[row]));
                }
                let weight = _mm256_mul_ps(weight, _mm256_set1_ps(scale.0[row]));
                let line = panel.add(row * stride).cast::<f32>();
                _mm256_store_ps(line.add(half * HALF), weight);
            }
        }
    }
}

/// # Safety
///
/// `words` must hold 64 words, `panel` a line at `15 * stride`.
#[target_feature(enable = "avx2,fma")]
unsafe fn byte_rows(words: *const u32, scale: &Line, panel: *mut Line, stride: usize) {
    for row in 0..BLOCK {
        for half in 0..2 {
            // SAFETY: by the caller's promise.
            unsafe {
                let word = |i: usize| *words.add((2 * half + i) * BLOCK + row) as i32;
                let bytes = _mm_setr_epi32(word(0), word(1), 0, 0);
                let weight = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
                let weight = _mm256_mul_ps(weight, _mm256_set1_ps(scale.0[row]));
                let line = panel.add(row * stride).cast::<f32>();
                _mm256_store_ps(line.add(half * HALF), weight);
            }
        }
    }
}
