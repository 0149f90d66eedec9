//! The layers every decoder is made of. All work on rows: activations are `[rows, dim]` with
//! rows = batch x seq, so that each linear layer is one matrix product.
//!
//! A layer computes in the dtype of its weights. Where that is a half-precision one, norms and
//! softmax are still computed in f32, as the reference implementations do.

use burn::module::{Module, Param};
use burn::tensor::activation::{gelu, silu};
use burn::tensor::module::layer_norm;
use burn::tensor::{DType, Int, Tensor};

use super::init::Init;
use crate::config::ModelShape;
use crate::device::is_cpu;

/// y = x W + b. The weight is `[in, out]`, the layout in which the forward product and both
/// products of the backward pass read and write contiguous rows; files hold `[out, in]`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[in, out]`.
    pub weight: Param<Tensor<2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    pub(super) fn new(init: &Init, path: &str, dims: [usize; 2], bias: bool, std: f64) -> Self {
        Self {
            weight: init.normal(&format!("{path}.weight"), dims, std),
            bias: bias.then(|| init.full([dims[1]], 0.0)),
        }
    }

    /// `[rows, in]` -> `[rows, out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = x.matmul(self.weight.val());
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }
}

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
        let dim = shape.hidden_size;
        let centred = shape.is_gpt2_form();
        Self {
            weight: init.full([dim], 1.0),
            bias: (centred && shape.bias).then(|| init.full([dim], 0.0)),
            eps: shape.norm_eps,
            centred,
        }
    }

    /// RMSNorm of one head.
    pub(super) fn of_head(init: &Init, shape: &ModelShape) -> Self {
        Self {
            weight: init.full([shape.head_dim], 1.0),
            bias: None,
            eps: shape.norm_eps,
            centred: false,
        }
    }

    /// `[rows, dim]` -> `[rows, dim]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
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

/// The feed-forward layer: SwiGLU (Shazeer, 2020); GELU for gpt2.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[dim, ffn]`, all but gpt2.
    pub gate_proj: Option<Linear>,
    /// `[dim, ffn]`.
    pub up_proj: Linear,
    /// `[ffn, dim]`.
    pub down_proj: Linear,
}

impl Mlp {
    pub(super) fn new(init: &Init, path: &str, shape: &ModelShape) -> Self {
        let (dim, ffn, std) = (
            shape.hidden_size,
            shape.intermediate_size,
            shape.initializer_range,
        );
        let gated = !shape.is_gpt2_form();
        let linear = |name: &str, dims, std| {
            Linear::new(init, &format!("{path}.{name}"), dims, shape.bias, std)
        };
        Self {
            gate_proj: gated.then(|| linear("gate_proj", [dim, ffn], std)),
            up_proj: linear("up_proj", [dim, ffn], std),
            down_proj: linear("down_proj", [ffn, dim], residual_std(shape)),
        }
    }

    /// `[rows, dim]` -> `[rows, dim]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let hidden = match &self.gate_proj {
            Some(gate) => silu(gate.forward(x.clone())) * self.up_proj.forward(x),
            None => exact_gelu(self.up_proj.forward(x)),
        };
        self.down_proj.forward(hidden)
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
/// with depth (Radford et al., 2019, section 2.3).
pub(super) fn residual_std(shape: &ModelShape) -> f64 {
    shape.initializer_range / (2.0 * shape.num_hidden_layers as f64).sqrt()
}
