//! AVX2 with FMA.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::array;
use std::hint::black_box;

use super::{DEPTH, Kernel, LANES, Line, Sums, activations_read, by_tokens, strides};

/// Twelve sums, two halves of a line, and an activation: 15 of 16 registers.
pub(crate) static KERNEL: Kernel = Kernel {
    groups: 1,
    tile: 6,
    multiply: multiply::<false>,
    multiply_columns: multiply::<true>,
};

pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

fn multiply<const COLUMNS: bool>(panel: &[Line], activations: &[f32], tokens: usize, sums: Sums) {
    assert!(available());
    assert!(panel.len() <= DEPTH);
    assert!(activations.len() >= activations_read(strides(COLUMNS), tokens, panel.len()));
    assert!(sums.kept.len() >= tokens * LANES);
    let mut outs = sums.out.iter();
    assert!(outs.len() == 0 || outs.len() == tokens);
    assert!(outs.all(|y| y.len() >= sums.at + LANES));
    // SAFETY: the instructions are there, and the slices are as long as the tile is.
    unsafe {
        by_tokens!(tokens, multiply_tile[COLUMNS](panel, activations.as_ptr(), sums), 1 2 3 4 5 6)
    }
}

/// # Safety
///
/// `activations` must hold what [`activations_read`] says, `sums.kept` `T * 16` values; `sums.out` must be
/// empty or hold T rows of 16 values from `sums.at` on.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_tile<const T: usize, const COLUMNS: bool>(
    panel: &[Line],
    activations: *const f32,
    sums: Sums,
) {
    let kept = sums.kept.as_mut_ptr();
    let load = |half: usize| {
        if sums.first {
            _mm256_setzero_ps()
        } else {
            // SAFETY: by the caller's promise, here and below.
            unsafe { _mm256_loadu_ps(kept.add(8 * half)) }
        }
    };
    let mut tile: [[__m256; 2]; T] = array::from_fn(|token| [load(2 * token), load(2 * token + 1)]);
    for y in sums.out.iter() {
        // A prefetch reads nothing.
        _mm_prefetch::<_MM_HINT_T0>(y.as_ptr().wrapping_add(sums.at).cast());
    }
    let [by_token, by_summand] = const { strides(COLUMNS) };
    for (summand, line) in panel.iter().enumerate() {
        // SAFETY: see above.
        unsafe {
            let line = line.0.as_ptr();
            let weights = [_mm256_load_ps(line), _mm256_load_ps(line.add(8))];
            for (token, sums) in tile.iter_mut().enumerate() {
                let at = token * by_token + summand * by_summand;
                let x = _mm256_set1_ps(*activations.add(at));
                sums[0] = _mm256_fmadd_ps(weights[0], x, sums[0]);
                sums[1] = _mm256_fmadd_ps(weights[1], x, sums[1]);
            }
        }
    }
    for (token, tile) in tile.into_iter().enumerate() {
        // SAFETY: see above.
        unsafe {
            let at = match sums.out.get_mut(token) {
                Some(y) => y.as_mut_ptr().add(sums.at),
                None => kept.add(token * LANES),
            };
            for (half, mut sum) in tile.into_iter().enumerate() {
                let at = at.add(8 * half);
                if sums.add && !sums.out.is_empty() {
                    sum = _mm256_add_ps(sum, _mm256_loadu_ps(at));
                }
                _mm256_storeu_ps(at, sum);
            }
        }
    }
}

/// Independent multiply-adds, more of them than their latency takes; returns how many operations they were.
pub(super) fn probe(rounds: usize) -> usize {
    const CHAINS: usize = 12;
    #[target_feature(enable = "avx2,fma")]
    fn vectors(rounds: usize) {
        let [w, x] = [0.5, 0.25].map(|value| _mm256_set1_ps(black_box(value)));
        let mut sums = [_mm256_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(w, x, *sum);
            }
        }
        black_box(sums);
    }
    assert!(available());
    // SAFETY: the instructions are there.
    unsafe { vectors(rounds) };
    rounds * CHAINS * LANES
}
