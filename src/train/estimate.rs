//! What a run would do, take and cost, without running it.

use std::time::{Instant, SystemTime};

use serde::Serialize;

use super::inputs::RunInputs;
use super::model_init::ModelInit;
use super::prepare::{on_device, start_threads};
use super::resume::starting_point;
use super::session::ActivePhase;
use super::team::Team;
use super::{Resume, Run, StepSettings, TrainError, train_step};
use crate::collective::SingleProcess;
use crate::config::{Backend, Plan};
use crate::device::is_cpu;
use crate::environment::Environment;
use crate::forecast::{Forecast, available_bytes};
use crate::phase::Phase;
use crate::readable::{bytes, duration, grouped, scaled};

/// What a plan amounts to, once the data is known.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Rows of the embedding matrix.
    pub vocab_size: u64,
    /// Tokens in the training split.
    pub train_tokens: u64,
    /// Tokens in the validation split.
    pub val_tokens: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens per optimizer step.
    pub tokens_per_step: u64,
    /// Passes over the training split.
    pub epochs: f64,
}

/// Everything that can be said about a run before it starts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Data and steps.
    #[serde(flatten)]
    pub summary: Summary,
    /// Parameters, arithmetic, memory.
    #[serde(flatten)]
    pub forecast: Forecast,
    /// Bytes that this process can have; none where that is not known, as on a GPU.
    pub available_bytes: Option<u64>,
    /// What computes.
    pub backend: Backend,
    /// Seconds of an optimizer step, measured here; none where it was not asked for.
    pub seconds_per_step: Option<f64>,
}

impl Run {
    /// Where the run would start: the step of the checkpoint in its folder, none for a new run.
    ///
    /// # Errors
    /// A folder that this plan cannot be run in.
    pub fn would_start_at(plan: &Plan, resume: Resume) -> Result<Option<u64>, TrainError> {
        let (plan, _) = on_device(plan)?;
        Ok(starting_point(&plan.config.output_dir, &plan, resume)?.checkpoint())
    }

    /// Loads the data and works out what the plan amounts to; with `timed`, builds the model too and
    /// takes an optimizer step to see how long it takes. Writes nothing but the token cache.
    ///
    /// # Errors
    /// Whatever is wrong with the data, the tokenizer, the model's shape or the run folder;
    /// [`TrainError::Memory`] if the run would not fit.
    pub fn estimate(
        plan: &Plan,
        timed: bool,
        mut note: impl FnMut(&str),
    ) -> Result<Estimate, TrainError> {
        start_threads(plan.config.train.threads, 1)?;
        let (plan, device) = on_device(plan)?;
        let inputs = RunInputs::load(&plan, SystemTime::now())?;
        let notes = inputs.notes(&plan, &device, &Environment::detect(), &Team::alone());
        notes.iter().skip(1).for_each(|text| note(text));
        let forecast = inputs.forecast(&plan, &device, 1)??;
        let init = ModelInit {
            plan: &plan,
            spec: &inputs.spec,
            device: &device.device,
        };
        let seconds = timed.then(|| time_step(&init, &inputs)).transpose()?;
        Ok(Estimate {
            summary: inputs.summary(),
            forecast,
            available_bytes: available_bytes().filter(|_| is_cpu(&device.device)),
            backend: device.backend,
            seconds_per_step: seconds,
        })
    }
}

/// Steps that are timed, after one that only warms up.
const TIMED_STEPS: usize = 3;

/// Seconds of an optimizer step, averaged over the steps of the run. Each phase contributes the
/// median of [`TIMED_STEPS`] steps.
fn time_step(init: &ModelInit, inputs: &RunInputs) -> Result<f64, TrainError> {
    let mut seconds = 0.0;
    for phase in inputs.timeline.phases() {
        seconds += phase.steps as f64 * time_phase(init, inputs, phase)?;
    }
    Ok(seconds / inputs.timeline.steps() as f64)
}

/// Seconds of an optimizer step of a phase. One micro-batch is timed; the others take as long.
fn time_phase(init: &ModelInit, inputs: &RunInputs, phase: &Phase) -> Result<f64, TrainError> {
    let initial = init.fresh(phase)?;
    let mut state = initial.state;
    let active = ActivePhase::new(phase, &inputs.data, initial.reference);
    // A blend of dense and ternary weights is all of one at the phase's ends.
    let middle = phase.first_step + phase.steps / 2;
    let settings = StepSettings {
        // With a learning rate of 0 the weights do not change, so every timed step does the same
        // work.
        learning_rate: 0.0,
        workers: 1,
        ..active.settings(middle, init.plan.config.seed)
    };
    let batch = [active.data.view.batch(0, phase.plan.micro_batch_size)];
    let objective = active.objective.as_ref();
    let mut seconds = Vec::new();
    for _ in 0..=TIMED_STEPS {
        let report = train_step(&mut state, &batch, objective, &settings, &SingleProcess)?;
        // Waits for the device by reading what it wrote last.
        let begun = Instant::now();
        state.model().norm.weight.val().into_data();
        let rest = report.time.gradient + report.time.update + begun.elapsed();
        let passes = phase.plan.micro_batches_per_rank() as f64;
        seconds.push(report.time.backward.as_secs_f64() * passes + rest.as_secs_f64());
    }
    seconds.remove(0);
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

impl Forecast {
    /// For a person: what will be trained, and the memory it takes.
    pub(super) fn describe(&self, summary: &Summary, plan: &Plan) -> [String; 2] {
        let steps: Vec<String> = plan
            .phases
            .iter()
            .map(|phase| {
                let sequences = phase.sequences_per_step();
                format!("{sequences} x {}", phase.data.sequence_len)
            })
            .collect();
        let run = format!(
            "{} parameters; {} steps of {} tokens = {:.1} passes over {} training tokens",
            grouped(self.parameters),
            grouped(summary.steps),
            steps.join(", then "),
            summary.epochs,
            grouped(summary.train_tokens),
        );
        let terms = self.memory.terms.iter();
        let terms: Vec<String> = terms
            .map(|term| format!("{} {}", term.name, bytes(term.bytes)))
            .collect();
        let memory = format!(
            "memory: up to {} {} ({})",
            bytes(self.peak_bytes),
            self.moment(),
            terms.join(", ")
        );
        [run, memory]
    }
}

impl Estimate {
    /// For a person, a line each.
    pub fn describe(&self, plan: &Plan) -> String {
        let [run, _] = self.forecast.describe(&self.summary, plan);
        let mut lines = vec![run];
        lines.push(format!(
            "compute  {}FLOP a token, forward and backward",
            scaled(self.forecast.flops_per_token)
        ));
        let of = self.available_bytes.map_or(String::new(), |available| {
            format!(", of {} available", bytes(available))
        });
        lines.push(format!(
            "memory   {} {}{of}",
            bytes(self.forecast.peak_bytes),
            self.forecast.moment(),
        ));
        for term in &self.forecast.memory.terms {
            lines.push(format!(
                "  {:<18}{:>10}   {}",
                term.name,
                bytes(term.bytes),
                term.formula
            ));
        }
        if let Some(seconds) = self.seconds_per_step {
            lines.push(format!(
                "time     {} for {} steps of {:.0} ms (the median of {TIMED_STEPS} taken here), evaluation and saving apart",
                duration(seconds * self.summary.steps as f64),
                grouped(self.summary.steps),
                seconds * 1e3,
            ));
        }
        lines.join("\n")
    }
}
