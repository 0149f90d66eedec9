//! AVX-512.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::array;
use std::hint::black_box;
use std::sync::LazyLock;

use super::{DEPTH, Kernel, LANES, Line, Sums, activations_read, by_tokens, strides};

/// Groups of 16 outputs of a panel.
const GROUPS: usize = 2;

/// Two groups and 14 tokens are 28 sums; two lines of weights and one activation fill up the 32 registers.
pub(crate) static KERNEL: Kernel = Kernel {
    groups: GROUPS,
    tile: 14,
    multiply: multiply::<false>,
    multiply_columns: multiply::<true>,
};

pub(super) fn available() -> bool {
    // Asked for once a tile.
    static AVAILABLE: LazyLock<bool> =
        LazyLock::new(|| is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("popcnt"));
    *AVAILABLE
}

fn multiply<const COLUMNS: bool>(panel: &[Line], activations: &[f32], tokens: usize, sums: Sums) {
    assert!(available());
    let panel = panel.as_chunks::<GROUPS>().0;
    assert!(panel.len() <= DEPTH);
    assert!(activations.len() >= activations_read(strides(COLUMNS), tokens, panel.len()));
    assert!(sums.kept.len() >= tokens * GROUPS * LANES);
    let mut outs = sums.out.iter();
    assert!(outs.len() == 0 || outs.len() == tokens);
    assert!(outs.all(|y| y.len() >= sums.at + GROUPS * LANES));
    // SAFETY: the instructions are there, and the slices are as long as the tile is.
    unsafe {
        by_tokens!(
            tokens,
            multiply_tile[COLUMNS](panel, activations.as_ptr(), sums),
            1 2 3 4 5 6 7 8 9 10 11 12 13 14
        )
    }
}

/// # Safety
///
/// `activations` must hold what [`activations_read`] says, `sums.kept` `T * GROUPS * 16` values; `sums.out` must be
/// empty or hold T rows of `GROUPS * 16` values from `sums.at` on.
#[target_feature(enable = "avx512f")]
unsafe fn multiply_tile<const T: usize, const COLUMNS: bool>(
    panel: &[[Line; GROUPS]],
    activations: *const f32,
    sums: Sums,
) {
    let kept = sums.kept.as_mut_ptr();
    let load = |token: usize, group: usize| {
        if sums.first {
            _mm512_setzero_ps()
        } else {
            // SAFETY: by the caller's promise, here and below.
            unsafe { _mm512_loadu_ps(kept.add((token * GROUPS + group) * LANES)) }
        }
    };
    // Element by element: passed through memory, they cost as much as some twenty summands.
    let mut tile: [[__m512; GROUPS]; T] = array::from_fn(|token| [load(token, 0), load(token, 1)]);
    for y in sums.out.iter() {
        // What is to be written is there when it is: a prefetch reads nothing.
        let at = y.as_ptr().wrapping_add(sums.at);
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(LANES).cast());
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(2 * LANES - 1).cast());
    }
    let [by_token, by_summand] = const { strides(COLUMNS) };
    for (summand, lines) in panel.iter().enumerate() {
        // SAFETY: see above.
        unsafe {
            let weights = [
                _mm512_load_ps(lines[0].0.as_ptr()),
                _mm512_load_ps(lines[1].0.as_ptr()),
            ];
            for (token, sums) in tile.iter_mut().enumerate() {
                let at = token * by_token + summand * by_summand;
                let x = _mm512_set1_ps(*activations.add(at));
                sums[0] = _mm512_fmadd_ps(weights[0], x, sums[0]);
                sums[1] = _mm512_fmadd_ps(weights[1], x, sums[1]);
            }
        }
    }
    if sums.out.is_empty() {
        for (token, tile) in tile.into_iter().enumerate() {
            // SAFETY: see above.
            unsafe {
                let at = kept.add(token * GROUPS * LANES);
                _mm512_storeu_ps(at, tile[0]);
                _mm512_storeu_ps(at.add(LANES), tile[1]);
            }
        }
        return;
    }
    for (token, mut tile) in tile.into_iter().enumerate() {
        // SAFETY: see above.
        unsafe {
            let at = sums.out.get_unchecked_mut(token).as_mut_ptr().add(sums.at);
            if sums.add {
                tile[0] = _mm512_add_ps(tile[0], _mm512_loadu_ps(at));
                tile[1] = _mm512_add_ps(tile[1], _mm512_loadu_ps(at.add(LANES)));
            }
            _mm512_storeu_ps(at, tile[0]);
            _mm512_storeu_ps(at.add(LANES), tile[1]);
        }
    }
}

/// Independent multiply-adds, more of them than their latency takes; returns how many operations they were.
pub(super) fn probe(rounds: usize) -> usize {
    const CHAINS: usize = 12;
    #[target_feature(enable = "avx512f")]
    fn vectors(rounds: usize) {
        let [w, x] = [0.5, 0.25].map(|value| _mm512_set1_ps(black_box(value)));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(w, x, *sum);
            }
        }
        black_box(sums);
    }
    assert!(available());
    // SAFETY: the instructions are there.
    unsafe { vectors(rounds) };
    rounds * CHAINS * 2 * LANES
}
