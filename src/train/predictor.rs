//! Predicts steps from the steps before them, so that some steps need no backward pass.
//!
//! A phase with `mode = "predict"` consists of cycles. The first step of a cycle compares what would
//! have been predicted for it with its true gradient (or, for weights, with its true displacement).
//! The last step of a cycle is predicted, if the last comparison was good enough. Prediction turns
//! itself off for the rest of the phase when a comparison is bad, or when too many predictions in a
//! row were rejected. What the predictor keeps is saved in checkpoints.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Device;

use super::TrainError;
use crate::config::{PredictConfig, PredictMethod};
use crate::extra::{ExtraState, StateScalar};
use crate::gradient::{Gradient, ParameterOrder};
use crate::model::{Decoder, Tensors};

/// The owner's name of the predictor's state in a checkpoint.
pub(super) const OWNER: &str = "predictor";

/// The weight of a gradient in the mean of the momentum, relative to the gradient after it.
const MOMENTUM: f64 = 0.9;

/// The weight of a gradient in the fit by least squares, relative to the gradient after it.
const AGE: f64 = 0.95;

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

/// Sums of a weighted fit of a straight line g(t) = a + b t to the gradients, by normal equations.
/// t is 0 at the last gradient.
#[derive(Debug, Default)]
struct Fit {
    /// Σ w, Σ w t, Σ w t².
    sums: [f64; 3],
    /// Σ w g and Σ w t g.
    gradients: Option<[Gradient; 2]>,
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

impl Fit {
    /// Takes the gradient of the next step: the earlier ones are a step older, and weigh less.
    fn take(&mut self, gradient: &Gradient) {
        let [ones, times, squares] = self.sums;
        self.sums = [
            AGE * ones + 1.0,
            AGE * (times - ones),
            AGE * (squares - 2.0 * times + ones),
        ];
        self.gradients = Some(match self.gradients.take() {
            Some([value, slope]) => {
                let older = slope.add(value.clone().scale(-1.0)).scale(AGE);
                [value.scale(AGE).add(gradient.clone()), older]
            }
            None => [gradient.clone(), gradient.clone().scale(0.0)],
        });
    }

    /// a + b of the line: its value a step after the last gradient. With one gradient the line is
    /// flat.
    fn next(&self) -> Option<Gradient> {
        let [value, slope] = self.gradients.as_ref()?;
        let [ones, times, squares] = self.sums;
        let determinant = ones * squares - times * times;
        if determinant < 1e-9 {
            return Some(value.clone().scale(1.0 / ones));
        }
        let value = value.clone().scale((squares - times) / determinant);
        let slope = slope.clone().scale((ones - times) / determinant);
        Some(value.add(slope))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::config::Preset;
    use crate::model::DecoderSpec;

    fn model() -> Decoder {
        let spec = DecoderSpec {
            shape: Preset::Stories260K.shape(),
            vocab_size: 8,
            eos_token_id: None,
            bos_token_id: None,
        };
        Decoder::new(&spec, 1, &Device::flex().autodiff()).unwrap()
    }

    /// A gradient of one parameter with these values.
    fn gradient(order: &Arc<ParameterOrder>, values: &[f32]) -> Gradient {
        let mut all = vec![0.0; 64];
        all[..values.len()].copy_from_slice(values);
        let tensors = Tensors::from([("norm.weight".to_string(), TensorData::new(all, [64]))]);
        Gradient::from_tensors(tensors, order, &Device::flex()).unwrap()
    }

    fn values(gradient: &Gradient, count: usize) -> Vec<f32> {
        let data = gradient.to_tensors().remove("norm.weight").unwrap();
        data.iter::<f32>().take(count).collect()
    }

    /// Weighted least squares in f64: the line through the values at t = -n + 1..=0, at t = 1.
    fn extrapolated(history: &[f64]) -> f64 {
        let count = history.len();
        let (mut n, mut t1, mut t2, mut g0, mut g1) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (place, value) in history.iter().enumerate() {
            let age = (count - 1 - place) as f64;
            let (weight, t) = (AGE.powf(age), -age);
            n += weight;
            t1 += weight * t;
            t2 += weight * t * t;
            g0 += weight * value;
            g1 += weight * t * value;
        }
        let determinant = n * t2 - t1 * t1;
        if determinant < 1e-9 {
            return g0 / n;
        }
        let slope = (n * g1 - t1 * g0) / determinant;
        (g0 - slope * t1) / n + slope
    }

    #[test]
    fn p2_least_squares_continue_the_line_through_the_last_gradients() {
        let order = Arc::new(ParameterOrder::of(&model()));
        let mut fit = Fit::default();
        let mut histories = [Vec::new(), Vec::new(), Vec::new()];
        for step in 0..12 {
            let t = f64::from(step);
            // A line, a curve, and something without order.
            let new = [
                3.0 - 0.5 * t,
                (t * 0.7).sin(),
                ((step * 7919) % 13) as f64 - 6.0,
            ];
            let sent: Vec<f32> = new.iter().map(|&value| value as f32).collect();
            fit.take(&gradient(&order, &sent));
            for (history, value) in histories.iter_mut().zip(new) {
                history.push(value);
            }
            let found = values(&fit.next().unwrap(), 3);
            for (found, history) in found.iter().zip(&histories) {
                let expected = extrapolated(history);
                let near = 1e-4 * (1.0 + expected.abs());
                assert!(
                    (f64::from(*found) - expected).abs() < near,
                    "{found} {expected}"
                );
            }
            if step > 0 {
                let line = 3.0 - 0.5 * (t + 1.0);
                assert!((f64::from(found[0]) - line).abs() < 1e-3, "{found:?}");
            }
        }
    }

    #[test]
    fn p2_momentum_is_the_mean_of_the_last_gradients() {
        let order = Arc::new(ParameterOrder::of(&model()));
        let mut predictor = Predictor::new(PredictConfig::default());
        let mut mean = 0.0;
        for step in 0..6 {
            let value = 1.0 + f64::from(step);
            mean = if step == 0 {
                value
            } else {
                0.9 * mean + 0.1 * value
            };
            predictor.take_gradient(&gradient(&order, &[value as f32]));
        }
        let found = values(&predictor.gradient().unwrap(), 1)[0];
        assert!((f64::from(found) - mean).abs() < 1e-5, "{found} {mean}");
    }

    #[test]
    fn p2_weights_are_predicted_from_the_mean_step_of_the_cycle() {
        let mut predictor = Predictor::new(PredictConfig {
            method: PredictMethod::Weights,
            ..PredictConfig::default()
        });
        let mut model = model();
        let order = Arc::new(ParameterOrder::of(&model));
        for step in [0.25, 0.5] {
            let before = Gradient::of_weights(&model, &order);
            model = gradient(&order, &[step, -step]).added_to(model);
            predictor.take_weights(before, &model);
        }
        let moved = predictor.displacement(&model).unwrap();
        assert_eq!(values(&moved, 3), [0.375, -0.375, 0.0]);
    }

    #[test]
    fn p2_roles_follow_the_cycle_and_a_bad_cosine_turns_prediction_off() {
        let order = Arc::new(ParameterOrder::of(&model()));
        let mut predictor = Predictor::new(PredictConfig {
            every: 3,
            ..PredictConfig::default()
        });
        let roles = |predictor: &Predictor| {
            (0..7)
                .map(|place| predictor.role(place))
                .collect::<Vec<_>>()
        };
        use Role::{Correct, Full, Predict};
        // Nothing is predicted before the first comparison.
        assert_eq!(
            roles(&predictor),
            [Full, Full, Full, Correct, Full, Full, Correct]
        );
        predictor.take_gradient(&gradient(&order, &[1.0, 1.0]));
        predictor.begin(Correct);
        predictor.take_gradient(&gradient(&order, &[1.0, 0.8]));
        assert!(predictor.cosine().unwrap() > 0.9);
        assert_eq!(
            roles(&predictor),
            [Full, Full, Predict, Correct, Full, Predict, Correct]
        );
        predictor.take_gradient(&gradient(&order, &[-1.0, 0.0]));
        assert!(predictor.is_off() && predictor.gradient().is_none());
        assert_eq!(roles(&predictor), [Full; 7]);
        assert!(
            matches!(predictor.take_turned_off(), Some(TurnedOff::Cosine(cosine)) if cosine < 0.0)
        );
        assert!(predictor.take_turned_off().is_none());
    }

    #[test]
    fn p2_rejections_in_a_row_turn_prediction_off() {
        let mut predictor = Predictor::new(PredictConfig::default());
        for is_kept in [false, false, true, false, false] {
            predictor.count(is_kept);
            assert!(!predictor.is_off());
        }
        predictor.count(false);
        assert!(predictor.is_off());
        assert_eq!(predictor.counts(), [1, 5]);
    }

    #[test]
    fn p2_the_saved_state_predicts_the_same() {
        let model = model();
        let order = Arc::new(ParameterOrder::of(&model));
        for method in [PredictMethod::Momentum, PredictMethod::LeastSquares] {
            let config = PredictConfig {
                method,
                ..PredictConfig::default()
            };
            let mut saved = Predictor::new(config);
            for value in [1.0, 1.5, 1.25] {
                saved.take_gradient(&gradient(&order, &[value, 2.0]));
            }
            saved.take_loss(2.5);
            saved.count(false);
            let mut restored = Predictor::new(config);
            restored
                .load(&saved.state(), &model, &Device::flex())
                .unwrap();
            let predicted = |predictor: &Predictor| values(&predictor.gradient().unwrap(), 64);
            assert_eq!(predicted(&saved), predicted(&restored));
            assert_eq!(saved.state(), restored.state());
            let mut torn = saved.state();
            torn.scalars.remove("kept");
            assert!(restored.load(&torn, &model, &Device::flex()).is_err());
        }
    }
}
