//! The regulator: decides what to do with a step whose loss or gradient norm leaps.
//!
//! It keeps the losses and gradient norms of the last regular steps. A step is irregular if its loss
//! is above their mean by a number of standard deviations, or its gradient norm is above their
//! median by a factor. The limits are known before the step, so the step itself can leave the
//! weights unchanged. Everything the regulator keeps is saved in checkpoints.

use std::collections::{BTreeMap, VecDeque};

use burn::tensor::TensorData;
use serde::{Deserialize, Serialize};

use super::TrainError;
use crate::config::{RegulatorConfig, SpikeAction};
use crate::extra::{ExtraState, StateScalar};

/// The owner's name of the regulator's state in a checkpoint.
pub(super) const OWNER: &str = "regulator";

/// Irregular steps in a row after which their level counts as the new one.
const NEW_LEVEL: u64 = 3;

/// Rollbacks to the same checkpoint after which a run is given up.
pub(super) const MOST_ROLLBACKS: u64 = 3;

/// The learning rate after a cut, as a share of the rate before it.
const CUT: f64 = 0.5;

/// The largest loss and gradient norm that a step may have to be taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepLimits {
    /// The largest loss, in the objective's unit.
    pub loss: f64,
    /// The largest norm of the whole gradient, before clipping.
    pub grad_norm: f64,
}

impl Default for StepLimits {
    /// No limits.
    fn default() -> Self {
        Self {
            loss: f64::INFINITY,
            grad_norm: f64::INFINITY,
        }
    }
}

impl StepLimits {
    /// What exceeds its limit; None for a regular step.
    pub(super) fn exceeded(&self, loss: f64, grad_norm: f64) -> Option<Irregular> {
        if loss > self.loss {
            Some(Irregular::Loss)
        } else if grad_norm > self.grad_norm {
            Some(Irregular::GradNorm)
        } else {
            None
        }
    }
}

/// What is irregular about a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Irregular {
    /// Its loss.
    Loss,
    /// Its gradient norm.
    GradNorm,
}

/// The state of the regulator of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Regulator {
    config: RegulatorConfig,
    losses: VecDeque<f64>,
    norms: VecDeque<f64>,
    counters: Counters,
}

/// The numbers that the regulator keeps besides the window.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Counters {
    /// Decisions since the run began.
    decisions: u64,
    /// Irregular steps in a row.
    in_a_row: u64,
    /// Steps for which the learning rate stays cut.
    cut_for: u64,
    /// How often the learning rate has been cut and not restored.
    cuts: u64,
    /// Rollbacks to the checkpoint of `rolled_back_to`.
    rollbacks: u64,
    rolled_back_to: u64,
}

impl Counters {
    fn named(&mut self) -> [(&'static str, &mut u64); 6] {
        [
            ("decisions", &mut self.decisions),
            ("in_a_row", &mut self.in_a_row),
            ("cut_for", &mut self.cut_for),
            ("cuts", &mut self.cuts),
            ("rollbacks", &mut self.rollbacks),
            ("rolled_back_to", &mut self.rolled_back_to),
        ]
    }
}

impl Regulator {
    /// A regulator that has seen nothing.
    pub fn new(config: RegulatorConfig) -> Self {
        Self {
            config,
            losses: VecDeque::new(),
            norms: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// The limits of the next step. There are none until the window is full.
    pub fn limits(&self) -> StepLimits {
        let mut limits = StepLimits::default();
        if self.losses.len() < self.config.window {
            return limits;
        }
        if self.config.spike_sigma > 0.0 {
            let count = self.losses.len() as f64;
            let mean = self.losses.iter().sum::<f64>() / count;
            let squares = self.losses.iter().map(|loss| (loss - mean).powi(2));
            let deviation = (squares.sum::<f64>() / count).sqrt();
            limits.loss = mean + self.config.spike_sigma * deviation;
        }
        if self.config.norm_factor > 0.0 {
            let mut norms: Vec<f64> = self.norms.iter().copied().collect();
            norms.sort_by(f64::total_cmp);
            limits.grad_norm = self.config.norm_factor * norms[norms.len() / 2];
        }
        limits
    }

    /// The factor by which the learning rate of the next step is cut; 1 if it is not.
    pub fn learning_rate_factor(&self) -> f64 {
        CUT.powi(self.counters.cuts.min(i32::MAX as u64) as i32)
    }

    /// Decisions since the run began.
    pub fn decisions(&self) -> u64 {
        self.counters.decisions
    }

    /// Records a step that was taken.
    pub(super) fn took(&mut self, loss: f64, grad_norm: f64) {
        self.counters.in_a_row = 0;
        self.restore_rate();
        for (values, value) in [(&mut self.losses, loss), (&mut self.norms, grad_norm)] {
            if values.len() == self.config.window {
                values.pop_front();
            }
            values.push_back(value);
        }
    }

    /// Records an irregular step and decides what to do about it. Also returns whether the level of
    /// the last steps counts as the new one from here on.
    pub(super) fn decide(&mut self) -> (SpikeAction, bool) {
        self.counters.decisions += 1;
        self.counters.in_a_row += 1;
        self.restore_rate();
        let action = self.config.on_spike;
        if action == SpikeAction::CutLr {
            self.counters.cuts += 1;
            self.counters.cut_for = self.config.window as u64;
        }
        let is_new_level = action != SpikeAction::Rollback && self.counters.in_a_row >= NEW_LEVEL;
        if is_new_level {
            self.begin_window();
        }
        (action, is_new_level)
    }

    /// Counts a step of the time for which the learning rate is cut.
    fn restore_rate(&mut self) {
        self.counters.cut_for = self.counters.cut_for.saturating_sub(1);
        if self.counters.cut_for == 0 {
            self.counters.cuts = 0;
        }
    }

    /// Forgets the window: losses of another phase have another level.
    pub(super) fn begin_window(&mut self) {
        self.losses.clear();
        self.norms.clear();
        self.counters.in_a_row = 0;
    }

    /// Takes the place of the regulator as it was saved with the checkpoint of `step`, to which the
    /// run has gone back. Returns whether the run may go on.
    pub(super) fn rolled_back(&mut self, before: &Self, step: u64) -> bool {
        self.counters.decisions = before.counters.decisions;
        self.counters.rollbacks = match before.counters.rolled_back_to == step {
            true => before.counters.rollbacks + 1,
            false => 1,
        };
        self.counters.rolled_back_to = step;
        self.counters.rollbacks < MOST_ROLLBACKS
    }

    /// What is saved in a checkpoint.
    pub(super) fn state(&self) -> ExtraState {
        let tensor = |values: &VecDeque<f64>| {
            let values: Vec<f64> = values.iter().copied().collect();
            let count = values.len();
            TensorData::new(values, [count])
        };
        let mut tensors = BTreeMap::new();
        // A tensor without elements has no place in a file.
        if !self.losses.is_empty() {
            tensors.insert("losses".to_string(), tensor(&self.losses));
            tensors.insert("norms".to_string(), tensor(&self.norms));
        }
        let mut counters = self.counters;
        let scalars = counters.named().map(|(name, value)| {
            let value = StateScalar::Uint(*value);
            (name.to_string(), value)
        });
        ExtraState {
            tensors,
            scalars: scalars.into_iter().collect(),
        }
    }

    /// Restores what [`state`](Self::state) returned. A shorter window than before keeps the last
    /// steps.
    pub(super) fn load(&mut self, state: &ExtraState) -> Result<(), TrainError> {
        let damaged = |what: &str| TrainError::OwnerState {
            owner: OWNER.to_string(),
            what: what.to_string(),
        };
        let window = self.config.window;
        let values = |name: &str| -> Result<VecDeque<f64>, TrainError> {
            let Some(data) = state.tensors.get(name) else {
                return Ok(VecDeque::new());
            };
            let values = data.try_to_vec::<f64>().map_err(|_| damaged(name))?;
            let beyond = values.len().saturating_sub(window);
            Ok(values.into_iter().skip(beyond).collect())
        };
        (self.losses, self.norms) = (values("losses")?, values("norms")?);
        if self.losses.len() != self.norms.len() {
            return Err(damaged("norms"));
        }
        for (name, value) in self.counters.named() {
            match state.scalars.get(name) {
                Some(StateScalar::Uint(saved)) => *value = *saved,
                _ => return Err(damaged(name)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regulator(action: SpikeAction) -> Regulator {
        Regulator::new(RegulatorConfig {
            window: 8,
            on_spike: action,
            ..RegulatorConfig::default()
        })
    }

    fn filled(action: SpikeAction) -> Regulator {
        let mut regulator = regulator(action);
        for step in 0..8 {
            assert_eq!(regulator.limits(), StepLimits::default());
            regulator.took(2.0 + f64::from(step % 2), 1.0 + f64::from(step));
        }
        regulator
    }

    #[test]
    fn p4_the_limits_are_those_of_the_window() {
        let regulator = filled(SpikeAction::Skip);
        // Mean 2.5, deviation 0.5, median of 1..=8 (the upper one) 5.
        let limits = regulator.limits();
        assert_eq!((limits.loss, limits.grad_norm), (4.0, 50.0));
        assert_eq!(limits.exceeded(4.0, 50.0), None);
        assert_eq!(limits.exceeded(4.01, 1.0), Some(Irregular::Loss));
        assert_eq!(limits.exceeded(1.0, 50.1), Some(Irregular::GradNorm));
    }

    #[test]
    fn p4_three_irregular_steps_in_a_row_are_a_new_level() {
        let mut regulator = filled(SpikeAction::Skip);
        assert_eq!(regulator.decide(), (SpikeAction::Skip, false));
        assert_eq!(regulator.decide(), (SpikeAction::Skip, false));
        regulator.took(2.0, 1.0);
        assert_eq!(regulator.decide(), (SpikeAction::Skip, false));
        assert_eq!(regulator.decide(), (SpikeAction::Skip, false));
        assert_eq!(regulator.decide(), (SpikeAction::Skip, true));
        assert_eq!(regulator.limits(), StepLimits::default());
        assert_eq!(regulator.decisions(), 5);
    }

    #[test]
    fn p4_a_cut_lasts_for_a_window_and_another_one_halves_again() {
        let mut regulator = filled(SpikeAction::CutLr);
        regulator.decide();
        assert_eq!(regulator.learning_rate_factor(), 0.5);
        for _ in 0..3 {
            regulator.took(2.0, 1.0);
        }
        regulator.decide();
        assert_eq!(regulator.learning_rate_factor(), 0.25);
        for _ in 0..7 {
            regulator.took(2.0, 1.0);
            assert_eq!(regulator.learning_rate_factor(), 0.25);
        }
        regulator.took(2.0, 1.0);
        assert_eq!(regulator.learning_rate_factor(), 1.0);
    }

    #[test]
    fn p4_rollbacks_to_one_checkpoint_are_counted() {
        let saved = filled(SpikeAction::Rollback);
        let mut now = saved.clone();
        for may_go_on in [true, true, false] {
            let mut before = now.clone();
            before.decide();
            now = saved.clone();
            assert_eq!(now.rolled_back(&before, 40), may_go_on);
        }
        assert_eq!(now.decisions(), 3);
        let before = now.clone();
        now = saved.clone();
        assert!(now.rolled_back(&before, 80));
    }

    #[test]
    fn p4_the_saved_state_is_restored_bit_for_bit() {
        for filled in [filled(SpikeAction::CutLr), regulator(SpikeAction::Skip)] {
            let mut saved = filled.clone();
            saved.decide();
            let mut restored = Regulator::new(saved.config);
            restored.load(&saved.state()).unwrap();
            assert_eq!(restored, saved);
        }
        let mut state = filled(SpikeAction::Skip).state();
        state.scalars.remove("cuts");
        assert!(regulator(SpikeAction::Skip).load(&state).is_err());
    }
}
