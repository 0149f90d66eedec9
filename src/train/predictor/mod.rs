//! Predicts steps from the steps before them, so that some steps need no backward pass.
//!
//! A phase with `mode = "predict"` consists of cycles. The first step of a cycle compares what would
//! have been predicted for it with its true gradient (or, for weights, with its true displacement).
//! The last step of a cycle is predicted, if the last comparison was good enough. Prediction turns
//! itself off for the rest of the phase when a comparison is bad, or when too many predictions in a
//! row were rejected. What the predictor keeps is saved in checkpoints.

mod fit;

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Device;

use self::fit::Fit;
use super::TrainError;
use crate::config::{PredictConfig, PredictMethod};
use crate::extra::{ExtraState, StateScalar};
use crate::gradient::{Gradient, ParameterOrder};
use crate::model::{Decoder, Tensors};

/// The owner's name of the predictor's state in a checkpoint.
pub(super) const OWNER: &str = "predictor";

/// The weight of a gradient in the mean of the momentum, relative to the gradient after it.
const MOMENTUM: f64 = 0.9;

/// The role of a step in its cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Its gradient is computed, and compared with a prediction.
    Correct,
    /// Its gradient is computed.
    Full,
    /// It is predicted.
    Predict,
}

impl Role {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Correct => "correct",
            Self::Full => "full",
            Self::Predict => "predict",
        }
    }
}

/// Why prediction was turned off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum TurnedOff {
    /// A prediction was too far from the truth.
    Cosine(f64),
    /// Too many predictions in a row were rejected.
    Rejections(u64),
}

/// The predictor of a phase.
#[derive(Debug)]
pub struct Predictor {
    config: PredictConfig,
    counters: Counters,
    /// The cosine of the last comparison.
    cosine: Option<f64>,
    /// The loss of the last computed step.
    last_loss: Option<f64>,
    memory: Memory,
    /// The role of the step that is being computed.
    role: Role,
    /// A reason that has not been reported yet.
    turned_off: Option<TurnedOff>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Counters {
    /// Whether prediction is off for the rest of the phase; 1 for yes.
    is_off: u64,
    /// Predictions that were kept.
    kept: u64,
    /// Predictions that were rejected.
    rejected: u64,
    /// Rejections in a row.
    in_a_row: u64,
}

impl Counters {
    fn named(&mut self) -> [(&'static str, &mut u64); 4] {
        [
            ("is_off", &mut self.is_off),
            ("kept", &mut self.kept),
            ("rejected", &mut self.rejected),
            ("in_a_row", &mut self.in_a_row),
        ]
    }
}

/// What predictions are made of.
#[derive(Debug)]
enum Memory {
    Momentum(Option<Gradient>),
    LeastSquares(Fit),
    Weights(Option<Anchor>),
}

/// The weights at an earlier step.
#[derive(Debug)]
struct Anchor {
    weights: Gradient,
    /// Steps since then.
    steps: u64,
}

impl Predictor {
    /// A predictor that has seen nothing.
    pub fn new(config: PredictConfig) -> Self {
        Self {
            config,
            counters: Counters::default(),
            cosine: None,
            last_loss: None,
            memory: Memory::of(config.method),
            role: Role::Full,
            turned_off: None,
        }
    }

    /// The role of the step at this place in the phase, counted from 0.
    pub(super) fn role(&self, place: u64) -> Role {
        let every = self.config.every;
        let good = |cosine: f64| cosine >= self.config.min_cosine;
        match place % every {
            _ if self.is_off() => Role::Full,
            0 if place > 0 => Role::Correct,
            last if last + 1 == every && self.cosine.is_some_and(good) => Role::Predict,
            _ => Role::Full,
        }
    }

    /// Begins a step of this role.
    pub(super) fn begin(&mut self, role: Role) {
        self.role = role;
    }

    /// Whether prediction is off for the rest of the phase.
    pub fn is_off(&self) -> bool {
        self.counters.is_off == 1
    }

    /// Predictions that were kept, and predictions that were rejected.
    pub fn counts(&self) -> [u64; 2] {
        [self.counters.kept, self.counters.rejected]
    }

    /// The cosine of the last comparison of a prediction with the truth.
    pub fn cosine(&self) -> Option<f64> {
        self.cosine
    }

    /// The loss of the last computed step.
    pub(super) fn last_loss(&self) -> Option<f64> {
        self.last_loss
    }

    /// A reason for which prediction was turned off, once.
    pub(super) fn take_turned_off(&mut self) -> Option<TurnedOff> {
        self.turned_off.take()
    }

    /// The predicted gradient of the next step; None if the memory is empty, or if the method
    /// predicts weights.
    pub(super) fn gradient(&self) -> Option<Gradient> {
        match &self.memory {
            Memory::Momentum(mean) => mean.clone(),
            Memory::LeastSquares(fit) => fit.next(),
            Memory::Weights(_) => None,
        }
    }

    /// The predicted displacement of the weights; None if the memory is empty, or if the method
    /// predicts gradients.
    pub(super) fn displacement(&self, model: &Decoder) -> Option<Gradient> {
        match &self.memory {
            Memory::Weights(Some(anchor)) if anchor.steps > 0 => {
                let now = Gradient::of_weights(model, anchor.weights.order());
                let moved = now.add(anchor.weights.clone().scale(-1.0));
                Some(moved.scale(1.0 / anchor.steps as f64))
            }
            _ => None,
        }
    }

    /// Whether the method needs the weights before a computed step.
    pub(super) fn watches_weights(&self) -> bool {
        !self.is_off() && matches!(self.memory, Memory::Weights(_))
    }

    /// Takes the gradient of a computed step, before clipping.
    pub(super) fn take_gradient(&mut self, gradient: &Gradient) {
        if self.is_off() || self.watches_weights() {
            return;
        }
        if self.role == Role::Correct
            && let Some(predicted) = self.gradient()
        {
            self.compare(predicted.cosine(gradient));
        }
        if self.is_off() {
            return;
        }
        match &mut self.memory {
            Memory::Momentum(mean) => {
                let new = gradient.clone().scale(1.0 - MOMENTUM);
                *mean = Some(match mean.take() {
                    Some(mean) => mean.scale(MOMENTUM).add(new),
                    None => gradient.clone(),
                });
            }
            Memory::LeastSquares(fit) => fit.take(gradient),
            Memory::Weights(_) => {}
        }
    }

    /// Takes the weights before and after a computed step.
    pub(super) fn take_weights(&mut self, before: Gradient, model: &Decoder) {
        let order = before.order().clone();
        let after = Gradient::of_weights(model, &order);
        let Memory::Weights(anchor) = &mut self.memory else {
            return;
        };
        let mean = anchor
            .as_ref()
            .filter(|anchor| anchor.steps > 0)
            .map(|anchor| {
                let moved = before.clone().add(anchor.weights.clone().scale(-1.0));
                moved.scale(1.0 / anchor.steps as f64)
            });
        match self.role {
            Role::Correct => {
                if let Some(mean) = mean {
                    let moved = after.add(before.clone().scale(-1.0));
                    self.compare(mean.cosine(&moved));
                }
                if !self.is_off() {
                    self.memory = Memory::Weights(Some(Anchor {
                        weights: before,
                        steps: 1,
                    }));
                }
            }
            Role::Full | Role::Predict => match anchor {
                Some(anchor) => anchor.steps += 1,
                None => {
                    *anchor = Some(Anchor {
                        weights: before,
                        steps: 1,
                    });
                }
            },
        }
    }

    /// Takes the loss of a computed step.
    pub(super) fn take_loss(&mut self, loss: f64) {
        self.last_loss = Some(loss);
    }

    /// Counts a prediction that was kept, or rejected.
    pub(super) fn count(&mut self, is_kept: bool) {
        let counters = &mut self.counters;
        if is_kept {
            counters.kept += 1;
            counters.in_a_row = 0;
            if let Memory::Weights(Some(anchor)) = &mut self.memory {
                anchor.steps += 1;
            }
            return;
        }
        counters.rejected += 1;
        counters.in_a_row += 1;
        if counters.in_a_row >= self.config.max_rejections {
            let rejections = counters.in_a_row;
            self.turn_off(TurnedOff::Rejections(rejections));
        }
    }

    fn compare(&mut self, cosine: f64) {
        self.cosine = Some(cosine);
        if cosine.is_nan() || cosine < self.config.min_cosine {
            self.turn_off(TurnedOff::Cosine(cosine));
        }
    }

    /// Turns prediction off and gives its memory back.
    fn turn_off(&mut self, reason: TurnedOff) {
        self.counters.is_off = 1;
        self.turned_off = Some(reason);
        self.memory = Memory::of(self.config.method);
    }

    /// What is saved in a checkpoint.
    pub(super) fn state(&self) -> ExtraState {
        let mut tensors = BTreeMap::new();
        let mut put = |name: &str, gradient: &Gradient| {
            let named = gradient.to_tensors().into_iter();
            tensors.extend(named.map(|(path, data)| (format!("{name}.{path}"), data)));
        };
        let mut scalars = BTreeMap::new();
        match &self.memory {
            Memory::Momentum(mean) => mean.iter().for_each(|mean| put("mean", mean)),
            Memory::LeastSquares(fit) => {
                if let Some([value, slope]) = &fit.gradients {
                    put("value", value);
                    put("slope", slope);
                }
                for (number, sum) in fit.sums.iter().enumerate() {
                    scalars.insert(format!("sum_{number}"), StateScalar::Float(*sum));
                }
            }
            Memory::Weights(anchor) => {
                if let Some(anchor) = anchor {
                    put("weights", &anchor.weights);
                    scalars.insert("steps".to_string(), StateScalar::Uint(anchor.steps));
                }
            }
        }
        let mut counters = self.counters;
        for (name, value) in counters.named() {
            scalars.insert(name.to_string(), StateScalar::Uint(*value));
        }
        for (name, value) in [("cosine", self.cosine), ("last_loss", self.last_loss)] {
            if let Some(value) = value.filter(|value| value.is_finite()) {
                scalars.insert(name.to_string(), StateScalar::Float(value));
            }
        }
        ExtraState { tensors, scalars }
    }

    /// Restores what [`state`](Self::state) returned.
    pub(super) fn load(
        &mut self,
        state: &ExtraState,
        model: &impl Module,
        device: &Device,
    ) -> Result<(), TrainError> {
        let order = Arc::new(ParameterOrder::of(model));
        let damaged = |what: &str| TrainError::OwnerState {
            owner: OWNER.to_string(),
            what: what.to_string(),
        };
        let gradient = |name: &str| -> Result<Option<Gradient>, TrainError> {
            let prefix = format!("{name}.");
            let own = state.tensors.iter().filter_map(|(path, data)| {
                Some((path.strip_prefix(&prefix)?.to_string(), data.clone()))
            });
            let own: Tensors = own.collect();
            if own.is_empty() {
                return Ok(None);
            }
            let gradient = Gradient::from_tensors(own, &order, device);
            gradient.map(Some).ok_or_else(|| damaged(name))
        };
        let float = |name: &str| match state.scalars.get(name) {
            Some(StateScalar::Float(value)) => Some(*value),
            _ => None,
        };
        for (name, value) in self.counters.named() {
            match state.scalars.get(name) {
                Some(StateScalar::Uint(saved)) => *value = *saved,
                _ => return Err(damaged(name)),
            }
        }
        (self.cosine, self.last_loss) = (float("cosine"), float("last_loss"));
        self.memory = match self.config.method {
            PredictMethod::Momentum => Memory::Momentum(gradient("mean")?),
            PredictMethod::LeastSquares => {
                let mut fit = Fit::default();
                for (number, sum) in fit.sums.iter_mut().enumerate() {
                    let name = format!("sum_{number}");
                    *sum = float(&name).ok_or_else(|| damaged(&name))?;
                }
                fit.gradients = match (gradient("value")?, gradient("slope")?) {
                    (Some(value), Some(slope)) => Some([value, slope]),
                    _ => None,
                };
                Memory::LeastSquares(fit)
            }
            PredictMethod::Weights => {
                let steps = match state.scalars.get("steps") {
                    Some(StateScalar::Uint(steps)) => *steps,
                    _ => 0,
                };
                let anchor = |weights| Anchor { weights, steps };
                Memory::Weights(gradient("weights")?.map(anchor))
            }
        };
        Ok(())
    }
}

impl Memory {
    fn of(method: PredictMethod) -> Self {
        match method {
            PredictMethod::Momentum => Self::Momentum(None),
            PredictMethod::LeastSquares => Self::LeastSquares(Fit::default()),
            PredictMethod::Weights => Self::Weights(None),
        }
    }
}

#[cfg(test)]
mod tests;
