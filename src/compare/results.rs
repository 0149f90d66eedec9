//! What came of a comparison, read from its run folders.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Candidate, Costs, Mean, Ratio, Reach, mean, ratio, reach};
use crate::train::{Course, CoursePoint, CourseState};

/// What came of a comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// How much each run was given, as `--budget` has it; none for its own length.
    pub budget: Option<String>,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// The loss that was to be reached; none for the first file's final loss with the same seed.
    pub target_loss: Option<f64>,
    /// The unit of the losses.
    pub loss_unit: String,
    /// The keys whose values differ.
    pub keys: Vec<String>,
    /// The candidates, the best first.
    pub candidates: Vec<CandidateResult>,
    /// Whether all runs of a seed took turns; otherwise they ran one after another.
    pub took_turns: bool,
}

/// What came of a candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CandidateResult {
    /// Its name.
    pub name: String,
    /// Its place among the files, or its combination's number, from 0.
    pub number: usize,
    /// Its file.
    pub config: PathBuf,
    /// The `--set` arguments that make it of its file.
    pub sets: Vec<String>,
    /// The values of the keys that differ.
    pub values: BTreeMap<String, String>,
    /// Steps that each run was given.
    pub steps: u64,
    /// Its runs, by seed.
    pub runs: Vec<RunResult>,
    /// The final validation loss of the runs that came to their end.
    pub val_loss: Option<Mean>,
    /// Their best validation loss.
    pub best_val_loss: Option<Mean>,
    /// Their mean costs.
    pub costs: Option<Costs>,
    /// The ratios to the first candidate, paired by seed; none for the first itself, and in a sweep.
    pub versus_first: Option<Versus>,
    /// The share of the run at which it was given up by its rank.
    pub given_up_at: Option<f64>,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// Its seed.
    pub seed: u64,
    /// Its folder.
    pub folder: PathBuf,
    /// How it ended.
    pub state: RunState,
    /// Why, where it ended before its last step.
    pub reason: Option<String>,
    /// Its last validation loss.
    pub val_loss: Option<f64>,
    /// Its best validation loss.
    pub best_val_loss: Option<f64>,
    /// What it used.
    pub costs: Costs,
    /// The loss that was to be reached.
    pub target: Option<f64>,
    /// Where it was reached.
    pub reach: Option<Reach>,
    /// Its validation curve.
    pub curve: Vec<CurvePoint>,
}

/// How a run of a comparison ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// With its last step.
    Finished,
    /// Validation stopped improving.
    StoppedEarly,
    /// At the end of its budget, before its last step.
    Cut,
    /// Its loss was not finite too often.
    Diverged,
    /// Not yet: it was given up, or the comparison was stopped.
    Unfinished,
}

impl RunState {
    /// Whether its last validation loss is a result.
    pub fn is_complete(self) -> bool {
        matches!(self, Self::Finished | Self::StoppedEarly | Self::Cut)
    }
}

/// A point of a validation curve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// What had been used.
    #[serde(flatten)]
    pub costs: Costs,
    /// The validation loss.
    pub val_loss: f64,
}

/// Ratios to the first candidate, paired by seed. A ratio above one is to the advantage of this
/// candidate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Versus {
    /// The first candidate's final validation loss over this one's.
    pub val_loss: Option<Ratio>,
    /// The first candidate's seconds to the target over this one's.
    pub seconds: Option<Ratio>,
    /// The same of steps.
    pub steps: Option<Ratio>,
    /// The same of tokens.
    pub tokens: Option<Ratio>,
    /// Seeds with which one of the two did not reach the target, or reached it before its first
    /// evaluation. They are in no ratio of times.
    pub without_time: usize,
}

impl RunResult {
    /// What has come of a run so far. Evaluations before `comparable_from` are left out.
    pub(super) fn new(
        (seed, folder): (u64, PathBuf),
        course: Option<&Course>,
        comparable_from: u64,
    ) -> Self {
        let points: Vec<CoursePoint> = course
            .iter()
            .flat_map(|course| &course.evaluations)
            .filter(|point| point.step >= comparable_from)
            .copied()
            .collect();
        let (state, reason) = match course.map(|course| &course.state) {
            None | Some(CourseState::Begun) => (RunState::Unfinished, None),
            Some(CourseState::Finished) => (RunState::Finished, None),
            Some(CourseState::StoppedEarly) => {
                let reason = "validation stopped improving".to_string();
                (RunState::StoppedEarly, Some(reason))
            }
            Some(CourseState::Cut(reason)) => (RunState::Cut, Some(reason.clone())),
            Some(CourseState::Diverged) => (RunState::Diverged, None),
        };
        let last = course.map(|course| course.last).unwrap_or_default();
        let losses = points.iter().filter_map(|point| point.val_loss);
        let curve = points.iter().filter_map(|point| {
            Some(CurvePoint {
                costs: point.into(),
                val_loss: point.val_loss?,
            })
        });
        Self {
            seed,
            folder,
            state,
            reason,
            val_loss: points.last().and_then(|point| point.val_loss),
            best_val_loss: losses.reduce(f64::min),
            costs: (&last).into(),
            target: None,
            reach: None,
            curve: curve.collect(),
        }
    }

    /// Looks for a target in the course.
    pub(super) fn aim(&mut self, target: f64, course: Option<&Course>, comparable_from: u64) {
        let points = course.iter().flat_map(|course| &course.evaluations);
        let points = points.filter(|point| point.step >= comparable_from);
        let points: Vec<CoursePoint> = points.copied().collect();
        self.target = Some(target);
        self.reach = Some(reach(&points, target));
    }

    /// The final validation loss; none for a run that did not come to its end.
    pub fn final_val_loss(&self) -> Option<f64> {
        self.val_loss.filter(|_| self.state.is_complete())
    }
}

impl CandidateResult {
    pub(super) fn new(
        (candidate, number): (&Candidate, usize),
        values: BTreeMap<String, String>,
        steps: u64,
        runs: Vec<RunResult>,
    ) -> Self {
        let complete = || runs.iter().filter(|run| run.state.is_complete());
        let losses: Vec<f64> = complete().filter_map(RunResult::final_val_loss).collect();
        let best: Vec<f64> = complete().filter_map(|run| run.best_val_loss).collect();
        let costs: Vec<Costs> = complete().map(|run| run.costs).collect();
        Self {
            name: candidate.name.clone(),
            number,
            config: candidate.config.clone(),
            sets: candidate.sets.clone(),
            values,
            steps,
            val_loss: mean(&losses),
            best_val_loss: mean(&best),
            costs: Costs::mean(&costs),
            versus_first: None,
            given_up_at: None,
            runs,
        }
    }

    /// Compares with the first candidate, seed by seed.
    pub(super) fn compare_with(&mut self, first: &Self) {
        let pairs = || first.runs.iter().zip(&self.runs);
        let losses: Vec<(f64, f64)> = pairs()
            .filter_map(|(a, b)| Some((a.final_val_loss()?, b.final_val_loss()?)))
            .collect();
        let exact = |run: &RunResult| run.reach.and_then(|reach| reach.exact());
        let times: Vec<(Costs, Costs)> = pairs()
            .filter_map(|(a, b)| Some((exact(a)?, exact(b)?)))
            .collect();
        let of = |pick: fn(&Costs) -> f64| {
            let pairs: Vec<(f64, f64)> = times.iter().map(|(a, b)| (pick(a), pick(b))).collect();
            ratio(&pairs)
        };
        self.versus_first = Some(Versus {
            val_loss: ratio(&losses),
            seconds: of(|costs| costs.seconds),
            steps: of(|costs| costs.steps),
            tokens: of(|costs| costs.tokens),
            without_time: self.runs.len() - times.len(),
        });
    }

    /// Orders results: candidates with all runs first, then those with some, then those that were
    /// given up, the latest first, then those without a result; by loss within each.
    pub(super) fn rank(&self) -> (usize, f64, f64) {
        let complete = self
            .runs
            .iter()
            .filter(|run| run.state.is_complete())
            .count();
        let class = match (complete, self.given_up_at) {
            (complete, _) if complete == self.runs.len() => 0,
            (1.., _) => 1,
            (0, Some(_)) if self.last_loss().is_some() => 2,
            (0, _) => 3,
        };
        let loss = self
            .val_loss
            .map(|mean| mean.mean)
            .or_else(|| self.last_loss());
        let later_first = self.given_up_at.map_or(0.0, |share| -share);
        (class, later_first, loss.unwrap_or(f64::INFINITY))
    }

    /// How its runs stand, where not all came to their last step.
    pub fn remark(&self) -> String {
        let count = |state: RunState| self.runs.iter().filter(|run| run.state == state).count();
        let mut parts = Vec::new();
        if let Some(share) = self.given_up_at {
            parts.push(format!("given up at {:.0} %", 100.0 * share));
        }
        let states = [
            (RunState::Diverged, "diverged"),
            (RunState::Cut, "cut at the budget"),
            (RunState::StoppedEarly, "stopped early"),
        ];
        for (state, words) in states {
            match count(state) {
                0 => {}
                all if all == self.runs.len() => parts.push(words.to_string()),
                some => parts.push(format!("{some} of {} {words}", self.runs.len())),
            }
        }
        parts.join(", ")
    }

    /// The mean of the last losses of all its runs, whether or not they came to their end.
    pub fn last_loss(&self) -> Option<f64> {
        let losses: Option<Vec<f64>> = self.runs.iter().map(|run| run.val_loss).collect();
        mean(&losses?).map(|mean| mean.mean)
    }
}

impl Costs {
    fn mean(all: &[Self]) -> Option<Self> {
        let n = all.len() as f64;
        let of = |pick: fn(&Self) -> f64| all.iter().map(pick).sum::<f64>() / n;
        (!all.is_empty()).then(|| Self {
            seconds: of(|costs| costs.seconds),
            steps: of(|costs| costs.steps),
            tokens: of(|costs| costs.tokens),
            backward_passes: of(|costs| costs.backward_passes),
            flops: of(|costs| costs.flops),
        })
    }
}

impl Results {
    /// The best candidate; none if no run came to its end.
    pub fn winner(&self) -> Option<&CandidateResult> {
        self.candidates
            .first()
            .filter(|best| best.val_loss.is_some())
    }
}
