//! The burn extension: what a backend has to offer, its gradient, and which device runs what.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, unary};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{DType, FloatDType, Tensor};

use super::{Granularity, fake_quantize};

/// Operations on ternary weights. A backend without a kernel of its own composes them.
#[backend_extension(
    Flex,
    Cube: cfg(feature = "gpu"),
    Autodiff,
    Fusion: cfg(feature = "gpu"),
)]
pub trait TernaryOps: Backend {
    /// W' of W `[inputs, outputs]`. Its gradient goes straight through.
    #[fusion(dtype = weight, shape = weight)]
    fn ternary_fake_quantize_weight(
        weight: FloatTensor<Self>,
        granularity: Granularity,
    ) -> FloatTensor<Self> {
        composed::weight::<Self>(weight, granularity)
    }

    /// x' of x `[tokens, inputs]`. Its gradient goes straight through.
    #[fusion(dtype = x, shape = x)]
    fn ternary_fake_quantize_activations(x: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::activations::<Self>(x)
    }
}

/// W' = g T, the ternary matrix that stands for a latent weight `[inputs, outputs]` of any float
/// dtype: g = max(mean |W|, 1e-5) and T = clamp(round(W / g), -1, 1) (Ma et al., 2024, section 2).
///
/// The gradient of W' is taken for that of W (Bengio et al., 2013: straight through), since rounding
/// has none.
///
/// # Panics
/// With [`Granularity::Group`] of a size that does not divide the inputs.
pub fn fake_quantize_weight(weight: Tensor<2>, granularity: Granularity) -> Tensor<2> {
    let [inputs, _] = weight.dims();
    if let Granularity::Group(size) = granularity {
        assert!(
            size > 0 && inputs % size == 0,
            "groups of {size} do not divide {inputs} inputs"
        );
    }
    Tensor::from_dispatch(Dispatch::ternary_fake_quantize_weight(
        weight.into_dispatch(),
        granularity,
    ))
}

/// x' = s q, what eight bits keep of activations `[tokens, inputs]` of any float dtype:
/// s = max(max |x|, 1e-5) / 127 of each token, q = clamp(round(x / s), -128, 127).
///
/// The gradient goes straight through.
pub fn fake_quantize_activations(x: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::ternary_fake_quantize_activations(
        x.into_dispatch(),
    ))
}

impl TernaryOps for Flex {
    fn ternary_fake_quantize_weight(
        weight: FloatTensor<Self>,
        granularity: Granularity,
    ) -> FloatTensor<Self> {
        let outputs = weight.shape()[1];
        in_f32(weight, |values| {
            fake_quantize::weight(values, outputs, granularity)
        })
    }

    fn ternary_fake_quantize_activations(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let width = x.shape()[1];
        in_f32(x, |values| fake_quantize::activations(values, width))
    }
}

/// The values of `x` changed in place where nothing else holds them, else those of a copy.
fn in_f32(x: FloatTensor<Flex>, change: impl FnOnce(&mut [f32])) -> FloatTensor<Flex> {
    let dtype = x.dtype();
    if dtype != DType::F32 {
        let x = in_f32(Flex::float_cast(x, FloatDType::F32), change);
        return Flex::float_cast(x, dtype.into());
    }
    let mut x = x.to_contiguous();
    let count = x.shape().num_elements();
    // A contiguous view of something larger would change what lies around it.
    if x.storage::<f32>().len() != count {
        let values = x.as_slice::<f32>().map(<[f32]>::to_vec);
        // It is contiguous, and of that dtype.
        let values = values.expect("contiguous f32");
        x = FloatTensor::<Flex>::from_data(burn::tensor::TensorData::new(values, x.shape()));
    }
    change(x.storage_mut::<f32>());
    x
}

#[cfg(feature = "gpu")]
impl TernaryOps for burn_cubecl::CubeBackend {}

impl<B: Backend + TernaryOps, C: CheckpointStrategy> TernaryOps for Autodiff<B, C> {
    fn ternary_fake_quantize_weight(
        weight: FloatTensor<Self>,
        granularity: Granularity,
    ) -> FloatTensor<Self> {
        straight_through::<B, C>(weight, |weight| {
            B::ternary_fake_quantize_weight(weight, granularity)
        })
    }

    fn ternary_fake_quantize_activations(x: FloatTensor<Self>) -> FloatTensor<Self> {
        straight_through::<B, C>(x, B::ternary_fake_quantize_activations)
    }
}

/// `quantize`, with the identity for its derivative.
fn straight_through<B: Backend, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    quantize: impl FnOnce(FloatTensor<B>) -> FloatTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    #[derive(Debug)]
    struct StraightThrough;

    impl<B: Backend> Backward<B, 1> for StraightThrough {
        type State = ();

        fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            unary::<B, _>(ops.parents, ops.node, grads, |gradient| gradient);
        }
    }

    let prepared = StraightThrough.prepare::<C>([x.node()]).compute_bound();
    prepared.stateless(quantize(x.into_primitive()))
}

/// The same by operations that every backend has.
mod composed {
    use burn::backend::Backend;
    use burn::backend::TensorMetadata;
    use burn::backend::tensor::FloatTensor;
    use burn::tensor::{FloatDType, Shape};

    use crate::ternary::{Granularity, SMALLEST_ACTIVATION, SMALLEST_MEAN};

    pub fn weight<B: Backend>(weight: FloatTensor<B>, granularity: Granularity) -> FloatTensor<B> {
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
        in_f32::<B>(x, |x| {
            let shape = x.shape();
            let max = B::float_clamp_min(B::float_max_abs_dim(x.clone(), 1), SMALLEST_ACTIVATION.into());
            let scale = B::float_div_scalar(max, 127.0.into());
            let scale = B::float_expand(scale, shape);
            let codes = B::float_round(B::float_div(x, scale.clone()));
            let codes = B::float_clamp(codes, (-128.0).into(), 127.0.into());
            B::float_mul(codes, scale)
        })
    }

    fn in_f32<B: Backend>(
        x: FloatTensor<B>,
        change: impl FnOnce(FloatTensor<B>) -> FloatTensor<B>,
    ) -> FloatTensor<B> {
        let dtype = x.dtype();
        let x = change(B::float_cast(x, FloatDType::F32));
        B::float_cast(x, dtype.into())
    }
}
