//! What other lengths of a plan amount to, and how long its steps take. Nothing is written but the
//! token cache.

use std::time::{Instant, SystemTime};

use super::inputs::RunInputs;
use super::model_init::ModelInit;
use super::prepare::{on_device, start_threads};
use super::session::{ActivePhase, objective_specs};
use super::{StepSettings, TrainError, TrainState, train_step};
use crate::checkpoint::Cost;
use crate::collective::SingleProcess;
use crate::config::{Length, PhaseLength, PhasePlan, Plan};
use crate::data::EpochSize;
use crate::device::{ComputeDevice, is_cpu};
use crate::forecast::{Forecast, available_bytes};
use crate::phase::Timeline;

/// A plan whose data has been read.
pub struct Lengths {
    plan: Plan,
    device: ComputeDevice,
    inputs: RunInputs,
    forecast: Forecast,
}

/// What a run of some length amounts to, by its plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Totals {
    /// Optimizer steps.
    pub steps: u64,
    /// Trained tokens; a mean where only a part of each row is trained.
    pub tokens: f64,
    /// Backward passes and FLOPs. Its seconds are 0: nothing was measured.
    pub cost: Cost,
    /// The steps of each phase.
    pub phase_steps: Vec<u64>,
}

impl Lengths {
    /// Reads the data of a plan.
    ///
    /// # Errors
    /// Whatever is wrong with the data, the tokenizer or the model's shape;
    /// [`TrainError::Memory`] if the run would not fit.
    pub fn load(plan: &Plan) -> Result<Self, TrainError> {
        start_threads(plan.config.train.threads, 1)?;
        let (plan, device) = on_device(plan)?;
        let inputs = RunInputs::load(&plan, SystemTime::now())?;
        let forecast = inputs.forecast(&plan, &device, 1)??;
        Ok(Self {
            plan,
            device,
            inputs,
            forecast,
        })
    }

    /// Parameters, arithmetic and memory of the run.
    pub fn forecast(&self) -> &Forecast {
        &self.forecast
    }

    /// Bytes that all runs of this process can have together; none where that is not known, as on
    /// a GPU.
    pub fn available_bytes(&self) -> Option<u64> {
        available_bytes().filter(|_| is_cpu(&self.device.device))
    }

    /// A description of the tokens that the run is validated on, besides the settings of its data:
    /// the tokenizer and the templates.
    pub fn token_inputs(&self) -> serde_json::Value {
        let last = self.inputs.token_inputs();
        let last = last.as_array().and_then(|phases| phases.last().cloned());
        last.unwrap_or_default()
    }

    /// The unit of the validation loss: "nats per token".
    pub fn loss_unit(&self) -> String {
        let specs = objective_specs(&self.plan);
        let last = specs.into_iter().last();
        last.map_or_else(String::new, |spec| spec.loss_unit.into_owned())
    }

    /// Whether the last phase is validated.
    pub fn has_validation(&self) -> bool {
        let last = self.inputs.data.last();
        last.is_some_and(|data| data.view.eval_batches(1).is_some())
    }

    /// The first completed step whose validation loss can be compared with that of the last step.
    pub fn comparable_from(&self) -> u64 {
        let phases = self.inputs.timeline.phases();
        let Some(last) = phases.last() else { return 0 };
        let mut others = phases.iter().rev();
        let other = others.find(|phase| !phase.plan.is_evaluated_as(&last.plan));
        other.map_or(0, |phase| phase.end() + 1)
    }

    /// The plan's own length.
    pub fn own(&self) -> Totals {
        self.totals_of(&self.inputs.timeline)
    }

    /// What a run of another length means differently than the plan's own length; None if nothing.
    pub fn caveat(&self) -> Option<&'static str> {
        let shares = |phase: &PhasePlan| matches!(phase.length, PhaseLength::Share(_));
        let phases = &self.plan.phases;
        let counts_steps = matches!(self.plan.length, Length::Steps(_));
        if phases.iter().any(|phase| phase.predict.is_some()) {
            Some("predicted steps are counted as if they were computed")
        } else if !counts_steps && phases.iter().any(shares) {
            Some("shares of phases are of the run's steps, and not of its tokens as in the file")
        } else {
            None
        }
    }

    /// The totals of a run of `steps` steps.
    ///
    /// # Errors
    /// Phases that cannot have this length.
    pub fn totals(&self, steps: u64) -> Result<Totals, TrainError> {
        let mut plan = self.plan.clone();
        plan.length = Length::Steps(steps);
        let data = self.inputs.data.iter();
        let epochs: Vec<EpochSize> = data.map(|data| data.view.epoch()).collect();
        Ok(self.totals_of(&Timeline::new(&plan, &epochs)?))
    }

    fn totals_of(&self, timeline: &Timeline) -> Totals {
        let phases = timeline.phases().iter();
        let tokens = phases.clone().map(|phase| {
            let epoch = self.inputs.data[phase.number].view.epoch();
            let sequences = (phase.steps * phase.sequences_per_step()) as f64;
            sequences * epoch.targets as f64 / epoch.sequences as f64
        });
        Totals {
            steps: timeline.steps(),
            tokens: tokens.sum(),
            cost: self.inputs.planned_cost(timeline, timeline.steps()),
            phase_steps: phases.map(|phase| phase.steps).collect(),
        }
    }

    /// The largest number of steps whose totals fit; 0 if not a single step does.
    ///
    /// # Errors
    /// Phases that cannot have this length.
    pub fn steps_within(&self, fits: impl Fn(&Totals) -> bool) -> Result<u64, TrainError> {
        // Phases whose lengths are all fixed have no other length than their own.
        let own = self.own().steps;
        self.totals(own + 1)?;
        // A length that is too short for the phases is no reason to look for a shorter one.
        let affords = |steps: u64| self.totals(steps).map_or(true, |totals| fits(&totals));
        if !affords(1) {
            return Ok(0);
        }
        let (mut low, mut high) = (1, 2);
        while high < MOST_STEPS && affords(high) {
            (low, high) = (high, high * 2);
        }
        while high - low > 1 {
            let middle = low.midpoint(high);
            if affords(middle) {
                low = middle;
            } else {
                high = middle;
            }
        }
        self.totals(low)?;
        Ok(low)
    }

    /// A timer for the steps of a phase.
    ///
    /// # Errors
    /// A model that cannot be built.
    pub fn timer(&self, phase: usize) -> Result<StepTimer, TrainError> {
        let init = ModelInit {
            plan: &self.plan,
            spec: &self.inputs.spec,
            device: &self.device.device,
        };
        let phase = &self.inputs.timeline.phases()[phase];
        let initial = init.fresh(phase)?;
        let active = ActivePhase::new(phase, &self.inputs.data, initial.reference);
        let settings = StepSettings {
            // With a learning rate of 0 the weights do not change.
            learning_rate: 0.0,
            ..active.settings(phase.first_step, self.plan.config.seed)
        };
        Ok(StepTimer {
            state: initial.state,
            active,
            settings,
            sequences: 0,
        })
    }
}

/// `max_steps` in [train] goes no further.
const MOST_STEPS: u64 = 1_000_000_000_000;

/// Takes steps to see how long they take. The weights do not change.
pub struct StepTimer {
    state: TrainState,
    active: ActivePhase,
    settings: StepSettings,
    sequences: u64,
}

impl StepTimer {
    /// Seconds of an optimizer step, from drawing its batches to its update.
    ///
    /// # Errors
    /// A step that fails.
    pub fn step(&mut self) -> Result<f64, TrainError> {
        let begun = Instant::now();
        let batches = self.active.micro_batches(self.sequences, 0);
        let objective = self.active.objective.as_ref();
        let (state, settings) = (&mut self.state, &self.settings);
        train_step(state, &batches, objective, settings, &SingleProcess)?;
        self.sequences += self.active.phase.sequences_per_step();
        // Waits for the device by reading what it wrote last.
        self.state.model().norm.weight.val().into_data();
        Ok(begun.elapsed().as_secs_f64())
    }
}
