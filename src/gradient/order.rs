//! The order that a model's parameters have.

use std::collections::HashMap;

use burn::module::{Module, Param, ParamId};
use burn::tensor::Tensor;

use crate::model::{VisitParameters, visit_parameters};

/// The float parameters of a model: their paths and dimensions, in the order in which the modules
/// declare them. Everything that goes through a gradient keeps to this order, so that sums of
/// floating-point numbers do not depend on names, threads or ranks.
#[derive(Debug, Default)]
pub struct ParameterOrder {
    parameters: Vec<NamedParameter>,
    by_id: HashMap<ParamId, usize>,
    by_path: HashMap<String, usize>,
}

/// A parameter's name and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedParameter {
    /// Where the parameter is in the model, as `layers.0.mlp.up_proj.weight`.
    pub path: String,
    /// Its dimensions, `[in, out]` for the weight of a linear layer.
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

    /// The place of a parameter that burn knows by this id.
    pub(super) fn place_of_id(&self, id: ParamId) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    /// The place of the parameter at a path.
    pub(super) fn place_of(&self, path: &str) -> Option<usize> {
        self.by_path.get(path).copied()
    }
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
