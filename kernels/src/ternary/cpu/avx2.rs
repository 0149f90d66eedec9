//! AVX2, and AVX-VNNI (`vpdpbusd` on 256 bits: Intel's client processors since Alder Lake, AMD since Zen 5).
//!
//! A line of a panel is a plane of a packed block, as it is: the four codes of a row are the bytes of its lane, rows
//! 0 to 7 in one register and 8 to 15 in the next.
//!
//! Without VNNI, `vpmaddubsw` multiplies unsigned bytes by signed ones and adds neighbouring products in 16 bits, with
//! saturation. It never saturates here, nor do the sums of [`NARROW_QUADS`] of its results overflow: a code is 2
//! at most and a q -128 at least, so two products are within ±512, and 63 * 512 = 32,256 < 2^15.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::hint::black_box;

use super::kernel::{FloatKernel, IntegerKernel, Line, PackKernel};
use super::portable;
use crate::panel::{self, AVX2, by_tokens};
use crate::ternary::layout::compute::BLOCK;

/// Quads whose sums 16 bits hold.
const NARROW_QUADS: usize = 63;
/// The same in whole blocks.
const NARROW_BLOCKS: usize = NARROW_QUADS / 4;

/// Twelve sums, two lines of weights, an activation and a product: 16 registers.
const TILE: usize = 6;
const STREAM_TOKENS: usize = 4;

/// The codes of plane 0 of a word.
const PLANE: i32 = 0x0303_0303;

/// How far ahead of its use a word is asked for, in bytes.
const AHEAD: usize = 2048;

pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

pub(super) fn vnni_available() -> bool {
    available() && is_x86_feature_detected!("avxvnni")
}

pub(super) static INTEGER: IntegerKernel = IntegerKernel {
    groups: 1,
    tile: TILE,
    stream_tokens: STREAM_TOKENS,
    absmax,
    quantise,
    unpack,
    multiply,
    stream,
};

pub(super) static INTEGER_VNNI: IntegerKernel = IntegerKernel {
    groups: 1,
    tile: TILE,
    stream_tokens: STREAM_TOKENS,
    absmax,
    quantise,
    unpack,
    multiply: multiply_vnni,
    stream: stream_vnni,
};

pub(super) static FLOAT: FloatKernel = FloatKernel {
    panel: &AVX2,
    unpack_columns,
    unpack_rows,
};

pub(super) static PACK: PackKernel = PackKernel { pack };

fn absmax(x: &[f32]) -> u32 {
    #[target_feature(enable = "avx2,fma")]
    fn vectors(x: &[f32]) -> u32 {
        portable::absmax(x)
    }
    assert!(available());
    // SAFETY: the instructions are there.
    unsafe { vectors(x) }
}

fn quantise(x: &[f32], scale: f32, out: &mut [u32], stride: usize) -> i32 {
    #[target_feature(enable = "avx2,fma")]
    fn vectors(x: &[f32], scale: f32, out: &mut [u32], stride: usize) -> i32 {
        portable::quantise(x, scale, out, stride)
    }
    assert!(available());
    // SAFETY: the instructions are there.
    unsafe { vectors(x, scale, out, stride) }
}

fn unpack(words: &[u32], panel: &mut [Line], stride: usize) {
    assert!(available());
    let blocks = words.len() / BLOCK;
    assert!(blocks == 0 || panel.len() > (4 * blocks - 1) * stride);
    // SAFETY: the instructions are there, and the panel holds the last line that is written.
    unsafe { unpack_vectors(words.as_ptr(), blocks, panel.as_mut_ptr(), stride) }
}

/// # Safety
///
/// `words` must hold `blocks` blocks, and `panel` a line at `(4 * blocks - 1) * stride`.
#[target_feature(enable = "avx2,fma")]
unsafe fn unpack_vectors(words: *const u32, blocks: usize, panel: *mut Line, stride: usize) {
    let mask = _mm256_set1_epi32(PLANE);
    for block in 0..blocks {
        // SAFETY: by the caller's promise; the prefetch reads nothing.
        unsafe {
            let words = words.add(block * BLOCK);
            _mm_prefetch::<_MM_HINT_T0>(words.wrapping_byte_add(AHEAD).cast());
            for half in 0..2 {
                let word = _mm256_loadu_si256(words.cast::<__m256i>().add(half));
                let planes = [
                    word,
                    _mm256_srli_epi32::<2>(word),
                    _mm256_srli_epi32::<4>(word),
                    _mm256_srli_epi32::<6>(word),
                ];
                for (plane, codes) in planes.into_iter().enumerate() {
                    let line = panel.add((4 * block + plane) * stride).cast::<__m256i>();
                    _mm256_store_si256(line.add(half), _mm256_and_si256(codes, mask));
                }
            }
        }
    }
}

/// Adds a vector of sums to the eight at `at`.
///
/// # Safety
///
/// `at` must hold eight sums.
#[target_feature(enable = "avx2,fma")]
unsafe fn add_to(at: *mut i32, sums: __m256i) {
    // SAFETY: by the caller's promise.
    unsafe {
        let at = at.cast();
        _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), sums));
    }
}

fn multiply(panel: &[Line], activations: &[u32], tokens: usize, sums: &mut [i32]) {
    assert!(available());
    let quads = panel.len();
    assert!(activations.len() >= quads * tokens && sums.len() >= tokens * BLOCK);
    let (panel, activations, sums) = (panel.as_ptr(), activations.as_ptr(), sums.as_mut_ptr());
    // SAFETY: the instructions are there, and the slices are as long as the tile is.
    unsafe { by_tokens!(tokens, multiply_tile(panel, activations, quads, sums), 1 2 3 4 5 6) }
}

fn multiply_vnni(panel: &[Line], activations: &[u32], tokens: usize, sums: &mut [i32]) {
    assert!(vnni_available());
    let quads = panel.len();
    assert!(activations.len() >= quads * tokens && sums.len() >= tokens * BLOCK);
    let (panel, activations, sums) = (panel.as_ptr(), activations.as_ptr(), sums.as_mut_ptr());
    // SAFETY: the instructions are there, and the slices are as long as the tile is.
    unsafe { by_tokens!(tokens, multiply_tile_vnni(panel, activations, quads, sums), 1 2 3 4 5 6) }
}

/// # Safety
///
/// `panel` must hold `quads` lines, `activations` `quads * T` words, `sums` `T * 16` sums.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_tile<const T: usize>(
    panel: *const Line,
    activations: *const u32,
    quads: usize,
    sums: *mut i32,
) {
    let ones = _mm256_set1_epi16(1);
    for first in (0..quads).step_by(NARROW_QUADS) {
        let mut tile = [[_mm256_setzero_si256(); 2]; T];
        for quad in first..quads.min(first + NARROW_QUADS) {
            // SAFETY: by the caller's promise.
            unsafe {
                let line = panel.add(quad).cast::<__m256i>();
                let weights = [_mm256_load_si256(line), _mm256_load_si256(line.add(1))];
                for (token, sums) in tile.iter_mut().enumerate() {
                    let q = _mm256_set1_epi32(*activations.add(quad * T + token) as i32);
                    for (sum, codes) in sums.iter_mut().zip(weights) {
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, q));
                    }
                }
            }
        }
        for (token, tile) in tile.into_iter().enumerate() {
            // SAFETY: by the caller's promise.
            unsafe {
                add_to(sums.add(token * BLOCK), _mm256_madd_epi16(tile[0], ones));
                add_to(
                    sums.add(token * BLOCK + 8),
                    _mm256_madd_epi16(tile[1], ones),
                );
            }
        }
    }
}

/// # Safety
///
/// As [`multiply_tile`].
#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn multiply_tile_vnni<const T: usize>(
    panel: *const Line,
    activations: *const u32,
    quads: usize,
    sums: *mut i32,
) {
    let mut tile = [[_mm256_setzero_si256(); 2]; T];
    for quad in 0..quads {
        // SAFETY: by the caller's promise.
        unsafe {
            let line = panel.add(quad).cast::<__m256i>();
            let weights = [_mm256_load_si256(line), _mm256_load_si256(line.add(1))];
            for (token, sums) in tile.iter_mut().enumerate() {
                let q = _mm256_set1_epi32(*activations.add(quad * T + token) as i32);
                for (sum, codes) in sums.iter_mut().zip(weights) {
                    *sum = _mm256_dpbusd_avx_epi32(*sum, codes, q);
                }
            }
        }
    }
    for (token, tile) in tile.into_iter().enumerate() {
        // SAFETY: by the caller's promise.
        unsafe {
            add_to(sums.add(token * BLOCK), tile[0]);
            add_to(sums.add(token * BLOCK + 8), tile[1]);
        }
    }
}

/// Checks what a stream is given, and calls `tile` for each row group: words, activations, blocks, sums.
fn each_group(
    (words, stride): (&[u32], usize),
    activations: &[u32],
    tokens: usize,
    sums: &mut [i32],
    tile: impl Fn(*const u32, *const u32, usize, *mut i32),
) {
    let groups = sums.len() / (tokens * BLOCK);
    let blocks = activations.len() / (4 * tokens);
    assert!(groups == 0 || words.len() >= (groups - 1) * stride + blocks * BLOCK);
    for (group, sums) in sums.chunks_exact_mut(tokens * BLOCK).enumerate() {
        tile(
            words[group * stride..].as_ptr(),
            activations.as_ptr(),
            blocks,
            sums.as_mut_ptr(),
        );
    }
}

fn stream(words: &[u32], stride: usize, activations: &[u32], tokens: usize, sums: &mut [i32]) {
    assert!(available());
    each_group(
        (words, stride),
        activations,
        tokens,
        sums,
        |words, activations, blocks, sums| {
            // SAFETY: the instructions are there, and `each_group` has checked the lengths.
            unsafe { by_tokens!(tokens, stream_tile(words, activations, blocks, sums), 1 2 3 4) }
        },
    );
}

fn stream_vnni(words: &[u32], stride: usize, activations: &[u32], tokens: usize, sums: &mut [i32]) {
    assert!(vnni_available());
    each_group(
        (words, stride),
        activations,
        tokens,
        sums,
        |words, activations, blocks, sums| {
            // SAFETY: the instructions are there, and `each_group` has checked the lengths.
            unsafe {
                match tokens {
                    1 => stream_tile_vnni::<1, 4>(words, activations, blocks, sums),
                    2 => stream_tile_vnni::<2, 2>(words, activations, blocks, sums),
                    3 => stream_tile_vnni::<3, 1>(words, activations, blocks, sums),
                    _ => stream_tile_vnni::<4, 1>(words, activations, blocks, sums),
                }
            }
        },
    );
}

/// # Safety
///
/// `words` must hold `blocks` blocks, `activations` `4 * blocks * T` words, `sums` `T * 16` sums.
#[target_feature(enable = "avx2,fma")]
unsafe fn stream_tile<const T: usize>(
    words: *const u32,
    activations: *const u32,
    blocks: usize,
    sums: *mut i32,
) {
    let (mask, ones) = (_mm256_set1_epi32(PLANE), _mm256_set1_epi16(1));
    for first in (0..blocks).step_by(NARROW_BLOCKS) {
        let mut tile = [[_mm256_setzero_si256(); 2]; T];
        for block in first..blocks.min(first + NARROW_BLOCKS) {
            // SAFETY: by the caller's promise; the prefetch reads nothing.
            unsafe {
                let words = words.add(block * BLOCK).cast::<__m256i>();
                _mm_prefetch::<_MM_HINT_T0>(words.wrapping_byte_add(AHEAD).cast());
                let mut halves = [_mm256_loadu_si256(words), _mm256_loadu_si256(words.add(1))];
                for plane in 0..4 {
                    let codes = halves.map(|word| _mm256_and_si256(word, mask));
                    for (token, sums) in tile.iter_mut().enumerate() {
                        let q = *activations.add((4 * block + plane) * T + token);
                        let q = _mm256_set1_epi32(q as i32);
                        for (sum, codes) in sums.iter_mut().zip(codes) {
                            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, q));
                        }
                    }
                    halves = halves.map(|word| _mm256_srli_epi32::<2>(word));
                }
            }
        }
        for (token, tile) in tile.into_iter().enumerate() {
            // SAFETY: by the caller's promise.
            unsafe {
                add_to(sums.add(token * BLOCK), _mm256_madd_epi16(tile[0], ones));
                add_to(
                    sums.add(token * BLOCK + 8),
                    _mm256_madd_epi16(tile[1], ones),
                );
            }
        }
    }
}

/// With N sums side by side for each row and token, since few tokens wait for the latency of `vpdpbusd`.
///
/// # Safety
///
/// As [`stream_tile`].
#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn stream_tile_vnni<const T: usize, const N: usize>(
    words: *const u32,
    activations: *const u32,
    blocks: usize,
    sums: *mut i32,
) {
    let mask = _mm256_set1_epi32(PLANE);
    let mut tile = [[[_mm256_setzero_si256(); N]; 2]; T];
    for block in 0..blocks {
        // SAFETY: by the caller's promise; the prefetch reads nothing.
        unsafe {
            let words = words.add(block * BLOCK).cast::<__m256i>();
            _mm_prefetch::<_MM_HINT_T0>(words.wrapping_byte_add(AHEAD).cast());
            let mut halves = [_mm256_loadu_si256(words), _mm256_loadu_si256(words.add(1))];
            for plane in 0..4 {
                let codes = halves.map(|word| _mm256_and_si256(word, mask));
                for (token, sums) in tile.iter_mut().enumerate() {
                    let q = *activations.add((4 * block + plane) * T + token);
                    let q = _mm256_set1_epi32(q as i32);
                    for (sums, codes) in sums.iter_mut().zip(codes) {
                        sums[plane % N] = _mm256_dpbusd_avx_epi32(sums[plane % N], codes, q);
                    }
                }
                halves = halves.map(|word| _mm256_srli_epi32::<2>(word));
            }
        }
    }
    for (token, tile) in tile.into_iter().enumerate() {
        for (half, parts) in tile.into_iter().enumerate() {
            for part in parts {
                // SAFETY: by the caller's promise.
                unsafe { add_to(sums.add(token * BLOCK + 8 * half), part) };
            }
        }
    }
}

fn unpack_columns(
    words: &[u32; BLOCK],
    scales: &[f32; BLOCK],
    panel: &mut [panel::Line],
    stride: usize,
) {
    #[target_feature(enable = "avx2,fma")]
    fn vectors(
        words: &[u32; BLOCK],
        scales: &[f32; BLOCK],
        panel: &mut [panel::Line],
        stride: usize,
    ) {
        portable::unpack_columns(words, scales, panel, stride);
    }
    assert!(available());
    // SAFETY: the instructions are there.
    unsafe { vectors(words, scales, panel, stride) }
}

fn unpack_rows(
    words: &[u32; BLOCK],
    scales: &[f32; BLOCK],
    panel: &mut [panel::Line],
    stride: usize,
) {
    #[target_feature(enable = "avx2,fma")]
    fn vectors(
        words: &[u32; BLOCK],
        scales: &[f32; BLOCK],
        panel: &mut [panel::Line],
        stride: usize,
    ) {
        portable::unpack_rows(words, scales, panel, stride);
    }
    assert!(available());
    // SAFETY: the instructions are there.
    unsafe { vectors(words, scales, panel, stride) }
}

fn pack(
    columns: &[f32],
    stride: usize,
    thresholds: &[f32; BLOCK],
    words: &mut [u32],
) -> [u32; BLOCK] {
    #[target_feature(enable = "avx2,fma")]
    fn vectors(
        columns: &[f32],
        stride: usize,
        thresholds: &[f32; BLOCK],
        words: &mut [u32],
    ) -> [u32; BLOCK] {
        super::portable::pack(columns, stride, thresholds, words)
    }
    assert!(available());
    // SAFETY: the instructions are there.
    unsafe { vectors(columns, stride, thresholds, words) }
}

/// Independent `vpdpbusd`, more of them than their latency takes; returns how many operations they were.
pub(super) fn probe_vnni(rounds: usize) -> usize {
    const CHAINS: usize = 12;
    #[target_feature(enable = "avx2,fma,avxvnni")]
    fn vectors(rounds: usize) {
        let codes = _mm256_set1_epi32(black_box(0x0102_0100));
        let q = _mm256_set1_epi32(black_box(0x0305_0709));
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, codes, q);
            }
        }
        black_box(sums);
    }
    assert!(vnni_available());
    // SAFETY: the instructions are there.
    unsafe { vectors(rounds) };
    // A multiplication and an addition for each byte.
    rounds * CHAINS * 64
}
