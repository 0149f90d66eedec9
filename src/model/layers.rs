//! The layers every decoder is made of. All work on rows: activations are `[rows, dim]` with
//! rows = batch x seq, so that each linear layer is one matrix product.
//!
//! A layer computes in the dtype of its weights. Where that is a half-precision one, norms and
//! softmax are still computed in f32, as the reference implementations do. On the CPU what a norm
//! scales is rounded once, at the end; on a GPU before the last factor too, as in transformers.

use burn::module::{Module, Param};
use burn::tensor::activation::{gelu, log_sigmoid, relu, sigmoid, silu};
use burn::tensor::module::layer_norm;
use burn::tensor::{DType, Int, Tensor};
use firebrick_kernels::layers::{Activation, gated, rms_norm};

use super::init::Init;
use super::linear::Linear;
use super::lora::Dropout;
use crate::config::{HiddenAct, ModelShape};
use crate::device::is_cpu;

/// A table of vectors, one per id.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[ids, dim]`.
    pub weight: Param<Tensor<2>>,
}

impl Embedding {
    pub(super) fn new(init: &Init, path: &str, dims: [usize; 2], std: f64) -> Self {
        Self {
            weight: init.normal(&format!("{path}.weight"), dims, std),
        }
    }

    /// `[batch, seq]` ids -> `[batch x seq, dim]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<2> {
        let [batch, seq] = ids.dims();
        let dim = self.weight.lazy_shape()[1];
        burn::tensor::module::embedding(self.weight.val(), ids).reshape([batch * seq, dim])
    }
}

/// RMSNorm (Zhang and Sennrich, 2019); LayerNorm, with or without bias, for gpt2.
#[derive(Module, Debug)]
pub struct Norm {
    /// `[dim]`.
    pub weight: Param<Tensor<1>>,
    /// `[dim]`.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    eps: f64,
    #[module(skip)]
    centred: bool,
}

impl Norm {
    pub(super) fn new(init: &Init, shape: &ModelShape) -> Self {
        Self::of_width(init, shape, shape.hidden_size)
    }

    pub(super) fn of_width(init: &Init, shape: &ModelShape, dim: usize) -> Self {
        let centred = shape.is_gpt2_form();
        Self {
            weight: init.full([dim], 1.0),
            bias: (centred && shape.bias).then(|| init.full([dim], 0.0)),
            eps: shape.norm_eps,
            centred,
        }
    }

    /// `[rows, dim]` -> `[rows, dim]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        if !self.centred && is_cpu(&x.device()) {
            return rms_norm(x, self.weight.val(), self.eps);
        }
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        if self.centred {
            let bias = self.bias.as_ref().map(|bias| bias.val().cast(DType::F32));
            let weight = self.weight.val().cast(DType::F32);
            return layer_norm(x, weight, bias, self.eps).cast(dtype);
        }
        let rms = x.clone().square().mean_dim(1).add_scalar(self.eps).sqrt();
        (x / rms).cast(dtype) * self.weight.val().unsqueeze()
    }
}

/// The feed-forward layer: gated (Shazeer, 2020) by SiLU, ReLU² or ERA-GELU; GELU without a gate for
/// gpt2.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[dim, ffn]`, all but gpt2.
    pub gate_proj: Option<Linear>,
    /// `[dim, ffn]`.
    pub up_proj: Linear,
    /// `[ffn]`, bitnet only: over what goes down.
    pub ffn_sub_norm: Option<Norm>,
    /// `[ffn, dim]`.
    pub down_proj: Linear,
    /// What is applied to the gate, if there is one.
    #[module(skip)]
    activation: Option<Activation>,
}

impl Mlp {
    pub(super) fn new(init: &Init, path: &str, shape: &ModelShape) -> Self {
        let (dim, ffn, std) = (
            shape.hidden_size,
            shape.intermediate_size,
            shape.initializer_range,
        );
        let activation = shape.hidden_act.map(|act| match act {
            HiddenAct::Silu => Activation::Silu,
            HiddenAct::Relu2 => Activation::Relu2,
            HiddenAct::GeluEra => Activation::GeluEra,
        });
        let linear = |name: &str, dims, std| {
            let path = format!("{path}.{name}");
            Linear::of_block(init, &path, shape, (dims, shape.bias, std))
        };
        let sub_norm = || Norm::of_width(init, shape, ffn);
        Self {
            gate_proj: activation.map(|_| linear("gate_proj", [dim, ffn], std)),
            up_proj: linear("up_proj", [dim, ffn], std),
            ffn_sub_norm: shape.is_bitnet_form().then(sub_norm),
            down_proj: linear("down_proj", [ffn, dim], residual_std(shape)),
            activation,
        }
    }

    pub(super) fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        let up_and_down = [&mut self.up_proj, &mut self.down_proj];
        self.gate_proj.iter_mut().chain(up_and_down)
    }

    /// `[rows, dim]` -> `[rows, dim]`.
    pub(super) fn forward(&self, x: Tensor<2>, dropout: Option<&Dropout>) -> Tensor<2> {
        let hidden = match (&self.gate_proj, self.activation) {
            (Some(gate), Some(activation)) => {
                let [gate, up] = Linear::forward_shared([gate, &self.up_proj], x, dropout);
                let product = match is_cpu(&gate.device()) {
                    true => gated(gate, up, activation),
                    false => activate(gate, activation) * up,
                };
                match &self.ffn_sub_norm {
                    Some(norm) => norm.forward(product),
                    None => product,
                }
            }
            _ => exact_gelu(self.up_proj.forward_dropping(x, dropout)),
        };
        self.down_proj.forward_dropping(hidden, dropout)
    }
}

/// An [`Activation`] as a graph of burn's operations.
fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    match activation {
        Activation::Silu => silu(x),
        Activation::Relu2 => relu(x).square(),
        Activation::GeluEra => {
            // 2 t of GELU in its tanh form. The sigmoid is 0 or 1 before the bounds, and the square is
            // finite within them, also in half precision.
            let within = x.clone().clamp(-20.0, 20.0);
            let twice = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
            let argument = (within.clone().square() * 0.044715 + 1.0) * within * twice;
            // log(1 + e^x), in a form that cannot overflow.
            let softplus = -log_sigmoid(-x.clone());
            x * sigmoid(argument) + softplus * 0.1
        }
    }
}

/// x Φ(x) (Hendrycks and Gimpel, 2016) with its own derivative. burn's `gelu` has that on the CPU in
/// one pass; on its GPU backends the backward pass is that of the tanh approximation (burn 0.22.1,
/// `ActivationOps::gelu_backward`), which is off by up to 9e-4.
fn exact_gelu(x: Tensor<2>) -> Tensor<2> {
    if is_cpu(&x.device()) {
        return gelu(x);
    }
    let phi = ((x.clone() * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5;
    x * phi
}

/// Projections that write to the residual stream start smaller, so that its variance does not grow
/// with depth (Radford et al., 2019, section 2.3), or at zero.
pub(super) fn residual_std(shape: &ModelShape) -> f64 {
    if shape.zero_init_output {
        return 0.0;
    }
    shape.initializer_range / (2.0 * shape.num_hidden_layers as f64).sqrt()
}
