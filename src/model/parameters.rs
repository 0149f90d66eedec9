//! Walking a module's parameters by path: to count, save, load, clip or update them.
//!
//! burn's visitors report entering and leaving modules; these two traits hand over the finished
//! path (`layers.0.mlp.up_proj.weight`) instead, which is what files, optimizer states and
//! parameter groups are keyed by.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};

use super::ModelError;

/// Host copies of tensors by name.
pub type Tensors = BTreeMap<String, TensorData>;

/// Looks at every float parameter of a module.
pub trait VisitParameters {
    /// Called once per parameter, in declaration order.
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>);
}

/// Replaces every float parameter of a module.
pub trait MapParameters {
    /// Called once per parameter, in declaration order.
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

/// Shows every float parameter of `module` to `visitor`.
pub fn visit_parameters(module: &impl Module, visitor: &mut impl VisitParameters) {
    module.visit(&mut Walk {
        path: Vec::new(),
        inner: visitor,
    });
}

/// Passes every float parameter of `module` through `mapper`.
pub fn map_parameters<M: Module>(module: M, mapper: &mut impl MapParameters) -> M {
    module.map(&mut Walk {
        path: Vec::new(),
        inner: mapper,
    })
}

struct Walk<'a, T> {
    path: Vec<String>,
    inner: &'a mut T,
}

impl<T: VisitParameters> ModuleVisitor for Walk<'_, T> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.inner.visit(&self.path.join("."), param);
    }
}

impl<T: MapParameters> ModuleMapper for Walk<'_, T> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.inner.map(&self.path.join("."), param)
    }
}

/// Copies every parameter to the host, keyed by path.
pub fn parameters(module: &impl Module) -> Tensors {
    struct Collect(Tensors);
    impl VisitParameters for Collect {
        fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            self.0.insert(path.to_string(), param.val().into_data());
        }
    }
    let mut collect = Collect(Tensors::new());
    visit_parameters(module, &mut collect);
    collect.0
}

/// Puts `tensors`, keyed by path, in the place of the module's parameters.
///
/// # Errors
/// A parameter without a tensor, a tensor without a parameter, or a shape that differs.
pub fn with_parameters<M: Module>(
    module: M,
    tensors: Tensors,
    device: &Device,
) -> Result<M, ModelError> {
    let mut load = Load {
        tensors,
        device,
        problem: None,
    };
    let module = map_parameters(module, &mut load);
    match (load.problem, load.tensors.into_keys().next()) {
        (Some(problem), _) => Err(problem),
        (None, Some(name)) => Err(ModelError::UnexpectedTensor { name }),
        (None, None) => Ok(module),
    }
}

struct Load<'a> {
    tensors: Tensors,
    device: &'a Device,
    problem: Option<ModelError>,
}

impl Load<'_> {
    fn take<const D: usize>(
        &mut self,
        path: &str,
        param: &Param<Tensor<D>>,
    ) -> Result<Tensor<D>, ModelError> {
        let data = self
            .tensors
            .remove(path)
            .ok_or_else(|| ModelError::MissingTensor {
                name: path.to_string(),
            })?;
        let expected = param.lazy_shape();
        if *data.shape() != expected {
            return Err(ModelError::TensorMismatch {
                name: path.to_string(),
                expected: format!("{:?}", expected.as_slice()),
                found: format!("{:?}", data.shape().as_slice()),
            });
        }
        Ok(Tensor::from_data(data, self.device))
    }
}

impl MapParameters for Load<'_> {
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.take(path, &param) {
            Ok(tensor) if self.device.is_autodiff() => {
                Param::initialized(param.id, tensor.require_grad())
            }
            Ok(tensor) => Param::initialized(param.id, tensor),
            Err(problem) => {
                self.problem.get_or_insert(problem);
                param
            }
        }
    }
}
