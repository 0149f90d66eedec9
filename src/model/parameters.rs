//! Walking a module's parameters by path: to count, save, load, clip or update them.
//!
//! burn's visitors report entering and leaving modules; these two traits hand over the finished
//! path (`layers.0.mlp.up_proj.weight`) instead, which is what files, optimizer states and
//! parameter groups are keyed by.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};

use rayon::prelude::*;

use super::ModelError;
use crate::device::{is_cpu, read_now};

/// Host copies of tensors by name.
pub type Tensors = BTreeMap<String, TensorData>;

/// Looks at every parameter of a module.
pub trait VisitParameters {
    /// Called once per float parameter, in declaration order.
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>);

    /// Called once per tensor of packed weights.
    fn visit_packed<const D: usize>(&mut self, _path: &str, _param: &Param<Tensor<D, Int>>) {}
}

/// Replaces parameters of a module.
pub trait MapParameters {
    /// Called once per float parameter, in declaration order.
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>>;

    /// Called once per tensor of packed weights.
    fn map_packed<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D, Int>>,
    ) -> Param<Tensor<D, Int>> {
        param
    }
}

/// Shows every parameter of `module` to `visitor`.
pub fn visit_parameters(module: &impl Module, visitor: &mut impl VisitParameters) {
    module.visit(&mut Walk {
        path: Vec::new(),
        inner: visitor,
    });
}

/// Passes every parameter of `module` through `mapper`.
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

impl<T> Walk<'_, T> {
    fn enter(&mut self, name: &str, container: &str) {
        // Which variant of an enum a weight is says nothing about whose weight it is.
        if !is_variant(container) {
            self.path.push(name.to_string());
        }
    }

    fn exit(&mut self, container: &str) {
        if !is_variant(container) {
            self.path.pop();
        }
    }

    fn path(&self) -> String {
        self.path.join(".")
    }
}

/// As burn's derive names the container of an enum's variant.
fn is_variant(container: &str) -> bool {
    container.starts_with("Enum:")
}

impl<T: VisitParameters> ModuleVisitor for Walk<'_, T> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.exit(container);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.inner.visit_packed(&self.path(), param);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.inner.visit(&self.path(), param);
    }
}

impl<T: MapParameters> ModuleMapper for Walk<'_, T> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.exit(container);
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        self.inner.map_packed(&self.path(), param)
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.inner.map(&self.path(), param)
    }
}

/// Copies every parameter to the host, keyed by path.
pub fn parameters(module: &impl Module) -> Tensors {
    parameters_into(module, Tensors::new())
}

/// The same, into the memory of an earlier copy.
pub(crate) fn parameters_into(module: &impl Module, mut spare: Tensors) -> Tensors {
    type Copy = Box<dyn FnOnce() -> TensorData + Send>;
    #[derive(Default)]
    struct Collect {
        copies: Vec<(String, Copy)>,
        device: Option<Device>,
    }
    impl VisitParameters for Collect {
        fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            let value = param.val();
            self.device.get_or_insert_with(|| value.device());
            let copy = Box::new(move || read_now(value.into_data()));
            self.copies.push((path.to_string(), copy));
        }

        fn visit_packed<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D, Int>>) {
            let value = param.val();
            self.device.get_or_insert_with(|| value.device());
            let copy = Box::new(move || read_now(value.into_data()));
            self.copies.push((path.to_string(), copy));
        }
    }
    let mut collect = Collect::default();
    visit_parameters(module, &mut collect);
    let Collect { copies, device } = collect;
    let copies = copies.into_iter().map(|(path, copy)| {
        let spare = spare.remove(&path);
        (path, copy, spare)
    });
    let copied = copied_from(device.as_ref(), copies.collect(), |(path, copy, spare)| {
        (path, moved_into(spare, copy()))
    });
    copied.into_iter().collect()
}

/// A tensor in the memory of another, if that has room for just it. Large pieces of new memory take several times as long
/// to be given out as to be written.
pub(crate) fn moved_into(spare: Option<TensorData>, data: TensorData) -> TensorData {
    let is_like = |spare: &TensorData| spare.as_bytes().len() == data.as_bytes().len();
    let Some(spare) = spare.filter(is_like) else {
        return data;
    };
    let mut bytes = spare.into_bytes();
    bytes.copy_from_slice(data.as_bytes());
    TensorData::from_bytes(bytes, data.shape().clone(), data.dtype())
}

/// Copies things to the host: from the CPU on all cores, since new memory takes longer to be given out than to be written;
/// from a GPU one after another, as its queue has them.
pub(crate) fn copied_from<J: Send, R: Send>(
    device: Option<&Device>,
    jobs: Vec<J>,
    copy: impl Fn(J) -> R + Send + Sync,
) -> Vec<R> {
    if device.is_some_and(is_cpu) {
        jobs.into_par_iter().map(copy).collect()
    } else {
        jobs.into_iter().map(copy).collect()
    }
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
    load(module, tensors, device, Absent::IsAnError)
}

/// The same for some of the parameters; the others stay, and whether one is trained does not change.
///
/// # Errors
/// A tensor without a parameter, or a shape that differs.
pub(crate) fn with_some_parameters<M: Module>(
    module: M,
    tensors: Tensors,
    device: &Device,
) -> Result<M, ModelError> {
    load(module, tensors, device, Absent::Stays)
}

/// What becomes of a parameter that no tensor is for.
#[derive(Clone, Copy, PartialEq)]
enum Absent {
    IsAnError,
    Stays,
}

fn load<M: Module>(
    module: M,
    tensors: Tensors,
    device: &Device,
    absent: Absent,
) -> Result<M, ModelError> {
    let mut load = Load {
        tensors,
        device,
        absent,
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
    absent: Absent,
    problem: Option<ModelError>,
}

impl Load<'_> {
    fn leaves(&self, path: &str) -> bool {
        self.absent == Absent::Stays && !self.tensors.contains_key(path)
    }

    fn take(
        &mut self,
        path: &str,
        expected: Shape,
        dtype: DType,
    ) -> Result<TensorData, ModelError> {
        let data = self
            .tensors
            .remove(path)
            .ok_or_else(|| ModelError::MissingTensor {
                name: path.to_string(),
            })?;
        if *data.shape() != expected || data.dtype() != dtype {
            return Err(ModelError::TensorMismatch {
                name: path.to_string(),
                expected: format!("{dtype:?} {:?}", expected.as_slice()),
                found: format!("{:?} {:?}", data.dtype(), data.shape().as_slice()),
            });
        }
        Ok(data)
    }
}

impl MapParameters for Load<'_> {
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.leaves(path) {
            return param;
        }
        match self.take(path, param.lazy_shape(), DType::F32) {
            Ok(data) => {
                let tensor = Tensor::from_data(data, self.device);
                // Asking a parameter that is still to be drawn would draw it; all of a new model are
                // trained.
                let tracked = self.device.is_autodiff()
                    && (self.absent == Absent::IsAnError || param.is_require_grad());
                let tensor = if tracked {
                    tensor.require_grad()
                } else {
                    tensor
                };
                Param::initialized(param.id, tensor)
            }
            Err(problem) => {
                self.problem.get_or_insert(problem);
                param
            }
        }
    }

    fn map_packed<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D, Int>>,
    ) -> Param<Tensor<D, Int>> {
        if self.leaves(path) {
            return param;
        }
        match self.take(path, param.lazy_shape(), DType::U32) {
            Ok(data) => {
                let tensor = Tensor::from_data(data, (self.device, DType::U32));
                Param::initialized(param.id, tensor)
            }
            Err(problem) => {
                self.problem.get_or_insert(problem);
                param
            }
        }
    }
}
