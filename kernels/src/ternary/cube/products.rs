//! Products of activations with packed weights (see `layout::compute`), tile by tile: the dense
//! matrix is never written.
//!
//! Activations come as words, in the order of their columns: four eight-bit codes, or the bits of one
//! f32. A block of 16 columns is so 4 or 16 words. Columns behind the last are zero.

use cubecl::prelude::*;

use super::UNITS;
use crate::ternary::layout::compute::BLOCK;

/// Tokens and outputs of a tile of [`product_tiled`] and [`gradient_tiled`].
pub const TILE: usize = 64;

/// Units of a cube along each side of its tile.
const SIDE: usize = 16;

/// Tokens and outputs that a unit computes.
const PER_UNIT: usize = TILE / SIDE;

/// From one depth to the next in shared memory: odd, so that a column is in as many banks.
const STRIDE: usize = TILE + 1;

/// What a word of activations holds, and how it is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// Four codes by the device's dot product of bytes, added up in i32.
    Bytes,
    /// Four codes one by one, in f32: exact for sums below 2^24, and as fast as floats are.
    Codes,
    /// One float.
    Floats,
}

impl Arithmetic {
    /// Words of activations for a block of columns.
    pub const fn words_per_block(self) -> usize {
        match self {
            Self::Bytes | Self::Codes => BLOCK / 4,
            Self::Floats => BLOCK,
        }
    }
}

/// Sizes of a product.
#[derive(CubeType, CubeLaunch)]
pub struct Sizes {
    pub tokens: usize,
    pub rows: usize,
    pub cols: usize,
    /// Blocks of columns in a row of the weights.
    pub blocks: usize,
    /// Blocks of columns that share a scale.
    pub blocks_per_scale: usize,
    /// From the scales of one row to those of the next: 0 where all rows share one.
    pub scale_stride: usize,
}

/// Code j of four, as a trit.
#[cube]
fn trit(codes: u32, #[comptime] j: usize) -> f32 {
    f32::cast_from((codes >> comptime!(8 * j as u32)) & 3) - 1.0
}

/// Code j of four activations.
#[cube]
fn activation(word: u32, #[comptime] j: usize) -> f32 {
    f32::cast_from(i32::reinterpret(word << comptime!(24 - 8 * j as u32)) >> 24)
}

/// Four codes T + 1, one a byte: columns 4 plane .. 4 plane + 4 of the block.
#[cube]
fn plane_of(word: u32, plane: u32) -> u32 {
    (word >> (2 * plane)) & 0x0303_0303
}

/// Σ q T of bytes, from codes T + 1.
#[cube]
fn dot_bytes(activations: i32, codes: i32, sum: i32) -> i32 {
    let minus_ones = i32::reinterpret(0xffff_ffffu32);
    dp4a(minus_ones, activations, dp4a(codes, activations, sum))
}

/// Σ x T over a block of columns, whose activations start at `first`.
#[cube]
fn dot_block<S: Numeric>(
    word: u32,
    activations: &[u32],
    first: usize,
    #[comptime] arithmetic: Arithmetic,
) -> S {
    if comptime!(arithmetic == Arithmetic::Bytes) {
        let mut sum = 0i32;
        #[unroll]
        for plane in 0..4usize {
            let codes = i32::reinterpret(plane_of(word, comptime!(plane as u32)));
            let four = i32::reinterpret(activations[first + plane]);
            sum = dot_bytes(four, codes, sum);
        }
        S::cast_from(sum)
    } else {
        let mut sum = 0f32;
        #[unroll]
        for plane in 0..4usize {
            let codes = plane_of(word, comptime!(plane as u32));
            if comptime!(arithmetic == Arithmetic::Codes) {
                let four = activations[first + plane];
                #[unroll]
                for j in 0..4usize {
                    sum += activation(four, j) * trit(codes, j);
                }
            } else {
                #[unroll]
                for j in 0..4usize {
                    let value = f32::reinterpret(activations[first + 4 * plane + j]);
                    sum += value * trit(codes, j);
                }
            }
        }
        S::cast_from(sum)
    }
}

/// y `[tokens, rows]` for few tokens: bound by reading the weights, once for every `at_once` tokens.
///
/// A cube takes a row group. Its 16 lanes are the rows, so that units read next to each other, and its
/// 16 parts take blocks in turn; with a scale per group, whole groups in turn, since the parts of a sum
/// are added in the order of the groups.
#[cube(launch, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn product_of_few<S: Numeric, F: Float>(
    activations: &[u32],
    token_scales: &[f32],
    words: &[u32],
    weight_scales: &[f32],
    output: &mut [F],
    sizes: Sizes,
    #[comptime] arithmetic: Arithmetic,
    #[comptime] grouped: bool,
    #[comptime] at_once: usize,
    #[define(S, F)] _dtypes: [ElemType; 2],
) {
    let parts = comptime!(UNITS / BLOCK);
    let per_block = comptime!(arithmetic.words_per_block());
    let lane = UNIT_POS as usize % BLOCK;
    let part = UNIT_POS as usize / BLOCK;
    let row = CUBE_POS_X as usize * BLOCK + lane;
    let first_word = CUBE_POS_X as usize * sizes.blocks * BLOCK + lane;
    let first_token = CUBE_POS_Y as usize * at_once;
    let last_token = sizes.tokens - 1;
    let per_token = sizes.blocks * per_block;
    // A row behind the last is computed like the last, and not written.
    let scales = select(row < sizes.rows, row, sizes.rows - 1) * sizes.scale_stride;

    // This unit adds up one token of the cube.
    let mut total = 0f32;
    let writes = part < at_once;
    if comptime!(grouped) {
        let mut products = Shared::<[f32]>::new_slice(comptime!(UNITS * at_once));
        let groups = sizes.blocks.div_ceil(sizes.blocks_per_scale);
        let mut first_group = 0usize;
        while first_group < groups {
            let group = first_group + part;
            let mut sums = Array::<S>::new(at_once);
            #[unroll]
            for t in 0..at_once {
                sums[t] = S::from_int(0);
            }
            if group < groups {
                let mut block = group * sizes.blocks_per_scale;
                let end = block + sizes.blocks_per_scale;
                let end = select(end < sizes.blocks, end, sizes.blocks);
                while block < end {
                    let word = words[first_word + block * BLOCK];
                    #[unroll]
                    for t in 0..at_once {
                        let token = first_token + t;
                        let token = select(token < sizes.tokens, token, last_token);
                        let first = token * per_token + block * per_block;
                        sums[t] += dot_block::<S>(word, activations, first, arithmetic);
                    }
                    block += 1;
                }
                let scale = weight_scales[scales + group];
                #[unroll]
                for t in 0..at_once {
                    // Added by another unit, so that no compiler joins product and sum.
                    products[t * UNITS + UNIT_POS as usize] = f32::cast_from(sums[t]) * scale;
                }
            }
            sync_cube();
            if writes {
                let left = groups - first_group;
                let left = select(left < parts, left, parts);
                for other in 0..left {
                    total += products[part * UNITS + other * BLOCK + lane];
                }
            }
            sync_cube();
            first_group += parts;
        }
    } else {
        let mut partial = Shared::<[S]>::new_slice(comptime!(UNITS * at_once));
        let mut sums = Array::<S>::new(at_once);
        #[unroll]
        for t in 0..at_once {
            sums[t] = S::from_int(0);
        }
        let mut block = part;
        while block < sizes.blocks {
            let word = words[first_word + block * BLOCK];
            #[unroll]
            for t in 0..at_once {
                let token = first_token + t;
                let token = select(token < sizes.tokens, token, last_token);
                let first = token * per_token + block * per_block;
                sums[t] += dot_block::<S>(word, activations, first, arithmetic);
            }
            block += parts;
        }
        #[unroll]
        for t in 0..at_once {
            partial[t * UNITS + UNIT_POS as usize] = sums[t];
        }
        sync_cube();
        if writes {
            let mut sum = S::from_int(0);
            for other in 0..parts {
                sum += partial[part * UNITS + other * BLOCK + lane];
            }
            total = f32::cast_from(sum);
        }
    }
    let token = first_token + part;
    if writes && token < sizes.tokens && row < sizes.rows {
        let y = epilogue(
            total,
            token_scales,
            token,
            weight_scales[scales],
            arithmetic,
            grouped,
        );
        output[token * sizes.rows + row] = F::cast_from(y);
    }
}

/// y from the sum of its products. With groups the sum has their scales in it already.
#[cube]
fn epilogue(
    sum: f32,
    token_scales: &[f32],
    token: usize,
    weight_scale: f32,
    #[comptime] arithmetic: Arithmetic,
    #[comptime] grouped: bool,
) -> f32 {
    if comptime!(arithmetic == Arithmetic::Floats) {
        if comptime!(grouped) {
            sum
        } else {
            sum * weight_scale
        }
    } else {
        let token_scale = token_scales[token];
        if comptime!(grouped) {
            sum * token_scale
        } else {
            sum * (token_scale * weight_scale)
        }
    }
}

/// y `[tokens, rows]`: a cube computes a tile of 64 tokens and 64 rows, 4 of each in a unit.
///
/// A stage is `stage` blocks of columns in shared memory. `zero` is 0, which the compiler must not
/// know.
#[cube(launch, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
// What is known when the kernel is compiled has an `if` of its own, and kernels have no is_multiple_of.
#[allow(clippy::collapsible_if, clippy::manual_is_multiple_of)]
pub fn product_tiled<S: Numeric, F: Float>(
    activations: &[u32],
    token_scales: &[f32],
    words: &[u32],
    weight_scales: &[f32],
    output: &mut [F],
    sizes: Sizes,
    zero: u32,
    #[comptime] arithmetic: Arithmetic,
    #[comptime] grouped: bool,
    #[comptime] stage: usize,
    #[define(S, F)] _dtypes: [ElemType; 2],
) {
    // Factors of a block: a word of four codes each, or one column each.
    let per_block = comptime!(if arithmetic == Arithmetic::Bytes {
        4
    } else {
        BLOCK
    });
    let depth = comptime!(per_block * stage);
    let unit = UNIT_POS as usize;
    let first_token = CUBE_POS_Y as usize * TILE;
    let first_row = CUBE_POS_X as usize * TILE;
    let my_token = unit / SIDE;
    let my_row = unit % SIDE;
    let mut left = Shared::<[S]>::new_slice(comptime!(depth * STRIDE));
    let mut right = Shared::<[S]>::new_slice(comptime!(depth * STRIDE));
    let mut sums = Array::<S>::new(comptime!(PER_UNIT * PER_UNIT));
    let mut totals = Array::<f32>::new(comptime!(PER_UNIT * PER_UNIT));
    #[unroll]
    for i in 0..comptime!(PER_UNIT * PER_UNIT) {
        sums[i] = S::from_int(0);
        totals[i] = 0f32;
    }

    let mut block = 0usize;
    while block < sizes.blocks {
        stage_activations::<S>(
            activations,
            &mut left,
            first_token,
            block,
            &sizes,
            arithmetic,
            stage,
        );
        stage_weights::<S>(
            words, &mut right, first_row, block, &sizes, arithmetic, stage,
        );
        sync_cube();
        multiply_tiles::<S>(
            &left, &right, &mut sums, my_token, my_row, arithmetic, depth,
        );
        sync_cube();
        block += stage;
        if comptime!(grouped) {
            if block % sizes.blocks_per_scale == 0 || block >= sizes.blocks {
                let group = (block - 1) / sizes.blocks_per_scale;
                #[unroll]
                for r in 0..PER_UNIT {
                    let row = first_row + my_row + r * SIDE;
                    let row = select(row < sizes.rows, row, sizes.rows - 1);
                    let scale = weight_scales[row * sizes.scale_stride + group];
                    #[unroll]
                    for t in 0..PER_UNIT {
                        let i = comptime!(t * PER_UNIT + r);
                        let product = f32::cast_from(sums[i]) * scale;
                        // Kept apart from the sum: joined, they would be rounded once.
                        totals[i] += f32::reinterpret(u32::reinterpret(product) ^ zero);
                        sums[i] = S::from_int(0);
                    }
                }
            }
        }
    }

    #[unroll]
    for t in 0..PER_UNIT {
        let token = first_token + my_token + t * SIDE;
        #[unroll]
        for r in 0..PER_UNIT {
            let row = first_row + my_row + r * SIDE;
            let i = comptime!(t * PER_UNIT + r);
            if token < sizes.tokens && row < sizes.rows {
                let mut sum = totals[i];
                if comptime!(!grouped) {
                    sum = f32::cast_from(sums[i]);
                }
                let scale = weight_scales[row * sizes.scale_stride];
                let y = epilogue(sum, token_scales, token, scale, arithmetic, grouped);
                output[token * sizes.rows + row] = F::cast_from(y);
            }
        }
    }
}

/// Activations of 64 tokens and `stage` blocks, `[depth, token]`; zeros where there are none.
#[cube]
fn stage_activations<S: Numeric>(
    activations: &[u32],
    tile: &mut Shared<[S]>,
    first_token: usize,
    first_block: usize,
    sizes: &Sizes,
    #[comptime] arithmetic: Arithmetic,
    #[comptime] stage: usize,
) {
    let per_block = comptime!(arithmetic.words_per_block());
    let per_stage = comptime!(per_block * stage);
    let per_token = sizes.blocks * per_block;
    #[unroll]
    for i in 0..comptime!((TILE * per_stage).div_ceil(UNITS)) {
        let position = i * UNITS + UNIT_POS as usize;
        let token = position / per_stage;
        let k = position % per_stage;
        let column = first_block * per_block + k;
        let mut word = 0u32;
        if token < TILE {
            if first_token + token < sizes.tokens && column < per_token {
                word = activations[(first_token + token) * per_token + column];
            }
            if comptime!(arithmetic == Arithmetic::Bytes) {
                tile[k * STRIDE + token] = S::cast_from(i32::reinterpret(word));
            } else if comptime!(arithmetic == Arithmetic::Codes) {
                #[unroll]
                for j in 0..4usize {
                    tile[(4 * k + j) * STRIDE + token] = S::cast_from(activation(word, j));
                }
            } else {
                tile[k * STRIDE + token] = S::cast_from(f32::reinterpret(word));
            }
        }
    }
}

/// Weights of 64 rows and `stage` blocks, `[depth, row]`: codes T + 1, four a factor, or trits. Blocks
/// behind the last come out as trits of 0, or meet activations that are zero.
#[cube]
fn stage_weights<S: Numeric>(
    words: &[u32],
    tile: &mut Shared<[S]>,
    first_row: usize,
    first_block: usize,
    sizes: &Sizes,
    #[comptime] arithmetic: Arithmetic,
    #[comptime] stage: usize,
) {
    // A unit takes one plane of a word.
    let row = UNIT_POS as usize % TILE;
    let plane = UNIT_POS as usize / TILE;
    let group = (first_row + row) / BLOCK;
    #[unroll]
    for i in 0..stage {
        let block = first_block + i;
        let mut word = comptime!(crate::ternary::layout::compute::ZERO_WORD).runtime();
        if block < sizes.blocks && first_row + row < sizes.rows {
            word = words[(group * sizes.blocks + block) * BLOCK + row % BLOCK];
        }
        let codes = plane_of(word, plane as u32);
        if comptime!(arithmetic == Arithmetic::Bytes) {
            tile[(4 * i + plane) * STRIDE + row] = S::cast_from(i32::reinterpret(codes));
        } else {
            #[unroll]
            for j in 0..4usize {
                tile[(BLOCK * i + 4 * plane + j) * STRIDE + row] = S::cast_from(trit(codes, j));
            }
        }
    }
}

/// sums `[token, row]` += left `[depth, token]`ᵀ right `[depth, row]`.
#[cube]
fn multiply_tiles<S: Numeric>(
    left: &Shared<[S]>,
    right: &Shared<[S]>,
    sums: &mut Array<S>,
    my_token: usize,
    my_row: usize,
    #[comptime] arithmetic: Arithmetic,
    #[comptime] depth: usize,
) {
    for k in 0..depth {
        let mut rows = Array::<S>::new(PER_UNIT);
        #[unroll]
        for r in 0..PER_UNIT {
            rows[r] = right[k * STRIDE + my_row + r * SIDE];
        }
        #[unroll]
        for t in 0..PER_UNIT {
            let value = left[k * STRIDE + my_token + t * SIDE];
            if comptime!(arithmetic == Arithmetic::Bytes) {
                let value = i32::cast_from(value);
                // Codes are T + 1: what that adds is the same for all rows.
                let minus_ones = i32::reinterpret(0xffff_ffffu32);
                let excess = dp4a(minus_ones, value, 0i32);
                #[unroll]
                for r in 0..PER_UNIT {
                    let sum = dp4a(i32::cast_from(rows[r]), value, excess);
                    sums[comptime!(t * PER_UNIT + r)] += S::cast_from(sum);
                }
            } else {
                #[unroll]
                for r in 0..PER_UNIT {
                    sums[comptime!(t * PER_UNIT + r)] += value * rows[r];
                }
            }
        }
    }
}

/// dx `[tokens, cols]` = dy `[tokens, rows]` times g T: a cube computes a tile of 64 tokens and 64
/// columns, a stage is one row group.
#[cube(launch, address_type = "dynamic")]
pub fn gradient_tiled<F: Float>(
    gradient: &[F],
    words: &[u32],
    weight_scales: &[f32],
    output: &mut [F],
    sizes: Sizes,
    #[define(F)] _dtype: ElemType,
) {
    let unit = UNIT_POS as usize;
    let first_token = CUBE_POS_Y as usize * TILE;
    let first_block = CUBE_POS_X as usize * comptime!(TILE / BLOCK);
    let my_token = unit / SIDE;
    let my_column = unit % SIDE;
    // What this unit stages: one plane of one block of a row.
    let row_in_group = unit % BLOCK;
    let plane = unit / BLOCK % 4;
    let block_in_tile = unit / (4 * BLOCK);
    let block = first_block + block_in_tile;
    let scale_in_row = block / sizes.blocks_per_scale;

    let mut left = Shared::<[f32]>::new_slice(comptime!(BLOCK * STRIDE));
    let mut right = Shared::<[f32]>::new_slice(comptime!(BLOCK * STRIDE));
    let mut sums = Array::<f32>::new(comptime!(PER_UNIT * PER_UNIT));
    #[unroll]
    for i in 0..comptime!(PER_UNIT * PER_UNIT) {
        sums[i] = 0f32;
    }

    let mut first_row = 0usize;
    while first_row < sizes.rows {
        #[unroll]
        for i in 0..comptime!(TILE * BLOCK / UNITS) {
            let position = i * UNITS + unit;
            let token = position / BLOCK;
            let row = position % BLOCK;
            let mut value = 0f32;
            if first_token + token < sizes.tokens && first_row + row < sizes.rows {
                value =
                    f32::cast_from(gradient[(first_token + token) * sizes.rows + first_row + row]);
            }
            left[row * STRIDE + token] = value;
        }
        let row = first_row + row_in_group;
        let mut word = comptime!(crate::ternary::layout::compute::ZERO_WORD).runtime();
        let mut scale = 0f32;
        if block < sizes.blocks && row < sizes.rows {
            word = words[(first_row / BLOCK * sizes.blocks + block) * BLOCK + row_in_group];
            scale = weight_scales[row * sizes.scale_stride + scale_in_row];
        }
        let codes = plane_of(word, plane as u32);
        #[unroll]
        for j in 0..4usize {
            let column = block_in_tile * BLOCK + 4 * plane + j;
            right[row_in_group * STRIDE + column] = scale * trit(codes, j);
        }
        sync_cube();
        multiply_tiles::<f32>(
            &left,
            &right,
            &mut sums,
            my_token,
            my_column,
            Arithmetic::Floats,
            BLOCK,
        );
        sync_cube();
        first_row += BLOCK;
    }

    #[unroll]
    for t in 0..PER_UNIT {
        let token = first_token + my_token + t * SIDE;
        #[unroll]
        for c in 0..PER_UNIT {
            let column = first_block * BLOCK + my_column + c * SIDE;
            if token < sizes.tokens && column < sizes.cols {
                output[token * sizes.cols + column] =
                    F::cast_from(sums[comptime!(t * PER_UNIT + c)]);
            }
        }
    }
}
