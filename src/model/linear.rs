//! The linear layer, and what its weights may be: dense, rounded to trits as they are used, or
//! packed trits.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_kernels::ternary::cpu::latent::{Order, pack_quantised};
use firebrick_kernels::ternary::layout::compute;
use firebrick_kernels::ternary::{
    PackedShape, fake_quantize_activations, fake_quantize_weight, int8_matmul, ternary_linear,
};

use super::init::Init;
use crate::config::{ModelShape, Ternary};

/// y = x W + b.
///
/// With ternary weights (BitNet b1.58) it is y = x' W' + b of what x and W are rounded to.
#[derive(Module, Debug)]
pub struct Linear {
    /// W.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    ternary: Option<Ternary>,
    /// Whether `weight` is W' already: what it was rounded from is elsewhere then.
    #[module(skip)]
    is_rounded: bool,
    #[module(skip)]
    multiplies_integers: bool,
}

/// What a linear layer multiplies by.
#[derive(Module, Debug)]
pub enum Weight {
    /// `[in, out]`, the layout in which the forward product and both products of the backward pass
    /// read and write contiguous rows; files hold `[out, in]`.
    Dense(Param<Tensor<2>>),
    /// Trits and scales, which are not trained.
    Packed(PackedWeight),
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

impl Linear {
    /// A dense layer.
    pub(super) fn new(init: &Init, path: &str, dims: [usize; 2], bias: bool, std: f64) -> Self {
        Self {
            weight: Weight::Dense(init.normal(&format!("{path}.weight"), dims, std)),
            bias: bias.then(|| init.full([dims[1]], 0.0)),
            ternary: None,
            is_rounded: false,
            multiplies_integers: false,
        }
    }

    /// One of a block's layers: ternary where the shape says so.
    pub(super) fn of_block(
        init: &Init,
        path: &str,
        shape: &ModelShape,
        (dims, bias, std): ([usize; 2], bool, f64),
    ) -> Self {
        let mut linear = Self::new(init, path, dims, bias, std);
        linear.ternary = shape.ternary;
        if let Some(ternary) = shape.ternary.filter(|ternary| ternary.packed.is_some()) {
            linear.weight = Weight::Packed(PackedWeight::empty(init, dims, ternary));
        }
        linear
    }

    /// `[rows, in]` -> `[rows, out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.forward_rounded(self.round_input(x))
    }

    /// x' of x `[rows, in]`, which layers that read the same x share; x where it is not rounded, or
    /// where the product rounds it.
    pub(super) fn round_input(&self, x: Tensor<2>) -> Tensor<2> {
        match (&self.weight, self.ternary) {
            (Weight::Dense(_), Some(ternary)) if ternary.rounds_activations => {
                fake_quantize_activations(x)
            }
            _ => x,
        }
    }

    /// [`round_input`](Self::round_input)'s `[rows, in]` -> `[rows, out]`.
    pub(super) fn forward_rounded(&self, x: Tensor<2>) -> Tensor<2> {
        let y = match (&self.weight, self.ternary) {
            (Weight::Packed(weight), _) => weight.product(x),
            (Weight::Dense(weight), Some(ternary)) => {
                let weight = if self.is_rounded {
                    weight.val()
                } else {
                    fake_quantize_weight(weight.val(), ternary.granularity)
                };
                if self.multiplies_integers {
                    int8_matmul(x, weight, ternary.granularity)
                } else {
                    x.matmul(weight)
                }
            }
            (Weight::Dense(weight), None) => x.matmul(weight.val()),
        };
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }

    pub(super) fn multiply_integers(&mut self) {
        self.multiplies_integers = self.ternary.is_some_and(|t| t.rounds_activations);
    }

    /// Puts W' in the place of W: rounded once and not in every forward pass. The gradient of W' is
    /// that of W.
    pub(super) fn round(&mut self) {
        let (Weight::Dense(weight), Some(ternary), false) =
            (&mut self.weight, self.ternary, self.is_rounded)
        else {
            return;
        };
        let latent = weight.val();
        let tracked = latent.is_autodiff();
        let rounded = fake_quantize_weight(latent.inner(), ternary.granularity);
        let rounded = if tracked {
            Tensor::from_inner(rounded).require_grad()
        } else {
            rounded
        };
        *weight = Param::initialized(weight.id, rounded);
        self.is_rounded = true;
    }

    /// Puts packed trits in the place of W.
    pub(super) fn pack(&mut self) {
        self.round();
        if let (Weight::Dense(weight), Some(ternary)) = (&self.weight, self.ternary) {
            self.weight = Weight::Packed(PackedWeight::new(weight.val().inner(), ternary));
            self.is_rounded = false;
        }
    }
}

impl PackedWeight {
    /// Of W' `[in, out]`.
    fn new(rounded: Tensor<2>, ternary: Ternary) -> Self {
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
    fn empty(init: &Init, [inputs, outputs]: [usize; 2], ternary: Ternary) -> Self {
        let shape = packed_shape(inputs, outputs, ternary);
        let scales = ternary.granularity.scales(outputs, inputs);
        Self {
            words: init.words(words_dims(shape)),
            scales: init.full([scales], 0.0),
            shape,
        }
    }

    /// `[rows, in]` -> `[rows, out]`.
    fn product(&self, x: Tensor<2>) -> Tensor<2> {
        ternary_linear(x, self.words.val(), self.scales.val(), self.shape)
    }
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
