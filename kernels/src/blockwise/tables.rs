//! The numbers that codes stand for.

use std::sync::LazyLock;

/// Levels of NF4: bitsandbytes' numbers, ascending.
pub const NF4: [f32; 16] = [
    f32::from_bits(0xbf80_0000),
    f32::from_bits(0xbf32_39b1),
    f32::from_bits(0xbf06_6b30),
    f32::from_bits(0xbeca_32a0),
    f32::from_bits(0xbe91_a24d),
    f32::from_bits(0xbe3d_353f),
    f32::from_bits(0xbdba_7871),
    f32::from_bits(0x0000_0000),
    f32::from_bits(0x3da2_faff),
    f32::from_bits(0x3e24_cae3),
    f32::from_bits(0x3e7c_04dd),
    f32::from_bits(0x3ead_033a),
    f32::from_bits(0x3ee1_a4b8),
    f32::from_bits(0x3f10_07ab),
    f32::from_bits(0x3f39_13b3),
    f32::from_bits(0x3f80_0000),
];

/// Levels of FP4, by code: bitsandbytes' numbers. Code 8 is a second 0.
pub const FP4: [f32; 16] = [
    f32::from_bits(0x0000_0000),
    f32::from_bits(0x3baa_aaab),
    f32::from_bits(0x3f2a_aaab),
    f32::from_bits(0x3f80_0000),
    f32::from_bits(0x3eaa_aaab),
    f32::from_bits(0x3f00_0000),
    f32::from_bits(0x3e2a_aaab),
    f32::from_bits(0x3e80_0000),
    f32::from_bits(0x0000_0000),
    f32::from_bits(0xbbaa_aaab),
    f32::from_bits(0xbf2a_aaab),
    f32::from_bits(0xbf80_0000),
    f32::from_bits(0xbeaa_aaab),
    f32::from_bits(0xbf00_0000),
    f32::from_bits(0xbe2a_aaab),
    f32::from_bits(0xbe80_0000),
];

/// Codes of [`FP4`] with their levels ascending; of the two zeros, code 0 stands first.
pub const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// Levels of symmetric int4.
pub const INT4: [f32; 16] = counting(-8.0);

/// Levels of affine int4, before its zero point.
pub const UINT4: [f32; 16] = counting(0.0);

/// Borders between NF4's levels: a number above `NF4_BORDERS[i]` has a code above i.
pub const NF4_BORDERS: [f32; 15] = midpoints(&NF4);

/// Borders between FP4's levels in the order of [`FP4_ORDER`].
pub const FP4_BORDERS: [f32; 15] = {
    let mut ascending = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        ascending[i] = FP4[FP4_ORDER[i] as usize];
        i += 1;
    }
    midpoints(&ascending)
};

const fn counting(first: f32) -> [f32; 16] {
    let mut levels = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        levels[i] = first + i as f32;
        i += 1;
    }
    levels
}

/// Halfway between neighbours, in f32: the sum first, then its half.
const fn midpoints<const N: usize, const M: usize>(ascending: &[f32; N]) -> [f32; M] {
    let mut midpoints = [0.0; M];
    let mut i = 0;
    while i < M {
        midpoints[i] = (ascending[i] + ascending[i + 1]) / 2.0;
        i += 1;
    }
    midpoints
}

/// The signed eight-bit dynamic map, ascending (Dettmers, 2016, "8-Bit Approximations for Parallelism in Deep Learning";
/// bitsandbytes' `create_dynamic_map`).
///
/// For each exponent e from 0 to 6 there are 2^e magnitudes: the middles of as many equal parts of [0.1, 1], times
/// 10^(e - 6). Each stands there with both signs; 0 and 1 are added, -1 is not.
pub static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(dynamic_map);

/// Borders between the levels of [`DYNAMIC_MAP`].
pub(super) static DYNAMIC_BORDERS: LazyLock<[f32; 255]> = LazyLock::new(|| midpoints(&DYNAMIC_MAP));

/// Computes [`DYNAMIC_MAP`].
pub fn dynamic_map() -> [f32; 256] {
    let mut levels = Vec::with_capacity(256);
    for exponent in 0..7 {
        let parts = 1 << exponent;
        let power = 10f64.powi(exponent - 6) as f32;
        let ends = linspace(parts + 1);
        for ends in ends.windows(2) {
            let magnitude = power * ((ends[0] + ends[1]) / 2.0);
            levels.extend([magnitude, -magnitude]);
        }
    }
    levels.extend([0.0, 1.0]);
    levels.sort_by(f32::total_cmp);
    std::array::from_fn(|i| levels[i])
}

/// The same without signs, ascending: for each exponent e from 0 to 6 there are 2^(e + 1) magnitudes, and 0 and 1.
pub fn unsigned_dynamic_map() -> [f32; 256] {
    let mut levels = Vec::with_capacity(256);
    for exponent in 0..7 {
        let power = 10f64.powi(exponent - 6) as f32;
        let ends = linspace((2 << exponent) + 1);
        levels.extend(
            ends.windows(2)
                .map(|ends| power * ((ends[0] + ends[1]) / 2.0)),
        );
    }
    levels.extend([0.0, 1.0]);
    levels.sort_by(f32::total_cmp);
    std::array::from_fn(|i| levels[i])
}

/// So many numbers from 0.1 to 1, equally far apart, in f32: the first half counted from the start, the second from the
/// end, each rounded once, as `torch.linspace` does.
fn linspace(count: usize) -> Vec<f32> {
    let (start, end) = (0.1f32, 1f32);
    let step = (end - start) / (count - 1) as f32;
    (0..count)
        .map(|i| {
            if i < count / 2 {
                step.mul_add(i as f32, start)
            } else {
                step.mul_add(-((count - 1 - i) as f32), end)
            }
        })
        .collect()
}
