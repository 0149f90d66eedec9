//! What a linear layer multiplies by: dense weights, packed trits, or blockwise codes.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_kernels::blockwise::layout::BlockwiseView;
use firebrick_kernels::blockwise::{BlockwiseShape, blockwise_linear};
use firebrick_kernels::ternary::cpu::latent::{Order, pack_quantised};
use firebrick_kernels::ternary::layout::compute;
use firebrick_kernels::ternary::{Granularity, PackedShape, ternary_linear};

use super::init::Init;
use crate::config::{Blockwise, Ternary};

/// What a linear layer multiplies by.
#[derive(Module, Debug)]
pub enum Weight {
    /// `[in, out]`, the layout in which the forward product and both products of the backward pass
    /// read and write contiguous rows; files hold `[out, in]`.
    Dense(Param<Tensor<2>>),
    /// Trits and scales, which are not trained.
    Packed(PackedWeight),
    /// Codes of four or eight bits and a scale for each block, which are not trained.
    Quantised(QuantisedWeight),
}

/// Ternary weights in two bits each; bytes as
/// [`compute`](firebrick_kernels::ternary::layout::compute) has them.
#[derive(Module, Debug)]
pub struct PackedWeight {
    /// `[groups of 16 outputs, words of a group]`, u32.
    pub words: Param<Tensor<2, Int>>,
    /// `[scales]`, f32: one, one an output, or one a group of each output.
    pub scales: Param<Tensor<1>>,
    #[module(skip)]
    shape: PackedShape,
}

/// Blockwise weights; bytes as [`layout`](firebrick_kernels::blockwise::layout) has them.
#[derive(Module, Debug)]
pub struct QuantisedWeight {
    /// `[groups of 16 outputs, words of a group]`, u32.
    pub words: Param<Tensor<2, Int>>,
    /// `[scales]`, f32.
    pub scales: Param<Tensor<1>>,
    /// `[side words]`, u32: what else there is of scales and zero points.
    pub side: Param<Tensor<1, Int>>,
    #[module(skip)]
    shape: BlockwiseShape,
}

impl Weight {
    /// `[in, out]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.lazy_shape().dims(),
            Self::Packed(weight) => [weight.shape.cols, weight.shape.rows],
            Self::Quantised(weight) => [weight.shape.cols, weight.shape.rows],
        }
    }
}

impl PackedWeight {
    /// Of W' `[in, out]`.
    pub(super) fn new(rounded: Tensor<2>, ternary: Ternary) -> Self {
        let [inputs, outputs] = rounded.dims();
        let device = rounded.device();
        let shape = packed_shape(inputs, outputs, ternary);
        let values = rounded.cast(DType::F32).into_data();
        // It is f32, and contiguous.
        let values = values.as_slice::<f32>().expect("f32 values");
        let dims = [outputs, inputs];
        let packed = pack_quantised(values, dims, Order::Transposed, ternary.granularity);
        // Any matrix that is in memory can be packed; groups were checked with the shape.
        let (words, scales) = packed.expect("a shape that was checked").into_parts();
        Self {
            words: Param::initialized(ParamId::new(), words_tensor(words, shape, &device)),
            scales: Param::initialized(ParamId::new(), scales_tensor(scales, &device)),
            shape,
        }
    }

    /// Of the right sizes, to be loaded.
    pub(super) fn empty(init: &Init, [inputs, outputs]: [usize; 2], ternary: Ternary) -> Self {
        let shape = packed_shape(inputs, outputs, ternary);
        let scales = ternary.granularity.scales(outputs, inputs);
        Self {
            words: init.words(words_dims(shape)),
            scales: init.full([scales], 0.0),
            shape,
        }
    }

    /// `[rows, in]` -> `[rows, out]`.
    pub(super) fn product(&self, x: Tensor<2>) -> Tensor<2> {
        ternary_linear(x, self.words.val(), self.scales.val(), self.shape)
    }

    /// The same with x as it is, off the autodiff device.
    pub(super) fn plain_product(&self, x: Tensor<2>) -> Tensor<2> {
        let shape = PackedShape {
            rounds_activations: false,
            ..self.shape
        };
        ternary_linear(
            x,
            self.words.val().inner(),
            self.scales.val().inner(),
            shape,
        )
    }
}

impl PackedWeight {
    /// W' `[in, out]` f32, off the autodiff device.
    pub(super) fn dense(&self) -> Tensor<2> {
        let PackedShape {
            rows,
            cols,
            granularity,
            ..
        } = self.shape;
        let words = host_words(self.words.val().into_data());
        // They are as many as the shape has: it is what they were made for.
        let trits = compute::unpack(&words, rows, cols).expect("packed weights");
        let scales: Vec<f32> = self.scales.val().into_data().iter::<f32>().collect();
        let scale_of = |row: usize, col: usize| match granularity {
            Granularity::Tensor => scales[0],
            Granularity::Row => scales[row],
            Granularity::Group(size) => scales[row * granularity.scales_per_row(cols) + col / size],
        };
        let trits = trits.into_iter().enumerate();
        let values = trits.map(|(i, trit)| f32::from(trit) * scale_of(i / cols, i % cols));
        transposed(values.collect(), [rows, cols], &self.scales.lazy_device())
    }
}

impl QuantisedWeight {
    /// Of the right sizes, to be loaded.
    pub(super) fn empty(init: &Init, dims: [usize; 2], blockwise: Blockwise) -> Self {
        let shape = blockwise.of_matrix(dims);
        Self {
            words: init.words([shape.row_groups(), shape.words_per_group()]),
            scales: init.full([shape.scales()], 0.0),
            side: init.words([shape.side_words()]),
            shape,
        }
    }

    /// `[rows, in]` -> `[rows, out]`.
    pub(super) fn product(&self, x: Tensor<2>) -> Tensor<2> {
        let (words, scales, side) = (self.words.val(), self.scales.val(), self.side.val());
        blockwise_linear(x, words, scales, side, self.shape)
    }

    /// The same off the autodiff device.
    pub(super) fn plain_product(&self, x: Tensor<2>) -> Tensor<2> {
        let (words, side) = (self.words.val().inner(), self.side.val().inner());
        blockwise_linear(x, words, self.scales.val().inner(), side, self.shape)
    }

    /// W' `[in, out]` f32, off the autodiff device.
    pub(super) fn dense(&self) -> Tensor<2> {
        let [words, side] = [self.words.val().into_data(), self.side.val().into_data()];
        let [words, side] = [words, side].map(host_words);
        let scales: Vec<f32> = self.scales.val().into_data().iter::<f32>().collect();
        let view = BlockwiseView::new(self.shape, &words, &scales, &side);
        let quantised = view.and_then(|view| view.to_quantised());
        // Lengths are the shape's, and scales were finite when they were read.
        let values = quantised.expect("quantised weights").dequantise();
        let dims = [self.shape.rows, self.shape.cols];
        transposed(values, dims, &self.scales.lazy_device())
    }
}

/// Values `[out, in]`, row after row, as `[in, out]`, off the autodiff device.
fn transposed(values: Vec<f32>, dims: [usize; 2], device: &Device) -> Tensor<2> {
    let data = TensorData::new(values, dims);
    Tensor::from_data(data, &device.clone().inner()).transpose()
}

fn host_words(data: TensorData) -> Vec<u32> {
    data.iter::<u32>().collect()
}

fn packed_shape(inputs: usize, outputs: usize, ternary: Ternary) -> PackedShape {
    PackedShape {
        rows: outputs,
        cols: inputs,
        granularity: ternary.granularity,
        rounds_activations: ternary.rounds_activations,
    }
}

fn words_dims(shape: PackedShape) -> [usize; 2] {
    let words = compute::words(shape.rows, shape.cols);
    let groups = shape.rows.div_ceil(compute::BLOCK);
    [groups, words / groups]
}

fn words_tensor(words: Vec<u32>, shape: PackedShape, device: &Device) -> Tensor<2, Int> {
    let data = TensorData::new(words, words_dims(shape));
    Tensor::from_data(data, (device, DType::U32))
}

fn scales_tensor(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}
