//! Update rules of our own in tensor operations. They run on every device.
//!
//! A rule gives its arithmetic and the layout of its state. Saving, loading and the dispatch over ranks
//! are the same for all of them and are here.

use std::collections::BTreeMap;

use burn::tensor::kind::BridgeTensor;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::applied::Adam;
use super::rule::{RuleState, SavedState, StateLayout, UpdateRule};
use super::{AppliedStep, OptimizerState, StateScalar};
use crate::device::read_now;
use crate::model::{Tensors, moved_into};

/// The arithmetic of a rule, and the state that it keeps of a parameter.
pub(super) trait TensorRule: Send + Sync {
    /// See [`UpdateRule::state_family`].
    fn family(&self) -> &'static str;

    /// See [`UpdateRule::layout`]. All tensors are f32. There is at most one scalar, which counts
    /// updates.
    fn layout(&self, dims: &[usize]) -> StateLayout;

    /// The updated parameter. `state` is empty before the first update, and has every tensor of
    /// the layout after it. `state.updates` counts this update already.
    fn update<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        state: &mut TensorState,
    ) -> Tensor<D>;

    /// See [`UpdateRule::adopt`].
    fn adopt(&self, dims: &[usize], saved: SavedState) -> Option<SavedState> {
        saved.of_family(self.family(), &self.layout(dims))
    }

    /// The Adam steps that the rule takes, if it takes such steps.
    fn adam(&self) -> Option<Adam> {
        None
    }
}

/// The state that a rule keeps of one parameter: f32 tensors by name.
#[derive(Default, Clone)]
pub struct TensorState {
    /// Updates so far, this one included.
    pub(super) updates: u64,
    tensors: BTreeMap<&'static str, BridgeTensor>,
}

impl TensorState {
    /// Updates of the parameter so far, the present one included.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Takes a tensor out; None before the first update.
    pub fn take<const D: usize>(&mut self, name: &'static str) -> Option<Tensor<D>> {
        self.tensors.remove(name).map(Tensor::from_bridge)
    }

    /// Puts a tensor in, and returns it.
    pub fn put<const D: usize>(&mut self, name: &'static str, tensor: Tensor<D>) -> Tensor<D> {
        self.tensors.insert(name, tensor.clone().into_bridge());
        tensor
    }
}

/// A rule of our own as an [`UpdateRule`].
pub(super) struct Own<R>(pub(super) R);

/// Calls a function of a constant rank for a rank that is known at run time.
macro_rules! with_rank {
    ($rank:expr, $D:ident => $body:expr) => {
        match $rank {
            1 => {
                const $D: usize = 1;
                $body
            }
            2 => {
                const $D: usize = 2;
                $body
            }
            3 => {
                const $D: usize = 3;
                $body
            }
            4 => {
                const $D: usize = 4;
                $body
            }
            // The largest rank is that of a volume convolution's kernel.
            5 => {
                const $D: usize = 5;
                $body
            }
            rank => unreachable!("a parameter of rank {rank}"),
        }
    };
}

impl<R: TensorRule> UpdateRule for Own<R> {
    fn state_family(&self) -> &'static str {
        self.0.family()
    }

    fn layout(&self, dims: &[usize]) -> StateLayout {
        self.0.layout(dims)
    }

    fn step(
        &self,
        rank: usize,
        learning_rate: f64,
        value: BridgeTensor,
        gradient: BridgeTensor,
        state: Option<RuleState>,
    ) -> (BridgeTensor, Option<RuleState>) {
        let state = state.map(RuleState::into_inner::<TensorState>);
        let mut state = state.unwrap_or_default();
        state.updates += 1;
        let value = with_rank!(rank, D => {
            let (value, gradient) = (Tensor::<D>::from_bridge(value), Tensor::from_bridge(gradient));
            self.0.update(learning_rate, value, gradient, &mut state).into_bridge()
        });
        (value, Some(RuleState::new(self, state)))
    }

    fn save(&self, path: &str, state: &RuleState, mut spare: Tensors, saved: &mut OptimizerState) {
        let state = state.inner::<TensorState>();
        for (name, tensor) in &state.tensors {
            let name = format!("{path}.{name}");
            let data = on_host(tensor.clone());
            let data = moved_into(spare.remove(&name), data);
            saved.tensors.insert(name, data);
        }
        // The count's name does not depend on the dimensions.
        for name in self.0.layout(&[1, 1]).scalars {
            let count = StateScalar::Uint(state.updates);
            saved.scalars.insert(format!("{path}.{name}"), count);
        }
    }

    fn load(&self, dims: &[usize], mut saved: SavedState, device: &Device) -> Option<RuleState> {
        let layout = self.0.layout(dims);
        let updates = match layout.scalars.first() {
            Some(&name) => match *saved.scalars.get(name)? {
                StateScalar::Uint(updates) => updates,
                StateScalar::Int(updates) => u64::try_from(updates).ok()?,
                _ => return None,
            },
            None => 0,
        };
        let mut tensors = BTreeMap::new();
        for tensor in &layout.tensors {
            let data = saved.tensors.remove(tensor.name)?;
            tensors.insert(tensor.name, on_device(data, device));
        }
        Some(RuleState::new(self, TensorState { updates, tensors }))
    }

    fn adopt(&self, dims: &[usize], saved: SavedState) -> Option<SavedState> {
        self.0.adopt(dims, saved)
    }

    fn applied(
        &self,
        path: &str,
        state: &OptimizerState,
        learning_rate: f64,
    ) -> Option<AppliedStep> {
        self.0.adam()?.applied(path, state, learning_rate)
    }
}

/// Makes a tensor of the same rank as its data.
pub(super) fn on_device(data: TensorData, device: &Device) -> BridgeTensor {
    with_rank!(data.shape().num_dims(), D => {
        Tensor::<D>::from_data(data, (device, DType::F32)).into_bridge()
    })
}

/// A copy of a tensor on the host.
fn on_host(tensor: BridgeTensor) -> TensorData {
    with_rank!(tensor.rank(), D => read_now(Tensor::<D>::from_bridge(tensor).into_data()))
}
