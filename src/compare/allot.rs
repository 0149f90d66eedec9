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

/// Seconds for which each candidate is timed: a twentieth of the budget, within bounds.
fn timed_seconds(budget: Budget) -> f64 {
    (budget.amount.unwrap_or(0.0) / 20.0).clamp(2.5, 15.0)
}

/// Seconds of a turn in this. It is short, so that whatever slows the machine for a moment reaches
/// all candidates.
const TURN_SECONDS: f64 = 0.02;

/// Turns at least.
const LEAST_TURNS: usize = 5;

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
    for (candidate, lengths) in candidates.iter().zip(lengths) {
        if let Some(caveat) = lengths.caveat() {
            note(&format!(
                "warning: {} under a budget: {caveat}",
                candidate.name
            ));
        }
    }
    let timings = match budget.kind {
        BudgetKind::Wall => {
            let timed = (timed_seconds(budget), is_together);
            timings(candidates, lengths, timed, folder, note)?
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

/// Returns the timings of all candidates. Timings from an earlier start of this comparison are used
/// again if they cover every candidate. Otherwise all candidates are timed anew, because only
/// timings that were taken in turns can be compared.
fn timings(
    candidates: &[Candidate],
    lengths: &[Lengths],
    (timed, is_together): (f64, bool),
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
        in_turns(candidates, lengths, timed)?
    } else {
        let each = candidates.iter().zip(lengths);
        let alone = each.map(|(candidate, own)| {
            in_turns(
                std::slice::from_ref(candidate),
                std::slice::from_ref(own),
                timed,
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
    timed: f64,
) -> Result<Vec<Vec<f64>>, CompareError> {
    let phases = lengths.iter().map(|own| own.own().phase_steps.len());
    let most = phases.max().unwrap_or(0);
    let mut seconds = vec![Vec::new(); candidates.len()];
    for phase in 0..most {
        let mut timers: Vec<(usize, StepTimer)> = Vec::new();
        for (number, (candidate, own)) in candidates.iter().zip(lengths).enumerate() {
            if phase >= own.own().phase_steps.len() {
                continue;
            }
            let train = |source| CompareError::train(&candidate.name)(source);
            let mut timer = own.timer(phase).map_err(train)?;
            // The first step allocates its memory.
            timer.step().map_err(train)?;
            timers.push((number, timer));
        }
        let (mut rounds, mut sum) = (Vec::new(), 0.0);
        while rounds.len() < LEAST_TURNS || sum < timed * timers.len() as f64 {
            let mut round = Vec::new();
            for (number, timer) in &mut timers {
                let (mut spent, mut steps) = (0.0, 0.0);
                while spent < TURN_SECONDS || steps == 0.0 {
                    let step = timer.step();
                    spent += step.map_err(CompareError::train(&candidates[*number].name))?;
                    steps += 1.0;
                }
                sum += spent;
                round.push(spent / steps);
            }
            rounds.push(round);
        }
        for ((number, _), found) in timers.iter().zip(paired(&rounds)) {
            seconds[*number].push(found);
        }
    }
    Ok(seconds)
}

/// Seconds of a step of each candidate, from rounds in which each was timed once. The share of a
/// candidate in its round is the median over the rounds, so that a disturbance that hits one turn
/// gives no candidate more steps than another. The level is the mean of the rounds: the runs will
/// meet disturbances, too.
fn paired(rounds: &[Vec<f64>]) -> Vec<f64> {
    let sums: Vec<f64> = rounds.iter().map(|round| round.iter().sum()).collect();
    let level = sums.iter().sum::<f64>() / sums.len() as f64;
    let candidates = rounds.first().map_or(0, Vec::len);
    let share = |candidate: usize| {
        let each = rounds
            .iter()
            .zip(&sums)
            .map(|(round, sum)| round[candidate] / sum);
        let mut shares: Vec<f64> = each.collect();
        shares.sort_by(f64::total_cmp);
        shares[shares.len() / 2]
    };
    let shares: Vec<f64> = (0..candidates).map(share).collect();
    // Medians of shares need not add up to one.
    let all: f64 = shares.iter().sum();
    shares.iter().map(|share| level * share / all).collect()
}

#[cfg(test)]
mod tests {
    use super::paired;

    #[test]
    fn p3_a_disturbance_of_one_turn_reaches_all_candidates_alike() {
        let quiet = vec![vec![0.01, 0.03]; 9];
        let near = |found: Vec<f64>, expected: [f64; 2]| {
            assert_eq!(found.len(), 2);
            let mut pairs = found.iter().zip(expected);
            assert!(pairs.all(|(a, b)| (a / b - 1.0).abs() < 1e-9), "{found:?}");
        };
        near(paired(&quiet), [0.01, 0.03]);
        // One turn of the first takes ten times as long.
        let mut disturbed = quiet.clone();
        disturbed.push(vec![0.1, 0.03]);
        let mean = (9.0 * 0.04 + 0.13) / 10.0;
        near(paired(&disturbed), [mean / 4.0, 3.0 * mean / 4.0]);
        // The machine is twice as slow half of the time, for both.
        let slow = vec![vec![0.02, 0.06]; 9];
        near(paired(&[quiet, slow].concat()), [0.015, 0.045]);
    }
}
