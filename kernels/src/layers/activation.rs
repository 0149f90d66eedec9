//! The functions that a gated feed-forward layer can apply to its gate.

/// What is applied to the gate, element by element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x) (Elfwing et al., 2018). The gated layer is SwiGLU.
    Silu,
    /// max(x, 0)² (So et al., 2021).
    Relu2,
    /// ERA-GELU: x (1 + tanh t) / 2 + 0.1 log(1 + e^x) with t = sqrt(2/π) (x + 0.044715 x³), which is GELU in its tanh
    /// form (Hendrycks and Gimpel, 2016) and a share of softplus. Its slope at 0 is 0.55, and it is 0 nowhere
    /// above -3.
    GeluEra,
}

impl Activation {
    /// All of them.
    pub const ALL: [Activation; 3] = [Activation::Silu, Activation::Relu2, Activation::GeluEra];
}
