//! The products by operations that every backend of burn has.

use burn::backend::Backend;
use burn::backend::TensorMetadata;
use burn::backend::tensor::{Device, FloatTensor, IntTensor};
use burn::tensor::{FloatDType, Shape, Slice, TensorData};

use super::layout::BLOCK;
use super::tables::DYNAMIC_MAP;
use super::{BlockwiseShape, Format, SCALE_BLOCK};
use crate::ways::{Way, answer};

pub fn linear<B: Backend>(
    x: FloatTensor<B>,
    words: IntTensor<B>,
    scales: FloatTensor<B>,
    side: IntTensor<B>,
    shape: BlockwiseShape,
) -> FloatTensor<B> {
    answer::<B>("blockwise_linear", || Way::Composed);
    let weight = dequantised::<B>(words, scales, side, shape);
    in_f32::<B>(x, |x| B::float_matmul(x, B::float_transpose(weight)))
}

pub fn linear_dx<B: Backend>(
    dy: FloatTensor<B>,
    words: IntTensor<B>,
    scales: FloatTensor<B>,
    side: IntTensor<B>,
    shape: BlockwiseShape,
) -> FloatTensor<B> {
    answer::<B>("blockwise_linear_dx", || Way::Composed);
    let weight = dequantised::<B>(words, scales, side, shape);
    in_f32::<B>(dy, |dy| B::float_matmul(dy, weight))
}

/// W' `[rows, cols]` in f32: the price of having no kernel.
fn dequantised<B: Backend>(
    words: IntTensor<B>,
    scales: FloatTensor<B>,
    side: IntTensor<B>,
    shape: BlockwiseShape,
) -> FloatTensor<B> {
    let BlockwiseShape {
        rows,
        cols,
        format,
        block,
        ..
    } = shape;
    let (groups, per_word) = (shape.row_groups(), format.codes_per_word());
    let device = scales.device();
    // [groups, words of a row, rows of a group, codes of a word]
    let width = cols.next_multiple_of(BLOCK);
    let words = B::int_reshape(words, Shape::new([groups, width / per_word, BLOCK, 1]));
    let codes = parts::<B>(words, format.bits(), per_word, 3);
    let codes = B::int_swap_dims(codes, 1, 2);
    let codes = B::int_reshape(codes, Shape::new([groups * BLOCK, width]));
    let codes = B::int_slice(codes, &[Slice::from(0..rows), Slice::from(0..cols)]);
    let codes = B::int_reshape(codes, Shape::new([rows * cols]));
    let weights = levels::<B>(codes, format, &device);
    // Blocks go along rows, the last may be short: behind it comes anything.
    let (blocks, elements) = (shape.blocks(), rows * cols);
    let weights = padded::<B>(weights, blocks * block - elements, &device);
    let blocked = Shape::new([blocks, block]);
    let mut weights = B::float_reshape(weights, blocked.clone());
    if format.has_zero_points() {
        let zeros = B::int_slice(
            side.clone(),
            &[Slice::from(shape.scale_code_words()..shape.side_words())],
        );
        let count = shape.side_words() - shape.scale_code_words();
        let zeros = parts::<B>(B::int_reshape(zeros, Shape::new([count, 1])), 4, 8, 1);
        let zeros = B::int_reshape(zeros, Shape::new([8 * count]));
        let zeros = by_blocks::<B>(B::int_into_float(zeros, FloatDType::F32), shape);
        let zeros = B::float_reshape(zeros, Shape::new([blocks, 1]));
        weights = B::float_sub(weights, B::float_expand(zeros, blocked.clone()));
    }
    let scales = expanded::<B>(scales, side, shape, &device);
    let scales = B::float_reshape(scales, Shape::new([blocks, 1]));
    let weights = B::float_mul(weights, B::float_expand(scales, blocked));
    let weights = B::float_reshape(weights, Shape::new([blocks * block]));
    let weights = B::float_slice(weights, &[Slice::from(0..elements)]);
    B::float_reshape(weights, Shape::new([rows, cols]))
}

/// So many codes of so many bits from each word, along a last dimension that was of one.
fn parts<B: Backend>(words: IntTensor<B>, bits: usize, count: usize, dim: usize) -> IntTensor<B> {
    let mask = (1i64 << bits) - 1;
    let parts = (0..count).map(|i| {
        let part = B::bitwise_right_shift_scalar(words.clone(), ((bits * i) as i64).into());
        B::bitwise_and_scalar(part, mask.into())
    });
    B::int_cat(parts.collect(), dim)
}

/// What codes `[n]` stand for, before zero points and scales.
fn levels<B: Backend>(codes: IntTensor<B>, format: Format, device: &Device<B>) -> FloatTensor<B> {
    let levels: Vec<f32> = match format.levels() {
        Some(levels) => levels.to_vec(),
        None => (0..=255u8).map(|code| f32::from(code as i8)).collect(),
    };
    looked_up::<B>(&levels, codes, device)
}

fn looked_up<B: Backend>(table: &[f32], codes: IntTensor<B>, device: &Device<B>) -> FloatTensor<B> {
    let data = TensorData::new(table.to_vec(), [table.len()]);
    B::float_select(B::float_from_data(data, device), 0, codes)
}

/// The scales of all blocks `[blocks]`.
fn expanded<B: Backend>(
    scales: FloatTensor<B>,
    side: IntTensor<B>,
    shape: BlockwiseShape,
    device: &Device<B>,
) -> FloatTensor<B> {
    let scales = B::float_cast(scales, FloatDType::F32);
    if !shape.double {
        return by_blocks::<B>(scales, shape);
    }
    let (blocks, groups, words) = (
        shape.blocks(),
        shape.scale_blocks(),
        shape.scale_code_words(),
    );
    let codes = B::int_slice(side, &[Slice::from(0..words)]);
    let codes = parts::<B>(B::int_reshape(codes, Shape::new([words, 1])), 8, 4, 1);
    let codes = B::int_reshape(codes, Shape::new([4 * words]));
    let levels = by_blocks::<B>(looked_up::<B>(&*DYNAMIC_MAP, codes, device), shape);
    let levels = padded::<B>(levels, groups * SCALE_BLOCK - blocks, device);
    let grouped = Shape::new([groups, SCALE_BLOCK]);
    let of_groups = B::float_slice(scales.clone(), &[Slice::from(0..groups)]);
    let of_groups = B::float_reshape(of_groups, Shape::new([groups, 1]));
    let of_groups = B::float_expand(of_groups, grouped.clone());
    let mean = B::float_slice(scales, &[Slice::from(groups..groups + 1)]);
    let mean = B::float_reshape(mean, Shape::new([1, 1]));
    let mean = B::float_expand(mean, grouped.clone());
    let scales = B::float_mul(B::float_reshape(levels, grouped), of_groups);
    let scales = B::float_reshape(
        B::float_add(scales, mean),
        Shape::new([groups * SCALE_BLOCK]),
    );
    B::float_slice(scales, &[Slice::from(0..blocks)])
}

/// Of values by places, and perhaps others behind them, those of blocks in their order.
fn by_blocks<B: Backend>(values: FloatTensor<B>, shape: BlockwiseShape) -> FloatTensor<B> {
    let values = B::float_slice(values, &[Slice::from(0..shape.places())]);
    let Some(per_row) = shape.blocks_per_row() else {
        return values;
    };
    let groups = shape.row_groups();
    let values = B::float_reshape(values, Shape::new([groups, per_row, BLOCK]));
    let values = B::float_swap_dims(values, 1, 2);
    let values = B::float_reshape(values, Shape::new([groups * BLOCK * per_row]));
    B::float_slice(values, &[Slice::from(0..shape.blocks())])
}

/// So many zeros behind values `[n]`.
fn padded<B: Backend>(values: FloatTensor<B>, zeros: usize, device: &Device<B>) -> FloatTensor<B> {
    if zeros == 0 {
        return values;
    }
    let zeros = B::float_zeros(Shape::new([zeros]), device, FloatDType::F32);
    B::float_cat(vec![values, zeros], 0)
}

fn in_f32<B: Backend>(
    x: FloatTensor<B>,
    change: impl FnOnce(FloatTensor<B>) -> FloatTensor<B>,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let x = change(B::float_cast(x, FloatDType::F32));
    B::float_cast(x, dtype.into())
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;

    use super::*;
    use crate::blockwise::{quantise, reference};

    const TOKENS: usize = 3;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        let value = |i: usize| ((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0;
        (0..count).map(value).collect()
    }

    fn tensor(values: &[f32], dims: [usize; 2]) -> FloatTensor<Flex> {
        FloatTensor::<Flex>::from_data(TensorData::new(values.to_vec(), dims))
    }

    fn assert_close(found: FloatTensor<Flex>, expected: &[f64]) {
        let found = found.to_contiguous();
        let found = found.as_slice::<f32>().unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-4,
                "{found} for {expected}"
            );
        }
    }

    #[test]
    fn bodies_without_kernels_agree_with_the_reference() {
        for format in Format::ALL {
            for (rows, cols, block, double) in [
                (21, 48, 16, false),
                (5, 37, 10, true),
                (40, 60, 64, true),
                (33, 80, 9, true),
            ] {
                let shape = BlockwiseShape {
                    rows,
                    cols,
                    format,
                    block,
                    double,
                };
                let quantised = quantise(&values(rows * cols, 3), shape).unwrap();
                let weights = quantised.dequantise();
                let operands = quantised.operands();
                let words = [shape.row_groups(), shape.words_per_group()];
                let words = IntTensor::<Flex>::from_data(TensorData::new(operands.words, words));
                let scales = TensorData::new(operands.scales, [shape.scales()]);
                let scales = FloatTensor::<Flex>::from_data(scales);
                let side = TensorData::new(operands.side, [shape.side_words()]);
                let side = IntTensor::<Flex>::from_data(side);
                let (x, dy) = (values(TOKENS * cols, 1), values(TOKENS * rows, 2));
                let sizes = [TOKENS, rows, cols];
                let expected = reference::linear_f64(&x, &weights, sizes);
                let x = tensor(&x, [TOKENS, cols]);
                let y = linear::<Flex>(x, words.clone(), scales.clone(), side.clone(), shape);
                assert_close(y, &expected);
                let expected = reference::linear_dx_f64(&dy, &weights, sizes);
                let dy = tensor(&dy, [TOKENS, rows]);
                assert_close(linear_dx::<Flex>(dy, words, scales, side, shape), &expected);
            }
        }
    }
}
