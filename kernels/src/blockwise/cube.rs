//! The products on a device that CubeCL compiles for: wgpu, CUDA, and what else burn has of them.

mod products;

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::ops::numeric::{empty_device_contiguous_dtype, zeros_client};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use self::products::{Kind, SizesLaunch, TILE};
use super::BlockwiseShape;
use super::layout::BLOCK;
use super::op::BlockwiseOps;
use crate::ways::{Way, answer};

/// Units of every cube here: a power of two, and a multiple of what the kernels divide it by.
const UNITS: usize = 256;

/// Up to so many tokens, reading the weights is what takes the time.
const FEW_TOKENS: usize = 16;

impl BlockwiseOps for CubeBackend {
    fn blockwise_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        side: IntTensor<Self>,
        shape: BlockwiseShape,
    ) -> FloatTensor<Self> {
        answer::<Self>("blockwise_linear", || Way::CubeCl);
        product(into_contiguous(x), Weights::new(words, scales, side, shape))
    }

    fn blockwise_linear_dx(
        dy: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        side: IntTensor<Self>,
        shape: BlockwiseShape,
    ) -> FloatTensor<Self> {
        answer::<Self>("blockwise_linear_dx", || Way::CubeCl);
        gradient(
            into_contiguous(dy),
            Weights::new(words, scales, side, shape),
        )
    }
}

/// Weights as kernels read them.
struct Weights {
    words: CubeTensor,
    scales: CubeTensor,
    side: CubeTensor,
    shape: BlockwiseShape,
}

impl Weights {
    fn new(words: CubeTensor, scales: CubeTensor, side: CubeTensor, shape: BlockwiseShape) -> Self {
        if let Err(error) = shape.check() {
            panic!("{error}");
        }
        for words in [&words, &side] {
            assert_eq!(words.dtype, DType::U32, "packed words are u32");
        }
        let weights = Self {
            words: into_contiguous(words),
            scales: into_contiguous(cast(scales, DType::F32)),
            side: into_contiguous(side),
            shape,
        };
        let count = |tensor: &CubeTensor| tensor.meta.num_elements();
        assert_eq!(count(&weights.words), shape.words(), "words");
        assert_eq!(count(&weights.scales), shape.scales(), "scales");
        assert_eq!(count(&weights.side), shape.side_words(), "side words");
        weights
    }

    fn kind(&self) -> Kind {
        Kind {
            format: self.shape.format,
            double: self.shape.double,
            whole: self.shape.blocks_per_row().is_some(),
        }
    }

    fn sizes(&self, tokens: usize) -> SizesLaunch {
        let shape = &self.shape;
        SizesLaunch::new(
            tokens,
            shape.rows,
            shape.cols,
            shape.words_per_group() / BLOCK,
            // A block that is longer than the matrix is the matrix; its size need not fit a device's integers.
            shape.block.min(shape.elements()),
            shape.scales() - 1,
            shape.scale_code_words(),
        )
    }
}

/// A tensor without values beside `x`. Its rows follow each other: those of other empty tensors are padded where a
/// device likes that, as CUDA's do.
fn like(x: &CubeTensor, shape: Shape) -> CubeTensor {
    empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), shape, x.dtype)
}

/// Sums of nothing.
fn empty_sums(x: &CubeTensor, shape: [usize; 2]) -> CubeTensor {
    let shape = Shape::new(shape);
    if shape.num_elements() == 0 {
        return like(x, shape);
    }
    zeros_client(x.client.clone(), x.device.clone(), shape, x.dtype)
}

/// What holds the index of any element of these.
fn address_type(tensors: &[&CubeTensor]) -> AddressType {
    let types = tensors.iter().map(|tensor| tensor.required_address_type());
    types.max().unwrap_or_default()
}

/// y `[tokens, rows]`.
fn product(x: CubeTensor, weights: Weights) -> CubeTensor {
    let [tokens, width] = x.meta.shape().dims();
    let BlockwiseShape { rows, cols, .. } = weights.shape;
    assert_eq!(width, cols, "x is [tokens, cols]");
    if tokens * rows * cols == 0 {
        return empty_sums(&x, [tokens, rows]);
    }
    let output = like(&x, Shape::new([tokens, rows]));
    let (kind, sizes) = (weights.kind(), weights.sizes(tokens));
    let address_type = address_type(&[&x, &weights.words, &output]);
    let dtype = dtype_to_storage_type(x.dtype);
    let units = CubeDim::new_1d(UNITS as u32);
    if tokens <= FEW_TOKENS {
        let at_once = if tokens == 1 { 1 } else { 4 };
        products::product_of_few::launch(
            &output.client,
            CubeCount::Static(
                rows.div_ceil(BLOCK) as u32,
                tokens.div_ceil(at_once) as u32,
                1,
            ),
            units,
            address_type,
            x.into_buffer_arg(),
            weights.words.into_buffer_arg(),
            weights.scales.into_buffer_arg(),
            weights.side.into_buffer_arg(),
            output.clone().into_buffer_arg(),
            sizes,
            kind,
            at_once,
            dtype,
        );
    } else {
        products::product_tiled::launch(
            &output.client,
            CubeCount::Static(rows.div_ceil(TILE) as u32, tokens.div_ceil(TILE) as u32, 1),
            units,
            address_type,
            x.into_buffer_arg(),
            weights.words.into_buffer_arg(),
            weights.scales.into_buffer_arg(),
            weights.side.into_buffer_arg(),
            output.clone().into_buffer_arg(),
            sizes,
            kind,
            dtype,
        );
    }
    output
}

/// dx `[tokens, cols]`.
fn gradient(dy: CubeTensor, weights: Weights) -> CubeTensor {
    let [tokens, width] = dy.meta.shape().dims();
    let BlockwiseShape { rows, cols, .. } = weights.shape;
    assert_eq!(width, rows, "dy is [tokens, rows]");
    if tokens * rows * cols == 0 {
        return empty_sums(&dy, [tokens, cols]);
    }
    let output = like(&dy, Shape::new([tokens, cols]));
    let (kind, sizes) = (weights.kind(), weights.sizes(tokens));
    products::gradient_tiled::launch(
        &output.client,
        CubeCount::Static(cols.div_ceil(TILE) as u32, tokens.div_ceil(TILE) as u32, 1),
        CubeDim::new_1d(UNITS as u32),
        address_type(&[&dy, &weights.words, &output]),
        dy.clone().into_buffer_arg(),
        weights.words.into_buffer_arg(),
        weights.scales.into_buffer_arg(),
        weights.side.into_buffer_arg(),
        output.clone().into_buffer_arg(),
        sizes,
        kind,
        dtype_to_storage_type(dy.dtype),
    );
    output
}
