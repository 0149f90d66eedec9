//! The timeline of a run: which phase each step belongs to, and the settings of that phase.
//!
//! The phases of a plan have lengths in steps, shares or "the rest". A [`Timeline`] turns them into
//! steps once the data is counted. The training loop gets the settings of every step from it.

mod check;

pub use check::check;

use crate::config::{Length, PhaseLength, PhaseModel, PhasePlan, Plan, ScheduleSpan};
use crate::data::EpochSize;
use crate::optimizer::Schedule;

/// A stretch of optimizer steps with the same settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// The position among the phases of the run, from 0.
    pub number: usize,
    /// First step of the phase, counted from 0 over the run.
    pub first_step: u64,
    /// Steps in the phase.
    pub steps: u64,
    /// The settings of the phase.
    pub plan: PhasePlan,
    /// The form of the model in this phase.
    pub model: PhaseModel,
    /// The learning-rate schedule, over the steps of the run or of the phase.
    schedule: Schedule,
}

impl Phase {
    /// Learning rate at a step, counted from 0 over the run. For a step before the phase this is the
    /// rate of the phase's first step.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let first = match self.plan.schedule_span {
            ScheduleSpan::Run => 0,
            ScheduleSpan::Phase => self.first_step,
        };
        self.schedule.learning_rate(step.saturating_sub(first))
    }

    /// The share of the rounded values in ternary weights at a step, counted from 0 over the run.
    /// It moves in a straight line from the first step of the phase to the last.
    pub fn ternary_blend(&self, step: u64) -> f64 {
        let [start, end] = self.plan.ternary_blend;
        let (place, last) = (step.saturating_sub(self.first_step), self.steps - 1);
        if place >= last {
            return end;
        }
        start + (end - start) * place as f64 / last as f64
    }

    /// Sequences per optimizer step.
    pub fn sequences_per_step(&self) -> u64 {
        self.plan.sequences_per_step()
    }

    /// Tokens per optimizer step, if every token counts as trained.
    pub fn tokens_per_step(&self) -> u64 {
        self.sequences_per_step() * self.plan.data.sequence_len as u64
    }

    /// The step after the last one.
    pub fn end(&self) -> u64 {
        self.first_step + self.steps
    }
}

/// The phases of a run, in order and without gaps.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    phases: Vec<Phase>,
}

/// Why a list of phases cannot be run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TimelineError {
    /// There are no phases at all.
    #[error("the run has no phases")]
    NoPhases,
    /// A phase would have no steps, because the others take the whole run.
    #[error("phase `{name}` has no steps: the others take all of the run")]
    NoSteps {
        /// The phase.
        name: String,
    },
    /// The phases end before the run does, or after it.
    #[error("the phases take {phases} steps, and the run has {run}")]
    NotTheRun {
        /// Steps of all phases.
        phases: u64,
        /// Steps of the run.
        run: u64,
    },
    /// A phase that cannot be trained.
    #[error("phase `{name}` {reason}")]
    Phase {
        /// The phase.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Timeline {
    /// Turns the lengths of the plan's phases into steps. `epochs` has the size of one epoch of
    /// each phase's training data.
    ///
    /// # Errors
    /// [`TimelineError`]
    pub fn new(plan: &Plan, epochs: &[EpochSize]) -> Result<Self, TimelineError> {
        check(plan)?;
        let lengths = lengths(plan, epochs)?;
        let all: u64 = lengths.iter().sum();
        let span = |phase: &PhasePlan, steps| match phase.schedule_span {
            ScheduleSpan::Run => all,
            ScheduleSpan::Phase => steps,
        };
        // The schedule of a run with one phase was checked by the configuration.
        if plan.phases.len() > 1 {
            for (phase, &steps) in plan.phases.iter().zip(&lengths) {
                check::check_schedule(phase, span(phase, steps))?;
            }
        }
        let models = PhaseModel::of_plan(plan);
        let mut first_step = 0;
        let phases = plan.phases.iter().zip(lengths).enumerate();
        let phases = phases.map(|(number, (plan, steps))| {
            first_step += steps;
            Phase {
                number,
                first_step: first_step - steps,
                steps,
                plan: plan.clone(),
                model: models[number],
                schedule: Schedule::new(
                    plan.learning_rate,
                    &plan.schedule.decay,
                    &plan.schedule.warmup,
                    plan.schedule.min_lr_ratio,
                    span(plan, steps),
                ),
            }
        });
        Ok(Self {
            phases: phases.collect(),
        })
    }

    /// Optimizer steps in the run.
    pub fn steps(&self) -> u64 {
        self.phases.iter().map(|phase| phase.steps).sum()
    }

    /// The phases.
    pub fn phases(&self) -> &[Phase] {
        &self.phases
    }

    /// The first step of each phase.
    pub fn starts(&self) -> Vec<u64> {
        self.phases.iter().map(|phase| phase.first_step).collect()
    }

    /// The phase of the step that comes after `step` completed steps; None past the end of the run.
    pub fn at(&self, step: u64) -> Option<&Phase> {
        self.phases.iter().find(|phase| step < phase.end())
    }

    /// The phase that a run is in after `steps` completed steps. At a boundary this is the phase
    /// that has just ended: the next phase begins with its first step.
    pub fn of_completed(&self, steps: u64) -> &Phase {
        let phase = self.phases.iter().find(|phase| steps <= phase.end());
        // There is at least one phase; past the end of the run the last one applies.
        phase.unwrap_or(&self.phases[self.phases.len() - 1])
    }
}

/// The number of steps of each phase.
fn lengths(plan: &Plan, epochs: &[EpochSize]) -> Result<Vec<u64>, TimelineError> {
    let phases: Vec<(&PhasePlan, &EpochSize)> = plan.phases.iter().zip(epochs).collect();
    let Some(&(first, epoch)) = phases.first() else {
        return Err(TimelineError::NoPhases);
    };
    // A run has at least one step.
    let all = match plan.length {
        Length::Steps(steps) => Budget::Steps(steps.max(1)),
        Length::Tokens(tokens) => Budget::Tokens(tokens as f64),
        Length::Epochs(epochs) if phases.len() == 1 => {
            let sequences = first.sequences_per_step() as f64;
            let steps = (epochs * epoch.sequences as f64 / sequences).ceil() as u64;
            Budget::Steps(steps.max(1))
        }
        Length::Epochs(epochs) => Budget::Tokens(epochs * epoch.targets as f64),
    };
    let mut left = all;
    let mut shares = 0.0;
    let mut lengths = vec![0; phases.len()];
    for (length, &(phase, epoch)) in lengths.iter_mut().zip(&phases) {
        *length = match phase.length {
            PhaseLength::Steps(steps) => steps,
            PhaseLength::Tokens(tokens) => Budget::Tokens(tokens as f64).steps(phase, epoch),
            PhaseLength::Share(share) => {
                let before = shares;
                shares += share;
                all.share(before, shares).steps(phase, epoch)
            }
            // Computed below, from what the other phases leave.
            PhaseLength::Rest => continue,
        };
        left = left.without(*length, phase, epoch);
    }
    for (length, &(phase, epoch)) in lengths.iter_mut().zip(&phases) {
        if phase.length == PhaseLength::Rest {
            *length = left.steps(phase, epoch);
            left = left.without(*length, phase, epoch);
        }
    }
    let without_steps = phases.iter().zip(&lengths).find(|(_, steps)| **steps == 0);
    if let Some(((phase, _), _)) = without_steps {
        return Err(TimelineError::NoSteps {
            name: phase.name.clone(),
        });
    }
    let taken = lengths
        .iter()
        .fold(0, |sum: u64, &steps| sum.saturating_add(steps));
    let run = match (all, phases.last()) {
        (Budget::Steps(run), _) => run,
        // Each phase's steps are rounded up, so phases may take slightly more than the run's
        // tokens.
        (Budget::Tokens(_), Some((last, epoch))) => taken + left.whole_steps(last, epoch),
        (Budget::Tokens(_), None) => taken,
    };
    if taken == run {
        Ok(lengths)
    } else {
        Err(TimelineError::NotTheRun { phases: taken, run })
    }
}

/// A length that a run or a phase may use up.
#[derive(Clone, Copy)]
enum Budget {
    Steps(u64),
    Tokens(f64),
}

impl Budget {
    /// The part between two shares of this budget. Rounding makes shares that sum to one take all
    /// steps.
    fn share(self, from: f64, to: f64) -> Self {
        match self {
            Self::Steps(steps) => {
                let at = |share: f64| (share * steps as f64).round() as u64;
                Self::Steps(at(to).saturating_sub(at(from)))
            }
            Self::Tokens(tokens) => Self::Tokens((to - from) * tokens),
        }
    }

    /// The steps of a phase that uses this whole budget, rounded up.
    fn steps(self, phase: &PhasePlan, epoch: &EpochSize) -> u64 {
        match self {
            Self::Steps(steps) => steps,
            Self::Tokens(tokens) => (tokens / tokens_per_step(phase, epoch)).ceil() as u64,
        }
    }

    /// The number of whole steps that fit into this budget.
    fn whole_steps(self, phase: &PhasePlan, epoch: &EpochSize) -> u64 {
        match self {
            Self::Steps(steps) => steps,
            Self::Tokens(tokens) => (tokens / tokens_per_step(phase, epoch)).floor() as u64,
        }
    }

    fn without(self, steps: u64, phase: &PhasePlan, epoch: &EpochSize) -> Self {
        match self {
            Self::Steps(left) => Self::Steps(left.saturating_sub(steps)),
            Self::Tokens(left) => {
                let taken = steps as f64 * tokens_per_step(phase, epoch);
                Self::Tokens((left - taken).max(0.0))
            }
        }
    }
}

/// Mean trained tokens of a step. The number varies between steps if only a part of each row is
/// trained.
fn tokens_per_step(phase: &PhasePlan, epoch: &EpochSize) -> f64 {
    let targets_per_sequence = epoch.targets as f64 / epoch.sequences as f64;
    phase.sequences_per_step() as f64 * targets_per_sequence
}
