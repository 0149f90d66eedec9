//! The interface of an update rule: it updates one parameter and keeps state for it between steps.

use std::any::Any;
use std::collections::BTreeMap;

use burn::tensor::kind::BridgeTensor;
use burn::tensor::{DType, Device, TensorData};

use super::{AppliedStep, OptimizerError, OptimizerState, StateScalar};
use crate::model::Tensors;

/// An update rule for single parameters. The same rule serves all parameters of a group, of any
/// rank, so tensors are passed as burn's untyped ones, together with the rank.
pub(super) trait UpdateRule: Send + Sync {
    /// The family of the rule's state. Rules of one family can continue from each other's states; a
    /// state of another family is refused.
    fn state_family(&self) -> &'static str;

    /// The state that the rule keeps of a parameter of these dimensions after its first update.
    fn layout(&self, dims: &[usize]) -> StateLayout;

    /// Returns the updated parameter and its new state. `state` is the state that the previous step
    /// returned or that was loaded; None before the first step. All tensors are on the plain
    /// device. `value` is the only owner of its memory, so that it can be updated in place.
    fn step(
        &self,
        rank: usize,
        learning_rate: f64,
        value: BridgeTensor,
        gradient: BridgeTensor,
        state: Option<RuleState>,
    ) -> (BridgeTensor, Option<RuleState>);

    /// Copies the state of the parameter `path` to the host: the tensors and scalars of the layout,
    /// as `<path>.<name>`. `spare` holds tensors of an earlier copy; their memory may be used
    /// again.
    fn save(&self, path: &str, state: &RuleState, spare: Tensors, saved: &mut OptimizerState);

    /// Restores a state that `save` has copied. `saved` has exactly the entries of the layout. None
    /// if a scalar is of the wrong type, or a value is one that the rule never keeps.
    fn load(&self, dims: &[usize], saved: SavedState, device: &Device) -> Option<RuleState>;

    /// What of a state that a rule of any family has saved this rule can go on from; None if nothing. The result
    /// fits the layout.
    fn adopt(&self, dims: &[usize], saved: SavedState) -> Option<SavedState> {
        saved.of_family(self.state_family(), &self.layout(dims))
    }

    /// The Adam step that led to `state`, if the rule takes such steps and keeps both moments in
    /// f32. Delta checkpoints predict moments and weights from it.
    fn applied(
        &self,
        _path: &str,
        _state: &OptimizerState,
        _learning_rate: f64,
    ) -> Option<AppliedStep> {
        None
    }

    /// Bytes of the state tensors of a parameter of these dimensions.
    fn state_bytes(&self, dims: &[usize]) -> u64 {
        let tensors = self.layout(dims).tensors;
        tensors.iter().map(StateTensor::bytes).sum()
    }
}

/// The state of one parameter. Only the rule that made it reads its content.
#[derive(Clone)]
pub(super) struct RuleState {
    family: &'static str,
    kept: Box<dyn Kept>,
}

/// The state of a rule, of any type that implements `Clone`. Copies share their tensors until one of
/// them changes.
trait Kept: Any + Send + Sync {
    fn copied(&self) -> Box<dyn Kept>;
    fn as_any(&self) -> &dyn Any;
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

impl<T: Any + Clone + Send + Sync> Kept for T {
    fn copied(&self) -> Box<dyn Kept> {
        Box::new(self.clone())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl Clone for Box<dyn Kept> {
    fn clone(&self) -> Self {
        (**self).copied()
    }
}

impl RuleState {
    /// Wraps the state `kept` of `rule`.
    pub(super) fn new<T: Any + Clone + Send + Sync>(rule: &impl UpdateRule, kept: T) -> Self {
        Self {
            family: rule.state_family(),
            kept: Box::new(kept),
        }
    }

    pub(super) fn family(&self) -> &'static str {
        self.family
    }

    /// Unwraps the state.
    pub(super) fn into_inner<T: Any>(self) -> T {
        let kept = self.kept.into_any().downcast();
        *kept.unwrap_or_else(|_| foreign(self.family))
    }

    /// Borrows the state.
    pub(super) fn inner<T: Any>(&self) -> &T {
        let kept = (*self.kept).as_any().downcast_ref();
        kept.unwrap_or_else(|| foreign(self.family))
    }
}

/// The rules of an optimizer never change, so a parameter's state always comes from its own rule.
fn foreign(family: &str) -> ! {
    unreachable!("a state of {family} was given to another rule")
}

/// The tensors and scalars that a rule keeps of a parameter, by name.
pub(super) struct StateLayout {
    pub(super) tensors: Vec<StateTensor>,
    pub(super) scalars: &'static [&'static str],
}

/// One state tensor.
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

    /// Checks that a saved state of the parameter `path` has exactly the entries of this layout.
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
                // Older checkpoints do not name the family.
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

/// The saved state of one parameter. Names do not contain the parameter's path.
pub(super) struct SavedState {
    pub(super) tensors: Tensors,
    pub(super) scalars: BTreeMap<String, StateScalar>,
    /// The family of the rule that saved it; None in older checkpoints, which do not name it.
    family: Option<String>,
}

impl SavedState {
    /// Removes the state of the parameter `path` from `state` and returns it; None if there is
    /// none.
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

    /// The state of the parameter `path`, restored by `rule`.
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

impl SavedState {
    /// This state, if it is of `family` and has the names of `layout`. Within a family one rule may keep what another
    /// does not: SGD with and without momentum.
    pub(super) fn of_family(self, family: &str, layout: &StateLayout) -> Option<Self> {
        let mut names = self.tensors.keys().chain(self.scalars.keys());
        let count = self.tensors.len() + self.scalars.len();
        let is_own = self.family.as_deref() == Some(family)
            && count == layout.tensors.len() + layout.scalars.len()
            && names.all(|name| layout.has(name));
        (is_own && !layout.is_empty()).then_some(self)
    }

    /// Puts the state back as that of the parameter `path`, under the name of `family`.
    pub(super) fn put_back(self, path: &str, family: &str, state: &mut OptimizerState) {
        let full = |name: String| format!("{path}.{name}");
        let tensors = self.tensors.into_iter();
        let scalars = self.scalars.into_iter();
        state
            .tensors
            .extend(tensors.map(|(name, data)| (full(name), data)));
        state
            .scalars
            .extend(scalars.map(|(name, value)| (full(name), value)));
        state.families.insert(path.to_string(), family.to_string());
    }

    pub(super) fn family(&self) -> Option<&str> {
        self.family.as_deref()
    }
}

/// Removes the entries `<path>.<name>` from `from` and returns them as `<name>`.
fn take_under<T>(path: &str, from: &mut BTreeMap<String, T>) -> BTreeMap<String, T> {
    // All names that begin with `<path>.` lie between these two: '/' follows '.' in ASCII.
    let (first, end) = (format!("{path}."), format!("{path}/"));
    let taken = from.extract_if(first.clone()..end, |_, _| true);
    let named = taken.map(|(name, value)| (name[first.len()..].to_string(), value));
    named.collect()
}
