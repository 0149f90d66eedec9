//! AVX-512 with VNNI: `vpdpbusd` multiplies 64 bytes, unsigned by signed, and adds them in fours to 16 sums.
//!
//! A line of a panel is a plane of a packed block, as it is: the four codes of a row are the bytes of its lane.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::array;
use std::hint::black_box;
use std::sync::LazyLock;

use super::kernel::{FloatKernel, IntegerKernel, Line, PackKernel};
use crate::panel::{self, AVX512, by_tokens};
use crate::ternary::layout::compute::BLOCK;

pub(super) fn available() -> bool {
    // Asked for once a tile: one load instead of four.
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
    });
    *AVAILABLE
}

/// Two row groups and 14 tokens are 28 sums; two lines of weights and one activation fill up the 32 registers.
const GROUPS: usize = 2;
const TILE: usize = 14;
/// Four sums a token, one for each plane. One token is multiplied with four row groups at once, two with two.
const STREAM_TOKENS: usize = 6;

pub(super) static INTEGER: IntegerKernel = IntegerKernel {
    groups: GROUPS,
    tile: TILE,
    stream_tokens: STREAM_TOKENS,
    absmax,
    quantise,
    unpack,
    multiply,
    stream,
};

/// The codes of plane 0 of a word.
const PLANE: i32 = 0x0303_0303;

/// How far ahead of its use a word is asked for, in bytes.
const AHEAD: usize = 2048;

/// Blocks that the sums of plane 3, which holds codes times 64, have bits for: 2^12 a column at most.
const WIDE_BLOCKS: usize = 1 << 14;

pub(super) static FLOAT: FloatKernel = FloatKernel {
    panel: &AVX512,
    unpack_columns,
    unpack_rows,
};

pub(super) static PACK: PackKernel = PackKernel { pack };

fn absmax(x: &[f32]) -> u32 {
    assert!(available());
    // SAFETY: the instructions are there.
    unsafe { absmax_vectors(x) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn absmax_vectors(x: &[f32]) -> u32 {
    super::portable::absmax(x)
}

fn quantise(x: &[f32], scale: f32, out: &mut [u32], stride: usize) -> i32 {
    assert!(available());
    let quads = x.len().div_ceil(BLOCK) * 4;
    assert!(quads == 0 || out.len() > (quads - 1) * stride);
    // SAFETY: the instructions are there, and `out` holds the last word that is written.
    unsafe { quantise_vectors(x, scale, out.as_mut_ptr(), stride) }
}

/// # Safety
///
/// `out` must hold a word at `(quads - 1) * stride`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn quantise_vectors(x: &[f32], scale: f32, out: *mut u32, stride: usize) -> i32 {
    let inverse = _mm512_set1_ps(1.0 / scale);
    let scale = _mm512_set1_ps(scale);
    let mut sum = _mm512_setzero_si512();
    for (block, x) in x.chunks(BLOCK).enumerate() {
        let mask = (u32::MAX >> (32 - x.len() as u32)) as __mmask16;
        // SAFETY: the mask keeps the load within `x`.
        let values = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) };
        // x / s as a division rounds it, in less than half its time. The second correction starts from one of the
        // two f32 next to the quotient, and so ends with the nearest (Markstein, 1990: 1 / s is rounded to nearest,
        // the remainder exact). Where x is too small for that, it is so for a code other than 0.
        let mut quotients = _mm512_mul_ps(values, inverse);
        for _ in 0..2 {
            let remainder = _mm512_fnmadd_ps(quotients, scale, values);
            quotients = _mm512_fmadd_ps(remainder, inverse, quotients);
        }
        let codes = _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
            quotients,
        );
        sum = _mm512_add_epi32(sum, codes);
        let bytes = _mm512_cvtepi32_epi8(codes);
        let quads = [
            _mm_extract_epi32::<0>(bytes),
            _mm_extract_epi32::<1>(bytes),
            _mm_extract_epi32::<2>(bytes),
            _mm_extract_epi32::<3>(bytes),
        ];
        for (i, quad) in quads.into_iter().enumerate() {
            // SAFETY: `4 * block + i` is less than the number of quads.
            unsafe { *out.add((4 * block + i) * stride) = quad as u32 };
        }
    }
    _mm512_reduce_add_epi32(sum)
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn unpack_vectors(words: *const u32, blocks: usize, panel: *mut Line, stride: usize) {
    let mask = _mm512_set1_epi32(PLANE);
    for block in 0..blocks {
        // SAFETY: by the caller's promise; the prefetch reads nothing.
        unsafe {
            let words = words.add(block * BLOCK);
            _mm_prefetch::<_MM_HINT_T0>(words.wrapping_byte_add(AHEAD).cast());
            let word = _mm512_loadu_si512(words.cast());
            let line = |plane: usize| panel.add((4 * block + plane) * stride).cast::<__m512i>();
            _mm512_store_si512(line(0), _mm512_and_si512(word, mask));
            let plane = _mm512_srli_epi32::<2>(word);
            _mm512_store_si512(line(1), _mm512_and_si512(plane, mask));
            let plane = _mm512_srli_epi32::<4>(word);
            _mm512_store_si512(line(2), _mm512_and_si512(plane, mask));
            let plane = _mm512_srli_epi32::<6>(word);
            _mm512_store_si512(line(3), _mm512_and_si512(plane, mask));
        }
    }
}

fn multiply(panel: &[Line], activations: &[u32], tokens: usize, sums: &mut [i32]) {
    assert!(available());
    let quads = panel.len() / GROUPS;
    assert!(activations.len() >= quads * tokens && sums.len() >= tokens * GROUPS * BLOCK);
    let (panel, activations, sums) = (panel.as_ptr(), activations.as_ptr(), sums.as_mut_ptr());
    // SAFETY: the instructions are there, and the slices are as long as the tile is.
    unsafe {
        by_tokens!(
            tokens,
            multiply_tile(panel, activations, quads, sums),
            1 2 3 4 5 6 7 8 9 10 11 12 13 14
        )
    }
}

/// # Safety
///
/// `panel` must hold `quads * GROUPS` lines, `activations` `quads * T` words, `sums` `T * GROUPS` vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn multiply_tile<const T: usize>(
    panel: *const Line,
    activations: *const u32,
    quads: usize,
    sums: *mut i32,
) {
    // SAFETY: by the caller's promise, here and below.
    let load = |token: usize, group: usize| unsafe {
        _mm512_loadu_si512(sums.add((token * GROUPS + group) * BLOCK).cast())
    };
    // Element by element: passed through memory, they cost as much as some twenty quads.
    let mut tile: [[__m512i; GROUPS]; T] = array::from_fn(|token| [load(token, 0), load(token, 1)]);
    for quad in 0..quads {
        // SAFETY: see above.
        unsafe {
            let lines = panel.add(quad * GROUPS).cast::<__m512i>();
            let weights = [_mm512_load_si512(lines), _mm512_load_si512(lines.add(1))];
            for (token, sums) in tile.iter_mut().enumerate() {
                let q = _mm512_set1_epi32(*activations.add(quad * T + token) as i32);
                sums[0] = _mm512_dpbusd_epi32(sums[0], weights[0], q);
                sums[1] = _mm512_dpbusd_epi32(sums[1], weights[1], q);
            }
        }
    }
    for (token, tile) in tile.into_iter().enumerate() {
        // SAFETY: see above.
        unsafe {
            let at = sums.add(token * GROUPS * BLOCK);
            _mm512_storeu_si512(at.cast(), tile[0]);
            _mm512_storeu_si512(at.add(BLOCK).cast(), tile[1]);
        }
    }
}

fn stream(words: &[u32], stride: usize, activations: &[u32], tokens: usize, sums: &mut [i32]) {
    assert!(available());
    let groups = sums.len() / (tokens * BLOCK);
    let blocks = activations.len() / (4 * tokens);
    assert!(groups == 0 || words.len() >= (groups - 1) * stride + blocks * BLOCK);
    let (words, sums) = (words.as_ptr(), sums.as_mut_ptr());
    let activations = activations.as_ptr();
    // Row groups from several places in turn: memory is read faster so, and an activation is used more than once.
    let places = match tokens {
        1 => 4,
        2 => 2,
        _ => 1,
    };
    let apart = groups / places;
    let at = |group: usize| words.wrapping_add(group * stride);
    let sums_at = |group: usize| sums.wrapping_add(group * tokens * BLOCK);
    for group in 0..apart {
        let (words, sums) = (at(group), sums_at(group));
        let [words_apart, sums_apart] = [apart * stride, apart * tokens * BLOCK];
        // SAFETY: the instructions are there; the last row group ends within `words` and `sums`.
        unsafe {
            match tokens {
                1 => stream_tile::<1, 4>(words, words_apart, activations, blocks, sums, sums_apart),
                2 => stream_tile::<2, 2>(words, words_apart, activations, blocks, sums, sums_apart),
                3 => stream_tile::<3, 1>(words, 0, activations, blocks, sums, 0),
                4 => stream_tile::<4, 1>(words, 0, activations, blocks, sums, 0),
                5 => stream_tile::<5, 1>(words, 0, activations, blocks, sums, 0),
                6 => stream_tile::<6, 1>(words, 0, activations, blocks, sums, 0),
                tokens => unreachable!("a tile of {tokens} tokens"),
            }
        }
    }
    for group in apart * places..groups {
        let (words, sums) = (at(group), sums_at(group));
        // SAFETY: see above. With more tokens than two, no group is left.
        unsafe {
            if tokens == 1 {
                stream_tile::<1, 1>(words, 0, activations, blocks, sums, 0);
            } else {
                stream_tile::<2, 1>(words, 0, activations, blocks, sums, 0);
            }
        }
    }
}

/// T tokens and G row groups, `words_apart` and `sums_apart` from each other.
///
/// # Safety
///
/// For each row group, `words` must hold `blocks` blocks and `sums` T vectors; `activations` `4 * blocks * T` words.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn stream_tile<const T: usize, const G: usize>(
    words: *const u32,
    words_apart: usize,
    activations: *const u32,
    blocks: usize,
    sums: *mut i32,
    sums_apart: usize,
) {
    let planes = [
        _mm512_set1_epi32(PLANE),
        _mm512_set1_epi32(PLANE << 2),
        _mm512_set1_epi32(PLANE << 4),
        _mm512_set1_epi32(PLANE << 6),
    ];
    for first in (0..blocks).step_by(WIDE_BLOCKS) {
        let mut tile = [[[_mm512_setzero_si512(); 4]; G]; T];
        for block in first..blocks.min(first + WIDE_BLOCKS) {
            // SAFETY: by the caller's promise; the prefetch reads nothing.
            unsafe {
                let word: [__m512i; G] = array::from_fn(|group| {
                    let words = words.add(group * words_apart + block * BLOCK);
                    _mm_prefetch::<_MM_HINT_T0>(words.wrapping_byte_add(AHEAD).cast());
                    _mm512_loadu_si512(words.cast())
                });
                for (plane, mask) in planes.iter().enumerate() {
                    // Codes times 4^plane, 128 at most: the shift waits until the end.
                    let codes: [__m512i; G] =
                        array::from_fn(|group| _mm512_and_si512(word[group], *mask));
                    for (token, sums) in tile.iter_mut().enumerate() {
                        let q = *activations.add((4 * block + plane) * T + token);
                        let q = _mm512_set1_epi32(q as i32);
                        for group in 0..G {
                            sums[group][plane] =
                                _mm512_dpbusd_epi32(sums[group][plane], codes[group], q);
                        }
                    }
                }
            }
        }
        for (token, groups) in tile.iter().enumerate() {
            for (group, planes) in groups.iter().enumerate() {
                // Exact: the sums of plane p are multiples of 4^p.
                let low = _mm512_add_epi32(planes[0], _mm512_srai_epi32::<2>(planes[1]));
                let high = _mm512_add_epi32(
                    _mm512_srai_epi32::<4>(planes[2]),
                    _mm512_srai_epi32::<6>(planes[3]),
                );
                // SAFETY: by the caller's promise.
                unsafe {
                    let at = sums.add(group * sums_apart + token * BLOCK).cast();
                    let sum = _mm512_add_epi32(low, high);
                    _mm512_storeu_si512(at, _mm512_add_epi32(_mm512_loadu_si512(at), sum));
                }
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
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn vectors(
        words: &[u32; BLOCK],
        scales: &[f32; BLOCK],
        panel: &mut [panel::Line],
        stride: usize,
    ) {
        super::portable::unpack_columns(words, scales, panel, stride);
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
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn vectors(
        words: &[u32; BLOCK],
        scales: &[f32; BLOCK],
        panel: &mut [panel::Line],
        stride: usize,
    ) {
        super::portable::unpack_rows(words, scales, panel, stride);
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
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
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
pub(super) fn probe(rounds: usize) -> usize {
    const CHAINS: usize = 12;
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn vectors(rounds: usize) {
        let codes = _mm512_set1_epi32(black_box(0x0102_0100));
        let q = _mm512_set1_epi32(black_box(0x0305_0709));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, codes, q);
            }
        }
        black_box(sums);
    }
    assert!(available());
    // SAFETY: the instructions are there.
    unsafe { vectors(rounds) };
    // A multiplication and an addition for each byte.
    rounds * CHAINS * 128
}
