//! An average of the weights over a run.
//!
//! The average a of a parameter takes in the weights w of the step as
//!
//! ```text
//! a <- d a + (1 - d) w,   d = min(decay, n / (n + 1))
//! ```
//!
//! where n is the number of weights that a holds already. So the first update copies the weights,
//! the average is the plain mean of the first 1 / (1 - decay) weights (Polyak and Juditsky, 1992),
//! and from then on it forgets old ones exponentially. With decay = 1 it stays the plain mean, as in
//! stochastic weight averaging (Izmailov et al., 2018). An average that begins with the initial
//! weights, as timm's `ModelEmaV2` does, would keep decay^n of them after n updates.
//!
//! Each trained parameter has an average of its own, in f32 on the device. A parameter that a phase
//! freezes keeps the average that it has. Training never reads the average, so it computes the same
//! bits with and without one. What is kept is saved in checkpoints.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::TrainError;
use crate::config::AverageConfig;
use crate::device::read_now;
use crate::extra::{ExtraState, StateScalar};
use crate::model::{Decoder, MapParameters, VisitParameters, map_parameters, visit_parameters};
use crate::optimizer::update_parameters;

/// The owner's name of the average's state in a checkpoint.
pub(crate) const OWNER: &str = "average";

/// The number of steps before the average, in a saved state.
const START: &str = "start";

/// How the weights of a run are averaged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AverageSettings {
    /// The largest share of the average that an update keeps.
    pub decay: f64,
    /// Steps from one update to the next.
    pub every: u64,
    /// Steps before those whose weights are averaged.
    pub start: u64,
}

impl AverageSettings {
    /// The settings in a run of so many steps.
    ///
    /// # Errors
    /// [`TrainError::AverageNeverBegins`] if the run ends before the first update.
    pub fn new(config: &AverageConfig, steps: u64) -> Result<Self, TrainError> {
        let start = config.start();
        let start = start.map_err(|reason| TrainError::AverageStart { reason })?;
        let settings = Self {
            decay: config.decay,
            every: config.every.max(1),
            start: start.steps_before(steps),
        };
        let first = settings.start.saturating_add(settings.every);
        if first > steps {
            return Err(TrainError::AverageNeverBegins { first, steps });
        }
        Ok(settings)
    }

    /// Whether the weights after this many completed steps are taken in.
    fn is_due(&self, step: u64) -> bool {
        step > self.start && (step - self.start).is_multiple_of(self.every)
    }
}

/// The average of a model's weights.
pub struct Average {
    settings: AverageSettings,
    /// By parameter path.
    parameters: BTreeMap<String, Mean>,
    /// Whether it has begun since [`take_begun`](Self::take_begun) was last called.
    has_just_begun: bool,
}

/// The average of one parameter.
#[derive(Clone)]
struct Mean {
    /// In f32, off the autodiff device.
    value: BridgeTensor,
    /// The weights in it.
    count: u64,
}

impl std::fmt::Debug for Average {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Average")
            .field("settings", &self.settings)
            .field("parameters", &self.parameters.len())
            .finish()
    }
}

impl Average {
    /// An average of nothing yet.
    pub fn new(settings: AverageSettings) -> Self {
        Self {
            settings,
            parameters: BTreeMap::new(),
            has_just_begun: false,
        }
    }

    /// Whether it holds any weights. Until then the weights themselves stand in for it.
    pub fn has_begun(&self) -> bool {
        !self.parameters.is_empty()
    }

    /// Whether it has begun since the last call.
    pub(super) fn take_begun(&mut self) -> bool {
        std::mem::take(&mut self.has_just_begun)
    }

    /// Takes in the weights after `step` completed steps, if they are due.
    pub fn take(&mut self, model: &Decoder, step: u64) {
        if !self.settings.is_due(step) {
            return;
        }
        let had_begun = self.has_begun();
        let mut collect = Collect {
            average: self,
            updates: Vec::new(),
            device: None,
        };
        model.visit_trained(&mut collect);
        let Collect {
            updates, device, ..
        } = collect;
        let updated = update_parameters(
            device.as_ref(),
            updates,
            |update| update.weights,
            |update| {
                let mean = Mean {
                    value: (update.run)(),
                    count: update.count + 1,
                };
                (update.path, mean)
            },
        );
        self.parameters.extend(updated);
        self.has_just_begun |= !had_begun;
    }

    /// Forgets all weights. Returns whether it held any.
    pub fn begin_anew(&mut self) -> bool {
        let had_begun = self.has_begun();
        self.parameters.clear();
        self.has_just_begun = false;
        had_begun
    }

    /// The model with the average in the place of the weights that are averaged. `model` is off the
    /// autodiff device.
    pub fn put_into(&self, model: Decoder) -> Decoder {
        struct Put<'a>(&'a BTreeMap<String, Mean>);
        impl MapParameters for Put<'_> {
            fn map<const D: usize>(
                &mut self,
                path: &str,
                param: Param<Tensor<D>>,
            ) -> Param<Tensor<D>> {
                match self.0.get(path) {
                    Some(mean) => {
                        let value = Tensor::from_bridge(mean.value.clone());
                        Param::initialized(param.id, value)
                    }
                    None => param,
                }
            }
        }
        map_parameters(model, &mut Put(&self.parameters))
    }

    /// What is saved in a checkpoint: the averages and their counts, by parameter path.
    pub(super) fn state(&self, model: &Decoder) -> ExtraState {
        struct Copy<'a> {
            parameters: &'a BTreeMap<String, Mean>,
            state: ExtraState,
        }
        impl VisitParameters for Copy<'_> {
            fn visit<const D: usize>(&mut self, path: &str, _: &Param<Tensor<D>>) {
                let Some(mean) = self.parameters.get(path) else {
                    return;
                };
                let value = Tensor::<D>::from_bridge(mean.value.clone());
                let (path, count) = (path.to_string(), StateScalar::Uint(mean.count));
                let value = read_now(value.into_data());
                self.state.tensors.insert(path.clone(), value);
                self.state.scalars.insert(path, count);
            }
        }
        let mut copy = Copy {
            parameters: &self.parameters,
            state: ExtraState::default(),
        };
        visit_parameters(model, &mut copy);
        let start = StateScalar::Uint(self.settings.start);
        copy.state.scalars.insert(START.to_string(), start);
        copy.state
    }

    /// Restores what [`state`](Self::state) returned after `step` completed steps.
    ///
    /// # Errors
    /// A state that is not of this model; [`TrainError::MovedAverage`] if the average began, or
    /// would have begun, at another step.
    pub(super) fn load(
        &mut self,
        mut state: ExtraState,
        (model, device): (&Decoder, &Device),
        step: u64,
    ) -> Result<(), TrainError> {
        let Some(StateScalar::Uint(before)) = state.scalars.remove(START) else {
            return Err(damaged(START));
        };
        let now = self.settings.start;
        if before != now && before.min(now) < step {
            return Err(TrainError::MovedAverage { before, now });
        }
        let mut load = Load {
            device,
            parameters: BTreeMap::new(),
            problem: None,
            state,
        };
        visit_parameters(model, &mut load);
        let (tensors, scalars) = (
            load.state.tensors.into_keys(),
            load.state.scalars.into_keys(),
        );
        let left = tensors.chain(scalars).next();
        if let Some(path) = load.problem.or(left) {
            return Err(damaged(&path));
        }
        self.parameters = load.parameters;
        Ok(())
    }
}

/// A saved state that cannot be used.
pub(super) fn damaged(what: &str) -> TrainError {
    TrainError::OwnerState {
        owner: OWNER.to_string(),
        what: what.to_string(),
    }
}

/// The update of one parameter's average.
struct Update {
    path: String,
    weights: usize,
    count: u64,
    run: Box<dyn FnOnce() -> BridgeTensor + Send>,
}

/// Takes the averages of the trained parameters out, so that each has one owner and is updated in
/// place.
struct Collect<'a> {
    average: &'a mut Average,
    updates: Vec<Update>,
    device: Option<Device>,
}

impl VisitParameters for Collect<'_> {
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let value = param.val();
        let value = match value.is_autodiff() {
            true => value.inner(),
            false => value,
        };
        self.device.get_or_insert_with(|| value.device());
        let mean = self.average.parameters.remove(path);
        let count = mean.as_ref().map_or(0, |mean| mean.count);
        let share = share_of_new(self.average.settings.decay, count);
        let weights = value.shape().num_elements();
        let run = Box::new(move || match mean {
            // Shared with the model until the optimizer changes its own.
            None => value.into_bridge(),
            Some(mean) => {
                let mean = Tensor::<D>::from_bridge(mean.value);
                let step = value.sub(mean.clone()).mul_scalar(share);
                mean.add(step).into_bridge()
            }
        });
        self.updates.push(Update {
            path: path.to_string(),
            weights,
            count,
            run,
        });
    }
}

/// The share of new weights in the average of `count` earlier ones and themselves.
fn share_of_new(decay: f64, count: u64) -> f64 {
    (1.0 - decay).max(1.0 / (count as f64 + 1.0))
}

/// Puts saved averages on the device.
struct Load<'a> {
    device: &'a Device,
    state: ExtraState,
    parameters: BTreeMap<String, Mean>,
    /// The first parameter whose average cannot be used.
    problem: Option<String>,
}

impl Load<'_> {
    fn count(&mut self, path: &str) -> Option<u64> {
        match self.state.scalars.remove(path) {
            Some(StateScalar::Uint(count)) => Some(count).filter(|count| *count > 0),
            _ => None,
        }
    }
}

impl VisitParameters for Load<'_> {
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        let Some(data) = self.state.tensors.remove(path) else {
            return;
        };
        let fits =
            |data: &TensorData| *data.shape() == param.lazy_shape() && data.dtype() == DType::F32;
        match self.count(path).filter(|_| fits(&data)) {
            Some(count) => {
                let value = Tensor::<D>::from_data(data, (self.device, DType::F32));
                let value = value.into_bridge();
                self.parameters
                    .insert(path.to_string(), Mean { value, count });
            }
            None => {
                self.problem.get_or_insert(path.to_string());
            }
        }
    }
}

#[cfg(test)]
mod tests;
