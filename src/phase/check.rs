//! Checks whether each phase of a plan can be trained. The phases of a TOML file were checked when
//! it was resolved; phases made in code were not.

use super::TimelineError;
use crate::config::{PhasePlan, Plan, ScheduleSpan, Task, Warmup};

/// Checks each phase by itself, before any data is read.
///
/// # Errors
/// [`TimelineError::Phase`] for the first phase that cannot be trained.
pub fn check(plan: &Plan) -> Result<(), TimelineError> {
    for phase in &plan.phases {
        if let Some(reason) = problem(plan, phase) {
            return Err(refused(phase, reason));
        }
    }
    Ok(())
}

fn refused(phase: &PhasePlan, reason: String) -> TimelineError {
    TimelineError::Phase {
        name: phase.name.clone(),
        reason,
    }
}

fn problem(plan: &Plan, phase: &PhasePlan) -> Option<String> {
    let is_dpo = phase.task == Task::Dpo;
    if is_dpo != phase.dpo.is_some() {
        let reason = match is_dpo {
            true => "has task = dpo and no `dpo`",
            false => "has `dpo` and another task",
        };
        return Some(reason.to_string());
    }
    if is_dpo && plan.config.model.base_model.is_none() {
        return Some(
            "trains on pairs, and the run has no base model to hold the answers against"
                .to_string(),
        );
    }
    let counts = [
        ("micro_batch_size", phase.micro_batch_size),
        (
            "gradient_accumulation_steps",
            phase.gradient_accumulation_steps,
        ),
        ("sequence_len", phase.data.sequence_len),
    ];
    if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
        return Some(format!("has a {name} of 0"));
    }
    let numbers = [
        ("learning_rate", phase.learning_rate),
        ("max_grad_norm", phase.max_grad_norm),
    ];
    let is_bad = |value: f64| !value.is_finite() || value < 0.0;
    if let Some((name, value)) = numbers.iter().find(|(_, value)| is_bad(*value)) {
        return Some(format!("has a {name} of {value}"));
    }
    let positions = plan.shape.max_position_embeddings;
    (phase.data.sequence_len > positions).then(|| {
        format!(
            "has sequences of {} tokens, and the model has {positions} positions",
            phase.data.sequence_len
        )
    })
}

/// Checks that the warm-up of a phase's own schedule ends within its steps.
pub(super) fn check_warmup(phase: &PhasePlan, steps: u64) -> Result<(), TimelineError> {
    match (phase.schedule_span, &phase.schedule.warmup) {
        (ScheduleSpan::Phase, Warmup::Steps(warmup)) if *warmup > steps => {
            let reason = format!("has a warm-up of {warmup} steps and {steps} steps in all");
            Err(refused(phase, reason))
        }
        _ => Ok(()),
    }
}
