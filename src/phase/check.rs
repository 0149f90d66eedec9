//! Checks whether each phase of a plan can be trained. The phases of a TOML file were checked when
//! it was resolved; phases made in code were not.

use super::TimelineError;
use crate::config::{Decay, PhasePlan, Plan, Warmup, phase_problems};

/// Checks the phases, before any data is read.
///
/// # Errors
/// [`TimelineError::Phase`] for the first phase that cannot be trained.
pub fn check(plan: &Plan) -> Result<(), TimelineError> {
    let mut problems = phase_problems(plan).into_iter();
    match problems.next() {
        Some(problem) => Err(refused(&plan.phases[problem.phase], problem.reason)),
        None => Ok(()),
    }
}

fn refused(phase: &PhasePlan, reason: String) -> TimelineError {
    TimelineError::Phase {
        name: phase.name.clone(),
        reason,
    }
}

/// Checks that a schedule's warm-up and decay fit into the `span` steps that it runs over.
pub(super) fn check_schedule(phase: &PhasePlan, span: u64) -> Result<(), TimelineError> {
    let warmup = match phase.schedule.warmup {
        Warmup::Steps(steps) => steps as f64 / span as f64,
        Warmup::Ratio(ratio) => ratio,
    };
    let decay = match phase.schedule.decay {
        Decay::Wsd { ratio, .. } => ratio,
        _ => 0.0,
    };
    // Tolerates the rounding of a sum such as 0.8 + 0.2.
    if warmup + decay <= 1.0 + 1e-9 {
        return Ok(());
    }
    let reason = match (&phase.schedule.warmup, decay) {
        (Warmup::Steps(steps), 0.0) => {
            format!("has a warm-up of {steps} steps in a schedule over {span} steps")
        }
        _ => format!(
            "has a schedule whose warm-up and decay take {:.0} % of its {span} steps",
            100.0 * (warmup + decay)
        ),
    };
    Err(refused(phase, reason))
}
