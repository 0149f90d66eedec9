//! The order of a model's parameters.

use std::collections::HashMap;

use burn::module::{Module, Param, ParamId};
use burn::tensor::Tensor;

use crate::model::{Decoder, VisitParameters, visit_parameters};

/// The float parameters of a model: their paths and dimensions, in the order in which the modules
/// declare them. All operations on a gradient use this order, so that floating-point sums do not
/// depend on names, threads or ranks.
#[derive(Debug, Default)]
pub struct ParameterOrder {
    parameters: Vec<NamedParameter>,
    by_id: HashMap<ParamId, usize>,
    by_path: HashMap<String, usize>,
}

/// A parameter's name and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedParameter {
    /// The place of the parameter in the model, such as `layers.0.mlp.up_proj.weight`.
    pub path: String,
    /// Dimensions of the parameter, `[in, out]` for the weight of a linear layer.
    pub dims: Vec<usize>,
}

impl ParameterOrder {
    /// The order of a model's parameters. No weight is read.
    pub fn of(model: &impl Module) -> Self {
        let mut order = Self::default();
        visit_parameters(model, &mut order);
        order
    }

    /// The parameters in order.
    pub fn parameters(&self) -> &[NamedParameter] {
        &self.parameters
    }

    /// The position of the parameter that has this id in burn.
    pub(super) fn place_of_id(&self, id: ParamId) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    /// The position of the parameter at a path.
    pub(super) fn place_of(&self, path: &str) -> Option<usize> {
        self.by_path.get(path).copied()
    }
}

/// The parameters of a model that are trained, in order. No weight is read.
pub fn trained_parameters(model: &Decoder) -> Vec<NamedParameter> {
    let mut order = ParameterOrder::default();
    model.visit_trained(&mut order);
    order.parameters
}

impl VisitParameters for ParameterOrder {
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let place = self.parameters.len();
        self.by_id.insert(param.id, place);
        self.by_path.insert(path.to_string(), place);
        self.parameters.push(NamedParameter {
            path: path.to_string(),
            dims: param.lazy_shape().iter().copied().collect(),
        });
    }
}
