//! The burn extension: what a backend has to offer, its gradient, and which device runs what.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Int, Tensor};

use super::layout::BlockwiseView;
use super::{BlockwiseShape, composed, cpu};
use crate::flex::{contiguous_f32, floats, map_f32};
use crate::ways::{Way, answer};

/// Products with blockwise weights. A backend without a kernel of its own composes them.
#[backend_extension(
    Flex,
    Cube: cfg(feature = "gpu"),
    Autodiff,
    Fusion: cfg(feature = "gpu"),
)]
pub trait BlockwiseOps: Backend {
    /// y `[tokens, rows]` of x `[tokens, cols]` and packed weights.
    #[fusion(dtype = x, shape = burn::tensor::Shape::new([x[0], shape.rows]))]
    fn blockwise_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        side: IntTensor<Self>,
        shape: BlockwiseShape,
    ) -> FloatTensor<Self> {
        composed::linear::<Self>(x, words, scales, side, shape)
    }

    /// dx `[tokens, cols]` of dy `[tokens, rows]` and packed weights.
    #[fusion(dtype = dy, shape = burn::tensor::Shape::new([dy[0], shape.cols]))]
    fn blockwise_linear_dx(
        dy: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        side: IntTensor<Self>,
        shape: BlockwiseShape,
    ) -> FloatTensor<Self> {
        composed::linear_dx::<Self>(dy, words, scales, side, shape)
    }
}

/// y `[tokens, rows]` = x W'ᵀ of x `[tokens, cols]`, of any float dtype, and blockwise weights, as
/// [`Quantised::operands`](super::Quantised::operands) gives them: words `[row groups, words of a group]` u32, scales
/// `[scales]`, side `[side words]` u32. y has the dtype of x; sums are f32.
///
/// It has a gradient with respect to x alone, which keeps nothing but the operands.
///
/// # Panics
/// Operands of other lengths than `shape` has, or x of another width.
pub fn blockwise_linear(
    x: Tensor<2>,
    words: Tensor<2, Int>,
    scales: Tensor<1>,
    side: Tensor<1, Int>,
    shape: BlockwiseShape,
) -> Tensor<2> {
    let [_, width] = x.dims();
    assert_eq!(width, shape.cols, "x is [tokens, {}]", shape.cols);
    Tensor::from_dispatch(Dispatch::blockwise_linear(
        x.into_dispatch(),
        words.into_dispatch(),
        scales.into_dispatch(),
        side.into_dispatch(),
        shape,
    ))
}

impl BlockwiseOps for Flex {
    fn blockwise_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        side: IntTensor<Self>,
        shape: BlockwiseShape,
    ) -> FloatTensor<Self> {
        answer::<Self>("blockwise_linear", way);
        let tokens = x.shape()[0];
        with_view(words, scales, side, shape, |weights| {
            map_f32(x, [tokens, shape.rows], |x, y| {
                cpu::linear(x, tokens, weights, y)
            })
        })
    }

    fn blockwise_linear_dx(
        dy: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        side: IntTensor<Self>,
        shape: BlockwiseShape,
    ) -> FloatTensor<Self> {
        answer::<Self>("blockwise_linear_dx", way);
        let tokens = dy.shape()[0];
        with_view(words, scales, side, shape, |weights| {
            map_f32(dy, [tokens, shape.cols], |dy, dx| {
                cpu::linear_dx(dy, tokens, weights, dx)
            })
        })
    }
}

fn way() -> Way {
    Way::Simd(cpu::Path::detect().name())
}

fn with_view<R>(
    words: IntTensor<Flex>,
    scales: FloatTensor<Flex>,
    side: IntTensor<Flex>,
    shape: BlockwiseShape,
    use_it: impl FnOnce(&BlockwiseView) -> R,
) -> R {
    let [words, side] = [words, side].map(|words| words.to_contiguous());
    let scales = contiguous_f32(scales);
    let [words, side] =
        [&words, &side].map(|words| words.as_slice::<u32>().expect("packed words are u32"));
    match BlockwiseView::new(shape, words, floats(&scales), side) {
        Ok(weights) => use_it(&weights),
        Err(error) => panic!("{error}"),
    }
}

impl<B: Backend + BlockwiseOps, C: CheckpointStrategy> BlockwiseOps for Autodiff<B, C> {
    fn blockwise_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        side: IntTensor<Self>,
        shape: BlockwiseShape,
    ) -> FloatTensor<Self> {
        let weights = (words, scales.into_primitive(), side, shape);
        with_gradient::<B, C>(x, weights, [B::blockwise_linear, B::blockwise_linear_dx])
    }

    /// The gradient of the gradient is the product itself.
    fn blockwise_linear_dx(
        dy: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        side: IntTensor<Self>,
        shape: BlockwiseShape,
    ) -> FloatTensor<Self> {
        let weights = (words, scales.into_primitive(), side, shape);
        with_gradient::<B, C>(dy, weights, [B::blockwise_linear_dx, B::blockwise_linear])
    }
}

type Weights<B> = (IntTensor<B>, FloatTensor<B>, IntTensor<B>, BlockwiseShape);

/// x, words, scales, side, shape -> y.
type Product<B> = fn(
    FloatTensor<B>,
    IntTensor<B>,
    FloatTensor<B>,
    IntTensor<B>,
    BlockwiseShape,
) -> FloatTensor<B>;

/// A product of x and weights, and the one of dy that is its gradient.
fn with_gradient<B: Backend, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    weights: Weights<B>,
    [forward, backward]: [Product<B>; 2],
) -> FloatTensor<Autodiff<B, C>> {
    #[derive(Debug)]
    struct Linear;

    impl<B: Backend> Backward<B, 1> for Linear {
        type State = (Weights<B>, Product<B>);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            let ((words, scales, side, shape), product) = ops.state;
            unary::<B, _>(ops.parents, ops.node, grads, |dy| {
                product(dy, words, scales, side, shape)
            });
        }
    }

    let prepared = Linear.prepare::<C>([x.node()]).compute_bound();
    let (words, scales, side, shape) = weights.clone();
    let y = forward(x.into_primitive(), words, scales, side, shape);
    match prepared.stateful() {
        OpsKind::Tracked(prepared) => prepared.finish((weights, backward), y),
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    }
}
