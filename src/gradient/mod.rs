//! The gradient of one optimizer step, between backward and update: accumulate, measure, clip.

mod backward;
mod loss_scale;
mod preference;
mod share;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{FloatDType, Gradients, Tensor};

pub use backward::{Backward, Precision, backward, backward_with};
pub use loss_scale::LossScale;
pub use preference::{Preference, PreferenceBackward, backward_preference, evaluate_preference};

use crate::model::{VisitParameters, visit_parameters};

/// One gradient tensor per trainable parameter.
#[derive(Debug, Default)]
pub struct Gradient {
    tensors: GradientsParams,
}

impl Gradient {
    /// Runs the backward pass from a scalar `objective` and collects the parameters' gradients.
    pub fn backward(objective: &Tensor<1>, model: &impl Module) -> Self {
        Self::from_grads(objective.backward(), model)
    }

    /// The gradients of `model`'s parameters out of a finished backward pass.
    fn from_grads(grads: Gradients, model: &impl Module) -> Self {
        Self {
            tensors: GradientsParams::from_grads(grads, model),
        }
    }

    /// The same gradient with every tensor in `dtype`.
    fn cast(self, dtype: FloatDType, model: &impl Module) -> Self {
        self.map(model, Cast(dtype))
    }

    /// The gradient of the parameter `param`; none if the objective does not depend on it.
    pub fn get<const D: usize>(&self, param: &Param<Tensor<D>>) -> Option<Tensor<D>> {
        self.tensors.get(param.id)
    }

    /// Takes the gradient of the parameter `param` out.
    pub(crate) fn take<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Option<Tensor<D>> {
        self.tensors.remove(param.id)
    }

    /// Adds another micro-batch's gradient.
    pub fn accumulate(self, other: Gradient, model: &impl Module) -> Self {
        struct Add {
            sum: GradientsParams,
            other: GradientsParams,
        }
        impl VisitParameters for Add {
            fn visit<const D: usize>(&mut self, _path: &str, param: &Param<Tensor<D>>) {
                let Some(other) = self.other.remove::<D>(param.id) else {
                    return;
                };
                let sum = match self.sum.remove::<D>(param.id) {
                    Some(sum) => sum + other,
                    None => other,
                };
                self.sum.register(param.id, sum);
            }
        }
        let mut add = Add {
            sum: self.tensors,
            other: other.tensors,
        };
        visit_parameters(model, &mut add);
        Self { tensors: add.sum }
    }

    /// Euclidean norm over all parameters at once. Not finite exactly when some element is not
    /// finite or the sum of squares overflows f32.
    pub fn norm(&self, model: &impl Module) -> f64 {
        struct Squares<'a> {
            gradient: &'a GradientsParams,
            sums: Vec<Tensor<1>>,
        }
        impl VisitParameters for Squares<'_> {
            fn visit<const D: usize>(&mut self, _path: &str, param: &Param<Tensor<D>>) {
                if let Some(gradient) = self.gradient.get::<D>(param.id) {
                    self.sums.push(gradient.square().sum());
                }
            }
        }
        let mut squares = Squares {
            gradient: &self.tensors,
            sums: Vec::new(),
        };
        visit_parameters(model, &mut squares);
        if squares.sums.is_empty() {
            return 0.0;
        }
        // One read for all tensors: on a GPU each read waits for the queue to drain.
        let sums = Tensor::cat(squares.sums, 0).into_data();
        sums.iter::<f32>().map(f64::from).sum::<f64>().sqrt()
    }

    /// Multiplies every element by `factor`.
    pub fn scale(self, factor: f64, model: &impl Module) -> Self {
        self.map(model, Scale(factor))
    }

    fn map(self, model: &impl Module, change: impl MapGradient) -> Self {
        struct Walk<C> {
            tensors: GradientsParams,
            change: C,
        }
        impl<C: MapGradient> VisitParameters for Walk<C> {
            fn visit<const D: usize>(&mut self, _path: &str, param: &Param<Tensor<D>>) {
                if let Some(gradient) = self.tensors.remove::<D>(param.id) {
                    let changed = self.change.map(gradient);
                    self.tensors.register(param.id, changed);
                }
            }
        }
        let mut walk = Walk {
            tensors: self.tensors,
            change,
        };
        visit_parameters(model, &mut walk);
        Self {
            tensors: walk.tensors,
        }
    }

    /// Scales the whole gradient down to `max_norm` if its `norm` is larger; 0 turns clipping off.
    /// The factor is `max_norm / (norm + 1e-6)`, PyTorch's.
    pub fn clip(self, norm: f64, max_norm: f64, model: &impl Module) -> Self {
        let factor = max_norm / (norm + 1e-6);
        if max_norm > 0.0 && factor < 1.0 {
            self.scale(factor, model)
        } else {
            self
        }
    }
}

/// Something done to each gradient tensor; a closure cannot be generic over the rank.
trait MapGradient {
    fn map<const D: usize>(&self, gradient: Tensor<D>) -> Tensor<D>;
}

struct Scale(f64);

impl MapGradient for Scale {
    fn map<const D: usize>(&self, gradient: Tensor<D>) -> Tensor<D> {
        gradient.mul_scalar(self.0)
    }
}

struct Cast(FloatDType);

impl MapGradient for Cast {
    fn map<const D: usize>(&self, gradient: Tensor<D>) -> Tensor<D> {
        gradient.cast(self.0)
    }
}
