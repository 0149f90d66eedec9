//! The burn extension: attention on the CPU, and its gradient.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Int, Tensor};

use super::{AttentionShape, Operands, cpu};
use crate::flex::{contiguous_f32, contiguous_i32, floats, indices, tensor};
use crate::panel::Path;
use crate::ways::{Way, answer};

/// Attention. The CPU alone has it: on a GPU, a graph of burn's operations is fused.
#[backend_extension(Flex, Autodiff)]
pub trait AttentionOps: Backend {
    /// o `[rows x seq, heads x head_dim]`.
    fn span_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        angles: FloatTensor<Self>,
        spans: IntTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self>;

    /// dq, dk and dv of do.
    fn span_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        angles: FloatTensor<Self>,
        spans: IntTensor<Self>,
        upstream: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// o `[rows x seq, heads x head_dim]` of q `[rows x seq, heads x head_dim]`, k and v
/// `[rows x seq, kv_heads x head_dim]`, of any float dtype: what the [module](super) says. o has the dtype of q.
///
/// `angles` `[1 or rows, seq, head_dim]` are f32 cosines, then sines, of `head_dim / 2` angles; without elements, nothing
/// is turned. `spans` `[1 or rows, seq, 2]`: the first key that a query sees, and the one behind the last. A query
/// that sees nothing gets zeros.
///
/// It has gradients with respect to q, k and v, and keeps nothing but these for them.
///
/// # Panics
/// On a device other than the CPU; and with shapes that do not belong together, or spans beyond the sequence.
pub fn attention(
    [q, k, v]: [Tensor<2>; 3],
    angles: Tensor<3>,
    spans: Tensor<3, Int>,
    shape: AttentionShape,
) -> Tensor<2> {
    let [q_dims, k_dims, v_dims] = [&q, &k, &v].map(Tensor::dims);
    assert_eq!(q_dims[1], shape.width(), "queries");
    assert_eq!(k_dims, [q_dims[0], shape.kv_width()], "keys");
    assert_eq!(v_dims, k_dims, "values");
    Tensor::from_dispatch(Dispatch::span_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        angles.into_dispatch(),
        spans.into_dispatch(),
        shape,
    ))
}

impl AttentionOps for Flex {
    fn span_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        angles: FloatTensor<Self>,
        spans: IntTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        answer::<Self>("span_attention", way);
        let (dtype, dims) = (q.dtype(), q.shape());
        let mut out = vec![0.0; dims.num_elements()];
        with_operands([q, k, v], angles, spans, shape, |operands| {
            cpu::forward(Path::detect(), operands, &mut out);
        });
        tensor(out, dims, dtype)
    }

    fn span_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        angles: FloatTensor<Self>,
        spans: IntTensor<Self>,
        upstream: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        answer::<Self>("span_attention_backward", way);
        let [of_q, of_k, of_v] = [&q, &k, &v].map(|x| (x.shape(), x.dtype()));
        let [mut dq, mut dk, mut dv] =
            [&of_q, &of_k, &of_v].map(|(shape, _)| vec![0.0; shape.num_elements()]);
        let upstream = contiguous_f32(upstream);
        with_operands([q, k, v], angles, spans, shape, |operands| {
            let gradients = [&mut dq, &mut dk, &mut dv].map(Vec::as_mut_slice);
            cpu::backward(Path::detect(), operands, floats(&upstream), gradients);
        });
        let like = |values: Vec<f32>, (shape, dtype)| tensor(values, shape, dtype);
        (like(dq, of_q), like(dk, of_k), like(dv, of_v))
    }
}

fn way() -> Way {
    Way::Simd(Path::detect().name())
}

fn with_operands(
    qkv: [FloatTensor<Flex>; 3],
    angles: FloatTensor<Flex>,
    spans: IntTensor<Flex>,
    shape: AttentionShape,
    use_them: impl FnOnce(&Operands),
) {
    let (qkv, angles) = (qkv.map(contiguous_f32), contiguous_f32(angles));
    let spans = contiguous_i32(spans);
    let [q, k, v] = qkv.each_ref().map(floats);
    use_them(&Operands {
        q,
        k,
        v,
        angles: floats(&angles),
        spans: indices(&spans),
        shape,
    });
}

impl<B: Backend + AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn span_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        angles: FloatTensor<Self>,
        spans: IntTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Attention;

        impl<B: Backend + AttentionOps> Backward<B, 3> for Attention {
            type State = (
                [FloatTensor<B>; 3],
                FloatTensor<B>,
                IntTensor<B>,
                AttentionShape,
            );

            fn backward(
                self,
                ops: Ops<Self::State, 3>,
                grads: &mut Gradients,
                _: &mut Checkpointer,
            ) {
                let upstream = grads.consume::<B>(&ops.node);
                let ([q, k, v], angles, spans, shape) = ops.state;
                let (dq, dk, dv) =
                    B::span_attention_backward(q, k, v, angles, spans, upstream, shape);
                for (parent, gradient) in ops.parents.into_iter().zip([dq, dk, dv]) {
                    if let Some(parent) = parent {
                        grads.register::<B>(parent.id, gradient);
                    }
                }
            }
        }

        let prepared = Attention
            .prepare::<C>([q.node(), k.node(), v.node()])
            .compute_bound();
        let qkv = [q, k, v].map(|x| x.into_primitive());
        let angles = angles.into_primitive();
        let [q, k, v] = qkv.clone();
        let out = B::span_attention(q, k, v, angles.clone(), spans.clone(), shape);
        match prepared.stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((qkv, angles, spans, shape), out),
            OpsKind::UnTracked(prepared) => prepared.finish(out),
        }
    }

    /// Its own gradient is not written down.
    fn span_attention_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: IntTensor<Self>,
        _: FloatTensor<Self>,
        _: AttentionShape,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        panic!("attention has no second derivative")
    }
}
