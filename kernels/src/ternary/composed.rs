//! The operations by those that every backend of burn has.

use burn::backend::Backend;
use burn::backend::TensorMetadata;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{FloatDType, Shape, Slice};

use super::layout::compute;
use super::op::{PackedShape, TernaryOps};
use super::ways::{Way, answer};
use super::{Granularity, SMALLEST_ACTIVATION, SMALLEST_MEAN};

pub fn weight<B: Backend>(weight: FloatTensor<B>, granularity: Granularity) -> FloatTensor<B> {
    answer::<B>("ternary_fake_quantize_weight", || Way::Composed);
    in_f32::<B>(weight, |weight| {
        let shape = weight.shape();
        let (inputs, outputs) = (shape[0], shape[1]);
        // [groups, weights of a group, outputs]: the mean is over the second.
        let grouped = match granularity {
            Granularity::Tensor => Shape::new([1, inputs * outputs, 1]),
            Granularity::Row => Shape::new([1, inputs, outputs]),
            Granularity::Group(size) => Shape::new([inputs / size, size, outputs]),
        };
        let weight = B::float_reshape(weight, grouped);
        let mean = B::float_mean_dim(B::float_abs(weight.clone()), 1);
        let scale = B::float_clamp_min(mean, SMALLEST_MEAN.into());
        let scale = B::float_expand(scale, weight.shape());
        let trits = B::float_round(B::float_div(weight, scale.clone()));
        let trits = B::float_clamp(trits, (-1.0).into(), 1.0.into());
        B::float_reshape(B::float_mul(trits, scale), shape)
    })
}

pub fn activations<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    answer::<B>("ternary_fake_quantize_activations", || Way::Composed);
    in_f32::<B>(x, |x| {
        let shape = x.shape();
        let max = B::float_clamp_min(
            B::float_max_abs_dim(x.clone(), 1),
            SMALLEST_ACTIVATION.into(),
        );
        let scale = B::float_div_scalar(max, 127.0.into());
        let scale = B::float_expand(scale, shape);
        let codes = B::float_round(B::float_div(x, scale.clone()));
        let codes = B::float_clamp(codes, (-128.0).into(), 127.0.into());
        B::float_mul(codes, scale)
    })
}

pub fn int8_matmul<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    answer::<B>("ternary_int8_matmul", || Way::Composed);
    B::float_matmul(x, weight)
}

pub fn linear<B: Backend + TernaryOps>(
    x: FloatTensor<B>,
    words: IntTensor<B>,
    scales: FloatTensor<B>,
    shape: PackedShape,
) -> FloatTensor<B> {
    answer::<B>("ternary_linear", || Way::Composed);
    let x = if shape.rounds_activations {
        B::ternary_fake_quantize_activations(x)
    } else {
        x
    };
    let weight = unpacked::<B>(words, scales, shape);
    in_f32::<B>(x, |x| B::float_matmul(x, B::float_transpose(weight)))
}

pub fn linear_dx<B: Backend>(
    dy: FloatTensor<B>,
    words: IntTensor<B>,
    scales: FloatTensor<B>,
    shape: PackedShape,
) -> FloatTensor<B> {
    answer::<B>("ternary_linear_dx", || Way::Composed);
    let weight = unpacked::<B>(words, scales, shape);
    in_f32::<B>(dy, |dy| B::float_matmul(dy, weight))
}

/// W' `[rows, cols]` in f32: the price of having no kernel.
fn unpacked<B: Backend>(
    words: IntTensor<B>,
    scales: FloatTensor<B>,
    shape: PackedShape,
) -> FloatTensor<B> {
    const BLOCK: usize = compute::BLOCK;
    let PackedShape { rows, cols, .. } = shape;
    let (groups, blocks) = (rows.div_ceil(BLOCK), cols.div_ceil(BLOCK));
    // [groups, blocks, rows of a group], and a last dimension of the columns of a block.
    let words = B::int_reshape(words, Shape::new([groups, blocks, BLOCK, 1]));
    let codes = (0..BLOCK).map(|col| {
        let shift = compute::shift(col);
        let code = B::bitwise_right_shift_scalar(words.clone(), (shift as i64).into());
        B::bitwise_and_scalar(code, 3.into())
    });
    let codes = B::int_cat(codes.collect(), 3);
    let trits = B::int_into_float(codes, FloatDType::F32);
    let trits = B::float_sub_scalar(trits, 1.0.into());
    let trits = B::float_swap_dims(trits, 1, 2);
    let trits = B::float_reshape(trits, Shape::new([groups * BLOCK, blocks * BLOCK]));
    let trits = B::float_slice(trits, &[Slice::from(0..rows), Slice::from(0..cols)]);
    // A scale for each run of columns.
    let (scales_dims, run) = match shape.granularity {
        Granularity::Tensor => ([1, 1], cols),
        Granularity::Row => ([rows, 1], cols),
        Granularity::Group(size) => ([rows, cols / size], size),
    };
    let runs = Shape::new([rows, cols / run, run]);
    let scales = B::float_reshape(
        B::float_cast(scales, FloatDType::F32),
        Shape::new([scales_dims[0], scales_dims[1], 1]),
    );
    let scales = B::float_expand(scales, runs.clone());
    let weight = B::float_mul(B::float_reshape(trits, runs), scales);
    B::float_reshape(weight, Shape::new([rows, cols]))
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
    use burn::tensor::TensorData;

    use super::*;
    use crate::ternary::reference;

    const TOKENS: usize = 3;
    const ROWS: usize = 21;
    const COLS: usize = 48;

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
        let (x, dy) = (values(TOKENS * COLS, 1), values(TOKENS * ROWS, 2));
        let weight = values(ROWS * COLS, 3);
        let sizes = [TOKENS, ROWS, COLS];
        for granularity in [
            Granularity::Tensor,
            Granularity::Row,
            Granularity::Group(16),
        ] {
            let (trits, scales) = reference::quantise_weights(&weight, ROWS, COLS, granularity);
            let rounded: Vec<f64> = (0..COLS * ROWS)
                .map(|i| (i % ROWS, i / ROWS))
                .map(|(row, col)| {
                    let scale = scales[reference::scale_index(granularity, COLS, row, col)];
                    f64::from(scale) * f64::from(trits[row * COLS + col])
                })
                .collect();
            let latent: Vec<f32> = (0..COLS * ROWS)
                .map(|i| weight[i % ROWS * COLS + i / ROWS])
                .collect();
            let found = super::weight::<Flex>(tensor(&latent, [COLS, ROWS]), granularity);
            assert_close(found, &rounded);

            let words = compute::pack(&trits, ROWS, COLS).unwrap();
            let words_dims = [ROWS.div_ceil(compute::BLOCK), words.len() / 2];
            let words = IntTensor::<Flex>::from_data(TensorData::new(words, words_dims));
            let count = scales.len();
            let packed_scales =
                FloatTensor::<Flex>::from_data(TensorData::new(scales.clone(), [count]));
            for rounds_activations in [true, false] {
                let shape = PackedShape {
                    rows: ROWS,
                    cols: COLS,
                    granularity,
                    rounds_activations,
                };
                let expected = if rounds_activations {
                    let y = reference::linear(&x, &trits, &scales, sizes, granularity);
                    y.into_iter().map(f64::from).collect()
                } else {
                    reference::linear_f64(&x, &trits, &scales, sizes, granularity)
                };
                let x = tensor(&x, [TOKENS, COLS]);
                let (words, scales) = (words.clone(), packed_scales.clone());
                assert_close(linear::<Flex>(x, words, scales, shape), &expected);
            }
            let shape = PackedShape {
                rows: ROWS,
                cols: COLS,
                granularity,
                rounds_activations: true,
            };
            let expected = reference::linear_dx_f64(&dy, &trits, &scales, sizes, granularity);
            let dy = tensor(&dy, [TOKENS, ROWS]);
            assert_close(
                linear_dx::<Flex>(dy, words, packed_scales, shape),
                &expected,
            );
        }
    }

    #[test]
    fn activations_are_rounded_as_the_reference_says() {
        let x = values(TOKENS * COLS, 4);
        let expected: Vec<f64> = (x.chunks(COLS))
            .flat_map(|token| {
                let (codes, scale) = reference::quantise_token(token);
                let value = move |code| f64::from(scale) * f64::from(code);
                codes.into_iter().map(value).collect::<Vec<_>>()
            })
            .collect();
        assert_close(activations::<Flex>(tensor(&x, [TOKENS, COLS])), &expected);
    }
}
