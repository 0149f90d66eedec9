//! How many steps each candidate gets.
//!
//! A budget becomes a number of steps for each candidate before anything is trained, so that each
//! learning-rate schedule ends with the budget. For seconds the steps of each candidate are timed
//! first. These timings are kept: without them the same command would find other lengths the next
//! time, and could not go on.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Candidate, CompareError};
use crate::config::{Budget, BudgetKind};
use crate::durable;
use crate::readable::{duration, grouped};
use crate::train::{Lengths, StepTimer, Totals};

/// What each candidate may use.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Allotment {
    /// Steps of each candidate.
    pub(super) steps: Vec<u64>,
    /// Seconds of training steps after which a run is cut.
    pub(super) seconds: Option<f64>,
}

/// The share of a budget in seconds that is kept free, because a step may take longer than it took
/// when it was timed, and a run that is cut does not come to the end of its schedule.
const MARGIN: f64 = 0.05;

/// Turns in which the candidates are timed.
const TURNS: usize = 5;

/// Seconds of such a turn: a hundredth of the budget, within bounds.
fn turn_seconds(budget: Budget) -> f64 {
    (budget.amount.unwrap_or(0.0) / 100.0).clamp(0.5, 3.0)
}

/// What is kept of the timing of a candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Timing {
    /// Its name when it was timed.
    name: String,
    /// Seconds of a step of each phase.
    seconds_per_step: Vec<f64>,
}

/// timings.json: by the hash of the configuration.
type Timings = BTreeMap<String, Timing>;

/// The steps of each candidate.
pub(super) fn allot(
    candidates: &[Candidate],
    lengths: &[Lengths],
    (budget, is_together): (Option<Budget>, bool),
    folder: &Path,
    note: &mut dyn FnMut(&str),
) -> Result<Allotment, CompareError> {
    let Some(budget) = budget else {
        return Ok(Allotment {
            steps: lengths.iter().map(|own| own.own().steps).collect(),
            seconds: None,
        });
    };
    let timings = match budget.kind {
        BudgetKind::Wall => {
            let turn = (turn_seconds(budget), is_together);
            timings(candidates, lengths, turn, folder, note)?
        }
        _ => Timings::new(),
    };
    let used = |number: usize, totals: &Totals| match budget.kind {
        BudgetKind::Wall => {
            let timing = timings.get(&candidates[number].hash());
            let phases = timing.map(|timing| timing.seconds_per_step.iter());
            let seconds = phases.into_iter().flatten().zip(&totals.phase_steps);
            let sum: f64 = seconds
                .map(|(seconds, &steps)| seconds * steps as f64)
                .sum();
            sum * (1.0 + MARGIN)
        }
        BudgetKind::Tokens => totals.tokens,
        BudgetKind::Steps => totals.steps as f64,
        BudgetKind::Backward => totals.cost.backward_passes as f64,
        BudgetKind::Flops => totals.cost.flops,
    };
    let amount = budget.amount.unwrap_or_else(|| used(0, &lengths[0].own()));
    let mut steps = Vec::new();
    for (number, candidate) in candidates.iter().enumerate() {
        // Sums of seconds and FLOPs are rounded.
        let fits = |totals: &Totals| used(number, totals) <= amount * (1.0 + 1e-9);
        let found = lengths[number]
            .steps_within(fits)
            .map_err(CompareError::length(&candidate.name, 0))?;
        if found == 0 {
            let name = candidate.name.clone();
            let budget = Budget {
                amount: Some(amount),
                ..budget
            };
            return Err(CompareError::BudgetTooSmall { name, budget });
        }
        steps.push(found);
    }
    let seconds = (budget.kind == BudgetKind::Wall).then_some(amount);
    if let Some(seconds) = seconds {
        let each: Vec<String> = candidates
            .iter()
            .zip(&steps)
            .map(|(candidate, &steps)| format!("{} {}", candidate.name, grouped(steps)))
            .collect();
        note(&format!(
            "{} of training steps afford, with {:.0} % to spare: {} steps",
            duration(seconds),
            100.0 * MARGIN,
            each.join(", ")
        ));
    }
    Ok(Allotment { steps, seconds })
}

/// The timings of all candidates: those of an earlier start of this comparison, and new ones. With a
/// new candidate all are timed again, because only timings in turns can be compared.
fn timings(
    candidates: &[Candidate],
    lengths: &[Lengths],
    (turn, is_together): (f64, bool),
    folder: &Path,
    note: &mut dyn FnMut(&str),
) -> Result<Timings, CompareError> {
    let path = folder.join("timings.json");
    let known: Timings = if path.exists() {
        let text = std::fs::read_to_string(&path).map_err(CompareError::io(&path))?;
        serde_json::from_str(&text).map_err(|error| CompareError::Record {
            path: path.clone(),
            message: error.to_string(),
        })?
    } else {
        Timings::new()
    };
    let hashes: Vec<String> = candidates.iter().map(Candidate::hash).collect();
    if hashes.iter().all(|hash| known.contains_key(hash)) {
        return Ok(known);
    }
    note("timing the steps of each candidate, in turns; what they compute is thrown away");
    let measured = if is_together {
        in_turns(candidates, lengths, turn)?
    } else {
        let each = candidates.iter().zip(lengths);
        let alone = each.map(|(candidate, own)| {
            in_turns(
                std::slice::from_ref(candidate),
                std::slice::from_ref(own),
                turn,
            )
        });
        alone.collect::<Result<Vec<_>, _>>()?.concat()
    };
    let new = hashes.into_iter().zip(candidates).zip(measured);
    let new = new.map(|((hash, candidate), seconds_per_step)| {
        let name = candidate.name.clone();
        let timing = Timing {
            name,
            seconds_per_step,
        };
        (hash, timing)
    });
    let timings: Timings = new.collect();
    let text = serde_json::to_string_pretty(&timings).map_err(std::io::Error::from);
    let text = text.map_err(CompareError::io(&path))?;
    durable::replace_with(&path, format!("{text}\n")).map_err(CompareError::io(&path))?;
    Ok(timings)
}

/// Seconds of a step of each phase of each candidate.
fn in_turns(
    candidates: &[Candidate],
    lengths: &[Lengths],
    turn: f64,
) -> Result<Vec<Vec<f64>>, CompareError> {
    let phases = lengths.iter().map(|own| own.own().phase_steps.len());
    let most = phases.max().unwrap_or(0);
    let mut seconds = vec![Vec::new(); candidates.len()];
    for phase in 0..most {
        let mut timers: Vec<(usize, StepTimer, Vec<f64>)> = Vec::new();
        for (number, (candidate, own)) in candidates.iter().zip(lengths).enumerate() {
            if phase >= own.own().phase_steps.len() {
                continue;
            }
            let train = |source| CompareError::train(&candidate.name)(source);
            let mut timer = own.timer(phase).map_err(train)?;
            // The first step allocates its memory.
            timer.step().map_err(train)?;
            timers.push((number, timer, Vec::new()));
        }
        for _ in 0..TURNS {
            for (number, timer, found) in &mut timers {
                let (mut spent, mut steps) = (0.0, 0.0);
                while spent < turn || steps == 0.0 {
                    let step = timer.step();
                    spent += step.map_err(CompareError::train(&candidates[*number].name))?;
                    steps += 1.0;
                }
                found.push(spent / steps);
            }
        }
        for (number, _, found) in timers {
            // The mean and not the median: the runs will meet what slows some turns, too.
            seconds[number].push(found.iter().sum::<f64>() / found.len() as f64);
        }
    }
    Ok(seconds)
}
