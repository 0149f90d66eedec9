//! Products of activations with blockwise weights (see [`layout`](crate::blockwise::layout)), tile by tile: the dense
//! matrix is never written.

use cubecl::prelude::*;

use super::UNITS;
use crate::blockwise::layout::BLOCK;
use crate::blockwise::{Format, SCALE_BLOCK};

/// Tokens and outputs of a tile of [`product_tiled`] and [`gradient_tiled`].
pub const TILE: usize = 64;

/// Units of a cube along each side of its tile.
const SIDE: usize = 16;

/// Tokens and outputs that a unit computes.
const PER_UNIT: usize = TILE / SIDE;

/// From one depth to the next in shared memory: odd, so that a column is in as many banks.
const STRIDE: usize = TILE + 1;

/// Weights of a row that a unit unpacks at a time: half a word, or a word of bytes.
const STEP: usize = 4;

/// What kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kind {
    pub format: Format,
    /// Whether scales are in eight bits.
    pub double: bool,
    /// Whether rows are whole blocks of a multiple of 16 columns.
    pub whole: bool,
}

/// Sizes of a product.
#[derive(CubeType, CubeLaunch)]
pub struct Sizes {
    pub tokens: usize,
    pub rows: usize,
    pub cols: usize,
    /// Words of a row.
    pub row_words: usize,
    /// Weights of a block.
    pub block: usize,
    /// Where, with double quantisation, the mean is among the scales.
    pub mean: usize,
    /// The first word of zero points.
    pub zeros: usize,
}

/// The levels of the sixteen codes of a format, for every unit of the cube.
#[cube]
fn levels(#[comptime] format: Format) -> Shared<[f32]> {
    let mut levels = Shared::<[f32]>::new_slice(16usize);
    if comptime!(format.levels().is_some()) {
        #[unroll]
        for code in 0..16usize {
            if UNIT_POS == comptime!(code as u32) {
                levels[code] = comptime!(level_of(format, code)).runtime();
            }
        }
    }
    sync_cube();
    levels
}

fn level_of(format: Format, code: usize) -> f32 {
    format.levels().map_or(0.0, |levels| levels[code])
}

/// A level of the dynamic map: of 127 magnitudes on each side of 0, 2^e are in the e-th power of ten. Up to rounding.
#[cube]
fn dynamic_level(code: u32) -> f32 {
    // From 1 on, away from the code of 0, which is 127.
    let above = code > 127;
    let distance = select(above, code - 127, 127 - code);
    let nearest = select(distance == 0, 1u32, distance);
    let exponent = (u32::reinterpret(f32::cast_from(nearest)) >> 23) - 127;
    let parts = f32::cast_from(1u32 << exponent);
    let middle = (f32::cast_from(nearest) - parts + 0.5) / parts;
    let mut power = 1e-6f32;
    #[unroll]
    for e in 1..7usize {
        if exponent == comptime!(e as u32) {
            power = comptime!(10f64.powi(e as i32 - 6) as f32).runtime();
        }
    }
    let magnitude = power * (0.1 + 0.9 * middle);
    let magnitude = select(distance == 0, 0.0f32, magnitude);
    let magnitude = select(code == 255, 1.0f32, magnitude);
    select(above, magnitude, -magnitude)
}

/// The scale of the block that a weight is in, and its zero point.
#[cube]
fn scale_and_zero(
    row: usize,
    col: usize,
    scales: &[f32],
    side: &[u32],
    sizes: &Sizes,
    #[comptime] kind: Kind,
) -> (f32, f32) {
    let mut block = (row * sizes.cols + col) / sizes.block;
    let mut place = block;
    if comptime!(kind.whole) {
        let per_row = sizes.cols / sizes.block;
        let along = col / sizes.block;
        block = row * per_row + along;
        place = (row / BLOCK * per_row + along) * BLOCK + row % BLOCK;
    }
    let scale = if comptime!(kind.double) {
        let code = (side[place / 4] >> (8 * (place % 4) as u32)) & 255;
        dynamic_level(code) * scales[block / SCALE_BLOCK] + scales[sizes.mean]
    } else {
        scales[place]
    };
    let mut zero = 0f32;
    if comptime!(kind.format.has_zero_points()) {
        let word = side[sizes.zeros + place / 8];
        zero = f32::cast_from((word >> (4 * (place % 8) as u32)) & 15);
    }
    (scale, zero)
}

/// What a code of a word stands for, before its scale.
#[cube]
fn weight(
    word: u32,
    position: usize,
    zero: f32,
    levels: &Shared<[f32]>,
    #[comptime] format: Format,
) -> f32 {
    if comptime!(format.levels().is_some()) {
        let code = (word >> (4 * position as u32)) & 15;
        levels[code as usize] - zero
    } else {
        f32::cast_from(i32::reinterpret(word << (24 - 8 * position as u32)) >> 24)
    }
}

/// The word of a row and column, in its row group's order.
#[cube]
fn word_at(row: usize, col: usize, sizes: &Sizes, #[comptime] format: Format) -> usize {
    let per_word = comptime!(format.codes_per_word());
    (row / BLOCK * sizes.row_words + col / per_word) * BLOCK + row % BLOCK
}

/// W' of one row and the four columns from `col` on, a multiple of four, into every `stride`-th value from `at` on;
/// zeros where the matrix has ended.
#[cube]
#[allow(clippy::too_many_arguments)]
fn unpack_four(
    row: usize,
    col: usize,
    words: &[u32],
    scales: &[f32],
    side: &[u32],
    levels: &Shared<[f32]>,
    sizes: &Sizes,
    tile: &mut Shared<[f32]>,
    at: usize,
    #[comptime] stride: usize,
    #[comptime] kind: Kind,
) {
    let per_word = comptime!(kind.format.codes_per_word());
    let inside = row < sizes.rows && col < sizes.cols;
    let row = select(inside, row, 0);
    let col = select(inside, col, 0);
    let word = words[word_at(row, col, sizes, kind.format)];
    let (mut scale, mut zero) = scale_and_zero(row, col, scales, side, sizes, kind);
    #[unroll]
    for j in 0..STEP {
        let mut value = 0f32;
        if inside && col + j < sizes.cols {
            if comptime!(!kind.whole && j > 0) {
                // A block may end between columns.
                let (next_scale, next_zero) =
                    scale_and_zero(row, col + j, scales, side, sizes, kind);
                scale = next_scale;
                zero = next_zero;
            }
            value = weight(word, col % per_word + j, zero, levels, kind.format) * scale;
        }
        tile[at + j * stride] = value;
    }
}

/// y `[tokens, rows]` for few tokens: bound by reading the weights, once for every `at_once` tokens.
///
/// A cube takes a row group. Its 16 lanes are the rows, so that units read next to each other, and its 16 parts take
/// words in turn.
#[cube(launch, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn product_of_few<F: Float>(
    x: &[F],
    words: &[u32],
    scales: &[f32],
    side: &[u32],
    output: &mut [F],
    sizes: Sizes,
    #[comptime] kind: Kind,
    #[comptime] at_once: usize,
    #[define(F)] _dtype: ElemType,
) {
    let parts = comptime!(UNITS / BLOCK);
    let per_word = comptime!(kind.format.codes_per_word());
    let lane = UNIT_POS as usize % BLOCK;
    let part = UNIT_POS as usize / BLOCK;
    let row = CUBE_POS_X as usize * BLOCK + lane;
    let first_token = CUBE_POS_Y as usize * at_once;
    let last_token = sizes.tokens - 1;
    // A row behind the last is computed like the last, and not written.
    let scaled_row = select(row < sizes.rows, row, sizes.rows - 1);
    let levels = levels(kind.format);
    let mut sums = Array::<f32>::new(at_once);
    #[unroll]
    for t in 0..at_once {
        sums[t] = 0f32;
    }
    let mut index = part;
    while index * per_word < sizes.cols {
        let first = index * per_word;
        let word = words[(CUBE_POS_X as usize * sizes.row_words + index) * BLOCK + lane];
        let (mut scale, mut zero) = scale_and_zero(scaled_row, first, scales, side, &sizes, kind);
        #[unroll]
        for j in 0..per_word {
            let col = first + j;
            if col < sizes.cols {
                if comptime!(!kind.whole && j > 0) {
                    let (next_scale, next_zero) =
                        scale_and_zero(scaled_row, col, scales, side, &sizes, kind);
                    scale = next_scale;
                    zero = next_zero;
                }
                let weight = weight(word, j, zero, &levels, kind.format) * scale;
                #[unroll]
                for t in 0..at_once {
                    let token = first_token + t;
                    let token = select(token < sizes.tokens, token, last_token);
                    sums[t] += f32::cast_from(x[token * sizes.cols + col]) * weight;
                }
            }
        }
        index += parts;
    }
    let mut partial = Shared::<[f32]>::new_slice(comptime!(UNITS * at_once));
    #[unroll]
    for t in 0..at_once {
        partial[t * UNITS + UNIT_POS as usize] = sums[t];
    }
    sync_cube();
    // This unit adds up one token of the cube.
    let token = first_token + part;
    if part < at_once && token < sizes.tokens && row < sizes.rows {
        let mut sum = 0f32;
        for other in 0..parts {
            sum += partial[part * UNITS + other * BLOCK + lane];
        }
        output[token * sizes.rows + row] = F::cast_from(sum);
    }
}

/// y `[tokens, rows]`: a cube computes a tile of 64 tokens and 64 rows, 4 of each in a unit, 16 columns at a time.
#[cube(launch, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn product_tiled<F: Float>(
    x: &[F],
    words: &[u32],
    scales: &[f32],
    side: &[u32],
    output: &mut [F],
    sizes: Sizes,
    #[comptime] kind: Kind,
    #[define(F)] _dtype: ElemType,
) {
    let unit = UNIT_POS as usize;
    let first_token = CUBE_POS_Y as usize * TILE;
    let first_row = CUBE_POS_X as usize * TILE;
    let levels = levels(kind.format);
    let mut left = Shared::<[f32]>::new_slice(comptime!(BLOCK * STRIDE));
    let mut right = Shared::<[f32]>::new_slice(comptime!(BLOCK * STRIDE));
    let mut sums = Array::<f32>::new(comptime!(PER_UNIT * PER_UNIT));
    #[unroll]
    for i in 0..comptime!(PER_UNIT * PER_UNIT) {
        sums[i] = 0f32;
    }
    let mut first = 0usize;
    while first < sizes.cols {
        stage::<F>(x, &mut left, first_token, first, sizes.tokens, sizes.cols);
        let (row, col) = (unit % TILE, unit / TILE * STEP);
        unpack_four(
            first_row + row,
            first + col,
            words,
            scales,
            side,
            &levels,
            &sizes,
            &mut right,
            col * STRIDE + row,
            STRIDE,
            kind,
        );
        sync_cube();
        multiply_tiles(&left, &right, &mut sums);
        sync_cube();
        first += BLOCK;
    }
    write::<F>(
        &sums,
        output,
        first_token,
        first_row,
        sizes.tokens,
        sizes.rows,
    );
}

/// dx `[tokens, cols]` = dy `[tokens, rows]` W': a cube computes a tile of 64 tokens and 64 columns, 16 rows at a time.
#[cube(launch, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn gradient_tiled<F: Float>(
    gradient: &[F],
    words: &[u32],
    scales: &[f32],
    side: &[u32],
    output: &mut [F],
    sizes: Sizes,
    #[comptime] kind: Kind,
    #[define(F)] _dtype: ElemType,
) {
    let unit = UNIT_POS as usize;
    let first_token = CUBE_POS_Y as usize * TILE;
    let first_col = CUBE_POS_X as usize * TILE;
    let levels = levels(kind.format);
    let mut left = Shared::<[f32]>::new_slice(comptime!(BLOCK * STRIDE));
    let mut right = Shared::<[f32]>::new_slice(comptime!(BLOCK * STRIDE));
    let mut sums = Array::<f32>::new(comptime!(PER_UNIT * PER_UNIT));
    #[unroll]
    for i in 0..comptime!(PER_UNIT * PER_UNIT) {
        sums[i] = 0f32;
    }
    let mut first = 0usize;
    while first < sizes.rows {
        stage::<F>(
            gradient,
            &mut left,
            first_token,
            first,
            sizes.tokens,
            sizes.rows,
        );
        let (row, col) = (unit % BLOCK, unit / BLOCK * STEP);
        unpack_four(
            first + row,
            first_col + col,
            words,
            scales,
            side,
            &levels,
            &sizes,
            &mut right,
            row * STRIDE + col,
            1usize,
            kind,
        );
        sync_cube();
        multiply_tiles(&left, &right, &mut sums);
        sync_cube();
        first += BLOCK;
    }
    write::<F>(
        &sums,
        output,
        first_token,
        first_col,
        sizes.tokens,
        sizes.cols,
    );
}

/// Values `[tokens, width]` of 64 tokens and 16 columns, `[depth, token]`; zeros where there are none.
#[cube]
fn stage<F: Float>(
    values: &[F],
    tile: &mut Shared<[f32]>,
    first_token: usize,
    first: usize,
    tokens: usize,
    width: usize,
) {
    #[unroll]
    for i in 0..comptime!(TILE * BLOCK / UNITS) {
        let position = i * UNITS + UNIT_POS as usize;
        let token = position / BLOCK;
        let depth = position % BLOCK;
        let mut value = 0f32;
        if first_token + token < tokens && first + depth < width {
            value = f32::cast_from(values[(first_token + token) * width + first + depth]);
        }
        tile[depth * STRIDE + token] = value;
    }
}

/// sums `[token, output]` += left `[depth, token]`ᵀ right `[depth, output]`.
#[cube]
fn multiply_tiles(left: &Shared<[f32]>, right: &Shared<[f32]>, sums: &mut Array<f32>) {
    let my_token = UNIT_POS as usize / SIDE;
    let my_output = UNIT_POS as usize % SIDE;
    for k in 0..BLOCK {
        let mut weights = Array::<f32>::new(PER_UNIT);
        #[unroll]
        for o in 0..PER_UNIT {
            weights[o] = right[k * STRIDE + my_output + o * SIDE];
        }
        #[unroll]
        for t in 0..PER_UNIT {
            let value = left[k * STRIDE + my_token + t * SIDE];
            #[unroll]
            for o in 0..PER_UNIT {
                sums[comptime!(t * PER_UNIT + o)] += value * weights[o];
            }
        }
    }
}

/// The sums of a unit to output `[tokens, width]`.
#[cube]
fn write<F: Float>(
    sums: &Array<f32>,
    output: &mut [F],
    first_token: usize,
    first: usize,
    tokens: usize,
    width: usize,
) {
    let my_token = UNIT_POS as usize / SIDE;
    let my_output = UNIT_POS as usize % SIDE;
    #[unroll]
    for t in 0..PER_UNIT {
        let token = first_token + my_token + t * SIDE;
        #[unroll]
        for o in 0..PER_UNIT {
            let at = first + my_output + o * SIDE;
            if token < tokens && at < width {
                output[token * width + at] = F::cast_from(sums[comptime!(t * PER_UNIT + o)]);
            }
        }
    }
}
