//! The gradient of one optimizer step, between the backward pass and the update. Gradients are
//! summed, scaled, measured, clipped, and passed through the stages of a [`Pipeline`].
//!
//! A [`Gradient`] is keyed by parameter path and keeps the order of the model's modules, which is
//! the same in every process. burn keys gradients by random ids; these are dropped after the
//! backward pass.

pub mod compress;
mod exchange;
mod loss_scale;
mod order;
mod pipeline;

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, FloatDType, Gradients, Tensor, TensorData};

pub use exchange::{Exchange, ExchangeReport};
pub use loss_scale::LossScale;
pub use order::{NamedParameter, ParameterOrder, trained_parameters};
pub use pipeline::{Pipeline, PipelineError, Restored, Stage, StepContext};

use crate::device::read_now;
use crate::model::{MapParameters, Tensors, VisitParameters, map_parameters, visit_parameters};

/// One gradient tensor for each parameter that the loss depends on.
#[derive(Debug, Default, Clone)]
pub struct Gradient {
    order: Arc<ParameterOrder>,
    /// The tensors, by the position of the parameter in `order`.
    tensors: Vec<Option<GradientTensor>>,
}

/// The gradient of one parameter, of rank 1 or 2.
#[derive(Debug, Clone)]
enum GradientTensor {
    Vector(Tensor<1>),
    Matrix(Tensor<2>),
}

impl GradientTensor {
    /// Parameters are vectors and matrices, so other ranks cannot occur.
    fn new<const D: usize>(tensor: Tensor<D>) -> Self {
        match D {
            1 => Self::Vector(Tensor::from_bridge(tensor.into_bridge())),
            2 => Self::Matrix(Tensor::from_bridge(tensor.into_bridge())),
            _ => unreachable!("parameters are vectors and matrices, not of rank {D}"),
        }
    }

    /// None if the tensor has another rank.
    fn into_rank<const D: usize>(self) -> Option<Tensor<D>> {
        match (self, D) {
            (Self::Vector(tensor), 1) => Some(Tensor::from_bridge(tensor.into_bridge())),
            (Self::Matrix(tensor), 2) => Some(Tensor::from_bridge(tensor.into_bridge())),
            _ => None,
        }
    }

    fn from_data(data: TensorData, device: &Device) -> Self {
        match data.shape().num_dims() {
            1 => Self::Vector(Tensor::from_data(data, device)),
            2 => Self::Matrix(Tensor::from_data(data, device)),
            rank => unreachable!("parameters are vectors and matrices, not of rank {rank}"),
        }
    }

    fn into_data(self) -> TensorData {
        match self {
            Self::Vector(tensor) => read_now(tensor.into_data()),
            Self::Matrix(tensor) => read_now(tensor.into_data()),
        }
    }

    fn device(&self) -> Device {
        match self {
            Self::Vector(tensor) => tensor.device(),
            Self::Matrix(tensor) => tensor.device(),
        }
    }

    fn add(self, other: Self) -> Self {
        match (self, other) {
            (Self::Vector(a), Self::Vector(b)) => Self::Vector(a + b),
            (Self::Matrix(a), Self::Matrix(b)) => Self::Matrix(a + b),
            _ => unreachable!("gradients of one parameter have its rank"),
        }
    }

    fn scale(self, factor: f64) -> Self {
        match self {
            Self::Vector(tensor) => Self::Vector(tensor.mul_scalar(factor)),
            Self::Matrix(tensor) => Self::Matrix(tensor.mul_scalar(factor)),
        }
    }

    fn cast(self, dtype: FloatDType) -> Self {
        match self {
            Self::Vector(tensor) => Self::Vector(tensor.cast(dtype)),
            Self::Matrix(tensor) => Self::Matrix(tensor.cast(dtype)),
        }
    }

    /// Σ x·y `[1]`.
    fn dot(&self, other: &Self) -> Tensor<1> {
        match (self, other) {
            (Self::Vector(a), Self::Vector(b)) => (a.clone() * b.clone()).sum(),
            (Self::Matrix(a), Self::Matrix(b)) => (a.clone() * b.clone()).sum(),
            _ => unreachable!("gradients of one parameter have its rank"),
        }
    }

    /// Σ x² `[1]`.
    fn sum_of_squares(&self) -> Tensor<1> {
        match self {
            Self::Vector(tensor) => tensor.clone().square().sum(),
            Self::Matrix(tensor) => tensor.clone().square().sum(),
        }
    }
}

impl Gradient {
    /// Runs the backward pass from a scalar `objective` and collects the parameters' gradients.
    pub fn backward(objective: &Tensor<1>, model: &impl Module) -> Self {
        let order = Arc::new(ParameterOrder::of(model));
        Self::from_grads(objective.backward(), model, &order)
    }

    /// A gradient in which no parameter has a tensor yet.
    pub fn empty(order: &Arc<ParameterOrder>) -> Self {
        Self {
            order: order.clone(),
            tensors: vec![None; order.parameters().len()],
        }
    }

    /// Takes the gradients of `module`'s parameters from a finished backward pass. `module` is the
    /// model that `order` describes, or a part of that model.
    pub(crate) fn from_grads(
        grads: Gradients,
        module: &impl Module,
        order: &Arc<ParameterOrder>,
    ) -> Self {
        struct Collect {
            grads: Gradients,
            gradient: Gradient,
        }
        impl VisitParameters for Collect {
            fn visit<const D: usize>(&mut self, _path: &str, param: &Param<Tensor<D>>) {
                if !param.is_require_grad() {
                    return;
                }
                if let Some(tensor) = param.val().grad_remove(&mut self.grads)
                    && let Some(place) = self.gradient.order.place_of_id(param.id)
                {
                    self.gradient.tensors[place] = Some(GradientTensor::new(tensor));
                }
            }
        }
        let mut collect = Collect {
            grads,
            gradient: Self::empty(order),
        };
        visit_parameters(module, &mut collect);
        collect.gradient
    }

    /// All parameters of the model, with or without a gradient.
    pub fn order(&self) -> &Arc<ParameterOrder> {
        &self.order
    }

    /// The paths of the parameters that have a gradient, in order.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        let parameters = self.order.parameters().iter().zip(&self.tensors);
        parameters
            .filter_map(|(parameter, tensor)| tensor.as_ref().map(|_| parameter.path.as_str()))
    }

    /// The gradient of the parameter at a path; None if the loss does not depend on the parameter,
    /// or if its rank is not `D`.
    pub fn get<const D: usize>(&self, path: &str) -> Option<Tensor<D>> {
        let place = self.order.place_of(path)?;
        self.tensors.get(place)?.clone()?.into_rank()
    }

    /// Removes and returns the gradient of the parameter at a path.
    pub(crate) fn take<const D: usize>(&mut self, path: &str) -> Option<Tensor<D>> {
        let place = self.order.place_of(path)?;
        self.tensors.get_mut(place)?.take()?.into_rank()
    }

    /// A copy of all tensors on the host, by path.
    pub fn to_tensors(&self) -> Tensors {
        let parameters = self.order.parameters().iter().zip(&self.tensors);
        let present = parameters.filter_map(|(parameter, tensor)| {
            Some((parameter.path.clone(), tensor.clone()?.into_data()))
        });
        present.collect()
    }

    /// Calls `change` for every tensor in order, with the tensor's name and dimensions and its
    /// values in f32 on the host. The values that `change` leaves become the gradient. On the CPU
    /// nothing is copied if no one else holds the tensor.
    ///
    /// # Errors
    /// The first error of `change`. Tensors after it are left unchanged.
    pub fn try_update<E>(
        &mut self,
        mut change: impl FnMut(&NamedParameter, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        for (parameter, slot) in self.order.parameters().iter().zip(&mut self.tensors) {
            let Some(tensor) = slot.take() else { continue };
            let device = tensor.device();
            let data = tensor.cast(FloatDType::F32).into_data();
            let shape = data.shape().clone();
            let mut values = data
                .try_into_vec::<f32>()
                .unwrap_or_else(|error| unreachable!("the tensor has been cast to f32: {error:?}"));
            let changed = change(parameter, &mut values);
            *slot = Some(GradientTensor::from_data(
                TensorData::new(values, shape),
                &device,
            ));
            changed?;
        }
        Ok(())
    }

    /// The same as [`try_update`](Self::try_update), for a change that cannot fail.
    pub fn update(&mut self, mut change: impl FnMut(&NamedParameter, &mut [f32])) {
        let changed: Result<(), std::convert::Infallible> = self.try_update(|parameter, values| {
            change(parameter, values);
            Ok(())
        });
        let Ok(()) = changed;
    }

    /// The same gradient with every tensor in `dtype`.
    pub(crate) fn cast(self, dtype: FloatDType) -> Self {
        self.map(|tensor| tensor.cast(dtype))
    }

    /// Adds the gradient of another micro-batch or shard.
    ///
    /// # Panics
    /// If the two gradients belong to models with different parameters.
    #[expect(
        clippy::should_implement_trait,
        reason = "`a + b` would hide a pass over memory"
    )]
    pub fn add(mut self, other: Self) -> Self {
        if self.tensors.is_empty() {
            return other;
        }
        assert!(
            Arc::ptr_eq(&self.order, &other.order)
                || self.order.parameters() == other.order.parameters(),
            "gradients of two models cannot be added"
        );
        for (sum, other) in self.tensors.iter_mut().zip(other.tensors) {
            *sum = match (sum.take(), other) {
                (Some(sum), Some(other)) => Some(sum.add(other)),
                (sum, other) => sum.or(other),
            };
        }
        self
    }

    /// Euclidean norm over all parameters at once. Not finite exactly when some element is not
    /// finite or the sum of squares overflows f32.
    pub fn norm(&self) -> f64 {
        let present = self.tensors.iter().flatten();
        let sums: Vec<Tensor<1>> = present.map(GradientTensor::sum_of_squares).collect();
        if sums.is_empty() {
            return 0.0;
        }
        // One read for all tensors: on a GPU each read waits for the queue to drain.
        let sums = Tensor::cat(sums, 0).into_data();
        sums.iter::<f32>().map(f64::from).sum::<f64>().sqrt()
    }

    /// Σ x·y over all parameters that both gradients have. The sum is in f64 over the tensors, in
    /// f32 within one.
    pub fn dot(&self, other: &Self) -> f64 {
        let pairs = self.tensors.iter().zip(&other.tensors);
        let products: Vec<Tensor<1>> = pairs
            .filter_map(|(a, b)| Some(a.as_ref()?.dot(b.as_ref()?)))
            .collect();
        if products.is_empty() {
            return 0.0;
        }
        let products = Tensor::cat(products, 0).into_data();
        products.iter::<f32>().map(f64::from).sum()
    }

    /// The cosine of the angle between two gradients; 0 if one of them is zero.
    pub fn cosine(&self, other: &Self) -> f64 {
        let norms = self.norm() * other.norm();
        if norms > 0.0 {
            self.dot(other) / norms
        } else {
            0.0
        }
    }

    /// The values of the trained parameters of a model, in the form of a gradient.
    pub(crate) fn of_weights(model: &impl Module, order: &Arc<ParameterOrder>) -> Self {
        struct Collect(Gradient);
        impl VisitParameters for Collect {
            fn visit<const D: usize>(&mut self, _path: &str, param: &Param<Tensor<D>>) {
                if param.is_require_grad()
                    && let Some(place) = self.0.order.place_of_id(param.id)
                {
                    let value = param.val();
                    let plain = if value.is_autodiff() {
                        value.inner()
                    } else {
                        value
                    };
                    self.0.tensors[place] = Some(GradientTensor::new(plain));
                }
            }
        }
        let mut collect = Collect(Self::empty(order));
        visit_parameters(model, &mut collect);
        collect.0
    }

    /// Adds the tensors to the parameters of a model.
    pub(crate) fn added_to<M: Module>(self, model: M) -> M {
        struct Add(Gradient);
        impl MapParameters for Add {
            fn map<const D: usize>(
                &mut self,
                path: &str,
                param: Param<Tensor<D>>,
            ) -> Param<Tensor<D>> {
                let Some(change) = self.0.take::<D>(path) else {
                    return param;
                };
                let (id, is_trained) = (param.id, param.is_require_grad());
                let value = param.val();
                let moved = match value.is_autodiff() {
                    true => Tensor::from_inner(value.inner() + change),
                    false => value + change,
                };
                let moved = if is_trained {
                    moved.require_grad()
                } else {
                    moved
                };
                Param::initialized(id, moved)
            }
        }
        map_parameters(model, &mut Add(self))
    }

    /// A gradient from what [`to_tensors`](Self::to_tensors) returned. None if a tensor belongs to no
    /// parameter.
    pub(crate) fn from_tensors(
        tensors: Tensors,
        order: &Arc<ParameterOrder>,
        device: &Device,
    ) -> Option<Self> {
        let mut gradient = Self::empty(order);
        for (path, data) in tensors {
            let place = order.place_of(&path)?;
            gradient.tensors[place] = Some(GradientTensor::from_data(data, device));
        }
        Some(gradient)
    }

    /// Multiplies every element by `factor`.
    pub fn scale(self, factor: f64) -> Self {
        self.map(|tensor| tensor.scale(factor))
    }

    fn map(mut self, change: impl Fn(GradientTensor) -> GradientTensor) -> Self {
        for slot in &mut self.tensors {
            *slot = slot.take().map(&change);
        }
        self
    }

    /// Scales the whole gradient down to `max_norm` if its `norm` is larger; 0 turns clipping off.
    /// The factor is `max_norm / (norm + 1e-6)`, PyTorch's.
    pub fn clip(self, norm: f64, max_norm: f64) -> Self {
        let factor = max_norm / (norm + 1e-6);
        if max_norm > 0.0 && factor < 1.0 {
            self.scale(factor)
        } else {
            self
        }
    }
}
