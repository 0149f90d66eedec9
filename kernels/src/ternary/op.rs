//! The burn extension: what a backend has to offer, its gradient, and which device runs what.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, binary, unary};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Int, Tensor};

use super::cpu;
use super::layout::PackedView;
use super::ways::{Way, answer};
use super::{Granularity, composed, fake_quantize};
use crate::flex::{contiguous_f32, floats, in_f32, map_f32};

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

    /// x' w' of fake-quantised x' `[tokens, inputs]` and w' `[inputs, outputs]`: as integers where
    /// there is a kernel for that, which is the same up to rounding.
    #[fusion(dtype = x, shape = burn::tensor::Shape::new([x[0], weight[1]]))]
    fn ternary_int8_matmul(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        _granularity: Granularity,
    ) -> FloatTensor<Self> {
        composed::int8_matmul::<Self>(x, weight)
    }

    /// y `[tokens, rows]` of x `[tokens, cols]` and packed weights.
    #[fusion(dtype = x, shape = burn::tensor::Shape::new([x[0], shape.rows]))]
    fn ternary_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        shape: PackedShape,
    ) -> FloatTensor<Self> {
        composed::linear::<Self>(x, words, scales, shape)
    }

    /// dx `[tokens, cols]` of dy `[tokens, rows]` and packed weights.
    #[fusion(dtype = dy, shape = burn::tensor::Shape::new([dy[0], shape.cols]))]
    fn ternary_linear_dx(
        dy: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        shape: PackedShape,
    ) -> FloatTensor<Self> {
        composed::linear_dx::<Self>(dy, words, scales, shape)
    }
}

/// A packed matrix beside its words and scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedShape {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// What one scale stands for.
    pub granularity: Granularity,
    /// Whether what goes in is rounded to eight bits, token by token.
    pub rounds_activations: bool,
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

/// x' w' of [`fake_quantize_activations`]' x' `[tokens, inputs]` and [`fake_quantize_weight`]'s w'
/// `[inputs, outputs]`, multiplied as integers on the CPU. Gradients are those of the product.
pub fn int8_matmul(x: Tensor<2>, weight: Tensor<2>, granularity: Granularity) -> Tensor<2> {
    let [x, weight] = [x, weight].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::ternary_int8_matmul(x, weight, granularity))
}

/// y `[tokens, rows]` = x W'ᵀ of x `[tokens, cols]` and packed weights: words
/// `[groups of 16 rows, words of a group]` u32 as [`compute`](super::layout::compute) lays them out,
/// and scales `[scales]`. Where `shape` says so, x is rounded to eight bits and the sums are of
/// integers. It has a gradient with respect to x alone, straight through the rounding.
///
/// # Panics
/// Words or scales of other lengths than `shape` has.
pub fn ternary_linear(
    x: Tensor<2>,
    words: Tensor<2, Int>,
    scales: Tensor<1>,
    shape: PackedShape,
) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::ternary_linear(
        x.into_dispatch(),
        words.into_dispatch(),
        scales.into_dispatch(),
        shape,
    ))
}

impl TernaryOps for Flex {
    fn ternary_fake_quantize_weight(
        weight: FloatTensor<Self>,
        granularity: Granularity,
    ) -> FloatTensor<Self> {
        answer::<Self>("ternary_fake_quantize_weight", elementwise);
        let outputs = weight.shape()[1];
        in_f32(weight, |values| {
            fake_quantize::weight(values, outputs, granularity)
        })
    }

    fn ternary_fake_quantize_activations(x: FloatTensor<Self>) -> FloatTensor<Self> {
        answer::<Self>("ternary_fake_quantize_activations", elementwise);
        let width = x.shape()[1];
        in_f32(x, |values| fake_quantize::activations(values, width))
    }

    fn ternary_int8_matmul(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        granularity: Granularity,
    ) -> FloatTensor<Self> {
        answer::<Self>("ternary_int8_matmul", product);
        let ([m, k], n) = (dims(&x), weight.shape()[1]);
        let weight = contiguous_f32(weight);
        map_f32(x, [m, n], |x, y| {
            cpu::int8_matmul(x, m, k, floats(&weight), n, granularity, y)
        })
    }

    fn ternary_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        shape: PackedShape,
    ) -> FloatTensor<Self> {
        answer::<Self>("ternary_linear", product);
        let tokens = x.shape()[0];
        with_packed(words, scales, shape, |weights| {
            map_f32(x, [tokens, shape.rows], |x, y| {
                if shape.rounds_activations {
                    cpu::packed_linear(x, tokens, weights, y)
                } else {
                    cpu::packed_linear_f32(x, tokens, weights, y)
                }
            })
        })
    }

    fn ternary_linear_dx(
        dy: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        shape: PackedShape,
    ) -> FloatTensor<Self> {
        answer::<Self>("ternary_linear_dx", product);
        let tokens = dy.shape()[0];
        with_packed(words, scales, shape, |weights| {
            map_f32(dy, [tokens, shape.cols], |dy, dx| {
                cpu::packed_linear_dx(dy, tokens, weights, dx)
            })
        })
    }
}

fn elementwise() -> Way {
    Way::Simd(fake_quantize::instructions())
}

fn product() -> Way {
    Way::Simd(cpu::Path::detect().name())
}

fn dims(x: &FloatTensor<Flex>) -> [usize; 2] {
    [x.shape()[0], x.shape()[1]]
}

fn with_packed<R>(
    words: IntTensor<Flex>,
    scales: FloatTensor<Flex>,
    shape: PackedShape,
    use_it: impl FnOnce(&PackedView) -> R,
) -> R {
    let words = words.to_contiguous();
    let scales = contiguous_f32(scales);
    let PackedShape { rows, cols, .. } = shape;
    let codes = words.as_slice::<u32>().expect("packed words are u32");
    match PackedView::new(codes, rows, cols, floats(&scales), shape.granularity) {
        Ok(weights) => use_it(&weights),
        Err(error) => panic!("{error}"),
    }
}

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

    fn ternary_int8_matmul(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        granularity: Granularity,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Product;

        impl<B: Backend> Backward<B, 2> for Product {
            type State = [FloatTensor<B>; 2];

            fn backward(
                self,
                ops: Ops<Self::State, 2>,
                grads: &mut Gradients,
                _: &mut Checkpointer,
            ) {
                let [x, weight] = ops.state;
                let dx = |dy| B::float_matmul(dy, B::float_transpose(weight));
                let dw = |dy| B::float_matmul(B::float_transpose(x), dy);
                binary::<B, _, _>(ops.parents, ops.node, grads, dx, dw);
            }
        }

        let prepared = Product
            .prepare::<C>([x.node(), weight.node()])
            .compute_bound();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        let y = B::ternary_int8_matmul(x.clone(), weight.clone(), granularity);
        match prepared.stateful() {
            OpsKind::Tracked(prepared) => prepared.finish([x, weight], y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }

    fn ternary_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        shape: PackedShape,
    ) -> FloatTensor<Self> {
        let packed = (words, scales.into_primitive(), shape);
        with_gradient::<B, C>(x, packed, [B::ternary_linear, B::ternary_linear_dx])
    }

    /// The gradient of the gradient is that of a linear layer without rounding.
    fn ternary_linear_dx(
        dy: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        shape: PackedShape,
    ) -> FloatTensor<Self> {
        let shape = PackedShape {
            rounds_activations: false,
            ..shape
        };
        let packed = (words, scales.into_primitive(), shape);
        with_gradient::<B, C>(dy, packed, [B::ternary_linear_dx, B::ternary_linear])
    }
}

type Packed<B> = (IntTensor<B>, FloatTensor<B>, PackedShape);

/// x, words, scales, shape -> y.
type PackedProduct<B> =
    fn(FloatTensor<B>, IntTensor<B>, FloatTensor<B>, PackedShape) -> FloatTensor<B>;

/// A product of x and packed weights, and the one of dy that is its gradient.
fn with_gradient<B: Backend, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    (words, scales, shape): Packed<B>,
    [forward, backward]: [PackedProduct<B>; 2],
) -> FloatTensor<Autodiff<B, C>> {
    #[derive(Debug)]
    struct Product;

    impl<B: Backend> Backward<B, 1> for Product {
        type State = (Packed<B>, PackedProduct<B>);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            let ((words, scales, shape), product) = ops.state;
            unary::<B, _>(ops.parents, ops.node, grads, |dy| {
                product(dy, words, scales, shape)
            });
        }
    }

    let prepared = Product.prepare::<C>([x.node()]).compute_bound();
    let y = forward(x.into_primitive(), words.clone(), scales.clone(), shape);
    match prepared.stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(((words, scales, shape), backward), y),
        OpsKind::UnTracked(prepared) => prepared.finish(y),
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

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;

    #[test]
    fn values_that_nothing_else_holds_are_rounded_where_they_are() {
        let data = TensorData::new(vec![0.3f32; 64], [4, 16]);
        let x = FloatTensor::<Flex>::from_data(data);
        let place = x.storage::<f32>().as_ptr();
        let rounded = Flex::ternary_fake_quantize_activations(x);
        assert_eq!(rounded.storage::<f32>().as_ptr(), place);
        let held = rounded.clone();
        let again = Flex::ternary_fake_quantize_activations(rounded);
        assert_ne!(
            again.storage::<f32>().as_ptr(),
            held.storage::<f32>().as_ptr()
        );
    }
}
