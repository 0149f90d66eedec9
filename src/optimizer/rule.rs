//! What an optimizer is to the rest: how one parameter is updated, and what is kept of it from step
//! to step.

use std::any::Any;
use std::collections::BTreeMap;

use burn::tensor::kind::BridgeTensor;
use burn::tensor::{DType, Device, TensorData};

use super::{AppliedStep, OptimizerError, OptimizerState, StateScalar};
use crate::model::Tensors;

/// How a parameter is updated. One rule serves every parameter of a group, of whatever rank: tensors
/// come as burn's untyped ones with the rank beside them.
pub(super) trait UpdateRule: Send + Sync {
    /// What the state means. Rules of one family continue from each other's states; a state of
    /// another family is refused.
    fn state_family(&self) -> &'static str;

    /// What the rule keeps of a parameter of these dimensions once it has been updated.
    fn layout(&self, dims: &[usize]) -> StateLayout;

    /// The updated parameter, and its state after the update. `state` is what the step before
    /// returned, or what was loaded; None before the first. All tensors are on the plain device,
    /// and `value` is the only owner of its memory, so that it can be updated in place.
    fn step(
        &self,
        rank: usize,
        learning_rate: f64,
        value: BridgeTensor,
        gradient: BridgeTensor,
        state: Option<RuleState>,
    ) -> (BridgeTensor, Option<RuleState>);

    /// Copies the state of the parameter `path` to the host: tensors and scalars of the layout, as
    /// `<path>.<name>`. `spare` are tensors of an earlier copy, whose memory may be used again.
    fn save(&self, path: &str, state: &RuleState, spare: Tensors, saved: &mut OptimizerState);

    /// The state that `save` has copied; `saved` has exactly what the layout lists. None if a scalar
    /// is of the wrong type, or a value is one that the rule never keeps.
    fn load(&self, dims: &[usize], saved: SavedState, device: &Device) -> Option<RuleState>;

    /// The step of Adam that led to `state`, if the rule takes such steps and keeps both moments
    /// in f32: checkpoints that are differences predict moments and weights from it.
    fn applied(
        &self,
        _path: &str,
        _state: &OptimizerState,
        _learning_rate: f64,
    ) -> Option<AppliedStep> {
        None
    }

    /// Bytes of the tensors that are kept of a parameter of these dimensions.
    fn state_bytes(&self, dims: &[usize]) -> u64 {
        let tensors = self.layout(dims).tensors;
        tensors.iter().map(StateTensor::bytes).sum()
    }
}

/// What is kept of one parameter. Only the rule that made it looks inside.
pub(super) struct RuleState {
    family: &'static str,
    kept: Box<dyn Any + Send + Sync>,
}

impl RuleState {
    /// What `rule` keeps.
    pub(super) fn new<T: Any + Send + Sync>(rule: &impl UpdateRule, kept: T) -> Self {
        Self {
            family: rule.state_family(),
            kept: Box::new(kept),
        }
    }

    pub(super) fn family(&self) -> &'static str {
        self.family
    }

    /// What was put in.
    pub(super) fn into_inner<T: Any>(self) -> T {
        let kept = self.kept.downcast();
        *kept.unwrap_or_else(|_| foreign(self.family))
    }

    /// A look at it.
    pub(super) fn inner<T: Any>(&self) -> &T {
        let kept = self.kept.downcast_ref();
        kept.unwrap_or_else(|| foreign(self.family))
    }
}

/// The rules of an optimizer never change, so the state of a parameter is its rule's.
fn foreign(family: &str) -> ! {
    unreachable!("a state of {family} was given to another rule")
}

/// What a rule keeps of a parameter, by name.
pub(super) struct StateLayout {
    pub(super) tensors: Vec<StateTensor>,
    pub(super) scalars: &'static [&'static str],
}

/// One of the tensors.
pub(super) struct StateTensor {
    pub(super) name: &'static str,
    pub(super) dtype: DType,
    pub(super) dims: Vec<usize>,
}

impl StateTensor {
    fn bytes(&self) -> u64 {
        (self.dims.iter().product::<usize>() * self.dtype.size()) as u64
    }

    fn fits(&self, data: &TensorData) -> bool {
        data.dtype() == self.dtype && data.shape().iter().eq(&self.dims)
    }
}

impl StateLayout {
    pub(super) fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.scalars.is_empty()
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.iter().any(|tensor| tensor.name == name) || self.scalars.contains(&name)
    }

    /// Whether a saved state of the parameter `path` has exactly what is listed here.
    fn check(
        &self,
        path: &str,
        family: &'static str,
        saved: &SavedState,
    ) -> Result<(), OptimizerError> {
        let full = |name: &str| format!("{path}.{name}");
        if let Some(found) = saved.family.as_ref().filter(|found| *found != family) {
            return Err(OptimizerError::OtherRule {
                path: path.to_string(),
                expected: family,
                found: found.clone(),
            });
        }
        let mut names = saved.tensors.keys().chain(saved.scalars.keys());
        if let Some(name) = names.find(|name| !self.has(name)) {
            let name = full(name);
            return Err(match saved.family {
                Some(_) => OptimizerError::Unfit { name },
                // Saved before states said whose they are.
                None => OptimizerError::NotKept { name, family },
            });
        }
        let scalars = self.scalars.iter().copied();
        let missing = scalars.filter(|&name| !saved.scalars.contains_key(name));
        let tensors = self.tensors.iter().map(|tensor| tensor.name);
        let mut missing = missing.chain(tensors.filter(|&name| !saved.tensors.contains_key(name)));
        if let Some(name) = missing.next() {
            return Err(OptimizerError::Incomplete {
                path: path.to_string(),
                name: full(name),
            });
        }
        let unfit = |tensor: &&StateTensor| !tensor.fits(&saved.tensors[tensor.name]);
        match self.tensors.iter().find(unfit) {
            Some(tensor) => Err(OptimizerError::Unfit {
                name: full(tensor.name),
            }),
            None => Ok(()),
        }
    }
}

/// The saved state of one parameter; names are without its path.
pub(super) struct SavedState {
    pub(super) tensors: Tensors,
    pub(super) scalars: BTreeMap<String, StateScalar>,
    /// The family of the rule that saved it; None in checkpoints that do not say.
    family: Option<String>,
}

impl SavedState {
    /// Takes all that belongs to the parameter `path` out of a state; None if there is nothing.
    pub(super) fn take(path: &str, state: &mut OptimizerState) -> Option<Self> {
        let saved = Self {
            tensors: take_under(path, &mut state.tensors),
            scalars: take_under(path, &mut state.scalars),
            family: state.families.remove(path),
        };
        let is_nothing =
            saved.tensors.is_empty() && saved.scalars.is_empty() && saved.family.is_none();
        (!is_nothing).then_some(saved)
    }

    /// The state as `rule` keeps it of the parameter `path`.
    pub(super) fn load(
        self,
        path: &str,
        dims: &[usize],
        rule: &dyn UpdateRule,
        device: &Device,
    ) -> Result<RuleState, OptimizerError> {
        let layout = rule.layout(dims);
        layout.check(path, rule.state_family(), &self)?;
        rule.load(dims, self, device)
            .ok_or_else(|| OptimizerError::Unfit {
                name: path.to_string(),
            })
    }
}

/// Takes the entries `<path>.<name>` out, as `<name>`.
fn take_under<T>(path: &str, from: &mut BTreeMap<String, T>) -> BTreeMap<String, T> {
    // All that starts with `<path>.` lies between these two: '/' comes right after '.'.
    let (first, end) = (format!("{path}."), format!("{path}/"));
    let taken = from.extract_if(first.clone()..end, |_, _| true);
    let named = taken.map(|(name, value)| (name[first.len()..].to_string(), value));
    named.collect()
}
