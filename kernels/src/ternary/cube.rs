//! The operations on a device that CubeCL compiles for: wgpu, CUDA, and what else burn has of them.

mod products;
mod rounding;

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::ops::numeric::{empty_device_contiguous_dtype, zeros_client};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use self::products::{Arithmetic, SizesLaunch, TILE};
use super::Granularity;
use super::layout::compute::{self, BLOCK};
use super::op::{PackedShape, TernaryOps};
use super::ways::{Way, answer};

/// Units of every cube here: a power of two, and a multiple of what the kernels divide it by.
const UNITS: usize = 256;

/// Cubes that read a matrix for its one scale: enough for any device, few enough to add up again.
const MOST_SUMS: usize = 1024;

/// Up to so many tokens, reading the weights is what takes the time.
const FEW_TOKENS: usize = 16;

/// Columns whose sums Σ q T f32 holds exactly: 128 x 2^17 = 2^24.
const EXACT_IN_F32: usize = 1 << 17;

impl TernaryOps for CubeBackend {
    fn ternary_fake_quantize_weight(
        weight: FloatTensor<Self>,
        granularity: Granularity,
    ) -> FloatTensor<Self> {
        answer::<Self>("ternary_fake_quantize_weight", || Way::CubeCl);
        let weight = into_contiguous(weight);
        let [inputs, outputs] = weight.meta.shape().dims();
        let output = like(&weight, weight.meta.shape().clone(), weight.dtype);
        if inputs * outputs == 0 {
            return output;
        }
        match granularity {
            Granularity::Tensor => round_matrix(weight, &output),
            Granularity::Row => round_columns(weight, &output, inputs),
            Granularity::Group(size) => round_columns(weight, &output, size),
        }
        output
    }

    fn ternary_fake_quantize_activations(x: FloatTensor<Self>) -> FloatTensor<Self> {
        answer::<Self>("ternary_fake_quantize_activations", || Way::CubeCl);
        let x = into_contiguous(x);
        let [tokens, width] = x.meta.shape().dims();
        let output = like(&x, x.meta.shape().clone(), x.dtype);
        if tokens * width > 0 {
            rounding::round_tokens::launch(
                &output.client,
                cubes(&x, tokens),
                CubeDim::new_1d(UNITS as u32),
                address_type(&[&x]),
                x.clone().into_buffer_arg(),
                output.clone().into_buffer_arg(),
                width,
                dtype_to_storage_type(x.dtype),
            );
        }
        output
    }

    fn ternary_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        shape: PackedShape,
    ) -> FloatTensor<Self> {
        answer::<Self>("ternary_linear", || Way::CubeCl);
        let tokens = x.meta.shape()[0];
        let packed = Packed::new(words, scales, shape);
        let arithmetic = arithmetic(&x, &packed);
        product(into_contiguous(x), packed, arithmetic, tokens <= FEW_TOKENS)
    }

    fn ternary_linear_dx(
        dy: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        shape: PackedShape,
    ) -> FloatTensor<Self> {
        answer::<Self>("ternary_linear_dx", || Way::CubeCl);
        gradient(into_contiguous(dy), Packed::new(words, scales, shape))
    }
}

/// Packed weights as kernels read them.
struct Packed {
    words: CubeTensor,
    scales: CubeTensor,
    shape: PackedShape,
}

impl Packed {
    fn new(words: CubeTensor, scales: CubeTensor, shape: PackedShape) -> Self {
        assert_eq!(words.dtype, DType::U32, "packed words are u32");
        let PackedShape { rows, cols, .. } = shape;
        if let Err(error) = compute::check_shape(rows, cols, shape.granularity) {
            panic!("{error}");
        }
        let words = into_contiguous(words);
        let scales = into_contiguous(cast(scales, DType::F32));
        let expected = compute::words(rows, cols);
        assert_eq!(words.meta.num_elements(), expected, "words");
        let expected = shape.granularity.scales(rows, cols);
        assert_eq!(scales.meta.num_elements(), expected, "scales");
        Self {
            words,
            scales,
            shape,
        }
    }

    fn grouped(&self) -> bool {
        matches!(self.shape.granularity, Granularity::Group(_))
    }

    fn blocks(&self) -> usize {
        self.shape.cols.div_ceil(BLOCK)
    }

    fn blocks_per_scale(&self) -> usize {
        match self.shape.granularity {
            Granularity::Tensor | Granularity::Row => self.blocks(),
            Granularity::Group(size) => size / BLOCK,
        }
    }

    fn sizes(&self, tokens: usize) -> SizesLaunch {
        let PackedShape { rows, cols, .. } = self.shape;
        let scale_stride = match self.shape.granularity {
            Granularity::Tensor => 0,
            Granularity::Row => 1,
            Granularity::Group(_) => self.shape.granularity.scales_per_row(cols),
        };
        SizesLaunch::new(
            tokens,
            rows,
            cols,
            self.blocks(),
            self.blocks_per_scale(),
            scale_stride,
        )
    }
}

/// A tensor without values beside `x`. Its rows follow each other: those of other empty tensors are
/// padded where a device likes that, as CUDA's do.
fn like(x: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), shape, dtype)
}

/// Sums of nothing.
fn empty_sums(x: &CubeTensor, shape: [usize; 2]) -> CubeTensor {
    let shape = Shape::new(shape);
    if shape.num_elements() == 0 {
        return like(x, shape, x.dtype);
    }
    zeros_client(x.client.clone(), x.device.clone(), shape, x.dtype)
}

/// At least so many cubes, spread over the dimensions of the grid.
fn cubes(x: &CubeTensor, count: usize) -> CubeCount {
    calculate_cube_count_elemwise(&x.client, count * UNITS, CubeDim::new_1d(UNITS as u32))
}

/// What holds the index of any element of these.
fn address_type(tensors: &[&CubeTensor]) -> AddressType {
    let types = tensors.iter().map(|tensor| tensor.required_address_type());
    types.max().unwrap_or_default()
}

fn round_matrix(weight: CubeTensor, output: &CubeTensor) {
    let count = weight.meta.num_elements();
    let dtype = dtype_to_storage_type(weight.dtype);
    let sums = count.div_ceil(UNITS).min(MOST_SUMS);
    let cubes = CubeCount::Static(sums as u32, 1, 1);
    let sums = like(&weight, Shape::new([sums]), DType::F32);
    rounding::sum_magnitudes::launch(
        &output.client,
        cubes.clone(),
        CubeDim::new_1d(UNITS as u32),
        address_type(&[&weight]),
        weight.clone().into_buffer_arg(),
        sums.clone().into_buffer_arg(),
        dtype,
    );
    rounding::round_matrix::launch(
        &output.client,
        cubes,
        CubeDim::new_1d(UNITS as u32),
        address_type(&[&weight]),
        weight.into_buffer_arg(),
        sums.into_buffer_arg(),
        output.clone().into_buffer_arg(),
        count as f32,
        dtype,
    );
}

fn round_columns(weight: CubeTensor, output: &CubeTensor, size: usize) {
    let [inputs, outputs] = weight.meta.shape().dims();
    let count = outputs.div_ceil(rounding::STRIP) * inputs.div_ceil(size);
    rounding::round_columns::launch(
        &output.client,
        cubes(&weight, count),
        CubeDim::new_1d(UNITS as u32),
        address_type(&[&weight]),
        weight.clone().into_buffer_arg(),
        output.clone().into_buffer_arg(),
        inputs,
        outputs,
        size,
        dtype_to_storage_type(weight.dtype),
    );
}

/// How to multiply on the device of `x`.
fn arithmetic(x: &CubeTensor, packed: &Packed) -> Arithmetic {
    let columns = packed.blocks_per_scale() * BLOCK;
    if !packed.shape.rounds_activations {
        Arithmetic::Floats
    } else if x.client.name() == "wgpu<spirv>" || columns > EXACT_IN_F32 {
        // Of CubeCL's compilers that is the one that has an instruction for it; the others spell the
        // dot product of bytes out, in more steps than products of floats take.
        Arithmetic::Bytes
    } else {
        Arithmetic::Codes
    }
}

/// Activations as words (see [`products`]), and the scale of each token.
fn activations(x: CubeTensor, packed: &Packed, arithmetic: Arithmetic) -> (CubeTensor, CubeTensor) {
    let [tokens, width] = x.meta.shape().dims();
    let words_per_token = packed.blocks() * arithmetic.words_per_block();
    let dtype = dtype_to_storage_type(x.dtype);
    if arithmetic == Arithmetic::Floats {
        let scales = packed.scales.clone();
        if x.dtype == DType::F32 && words_per_token == width {
            return (x, scales);
        }
        let words = like(&x, Shape::new([tokens, words_per_token]), DType::U32);
        rounding::widen_tokens::launch(
            &words.client,
            cubes(&x, (tokens * words_per_token).div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            address_type(&[&x, &words]),
            x.into_buffer_arg(),
            words.clone().into_buffer_arg(),
            width,
            words_per_token,
            dtype,
        );
        return (words, scales);
    }
    let words = like(&x, Shape::new([tokens, words_per_token]), DType::U32);
    let scales = like(&x, Shape::new([tokens]), DType::F32);
    rounding::quantize_tokens::launch(
        &words.client,
        cubes(&x, tokens),
        CubeDim::new_1d(UNITS as u32),
        address_type(&[&x]),
        x.into_buffer_arg(),
        words.clone().into_buffer_arg(),
        scales.clone().into_buffer_arg(),
        width,
        words_per_token,
        dtype,
    );
    (words, scales)
}

/// y `[tokens, rows]`.
fn product(x: CubeTensor, packed: Packed, arithmetic: Arithmetic, few: bool) -> CubeTensor {
    let [tokens, width] = x.meta.shape().dims();
    let PackedShape { rows, cols, .. } = packed.shape;
    assert_eq!(width, cols, "x is [tokens, cols]");
    if tokens * rows * cols == 0 {
        return empty_sums(&x, [tokens, rows]);
    }
    let output = like(&x, Shape::new([tokens, rows]), x.dtype);
    let (activations, token_scales) = activations(x, &packed, arithmetic);
    let sums = match arithmetic {
        Arithmetic::Bytes => DType::I32,
        Arithmetic::Codes | Arithmetic::Floats => DType::F32,
    };
    let dtypes = [sums, output.dtype].map(dtype_to_storage_type);
    let address_type = address_type(&[&activations, &packed.words, &output]);
    let (grouped, sizes) = (packed.grouped(), packed.sizes(tokens));
    if few {
        let at_once = if tokens == 1 { 1 } else { 4 };
        products::product_of_few::launch(
            &output.client,
            CubeCount::Static(
                rows.div_ceil(BLOCK) as u32,
                tokens.div_ceil(at_once) as u32,
                1,
            ),
            CubeDim::new_1d(UNITS as u32),
            address_type,
            activations.into_buffer_arg(),
            token_scales.into_buffer_arg(),
            packed.words.into_buffer_arg(),
            packed.scales.into_buffer_arg(),
            output.clone().into_buffer_arg(),
            sizes,
            arithmetic,
            grouped,
            at_once,
            dtypes,
        );
    } else {
        // A stage of whole groups, and of sixteen factors where bytes leave only four of a block.
        let whole = !grouped || packed.blocks_per_scale().is_multiple_of(4);
        let stage = match arithmetic {
            Arithmetic::Bytes if whole => 4,
            _ => 1,
        };
        products::product_tiled::launch(
            &output.client,
            CubeCount::Static(rows.div_ceil(TILE) as u32, tokens.div_ceil(TILE) as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            address_type,
            activations.into_buffer_arg(),
            token_scales.into_buffer_arg(),
            packed.words.into_buffer_arg(),
            packed.scales.into_buffer_arg(),
            output.clone().into_buffer_arg(),
            sizes,
            0,
            arithmetic,
            grouped,
            stage,
            dtypes,
        );
    }
    output
}

/// dx `[tokens, cols]`.
fn gradient(dy: CubeTensor, packed: Packed) -> CubeTensor {
    let [tokens, width] = dy.meta.shape().dims();
    let PackedShape { rows, cols, .. } = packed.shape;
    assert_eq!(width, rows, "dy is [tokens, rows]");
    if tokens * rows * cols == 0 {
        return empty_sums(&dy, [tokens, cols]);
    }
    let output = like(&dy, Shape::new([tokens, cols]), dy.dtype);
    products::gradient_tiled::launch(
        &output.client,
        CubeCount::Static(cols.div_ceil(TILE) as u32, tokens.div_ceil(TILE) as u32, 1),
        CubeDim::new_1d(UNITS as u32),
        address_type(&[&dy, &packed.words, &output]),
        dy.clone().into_buffer_arg(),
        packed.words.clone().into_buffer_arg(),
        packed.scales.clone().into_buffer_arg(),
        output.clone().into_buffer_arg(),
        packed.sizes(tokens),
        dtype_to_storage_type(dy.dtype),
    );
    output
}
