//! A run is a list of phases, each with its length, batch and learning rate. Today's TOML describes
//! one phase; the loop already asks the timeline what holds at a step instead of the config.

use crate::config::{Length, Plan};
use crate::data::Pass;
use crate::optimizer::Schedule;

/// A stretch of optimizer steps with the same settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// First step of the phase, counted from 0 over the run.
    pub first_step: u64,
    /// Steps in the phase.
    pub steps: u64,
    /// Sequences per forward and backward pass.
    pub micro_batch_size: usize,
    /// Passes per optimizer step.
    pub accumulation: usize,
    /// Tokens per sequence.
    pub sequence_len: usize,
    /// Learning rate over the phase's own steps.
    pub schedule: Schedule,
}

impl Phase {
    /// Learning rate at a step of the run within this phase.
    pub fn learning_rate(&self, step: u64) -> f64 {
        self.schedule.learning_rate(step - self.first_step)
    }

    /// Sequences per optimizer step.
    pub fn sequences_per_step(&self) -> u64 {
        (self.micro_batch_size * self.accumulation) as u64
    }

    /// Tokens per optimizer step.
    pub fn tokens_per_step(&self) -> u64 {
        self.sequences_per_step() * self.sequence_len as u64
    }
}

/// The phases of a run, in order and without gaps.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    phases: Vec<Phase>,
}

impl Timeline {
    /// Turns the plan's length into steps. `pass` is one pass over the training data.
    pub fn new(plan: &Plan, pass: Pass) -> Self {
        let train = &plan.config.train;
        let sequence_len = plan.config.data.sequence_len;
        let sequences = (train.micro_batch_size * train.gradient_accumulation_steps) as u64;
        // On average: sequences of rows are not all trained to the same extent.
        let targets_per_sequence = pass.targets as f64 / pass.sequences as f64;
        let tokens_per_step = sequences as f64 * targets_per_sequence;
        let steps = match plan.length {
            Length::Steps(steps) => steps,
            Length::Tokens(tokens) => (tokens as f64 / tokens_per_step).ceil() as u64,
            Length::Epochs(epochs) => {
                (epochs * pass.sequences as f64 / sequences as f64).ceil() as u64
            }
        };
        let phase = Phase {
            first_step: 0,
            steps: steps.max(1),
            micro_batch_size: train.micro_batch_size,
            accumulation: train.gradient_accumulation_steps,
            sequence_len,
            schedule: Schedule::new(
                plan.config.optimizer.learning_rate,
                &plan.schedule.decay,
                &plan.schedule.warmup,
                plan.schedule.min_lr_ratio,
                steps.max(1),
            ),
        };
        Self {
            phases: vec![phase],
        }
    }

    /// Optimizer steps in the run.
    pub fn steps(&self) -> u64 {
        self.phases.iter().map(|phase| phase.steps).sum()
    }

    /// The phase a step belongs to; none past the end of the run.
    pub fn at(&self, step: u64) -> Option<&Phase> {
        self.phases
            .iter()
            .find(|phase| step < phase.first_step + phase.steps)
    }
}
