//! AVX-512: `vpermps` takes sixteen levels for sixteen codes, and looks at the low four bits of each alone.
#![allow(unsafe_code)]

mod stream;

use std::arch::x86_64::*;

use super::Path;
use super::unpack::{Decode, Kernel, Runs};
use crate::blockwise::layout::BLOCK;
use crate::panel::{AVX512, Line};

pub(super) static KERNEL: Kernel = Kernel {
    panel: &AVX512,
    columns,
    rows,
    stream: Some(stream::STREAM),
};

fn columns(words: &[u32], decode: Decode, runs: Runs, panel: &mut [Line], stride: usize) {
    assert!(Path::Avx512.available());
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
#[target_feature(enable = "avx512f")]
unsafe fn nibble_columns<const SHIFTED: bool>(
    words: &[[u32; BLOCK]],
    levels: &[f32; 16],
    runs: Runs,
    panel: &mut [Line],
    stride: usize,
) {
    // SAFETY: by the caller's promise, here and below.
    let levels = unsafe { _mm512_loadu_ps(levels.as_ptr()) };
    let shift = runs.run.trailing_zeros();
    let (scales, zeros) = (runs.scales.as_ptr(), runs.zeros.as_ptr());
    let panel = panel.as_mut_ptr();
    for (i, word) in words.iter().enumerate() {
        // SAFETY: see above.
        let word = unsafe { _mm512_loadu_si512(word.as_ptr().cast()) };
        let line = |col: usize, codes: __m512i| {
            let mut weight = _mm512_permutexvar_ps(codes, levels);
            // SAFETY: see above.
            unsafe {
                if SHIFTED {
                    let zero = _mm512_load_ps(zeros.add(col >> shift).cast());
                    weight = _mm512_sub_ps(weight, zero);
                }
                let scale = _mm512_load_ps(scales.add(col >> shift).cast());
                let line = panel.add(col * stride).cast();
                _mm512_store_ps(line, _mm512_mul_ps(weight, scale));
            }
        };
        line(8 * i, word);
        line(8 * i + 1, _mm512_srli_epi32::<4>(word));
        line(8 * i + 2, _mm512_srli_epi32::<8>(word));
        line(8 * i + 3, _mm512_srli_epi32::<12>(word));
        line(8 * i + 4, _mm512_srli_epi32::<16>(word));
        line(8 * i + 5, _mm512_srli_epi32::<20>(word));
        line(8 * i + 6, _mm512_srli_epi32::<24>(word));
        line(8 * i + 7, _mm512_srli_epi32::<28>(word));
    }
}

/// # Safety
///
/// `panel` must hold a line at `(4 * words.len() - 1) * stride`, and `runs` one for each run of as many columns.
#[target_feature(enable = "avx512f")]
unsafe fn byte_columns(words: &[[u32; BLOCK]], runs: Runs, panel: &mut [Line], stride: usize) {
    let shift = runs.run.trailing_zeros();
    let (scales, panel) = (runs.scales.as_ptr(), panel.as_mut_ptr());
    for (i, word) in words.iter().enumerate() {
        // SAFETY: by the caller's promise, here and below.
        let word = unsafe { _mm512_loadu_si512(word.as_ptr().cast()) };
        let line = |col: usize, high: __m512i| {
            let weight = _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(high));
            // SAFETY: see above.
            unsafe {
                let scale = _mm512_load_ps(scales.add(col >> shift).cast());
                let line = panel.add(col * stride).cast();
                _mm512_store_ps(line, _mm512_mul_ps(weight, scale));
            }
        };
        line(4 * i, _mm512_slli_epi32::<24>(word));
        line(4 * i + 1, _mm512_slli_epi32::<16>(word));
        line(4 * i + 2, _mm512_slli_epi32::<8>(word));
        line(4 * i + 3, word);
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
    assert!(Path::Avx512.available());
    let wide = matches!(decode, Decode::Bytes);
    assert!(words.len() >= if wide { 4 * BLOCK } else { 2 * BLOCK });
    assert!(panel.len() > (BLOCK - 1) * stride);
    // SAFETY: the instructions are there, and the slices hold 16 rows.
    unsafe {
        match decode {
            Decode::Levels(levels) => {
                nibble_rows::<false>(
                    words.as_ptr(),
                    levels,
                    scale,
                    zero,
                    panel.as_mut_ptr(),
                    stride,
                );
            }
            Decode::Shifted(levels) => {
                nibble_rows::<true>(
                    words.as_ptr(),
                    levels,
                    scale,
                    zero,
                    panel.as_mut_ptr(),
                    stride,
                );
            }
            Decode::Bytes => byte_rows(words.as_ptr(), scale, panel.as_mut_ptr(), stride),
        }
    }
}

/// # Safety
///
/// `words` must hold 32 words, `panel` a line at `15 * stride`.
#[target_feature(enable = "avx512f")]
unsafe fn nibble_rows<const SHIFTED: bool>(
    words: *const u32,
    levels: &[f32; 16],
    scale: &Line,
    zero: &Line,
    panel: *mut Line,
    stride: usize,
) {
    // SAFETY: an array of 16.
    let levels = unsafe { _mm512_loadu_ps(levels.as_ptr()) };
    let shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    for row in 0..BLOCK {
        // SAFETY: by the caller's promise.
        unsafe {
            let low = _mm512_set1_epi32(*words.add(row) as i32);
            let high = *words.add(BLOCK + row) as i32;
            let word = _mm512_mask_set1_epi32(low, 0xFF00, high);
            let codes = _mm512_srlv_epi32(word, shifts);
            let mut weight = _mm512_permutexvar_ps(codes, levels);
            if SHIFTED {
                weight = _mm512_sub_ps(weight, _mm512_set1_ps(zero.0[row]));
            }
            let weight = _mm512_mul_ps(weight, _mm512_set1_ps(scale.0[row]));
            _mm512_store_ps(panel.add(row * stride).cast(), weight);
        }
    }
}

/// # Safety
///
/// `words` must hold 64 words, `panel` a line at `15 * stride`.
#[target_feature(enable = "avx512f")]
unsafe fn byte_rows(words: *const u32, scale: &Line, panel: *mut Line, stride: usize) {
    for row in 0..BLOCK {
        // SAFETY: by the caller's promise.
        unsafe {
            let word = |i: usize| *words.add(i * BLOCK + row) as i32;
            let bytes = _mm_setr_epi32(word(0), word(1), word(2), word(3));
            let weight = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
            let weight = _mm512_mul_ps(weight, _mm512_set1_ps(scale.0[row]));
            _mm512_store_ps(panel.add(row * stride).cast(), weight);
        }
    }
}
