//! The burn extension: layers on the CPU, and their gradients.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata, backend_extension,
};
use burn::tensor::{DType, Int, Tensor};

use super::{Activation, cpu};
use crate::flex::{contiguous_f32, contiguous_i32, floats, in_f32, indices, tensor};
use crate::panel::Path;
use crate::ways::{Way, answer};

/// Layers in one pass. The CPU alone has them: on a GPU, graphs of burn's operations are fused.
#[backend_extension(Flex, Autodiff)]
pub trait LayerOps: Backend {
    /// y of x `[rows, dim]` and w `[dim]`.
    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self>;

    /// dx of dy, and dw if it is `wanted`, else no elements.
    fn fused_rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        upstream: FloatTensor<Self>,
        eps: f64,
        wanted: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// y of gate and up `[rows, width]`.
    fn fused_gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self>;

    /// The gradients of gate and up.
    fn fused_gated_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        upstream: FloatTensor<Self>,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Nats `[rows]` of logits z `[rows, vocab]` and targets `[rows]`; and of each row the largest m and
    /// log Σ exp(z - m) `[rows, 2]`.
    fn fused_token_nats(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The gradient of logits.
    fn fused_token_nats_backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        log_sums: FloatTensor<Self>,
        upstream: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// y + x w.
    fn fused_add_product(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// y = x w / sqrt(mean x² + eps) of x `[rows, dim]` and w `[dim]`, of any float dtype; y has the dtype of x. It has
/// gradients with respect to both.
///
/// # Panics
/// On a device other than the CPU, and where w is not as wide as x.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    assert_eq!(weight.dims(), [x.dims()[1]], "w is as wide as x");
    let [x, weight] = [x.into_dispatch(), weight.into_dispatch()];
    Tensor::from_dispatch(Dispatch::fused_rms_norm(x, weight, eps))
}

/// activation(gate) up, `[rows, width]` of any float dtype. It has gradients with respect to both.
///
/// # Panics
/// On a device other than the CPU, and where shapes differ.
pub fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    assert_eq!(gate.dims(), up.dims());
    let [gate, up] = [gate, up].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::fused_gated(gate, up, activation))
}

/// -log softmax(z) of the target, `[rows]` f32, of logits z `[rows, vocab]` of any float dtype and targets `[rows]`. It
/// has a gradient with respect to the logits, for which it keeps these; they are overwritten if nothing else holds them.
///
/// # Panics
/// On a device other than the CPU, where there is not a target for each row, and when one is not below vocab.
pub fn token_nats(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    assert_eq!(targets.dims(), [logits.dims()[0]], "a target for each row");
    let (logits, targets) = (logits.into_dispatch(), targets.into_dispatch());
    let (nats, _) = Dispatch::fused_token_nats(logits, targets);
    Tensor::from_dispatch(nats)
}

/// y + x w of y `[rows, outputs]`, x `[rows, inputs]` and w `[inputs, outputs]`, of any float dtype; in place of y where
/// nothing else holds it. It has gradients with respect to all three.
///
/// # Panics
/// On a device other than the CPU, and where shapes do not belong together.
pub fn add_product(y: Tensor<2>, x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let ([rows, outputs], [inputs, _]) = (y.dims(), weight.dims());
    assert_eq!(
        [x.dims(), weight.dims()],
        [[rows, inputs], [inputs, outputs]]
    );
    let [y, x, weight] = [y, x, weight].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::fused_add_product(y, x, weight))
}

impl LayerOps for Flex {
    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        answer::<Self>("fused_rms_norm", way);
        let weight = contiguous_f32(weight);
        in_f32(x, |x| {
            cpu::rms_norm(Path::detect(), x, floats(&weight), eps as f32)
        })
    }

    fn fused_rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        upstream: FloatTensor<Self>,
        eps: f64,
        wanted: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        answer::<Self>("fused_rms_norm_backward", way);
        let dtype = weight.dtype();
        let [x, weight] = [x, weight].map(contiguous_f32);
        let mut dw = Vec::new();
        let dx = in_f32(upstream, |dy| {
            let (path, eps) = (Path::detect(), eps as f32);
            dw = cpu::rms_norm_backward(path, floats(&x), floats(&weight), dy, eps, wanted);
        });
        let count = dw.len();
        (dx, tensor(dw, [count], dtype))
    }

    fn fused_gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self> {
        answer::<Self>("fused_gated", way);
        let up = contiguous_f32(up);
        in_f32(gate, |gate| {
            cpu::gated(Path::detect(), activation, gate, floats(&up));
        })
    }

    fn fused_gated_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        upstream: FloatTensor<Self>,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        answer::<Self>("fused_gated_backward", way);
        let up = contiguous_f32(up);
        let mut of_gate = None;
        let of_up = in_f32(upstream, |dy| {
            of_gate = Some(in_f32(gate, |gate| {
                cpu::gated_backward(Path::detect(), activation, gate, floats(&up), dy);
            }));
        });
        // The closure was called.
        (of_gate.expect("a gradient of gate"), of_up)
    }

    fn fused_token_nats(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        answer::<Self>("fused_token_nats", way);
        let ([rows, vocab], targets) = (
            [logits.shape()[0], logits.shape()[1]],
            contiguous_i32(targets),
        );
        let logits = contiguous_f32(logits);
        let logits = floats(&logits);
        let mut log_sums = vec![[0.0; 2]; rows];
        cpu::log_sum_exp(Path::detect(), logits, &mut log_sums);
        let rows_of_logits = (0..rows).map(|row| &logits[row * vocab..][..vocab]);
        let nats = rows_of_logits.zip(&log_sums).zip(indices(&targets));
        let nats = nats.map(|((row, sum), &target)| cpu::nats(*sum, row[target as usize]));
        (
            tensor(nats.collect(), [rows], DType::F32),
            tensor(log_sums.into_flattened(), [rows, 2], DType::F32),
        )
    }

    fn fused_token_nats_backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        log_sums: FloatTensor<Self>,
        upstream: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        answer::<Self>("fused_token_nats_backward", way);
        let [log_sums, upstream] = [log_sums, upstream].map(contiguous_f32);
        let targets = contiguous_i32(targets);
        in_f32(logits, |logits| {
            let (targets, log_sums) = (indices(&targets), floats(&log_sums).as_chunks().0);
            cpu::token_nats_backward(Path::detect(), logits, targets, log_sums, floats(&upstream));
        })
    }

    fn fused_add_product(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        answer::<Self>("fused_add_product", way);
        let outputs = y.shape()[1];
        let [x, weight] = [x, weight].map(contiguous_f32);
        in_f32(y, |y| {
            cpu::add_product(Path::detect(), y, floats(&x), floats(&weight), outputs);
        })
    }
}

fn way() -> Way {
    Way::Simd(Path::detect().name())
}

impl<B: Backend + LayerOps, C: CheckpointStrategy> LayerOps for Autodiff<B, C> {
    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct RmsNorm;

        impl<B: Backend + LayerOps> Backward<B, 2> for RmsNorm {
            type State = ([FloatTensor<B>; 2], f64);

            fn backward(
                self,
                ops: Ops<Self::State, 2>,
                grads: &mut Gradients,
                _: &mut Checkpointer,
            ) {
                let upstream = grads.consume::<B>(&ops.node);
                let ([x, weight], eps) = ops.state;
                let wanted = ops.parents[1].is_some();
                let (dx, dw) = B::fused_rms_norm_backward(x, weight, upstream, eps, wanted);
                for (parent, gradient) in ops.parents.into_iter().zip([dx, dw]) {
                    if let Some(parent) = parent {
                        grads.register::<B>(parent.id, gradient);
                    }
                }
            }
        }

        let prepared = RmsNorm
            .prepare::<C>([x.node(), weight.node()])
            .compute_bound();
        let [x, weight] = [x, weight].map(|x| x.into_primitive());
        let y = B::fused_rms_norm(x.clone(), weight.clone(), eps);
        match prepared.stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(([x, weight], eps), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }

    /// Its own gradient is not written down.
    fn fused_rms_norm_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
        _: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        panic!("a fused RMSNorm has no second derivative")
    }

    fn fused_gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Gated;

        impl<B: Backend + LayerOps> Backward<B, 2> for Gated {
            type State = ([FloatTensor<B>; 2], Activation);

            fn backward(
                self,
                ops: Ops<Self::State, 2>,
                grads: &mut Gradients,
                _: &mut Checkpointer,
            ) {
                let upstream = grads.consume::<B>(&ops.node);
                let ([gate, up], activation) = ops.state;
                let (gate, up) = B::fused_gated_backward(gate, up, upstream, activation);
                for (parent, gradient) in ops.parents.into_iter().zip([gate, up]) {
                    if let Some(parent) = parent {
                        grads.register::<B>(parent.id, gradient);
                    }
                }
            }
        }

        let prepared = Gated.prepare::<C>([gate.node(), up.node()]).compute_bound();
        let [gate, up] = [gate, up].map(|x| x.into_primitive());
        let y = B::fused_gated(gate.clone(), up.clone(), activation);
        match prepared.stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(([gate, up], activation), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }

    /// Its own gradient is not written down.
    fn fused_gated_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        panic!("a fused gated product has no second derivative")
    }

    fn fused_token_nats(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct TokenNats;

        impl<B: Backend + LayerOps> Backward<B, 1> for TokenNats {
            type State = (FloatTensor<B>, IntTensor<B>, FloatTensor<B>);

            fn backward(
                self,
                ops: Ops<Self::State, 1>,
                grads: &mut Gradients,
                _: &mut Checkpointer,
            ) {
                let (logits, targets, log_sums) = ops.state;
                unary::<B, _>(ops.parents, ops.node, grads, |upstream| {
                    B::fused_token_nats_backward(logits, targets, log_sums, upstream)
                });
            }
        }

        let prepared = TokenNats.prepare::<C>([logits.node()]).compute_bound();
        let logits = logits.into_primitive();
        let (nats, log_sums) = B::fused_token_nats(logits.clone(), targets.clone());
        let constant = <Self as AutodiffBackend>::from_inner(log_sums.clone());
        let nats = match prepared.stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((logits, targets, log_sums), nats),
            OpsKind::UnTracked(prepared) => prepared.finish(nats),
        };
        (nats, constant)
    }

    /// Its own gradient is not written down.
    fn fused_token_nats_backward(
        _: FloatTensor<Self>,
        _: IntTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        panic!("fused nats have no second derivative")
    }

    fn fused_add_product(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct AddProduct;

        impl<B: Backend> Backward<B, 3> for AddProduct {
            type State = [Option<FloatTensor<B>>; 2];

            fn backward(
                self,
                ops: Ops<Self::State, 3>,
                grads: &mut Gradients,
                _: &mut Checkpointer,
            ) {
                let upstream = grads.consume::<B>(&ops.node);
                let [y, x, weight] = ops.parents;
                let [kept_x, kept_weight] = ops.state;
                if let (Some(x), Some(weight)) = (x, kept_weight) {
                    let dx = B::float_matmul(upstream.clone(), B::float_transpose(weight));
                    grads.register::<B>(x.id, dx);
                }
                if let (Some(weight), Some(x)) = (weight, kept_x) {
                    let dw = B::float_matmul(B::float_transpose(x), upstream.clone());
                    grads.register::<B>(weight.id, dw);
                }
                if let Some(y) = y {
                    grads.register::<B>(y.id, upstream);
                }
            }
        }

        // Each is kept for the gradient of the other alone.
        let keep = [weight.is_tracked(), x.is_tracked()];
        let prepared = AddProduct
            .prepare::<C>([y.node(), x.node(), weight.node()])
            .compute_bound();
        let [y, x, weight] = [y, x, weight].map(|x| x.into_primitive());
        let kept = [keep[0].then(|| x.clone()), keep[1].then(|| weight.clone())];
        let sum = B::fused_add_product(y, x, weight);
        match prepared.stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(kept, sum),
            OpsKind::UnTracked(prepared) => prepared.finish(sum),
        }
    }
}
