//! Whether a run fits into memory, and what would make it fit.

use super::{Conditions, Forecast};
use crate::config::{CheckpointFormat, DecoderSpec, PhaseModel, Plan};
use crate::environment::{memory_limit_bytes, resident_memory_bytes};
use crate::model::ModelError;
use crate::readable::bytes;

/// A run that needs more memory than there is.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "needs {} {}, {} available ({})",
    bytes(forecast.peak_bytes), forecast.moment(), bytes(*available), parts(forecast)
)]
pub struct Shortage {
    /// What it needs.
    pub forecast: Box<Forecast>,
    /// Bytes there are.
    pub available: u64,
    /// Keys that would make it fit, and what it would need then.
    pub remedy: Option<(String, u64)>,
}

impl Forecast {
    /// When the most memory is held, as in "at the end of the backward pass in phase long".
    pub fn moment(&self) -> String {
        let moment = self.memory.moment.describe();
        match &self.phase {
            Some(phase) => format!("{moment} in phase {phase}"),
            None => moment.to_string(),
        }
    }
}

impl Shortage {
    /// What to do about it.
    pub fn help(&self) -> String {
        match &self.remedy {
            Some((keys, needed)) => format!("{keys} -> {} (fits)", bytes(*needed)),
            None => {
                "no batch size makes it fit: a smaller model, a shorter data.sequence_len, or an \
                     optimizer with less state (adafactor, lion, sgd)"
                    .to_string()
            }
        }
    }
}

/// Memory that this process can have in all: what it holds and what is free, within the limit of
/// its control group. None where the system does not say.
pub fn available_bytes() -> Option<u64> {
    Some(memory_limit_bytes()? + resident_memory_bytes()?)
}

/// Whether the forecast of the phase that needs the most memory stays below `available` bytes.
///
/// # Errors
/// [`Shortage`], in the inner result, with the smallest change that makes it fit.
pub fn fit(
    plan: &Plan,
    spec: &DecoderSpec,
    conditions: Conditions,
    available: u64,
) -> Result<Result<Forecast, Shortage>, ModelError> {
    let forecast = worst_phase(plan, spec, conditions)?;
    if forecast.peak_bytes <= available {
        return Ok(Ok(forecast));
    }
    let mut remedy = None;
    for (keys, changed) in remedies(plan) {
        let needed = worst_phase(&changed, spec, conditions)?.peak_bytes;
        if needed <= available {
            remedy = Some((keys, needed));
            break;
        }
    }
    Ok(Err(Shortage {
        forecast: Box::new(forecast),
        available,
        remedy,
    }))
}

/// The forecast of the phase that needs the most memory.
fn worst_phase(
    plan: &Plan,
    spec: &DecoderSpec,
    conditions: Conditions,
) -> Result<Forecast, ModelError> {
    let mut worst: Option<Forecast> = None;
    for (phase, model) in plan.phases.iter().zip(PhaseModel::of_plan(plan)) {
        let forecast = Forecast::new((plan, phase, model), spec, conditions)?;
        if worst
            .as_ref()
            .is_none_or(|worst| forecast.peak_bytes > worst.peak_bytes)
        {
            worst = Some(forecast);
        }
    }
    // Every plan has a phase: a timeline without phases has already been refused.
    Ok(worst.expect("a plan has a phase"))
}

/// Changes that save memory and train the same, the smallest first: saving before training goes on,
/// checkpointing, then the same sequences per step in smaller micro-batches, then both.
fn remedies(plan: &Plan) -> Vec<(String, Plan)> {
    let is_checkpointed = plan.phases.iter().all(|phase| phase.gradient_checkpointing);
    let checkpointing = "train.gradient_checkpointing = true";
    let mut remedies = vec![(checkpointing.to_string(), checkpointed(plan))];
    let smaller = smaller_batches(plan);
    let both: Vec<(String, Plan)> = smaller
        .iter()
        .map(|(keys, plan)| (format!("{checkpointing}, {keys}"), checkpointed(plan)))
        .collect();
    remedies.extend(smaller);
    remedies.extend(both);
    if is_checkpointed {
        remedies.retain(|(keys, _)| !keys.starts_with(checkpointing));
    }
    let saving = &plan.config.checkpoint;
    if saving.format == CheckpointFormat::Delta && saving.background {
        let at_once = |plan: &Plan| {
            let mut plan = plan.clone();
            plan.config.checkpoint.background = false;
            plan
        };
        let key = "checkpoint.background = false";
        let others: Vec<_> = remedies
            .iter()
            .map(|(keys, plan)| (format!("{key}, {keys}"), at_once(plan)))
            .collect();
        remedies.insert(0, (key.to_string(), at_once(plan)));
        remedies.extend(others);
    }
    remedies
}

fn checkpointed(plan: &Plan) -> Plan {
    let mut plan = plan.clone();
    for phase in &mut plan.phases {
        phase.gradient_checkpointing = true;
    }
    plan
}

/// The same number of sequences per step, in two, three, ... times as many micro-batches.
fn smaller_batches(plan: &Plan) -> Vec<(String, Plan)> {
    let sizes = plan.phases.iter().map(|phase| phase.micro_batch_size);
    let divides_all = |n: &usize| sizes.clone().all(|size| size.is_multiple_of(*n));
    let divisors = (2..=sizes.clone().min().unwrap_or(1)).filter(divides_all);
    let smaller = divisors.map(|n| {
        let mut plan = plan.clone();
        for phase in &mut plan.phases {
            phase.micro_batch_size /= n;
            phase.gradient_accumulation_steps *= n;
        }
        let keys: Vec<String> = plan
            .phases
            .iter()
            .map(|phase| {
                let whose = match plan.phases.len() {
                    1 => "train".to_string(),
                    _ => phase.name.clone(),
                };
                format!(
                    "{whose}.micro_batch_size = {}, {whose}.gradient_accumulation_steps = {}",
                    phase.micro_batch_size, phase.gradient_accumulation_steps
                )
            })
            .collect();
        (keys.join(", "), plan)
    });
    smaller.collect()
}

/// "weights 5.1 GiB, optimizer 10.2 GiB, activations 25.7 GiB"
fn parts(forecast: &Forecast) -> String {
    let terms = forecast.memory.terms.iter();
    let texts: Vec<String> = terms
        .map(|term| format!("{} {}", term.name, bytes(term.bytes)))
        .collect();
    texts.join(", ")
}
