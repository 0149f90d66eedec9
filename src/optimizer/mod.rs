//! The update rules: burn's per-tensor optimizers, applied by parameter group and kept by path.
//!
//! burn's own `ModuleOptimizer` keys its state by random parameter ids and saves it in its own
//! format. Ours keys state by the parameter's path, so that a checkpoint is a plain safetensors
//! file that means the same in the next process.
//!
//! Groups: matrices and embeddings are decayed, norms and biases never. With Muon the blocks'
//! matrices take Muon's rule and everything else AdamW's.

mod eight_bit;
mod rules;
mod schedule;

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::optim::{DynState, StateSink, StateSource};
use burn::tensor::{Device, Tensor, TensorData};
use burn_pack::Scalar;
use firebrick_kernels::difference::adam::AdamStep;

use crate::config::OptimizerPlan;
pub use crate::extra::StateScalar;
use crate::gradient::Gradient;
use crate::model::{
    Decoder, MapParameters, Tensors, VisitParameters, copied_from, map_parameters, moved_into,
    visit_parameters,
};
use rules::{Rule, Rules};
pub use schedule::Schedule;

/// Updates a module's parameters from their gradients.
pub struct Optimizer {
    rules: Rules,
    /// The second matrix of adapters learns at so many times the learning rate.
    lora_plus_ratio: f64,
    states: BTreeMap<String, State>,
}

/// What is kept of a parameter from step to step.
enum State {
    /// By one of burn's optimizers.
    Burn(DynState),
    /// Moments in eight bits.
    EightBit(eight_bit::State),
}

/// The whole state of an [`Optimizer`] on the host. Tensors are keyed
/// `<parameter path>.<state path>`, as in `norm.weight.momentum.moment_1`; so are scalars, such as
/// the number of updates a parameter has had.
#[derive(Debug, Default)]
pub struct OptimizerState {
    /// Moments and the like.
    pub tensors: Tensors,
    /// Counters and the like.
    pub scalars: BTreeMap<String, StateScalar>,
}

/// A step of Adam that a parameter has taken, in the numbers it was computed with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AppliedStep {
    /// Updates up to this one, it included.
    pub time: u64,
    /// Decoupled.
    pub weight_decay: f32,
    /// What leads from the moments and the parameter before it to those after it.
    pub step: AdamStep,
}

/// A saved state that does not belong to this optimizer and model.
#[derive(Debug, thiserror::Error)]
pub enum OptimizerError {
    /// A parameter's state is absent, incomplete or of the wrong shape.
    #[error("optimizer state of `{path}` is missing or does not fit")]
    State {
        /// Path of the parameter.
        path: String,
    },
    /// The state names a parameter the model does not have.
    #[error("optimizer state `{name}` belongs to no parameter of this model")]
    Unexpected {
        /// Name of the state tensor.
        name: String,
    },
}

impl std::fmt::Debug for Optimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Optimizer")
            .field("parameters", &self.states.len())
            .finish()
    }
}

impl Optimizer {
    /// An optimizer without any state yet.
    pub fn new(plan: &OptimizerPlan) -> Self {
        Self {
            rules: Rules::new(plan),
            lora_plus_ratio: 1.0,
            states: BTreeMap::new(),
        }
    }

    /// The same with another learning rate for the second matrix, B, of adapters: `ratio` times that
    /// of everything else (LoRA+: Hayou et al., 2024).
    pub fn with_lora_plus(self, ratio: f64) -> Self {
        Self {
            lora_plus_ratio: ratio,
            ..self
        }
    }

    fn learning_rate(&self, path: &str, learning_rate: f64) -> f64 {
        if path.ends_with(".adapter.lora_b") {
            learning_rate * self.lora_plus_ratio
        } else {
            learning_rate
        }
    }

    /// One update of every parameter that has a gradient.
    pub fn step<M: Module>(&mut self, model: M, gradient: Gradient, learning_rate: f64) -> M {
        let mut update = Update {
            optimizer: self,
            gradient,
            learning_rate,
        };
        map_parameters(model, &mut update)
    }

    /// A copy of the state on the host.
    pub fn state(&self, model: &impl Module) -> OptimizerState {
        self.state_into(model, Tensors::new())
    }

    /// The same, with tensors in the memory of an earlier copy's.
    pub(crate) fn state_into(&self, model: &impl Module, mut spare: Tensors) -> OptimizerState {
        #[derive(Default)]
        struct Collect {
            /// Paths and dimensions.
            parameters: Vec<(String, usize)>,
            device: Option<Device>,
        }
        impl VisitParameters for Collect {
            fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
                self.device.get_or_insert_with(|| param.lazy_device());
                self.parameters.push((path.to_string(), D));
            }
        }
        let mut collect = Collect::default();
        visit_parameters(model, &mut collect);
        let Collect { parameters, device } = collect;
        let parameters = parameters.into_iter().map(|(path, dims)| {
            let from = format!("{path}.");
            let own = spare.extract_if(from.clone().., |name, _| name.starts_with(&from));
            let own: Tensors = own.collect();
            (path, dims, own)
        });
        let parameters = parameters.collect();
        let copies = copied_from(device.as_ref(), parameters, |(path, dims, mut spare)| {
            let (mut sink, mut kept) = (StateSink::default(), OptimizerState::default());
            match (self.states.get(&path), self.rules.of(&path, dims)) {
                (Some(State::Burn(state)), Rule::Burn(rule)) => {
                    rule.state_flatten(&path, state, &mut sink);
                }
                (Some(State::EightBit(state)), _) => state.save(&path, &mut kept),
                _ => {}
            }
            let tensors = sink.tensors.into_iter();
            kept.tensors.extend(tensors.map(|(name, data)| {
                let spare = spare.remove(&name);
                (name, moved_into(spare, data))
            }));
            let scalars = sink.scalars.into_iter();
            kept.scalars
                .extend(scalars.map(|(name, value)| (name, value.into())));
            kept
        });
        let mut all = OptimizerState::default();
        for kept in copies {
            all.tensors.extend(kept.tensors);
            all.scalars.extend(kept.scalars);
        }
        all
    }

    /// The last step of every parameter that Adam's rule updates, by path: `state` is what came of it, `learning_rate` what
    /// it was taken with.
    pub fn applied(
        &self,
        model: &impl Module,
        state: &OptimizerState,
        learning_rate: f64,
    ) -> BTreeMap<String, AppliedStep> {
        struct Collect<'a> {
            optimizer: &'a Optimizer,
            state: &'a OptimizerState,
            learning_rate: f64,
            steps: BTreeMap<String, AppliedStep>,
        }
        impl VisitParameters for Collect<'_> {
            fn visit<const D: usize>(&mut self, path: &str, _param: &Param<Tensor<D>>) {
                let time = match self.state.scalars.get(&format!("{path}.momentum.time")) {
                    Some(&StateScalar::Uint(time)) => time,
                    Some(&StateScalar::Int(time)) => time as u64,
                    _ => return,
                };
                let Some(adam) = self.optimizer.rules.adam(path, D) else {
                    return;
                };
                let learning_rate = self.optimizer.learning_rate(path, self.learning_rate);
                let [beta_1, beta_2] = adam.betas;
                let step = AdamStep {
                    arithmetic: adam.arithmetic,
                    beta_1,
                    beta_2,
                    correction_1: 1.0 - beta_1.powi(time as i32),
                    correction_2: 1.0 - beta_2.powi(time as i32),
                    epsilon: adam.eps,
                    learning_rate: learning_rate as f32,
                    decay: (1.0 - learning_rate * f64::from(adam.weight_decay)) as f32,
                };
                let applied = AppliedStep {
                    time,
                    weight_decay: adam.weight_decay,
                    step,
                };
                self.steps.insert(path.to_string(), applied);
            }
        }
        let mut collect = Collect {
            optimizer: self,
            state,
            learning_rate,
            steps: BTreeMap::new(),
        };
        visit_parameters(model, &mut collect);
        collect.steps
    }

    /// Bytes of the tensors that [`state`](Self::state) will hold after the first update.
    pub fn state_bytes(&self, model: &Decoder) -> u64 {
        struct Count<'a> {
            rules: &'a Rules,
            bytes: u64,
        }
        impl VisitParameters for Count<'_> {
            fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
                let dims: Vec<usize> = param.lazy_shape().iter().copied().collect();
                self.bytes += self.rules.kept_bytes(path, &dims);
            }
        }
        let mut count = Count {
            rules: &self.rules,
            bytes: 0,
        };
        model.visit_trained(&mut count);
        count.bytes
    }

    /// Puts a saved state in place, on `device` (the plain one).
    ///
    /// # Errors
    /// A parameter whose state is missing or of another shape; state of an unknown parameter.
    pub fn load_state(
        &mut self,
        model: &impl Module,
        state: OptimizerState,
        device: &Device,
    ) -> Result<Vec<String>, OptimizerError> {
        if state.tensors.is_empty() {
            return Ok(Vec::new());
        }
        let mut restore = Restore {
            optimizer: self,
            state,
            device,
            problem: None,
        };
        visit_parameters(model, &mut restore);
        match (restore.problem, restore.state.tensors.into_keys().next()) {
            (Some(problem), _) => Err(problem),
            (None, Some(name)) => Err(OptimizerError::Unexpected { name }),
            (None, None) => Ok(Vec::new()),
        }
    }

    /// Goes on with another optimizer's state.
    pub(crate) fn take_over(&mut self, _before: Self, _model: &Decoder) -> Vec<String> {
        Vec::new()
    }
}

struct Update<'a> {
    optimizer: &'a mut Optimizer,
    gradient: Gradient,
    learning_rate: f64,
}

impl MapParameters for Update<'_> {
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = self.gradient.take(path) else {
            return param;
        };
        let rule = self.optimizer.rules.of(path, D).clone();
        let learning_rate = self.optimizer.learning_rate(path, self.learning_rate);
        let state = self.optimizer.states.remove(path);
        // Consuming the parameter leaves one owner of its memory, so that the update is in place.
        let (id, value, mapper) = param.consume();
        let value = value.inner();
        let (value, state) = match (rule, state) {
            (Rule::EightBit(rule), state) => {
                let state = match state {
                    Some(State::EightBit(state)) => Some(state),
                    _ => None,
                };
                let (value, state) = rule.step(learning_rate, value, gradient, state);
                (value, Some(State::EightBit(state)))
            }
            (Rule::Burn(rule), state) => {
                let state = match state {
                    Some(State::Burn(state)) => Some(state),
                    _ => None,
                };
                let (value, gradient) = (value.into_bridge(), gradient.into_bridge());
                let (value, state) = rule.step_dyn(D, learning_rate, value, gradient, state);
                (Tensor::<D>::from_bridge(value), state.map(State::Burn))
            }
        };
        if let Some(state) = state {
            self.optimizer.states.insert(path.to_string(), state);
        }
        let value = Tensor::from_inner(value).require_grad();
        Param::from_mapped_value(id, value, mapper)
    }
}

struct Restore<'a> {
    optimizer: &'a mut Optimizer,
    state: OptimizerState,
    device: &'a Device,
    problem: Option<OptimizerError>,
}

impl Restore<'_> {
    fn miss(&mut self, path: &str) {
        self.problem.get_or_insert(OptimizerError::State {
            path: path.to_string(),
        });
    }

    /// The tensors and scalars of one parameter, taken out of the state.
    fn source(&mut self, path: &str) -> StateSource {
        let prefix = format!("{path}.");
        let scalars = self
            .state
            .scalars
            .iter()
            .filter(|(name, _)| name.starts_with(&prefix));
        let mut source = StateSource::new(
            scalars
                .map(|(name, &value)| (name.clone(), value.into()))
                .collect(),
        );
        let names: Vec<String> = self
            .state
            .tensors
            .keys()
            .filter(|name| name.starts_with(&prefix))
            .cloned()
            .collect();
        for name in names {
            if let Some(data) = self.state.tensors.remove(&name) {
                source.insert_tensor(name, data);
            }
        }
        source
    }
}

impl VisitParameters for Restore<'_> {
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        // What is not trained has no state.
        if !param.is_require_grad() {
            return;
        }
        let rule = match self.optimizer.rules.of(path, D) {
            Rule::Burn(rule) => rule.clone(),
            Rule::EightBit(_) => {
                let weights = param.lazy_shape().num_elements();
                match eight_bit::State::load(path, weights, &mut self.state) {
                    Some(state) => {
                        let state = State::EightBit(state);
                        self.optimizer.states.insert(path.to_string(), state);
                    }
                    None => self.miss(path),
                }
                return;
            }
        };
        let rank_fits = |data: &TensorData| data.shape().num_dims() == D;
        let prefix = format!("{path}.");
        let mut own = self
            .state
            .tensors
            .iter()
            .filter(|(name, _)| name.starts_with(&prefix));
        let ranks_fit = own.all(|(_, data)| rank_fits(data));
        let mut source = self.source(path);
        let state = ranks_fit
            .then(|| rule.state_unflatten(D, path, &mut source, self.device))
            .flatten()
            .filter(|state| fits(rule.as_ref(), state, path, &param.lazy_shape()));
        match state {
            Some(state) => {
                let state = State::Burn(state);
                self.optimizer.states.insert(path.to_string(), state);
            }
            None => self.miss(path),
        }
    }
}

/// Every dimension of every state tensor is the parameter's own, or 1 where the rule keeps a
/// factored moment.
fn fits(
    rule: &dyn burn::optim::DynOptimizer,
    state: &DynState,
    path: &str,
    shape: &burn::tensor::Shape,
) -> bool {
    let mut sink = StateSink::default();
    rule.state_flatten(path, state, &mut sink);
    let dims: Vec<usize> = shape.iter().copied().collect();
    sink.tensors.iter().all(|(_, data)| {
        data.shape()
            .iter()
            .zip(&dims)
            .all(|(&found, &own)| found == own || found == 1)
    })
}

impl From<Scalar> for StateScalar {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::Int(value) => Self::Int(value),
            Scalar::UInt(value) => Self::Uint(value),
            Scalar::Float(value) => Self::Float(value),
            Scalar::Bool(value) => Self::Bool(value),
        }
    }
}

impl From<StateScalar> for Scalar {
    fn from(scalar: StateScalar) -> Self {
        match scalar {
            StateScalar::Int(value) => Self::Int(value),
            StateScalar::Uint(value) => Self::UInt(value),
            StateScalar::Float(value) => Self::Float(value),
            StateScalar::Bool(value) => Self::Bool(value),
        }
    }
}
