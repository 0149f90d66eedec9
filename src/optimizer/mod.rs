//! The update rules for each parameter group, and their state, which is keyed by parameter path.
//!
//! Each optimizer is one file here (`adamw.rs`, `lion.rs`, ...), which says which rule updates each
//! parameter group, and one entry in the table of `rules.rs`. Its part of the configuration is in
//! `config/optimizer/`. A rule in tensor operations implements `TensorRule`; some wrap burn's per-tensor
//! optimizers (`BurnRule`), and one that works on the host implements `UpdateRule` itself.
//!
//! burn's own `ModuleOptimizer` keys its state by random parameter ids and saves it in its own
//! format. Ours keys state by the parameter's path, so that a checkpoint is a plain safetensors
//! file that means the same in the next process. A saved state names the family of each parameter's
//! state, and a rule never continues from a state of another family.
//!
//! Groups: matrices and embeddings are decayed, norms and biases never. With Muon the blocks'
//! matrices take Muon's rule and everything else AdamW's; the same holds for NorMuon and SOAP.

mod adafactor;
mod adam;
mod adamw;
mod adamw8bit;
mod applied;
mod burn_rule;
mod custom;
mod decay;
mod eigenbasis;
mod error;
mod facts;
mod lion;
mod load;
mod muon;
mod normuon;
mod orthogonalize;
mod ramp;
mod rule;
mod rules;
mod schedule;
mod sgd;
mod sign;
mod soap;
mod state;
mod take_over;
mod tensor_rule;
mod update;
mod velvet;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::config::OptimizerPlan;
pub use crate::extra::StateScalar;
use crate::model::{Decoder, Tensors, VisitParameters, copied_from, visit_parameters};
pub use applied::AppliedStep;
pub use custom::CustomRule;
pub use error::OptimizerError;
pub use facts::StepFacts;
use rule::RuleState;
use rules::Rules;
pub use schedule::Schedule;
pub use state::OptimizerState;
pub use tensor_rule::TensorState;
pub(crate) use update::update_parameters;
use velvet::Velvet;

/// Updates a module's parameters from their gradients.
pub struct Optimizer {
    rules: Rules,
    /// Velvet's signals, which act on the learning rate of all parameters.
    velvet: Option<Velvet>,
    /// The second matrix of adapters learns at so many times the learning rate.
    lora_plus_ratio: f64,
    /// The states by parameter path; a parameter has none before its first update.
    states: BTreeMap<String, RuleState>,
}

/// The state of an optimizer at some step.
pub(crate) struct Snapshot {
    states: BTreeMap<String, RuleState>,
    velvet: Option<Velvet>,
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
            velvet: Velvet::of(plan),
            lora_plus_ratio: 1.0,
            states: BTreeMap::new(),
        }
    }

    /// An optimizer of your own rules, one for matrices and one for vectors (norms and biases).
    ///
    /// # Errors
    /// [`OptimizerError::Family`] for a family's name without a slash.
    pub fn custom(
        matrices: impl CustomRule,
        vectors: impl CustomRule,
    ) -> Result<Self, OptimizerError> {
        Ok(Self {
            rules: custom::rules(matrices, vectors)?,
            velvet: None,
            lora_plus_ratio: 1.0,
            states: BTreeMap::new(),
        })
    }

    /// The same with another learning rate for the second matrix, B, of adapters: `ratio` times that
    /// of everything else (LoRA+: Hayou et al., 2024).
    pub fn with_lora_plus(self, ratio: f64) -> Self {
        Self {
            lora_plus_ratio: ratio,
            ..self
        }
    }

    /// The state of all parameters, to go back to with [`restore`](Self::restore). Tensors are shared
    /// until the next step changes them.
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot {
            states: self.states.clone(),
            velvet: self.velvet.clone(),
        }
    }

    /// Goes back to a snapshot of this optimizer.
    pub(crate) fn restore(&mut self, snapshot: Snapshot) {
        (self.states, self.velvet) = (snapshot.states, snapshot.velvet);
    }

    fn learning_rate(&self, path: &str, learning_rate: f64) -> f64 {
        if path.ends_with(".adapter.lora_b") {
            learning_rate * self.lora_plus_ratio
        } else {
            learning_rate
        }
    }

    /// A copy of the state on the host.
    pub fn state(&self, model: &impl Module) -> OptimizerState {
        self.state_into(model, Tensors::new())
    }

    /// The same, with tensors in the memory of an earlier copy's.
    pub(crate) fn state_into(&self, model: &impl Module, mut spare: Tensors) -> OptimizerState {
        #[derive(Default)]
        struct Collect {
            /// Paths and ranks of the parameters.
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
        let parameters = parameters.into_iter().map(|(path, rank)| {
            let from = format!("{path}.");
            let own = spare.extract_if(from.clone().., |name, _| name.starts_with(&from));
            let own: Tensors = own.collect();
            (path, rank, own)
        });
        let parameters = parameters.collect();
        let copies = copied_from(device.as_ref(), parameters, |(path, rank, spare)| {
            let mut saved = OptimizerState::default();
            if let Some(state) = self.states.get(&path) {
                let rule = self.rules.rule_for(&path, rank);
                rule.save(&path, state, spare, &mut saved);
                // A rule without state needs no family.
                if !saved.tensors.is_empty() || !saved.scalars.is_empty() {
                    saved.families.insert(path, state.family().to_string());
                }
            }
            saved
        });
        let mut all = OptimizerState::default();
        for saved in copies {
            all.tensors.extend(saved.tensors);
            all.scalars.extend(saved.scalars);
            all.families.extend(saved.families);
        }
        if let Some(velvet) = &self.velvet {
            velvet.save(&mut all);
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
                let rule = self.optimizer.rules.rule_for(path, D);
                let learning_rate = self.optimizer.learning_rate(path, self.learning_rate);
                let Some(applied) = rule.applied(path, self.state, learning_rate) else {
                    return;
                };
                self.steps.insert(path.to_string(), applied);
            }
        }
        let factor = self.velvet.as_ref().map_or(1.0, Velvet::factor);
        let mut collect = Collect {
            optimizer: self,
            state,
            learning_rate: learning_rate * factor,
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
                self.bytes += self.rules.rule_for(path, D).state_bytes(&dims);
            }
        }
        let mut count = Count {
            rules: &self.rules,
            bytes: 0,
        };
        model.visit_trained(&mut count);
        count.bytes
    }
}
