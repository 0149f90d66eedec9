//! An update rule that wraps one of burn's optimizers.

use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{DynOptimizer, DynState, StateSink, StateSource};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{DType, Device};

use super::applied::Adam;
use super::rule::{RuleState, SavedState, StateLayout, StateTensor, UpdateRule};
use super::{AppliedStep, OptimizerState};
use crate::device::read_now;
use crate::model::{Tensors, moved_into};

/// One of burn's optimizers with its parameters.
pub(super) struct BurnRule {
    optimizer: Box<dyn DynOptimizer>,
    state: BurnState,
    adam: Option<Adam>,
}

/// The state that one of burn's optimizers keeps of a parameter, under burn's names for its parts.
/// All tensors are f32.
#[derive(Clone, Copy)]
pub(super) struct BurnState {
    pub(super) family: &'static str,
    pub(super) tensors: &'static [(&'static str, StateSize)],
    pub(super) scalars: &'static [&'static str],
}

/// The dimensions of a state tensor, as a function of the parameter's.
#[derive(Clone, Copy)]
pub(super) enum StateSize {
    /// The dimensions of the parameter.
    Full,
    /// One value for each row of a matrix; for a vector, one for each element.
    Rows,
    /// One value for each column of a matrix; none for a vector.
    Columns,
}

impl StateSize {
    fn dims(self, dims: &[usize]) -> Option<Vec<usize>> {
        match (self, dims) {
            (Self::Rows, [batch @ .., rows, _]) => Some([batch, &[*rows, 1]].concat()),
            (Self::Columns, [batch @ .., _, columns]) => Some([batch, &[1, *columns]].concat()),
            (Self::Columns, _) => None,
            (Self::Full | Self::Rows, _) => Some(dims.to_vec()),
        }
    }
}

impl BurnRule {
    pub(super) fn new(optimizer: impl DynOptimizer + 'static, state: BurnState) -> Self {
        Self {
            optimizer: Box::new(optimizer),
            state,
            adam: None,
        }
    }

    /// The same rule, for an optimizer that takes Adam steps with these settings.
    pub(super) fn with_adam(self, adam: Adam) -> Self {
        Self {
            adam: Some(adam),
            ..self
        }
    }
}

impl UpdateRule for BurnRule {
    fn state_family(&self) -> &'static str {
        self.state.family
    }

    fn layout(&self, dims: &[usize]) -> StateLayout {
        let tensors = self.state.tensors.iter();
        let tensors = tensors.filter_map(|&(name, size)| {
            Some(StateTensor {
                name,
                dtype: DType::F32,
                dims: size.dims(dims)?,
            })
        });
        StateLayout {
            tensors: tensors.collect(),
            scalars: self.state.scalars,
        }
    }

    fn step(
        &self,
        rank: usize,
        learning_rate: f64,
        value: BridgeTensor,
        gradient: BridgeTensor,
        state: Option<RuleState>,
    ) -> (BridgeTensor, Option<RuleState>) {
        let state = state.map(RuleState::into_inner::<DynState>);
        let optimizer = &self.optimizer;
        let (value, state) = optimizer.step_dyn(rank, learning_rate, value, gradient, state);
        (value, state.map(|state| RuleState::new(self, state)))
    }

    fn save(&self, path: &str, state: &RuleState, mut spare: Tensors, saved: &mut OptimizerState) {
        let mut sink = StateSink::default();
        let state = state.inner::<DynState>();
        self.optimizer.state_flatten(path, state, &mut sink);
        let tensors = sink.tensors.into_iter();
        saved.tensors.extend(tensors.map(|(name, data)| {
            let spare = spare.remove(&name);
            (name, moved_into(spare, read_now(data)))
        }));
        let scalars = sink.scalars.into_iter();
        let scalars = scalars.map(|(name, value)| (name, value.into()));
        saved.scalars.extend(scalars);
    }

    fn load(&self, dims: &[usize], saved: SavedState, device: &Device) -> Option<RuleState> {
        let scalars = saved.scalars.into_iter();
        let scalars = scalars.map(|(name, value)| (name, value.into()));
        let mut source = StateSource::new(scalars.collect());
        for (name, data) in saved.tensors {
            source.insert_tensor(name, data);
        }
        let rank = dims.len();
        let state = self
            .optimizer
            .state_unflatten(rank, "", &mut source, device)?;
        Some(RuleState::new(self, state))
    }

    fn applied(
        &self,
        path: &str,
        state: &OptimizerState,
        learning_rate: f64,
    ) -> Option<AppliedStep> {
        self.adam.as_ref()?.applied(path, state, learning_rate)
    }
}

/// burn's weight decay, which is added to the gradient. 0 = none.
pub(super) fn decay(penalty: f64) -> Option<WeightDecayConfig> {
    (penalty > 0.0).then(|| WeightDecayConfig::new(penalty as f32))
}

/// burn dampens the gradient by default; PyTorch and the papers do not.
pub(super) fn momentum_without_dampening(momentum: f64, nesterov: bool) -> MomentumConfig {
    MomentumConfig::new()
        .with_momentum(momentum)
        .with_dampening(0.0)
        .with_nesterov(nesterov)
}
