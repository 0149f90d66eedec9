//! The services that a run uses: its plan, its data, its run folder and its observers.

use std::path::Path;

use burn::tensor::FloatDType;
use tracing::Dispatch;
use tracing::dispatcher::DefaultGuard;

use super::average::{Average, AverageSettings};
use super::clock::Clock;
use super::inputs::PhaseData;
use super::model_init::{ModelInit, float_dtype, loss_scale, optimizer};
use super::predictor::Predictor;
use super::regulator::StepLimits;
use super::saving::Saver;
use super::team::Team;
use super::{Event, Interrupt, Observer, RunFolder, StepSettings, TrainError, TrainState};
use crate::adapter::Adapter;
use crate::checkpoint::CheckpointStore;
use crate::config::{DecoderSpec, PhaseModel, PhasePlan, Plan};
use crate::data::{Batch, TrainingData};
use crate::device::ComputeDevice;
use crate::forecast::Flops;
use crate::model::{Decoder, is_of_adapter};
use crate::objective::{CrossEntropy, Objective, ObjectiveSpec, Preference};
use crate::phase::{Phase, Timeline};

/// Everything of a run that a step does not change.
pub(super) struct Session {
    pub(super) plan: Plan,
    /// The ranks of the run.
    pub(super) team: Team,
    /// The spec of the run's first model; [`PhaseModel::spec`] derives that of each phase.
    pub(super) spec: DecoderSpec,
    pub(super) device: ComputeDevice,
    pub(super) timeline: Timeline,
    /// The data of each phase, in order.
    pub(super) data: Vec<PhaseData>,
    pub(super) active: ActivePhase,
    /// Multiplications and additions for one token of each phase.
    pub(super) flops_per_token: Vec<Flops>,
    /// The initial adapter; None if it starts at zero, or if this session began without it.
    pub(super) initial_adapter: Option<Adapter>,
    /// How the weights are averaged; None if they are not.
    pub(super) average: Option<AverageSettings>,
    /// The learning rate of the last step.
    pub(super) last_learning_rate: f64,
    pub(super) clock: Clock,
    pub(super) store: CheckpointStore,
    pub(super) saver: Saver,
    pub(super) folder: RunFolder,
    pub(super) observers: Vec<Box<dyn Observer>>,
    pub(super) interrupt: Interrupt,
    /// Bytes that can still be written beside a path. Tests replace this function.
    pub(super) free_space: fn(&Path) -> std::io::Result<u64>,
    /// Receives the `tracing` records of this run: logs/train.log.
    pub(super) log: Dispatch,
    /// Why the run ends at its present step; none if it goes to its last.
    pub(super) cut: Option<String>,
    /// Whether the run is being saved to go on later, from exactly here.
    pub(super) is_suspended: bool,
}

/// The current phase, ready for training.
pub(super) struct ActivePhase {
    pub(super) phase: Phase,
    pub(super) data: PhaseData,
    pub(super) objective: Box<dyn Objective>,
    /// Dtype of the forward and backward pass.
    pub(super) dtype: FloatDType,
}

impl ActivePhase {
    /// `reference` is the reference model in f32, for an objective that needs one.
    pub(super) fn new(phase: &Phase, data: &[PhaseData], reference: Option<Decoder>) -> Self {
        let dtype = float_dtype(phase.plan.dtype);
        Self {
            objective: objective(&phase.plan, reference, dtype),
            data: data[phase.number].clone(),
            phase: phase.clone(),
            dtype,
        }
    }

    /// The settings of a step of the run within this phase.
    pub(super) fn settings(&self, step: u64, seed: u64) -> StepSettings {
        let plan = &self.phase.plan;
        StepSettings {
            dtype: self.dtype,
            gradient_checkpointing: plan.gradient_checkpointing,
            int8_forward: plan.int8_forward,
            ternary_blend: self.phase.ternary_blend(step),
            max_grad_norm: plan.max_grad_norm,
            learning_rate: self.phase.learning_rate(step),
            limits: StepLimits::default(),
            seed,
            workers: plan.workers,
        }
    }

    /// The micro-batches of a rank in a step, with sequences in data order for any grouping. The
    /// sequences of a step belong to the ranks in their order.
    pub(super) fn micro_batches(&self, first: u64, rank: usize) -> Vec<Batch> {
        let phase = &self.phase.plan;
        let rows = phase.micro_batch_size;
        let passes = phase.micro_batches_per_rank();
        let first = first + rank as u64 * passes * rows as u64;
        (0..passes)
            .map(|pass| self.data.view.batch(first + pass * rows as u64, rows))
            .collect()
    }
}

impl ActivePhase {
    /// The share of the rounded values in ternary weights after `steps` completed steps: that of the
    /// last step.
    pub(super) fn ternary_blend_after(&self, steps: u64) -> f64 {
        self.phase.ternary_blend(steps.saturating_sub(1))
    }
}

/// The objective of a phase.
pub(super) fn objective(
    phase: &PhasePlan,
    reference: Option<Decoder>,
    dtype: FloatDType,
) -> Box<dyn Objective> {
    match (&phase.dpo, reference) {
        (Some(dpo), Some(reference)) => Box::new(Preference {
            loss: dpo.into(),
            // Rounded once here; in f32 the reference keeps sharing its weights.
            reference: reference.cast(dtype),
        }),
        (Some(_), None) => unreachable!("a run with pairs of answers has a reference model"),
        (None, _) => Box::new(CrossEntropy),
    }
}

impl Session {
    /// Sends this thread's `tracing` records to the run's log until the guard is dropped.
    pub(super) fn log_here(&self) -> DefaultGuard {
        tracing::dispatcher::set_default(&self.log)
    }

    /// The data whose tokenizer goes with the exported model: that of the last phase.
    pub(super) fn exported_data(&self) -> &dyn TrainingData {
        let last = self.data.last().unwrap_or(&self.active.data);
        last.source.as_ref()
    }

    /// The specs of all phases' objectives, each once.
    pub(super) fn objective_specs(&self) -> Vec<ObjectiveSpec> {
        objective_specs(&self.plan)
    }

    /// Enters the phase of the next step, if it is another phase: with other trained parameters,
    /// and another optimizer, data and objective.
    pub(super) fn enter_phase(
        &mut self,
        state: &mut TrainState,
        phase: &Phase,
    ) -> Result<(), TrainError> {
        let before = &self.active.phase;
        if phase.number == before.number {
            return Ok(());
        }
        let is_comparable = before.plan.is_evaluated_as(&phase.plan);
        let has_other_adapter = before.model.adapter_since != phase.model.adapter_since;
        let init = self.model_init();
        let reference = init.reference_beside(&self.folder, state.model(), phase)?;
        let model = init.turned(state.model().clone(), before.model, phase.model)?;
        let model = model.with_frozen(&phase.plan.freeze)?;
        self.active = ActivePhase::new(phase, &self.data, reference);
        let rules = optimizer(&self.plan, &phase.plan);
        // A new adapter's parameters have the same paths as the old one's.
        let is_new = |path: &str| has_other_adapter && is_of_adapter(path);
        let fresh = state.enter_phase(model, rules, is_new, &self.device.device)?;
        let progress = &mut state.progress;
        progress.loss_scale = loss_scale(&phase.plan, progress.loss_scale);
        progress.phase = phase.number as u64;
        progress.sequences = progress.skip_to(phase.number);
        state.predictor = phase.plan.predict.map(Predictor::new);
        let progress = &mut state.progress;
        if !is_comparable {
            // Losses of two objectives, or of two validation splits, cannot be compared.
            progress.best = None;
            progress.evaluations_since_best = 0;
            // A background save may still be about to mark its step as the best.
            self.wait_for_save()?;
            if self.team.is_lead() {
                self.store.forget_best()?;
            }
        }
        self.emit(&Event::PhaseStarted {
            step: progress.step,
            phase: phase.number,
            name: phase.plan.name.clone(),
        })?;
        if has_other_adapter {
            self.note_other_adapter(phase.model)?;
            self.begin_average_anew(state)?;
        }
        self.note_fresh_state(&fresh)
    }

    /// Reports what happened to the adapter.
    fn note_other_adapter(&mut self, model: PhaseModel) -> Result<(), TrainError> {
        let text = match model.adapter_since {
            Some(_) => {
                "a new adapter begins; the weights beside it are those that the run has made"
            }
            None => "the adapter has been merged into the weights, which are trained from here on",
        };
        let text = text.to_string();
        self.emit(&Event::Note { text })
    }

    /// Drops the average of parameters that the model no longer has.
    fn begin_average_anew(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        if !state.average.as_mut().is_some_and(Average::begin_anew) {
            return Ok(());
        }
        let text = "the average of the weights begins anew, because the model has other parameters";
        let text = text.to_string();
        self.emit(&Event::Note { text })
    }

    /// Reports that the average of the weights has begun.
    pub(super) fn note_average(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        if !state.average.as_mut().is_some_and(Average::take_begun) {
            return Ok(());
        }
        let text = format!(
            "the average of the weights begins with those of step {}: from here on it is what is \
             evaluated and exported",
            state.progress.step
        );
        self.emit(&Event::Note { text })
    }

    /// Reports which parameters begin without optimizer state.
    pub(super) fn note_fresh_state(&mut self, paths: &[String]) -> Result<(), TrainError> {
        let Some(first) = paths.first() else {
            return Ok(());
        };
        let text = match paths.len() {
            1 => format!("the optimizer's state of {first} starts fresh"),
            all => format!("the optimizer's state of {all} parameters starts fresh, {first} first"),
        };
        self.emit(&Event::Note { text })
    }

    /// The name of the current phase; None if the run has one phase.
    pub(super) fn phase_name(&self) -> Option<String> {
        let has_phases = self.timeline.phases().len() > 1;
        has_phases.then(|| self.active.phase.plan.name.clone())
    }

    pub(super) fn model_init(&self) -> ModelInit<'_> {
        ModelInit {
            plan: &self.plan,
            spec: &self.spec,
            device: &self.device.device,
        }
    }

    /// Whether an action that is due every `every` steps is due; at the last step it always is.
    pub(super) fn is_due(&self, step: u64, every: u64) -> bool {
        step == self.timeline.steps() || (every > 0 && step.is_multiple_of(every))
    }

    /// Sends an event to every observer.
    pub(super) fn emit(&mut self, event: &Event) -> Result<(), TrainError> {
        self.observers
            .iter_mut()
            .try_for_each(|observer| observer.observe(event))
    }

    /// Tells every observer that the run ends early. Their own errors are ignored: they may have
    /// the same cause, and matter less.
    pub(super) fn emit_end(&mut self, step: u64, error: &TrainError) {
        let event = Event::Stopped {
            step,
            kind: error.kind().to_string(),
            message: error.to_string(),
        };
        for observer in &mut self.observers {
            let _ = observer.observe(&event);
        }
    }
}

/// The specs of all phases' objectives, each once.
pub(super) fn objective_specs(plan: &Plan) -> Vec<ObjectiveSpec> {
    let mut specs: Vec<ObjectiveSpec> = Vec::new();
    for phase in &plan.phases {
        let spec = match phase.dpo {
            Some(_) => Preference::SPEC,
            None => CrossEntropy::SPEC,
        };
        if !specs.contains(&spec) {
            specs.push(spec);
        }
    }
    specs
}
