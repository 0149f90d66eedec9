//! Decoupled weight decay, plain or cautious.

use burn::tensor::Tensor;

/// The decay of a parameter group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decay {
    pub(super) weight_decay: f32,
    /// Whether only weights are decayed whose update has the same sign, or is 0 (Chen et al., 2025,
    /// arXiv 2510.12402, equation 1).
    pub(super) is_cautious: bool,
}

impl Decay {
    /// No decay, for norms and biases.
    pub(super) const NONE: Self = Self {
        weight_decay: 0.0,
        is_cautious: false,
    };

    pub(super) fn new(weight_decay: f64, is_cautious: bool) -> Self {
        Self {
            weight_decay: weight_decay as f32,
            is_cautious,
        }
    }

    /// The share that a step takes off a weight.
    pub(super) fn rate(self, learning_rate: f64) -> f64 {
        learning_rate * f64::from(self.weight_decay)
    }

    /// The weights after the decay. `update` is what the step will subtract from them, up to a
    /// positive factor.
    pub(super) fn decayed<const D: usize>(
        self,
        learning_rate: f64,
        value: Tensor<D>,
        update: &Tensor<D>,
    ) -> Tensor<D> {
        let rate = self.rate(learning_rate);
        if rate == 0.0 {
            value
        } else if self.is_cautious {
            let is_opposed = (update.clone() * value.clone()).lower_scalar(0.0);
            let decay = value.clone().mul_scalar(rate).mask_fill(is_opposed, 0.0);
            value - decay
        } else {
            value.mul_scalar(1.0 - rate)
        }
    }
}
