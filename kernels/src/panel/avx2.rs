//! AVX2 with FMA.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::array;
use std::hint::black_box;

use super::{DEPTH, Kernel, LANES, Line, by_tokens};

/// Twelve sums, two halves of a line, and an activation: 15 of 16 registers.
pub(crate) static KERNEL: Kernel = Kernel {
    groups: 1,
    tile: 6,
    multiply,
};

pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

fn multiply(panel: &[Line], activations: &[f32], tokens: usize, sums: &mut [f32]) {
    assert!(available());
    let summands = panel.len();
    assert!(summands <= DEPTH && activations.len() >= tokens * DEPTH);
    assert!(sums.len() >= tokens * LANES);
    let (panel, activations, sums) = (panel.as_ptr(), activations.as_ptr(), sums.as_mut_ptr());
    // SAFETY: the instructions are there, and the slices are as long as the tile is.
    unsafe { by_tokens!(tokens, multiply_tile(panel, activations, summands, sums), 1 2 3 4 5 6) }
}

/// # Safety
///
/// `panel` must hold `summands` lines, at most [`DEPTH`], `activations` `T * DEPTH` values, `sums` `T * 16`.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_tile<const T: usize>(
    panel: *const Line,
    activations: *const f32,
    summands: usize,
    sums: *mut f32,
) {
    // SAFETY: by the caller's promise, here and below.
    let load = |half: usize| unsafe { _mm256_loadu_ps(sums.add(8 * half)) };
    let mut tile: [[__m256; 2]; T] = array::from_fn(|token| [load(2 * token), load(2 * token + 1)]);
    for summand in 0..summands {
        // SAFETY: see above.
        unsafe {
            let line = panel.add(summand).cast::<f32>();
            let weights = [_mm256_load_ps(line), _mm256_load_ps(line.add(8))];
            for (token, sums) in tile.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*activations.add(token * DEPTH + summand));
                sums[0] = _mm256_fmadd_ps(weights[0], x, sums[0]);
                sums[1] = _mm256_fmadd_ps(weights[1], x, sums[1]);
            }
        }
    }
    for (token, tile) in tile.into_iter().enumerate() {
        // SAFETY: see above.
        unsafe {
            let at = sums.add(token * LANES);
            _mm256_storeu_ps(at, tile[0]);
            _mm256_storeu_ps(at.add(8), tile[1]);
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
