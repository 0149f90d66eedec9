//! Runs against each other: [`compare`] trains several plans with several seeds under one budget,
//! and says which is better, by how much, and how sure that is.
//!
//! Read `turns.rs` for how runs take turns, `allot.rs` for what a budget is worth in steps, and
//! `statistics.rs` for the tests. Every run is an ordinary run folder, named after its seed and a
//! hash of its configuration: the same comparison started again goes on where it was.
//!
//! ```
//! use firebrick::compare::{Candidate, Settings, compare};
//! use firebrick::config::{Config, DatasetConfig, Plan, Preset, TokenizerKind};
//!
//! let folder = tempfile::tempdir()?;
//! let text = folder.path().join("text.txt");
//! std::fs::write(&text, "one two three four five six\n".repeat(20))?;
//! let mut candidates = Vec::new();
//! for learning_rate in [1e-3, 1e-2] {
//!     let mut config = Config::default();
//!     config.model.preset = Some(Preset::Stories260K);
//!     config.tokenizer.kind = TokenizerKind::Char;
//!     config.data.sequence_len = 8;
//!     config.data.datasets.push(DatasetConfig::new(text.display().to_string()));
//!     config.train.max_steps = Some(4);
//!     config.eval.eval_steps = 2;
//!     config.optimizer.learning_rate = learning_rate;
//!     candidates.push(Candidate {
//!         name: format!("lr {learning_rate}"),
//!         config: "x.toml".into(),
//!         text: String::new(),
//!         sets: Vec::new(),
//!         plan: Plan::from_config(config)?,
//!     });
//! }
//! let settings = Settings::new(candidates, vec![1, 2], folder.path().join("comparison"));
//! let results = compare(&settings, Default::default(), &mut |_| ())?;
//! assert_eq!(results.keys, ["optimizer.learning_rate"]);
//! assert_eq!(results.winner().unwrap().val_loss.unwrap().n, 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod allot;
mod candidate;
mod error;
mod files;
mod page;
mod results;
mod statistics;
mod table;
mod target;
mod turns;

use std::collections::BTreeSet;
use std::path::PathBuf;

pub use candidate::Candidate;
pub use error::CompareError;
pub use results::{CandidateResult, CurvePoint, Results, RunResult, RunState, Versus};
pub use statistics::{Mean, Ratio, mean, ratio};
pub use target::{Costs, Reach, reach};

use allot::{Allotment, allot};
use candidate::{check, hash_of, varied_keys};
use serde::Serialize;
use turns::{Entry, MOST_AT_ONCE, Turns};

use crate::config::{Budget, EarlyStop, Plan};
use crate::durable;
use crate::readable::bytes;
use crate::train::{Course, CourseState, Interrupt, Lengths, RunFolder};

/// What to compare, and how.
#[derive(Debug, Clone)]
pub struct Settings {
    /// At least two for a comparison with the first; a sweep may have one.
    pub candidates: Vec<Candidate>,
    /// Each candidate is run once with each.
    pub seeds: Vec<u64>,
    /// What each run may use; none for its own length.
    pub budget: Option<Budget>,
    /// The validation loss to be reached. None: the final one of the first candidate, with the
    /// same seed.
    pub target_loss: Option<f64>,
    /// When candidates are given up.
    pub early_stop: Option<EarlyStop>,
    /// Whether the first candidate is the one that the others are held against.
    pub has_baseline: bool,
    /// Where everything goes.
    pub folder: PathBuf,
    /// Seconds of training steps of a turn; 0 for a single step.
    pub slice: f64,
}

impl Settings {
    /// A comparison with the first candidate, each at its own length, in turns of five seconds.
    pub fn new(candidates: Vec<Candidate>, seeds: Vec<u64>, folder: PathBuf) -> Self {
        Self {
            candidates,
            seeds,
            budget: None,
            target_loss: None,
            early_stop: None,
            has_baseline: true,
            folder,
            slice: 5.0,
        }
    }
}

/// What a comparison says while it runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Notice {
    /// Something a person should know.
    Note {
        /// One line of text.
        text: String,
    },
    /// A run has had its turn.
    Turn {
        /// The number of its candidate.
        candidate: usize,
        /// Its seed.
        seed: u64,
        /// Completed steps.
        step: u64,
        /// Steps of the whole run.
        steps: u64,
        /// Seconds of training steps so far.
        seconds: f64,
    },
    /// A run has ended.
    Ended {
        /// The number of its candidate.
        candidate: usize,
        /// Its seed.
        seed: u64,
        /// Completed steps.
        step: u64,
        /// How.
        what: String,
    },
    /// Candidates were ranked.
    Ranked {
        /// The share of the run.
        at: f64,
        /// The numbers of those that go on.
        kept: Vec<usize>,
        /// The numbers of those that were given up.
        given_up: Vec<usize>,
    },
}

/// Runs a comparison, or goes on with one, and writes comparison.json, comparison.csv and
/// comparison.html into its folder.
///
/// # Errors
/// [`CompareError`]. Runs that have begun are saved, and the same call goes on with them. A run
/// that diverges is a result and not an error.
pub fn compare(
    settings: &Settings,
    interrupt: Interrupt,
    notice: &mut dyn FnMut(&Notice),
) -> Result<Results, CompareError> {
    compare_within(settings, None, interrupt, notice)
}

/// The same with so many bytes of memory; none for what there is.
fn compare_within(
    settings: &Settings,
    memory: Option<u64>,
    interrupt: Interrupt,
    notice: &mut dyn FnMut(&Notice),
) -> Result<Results, CompareError> {
    let prepared = Prepared::new(settings, memory, notice)?;
    let mut given_up = vec![None; settings.candidates.len()];
    let mut turns = Turns {
        candidates: &settings.candidates,
        slice: settings.slice,
        limit: prepared.allotment.seconds,
        is_together: prepared.is_together,
        interrupt,
        notice,
    };
    let early = settings.early_stop.iter();
    let rungs: Vec<f64> = early.flat_map(|early| early.at.iter().copied()).collect();
    for &share in &rungs {
        prepared.advance(&mut turns, &given_up, share)?;
        prepared.rank(&mut turns, &mut given_up, share)?;
    }
    prepared.advance(&mut turns, &given_up, 1.0)?;
    let results = prepared.results(&given_up)?;
    files::write(&results, &settings.folder)?;
    Ok(results)
}

/// A comparison whose runs are known.
struct Prepared<'a> {
    settings: &'a Settings,
    lengths: Vec<Lengths>,
    allotment: Allotment,
    is_together: bool,
    /// All runs, by seed and then by candidate.
    entries: Vec<Entry>,
    /// Held while the comparison runs.
    _lock: RunFolder,
}

impl<'a> Prepared<'a> {
    fn new(
        settings: &'a Settings,
        memory: Option<u64>,
        notice: &mut dyn FnMut(&Notice),
    ) -> Result<Self, CompareError> {
        let candidates = &settings.candidates;
        if settings.has_baseline && candidates.len() < 2 {
            return Err(CompareError::TooFew);
        }
        let different: BTreeSet<&u64> = settings.seeds.iter().collect();
        if different.is_empty() || different.len() < settings.seeds.len() {
            return Err(CompareError::Seeds);
        }
        let loaded = candidates.iter().map(|candidate| {
            Lengths::load(&candidate.plan).map_err(CompareError::train(&candidate.name))
        });
        let lengths = loaded.collect::<Result<Vec<_>, _>>()?;
        check(candidates, &lengths, settings.budget.is_some())?;
        let no_evaluations = |candidate: &&Candidate| candidate.plan.config.eval.eval_steps == 0;
        if let (Some(_), Some(candidate)) =
            (&settings.early_stop, candidates.iter().find(no_evaluations))
        {
            let name = candidate.name.clone();
            return Err(CompareError::NoEvaluations { name });
        }
        let folder = &settings.folder;
        durable::create_folder(folder).map_err(CompareError::io(folder))?;
        let lock = RunFolder::open(folder).map_err(CompareError::train("the comparison"))?;
        let mut note = |text: &str| {
            notice(&Notice::Note {
                text: text.to_string(),
            })
        };
        let memory = memory.or_else(|| lengths.first().and_then(Lengths::available_bytes));
        let is_together = fit_together(&lengths, memory, &mut note);
        if is_together && candidates.len() > MOST_AT_ONCE {
            note(&format!(
                "at most {MOST_AT_ONCE} runs of a seed take turns at a time"
            ));
        }
        let budget = (settings.budget, is_together);
        let allotment = allot(candidates, &lengths, budget, folder, &mut note)?;
        let entries = entries(settings, &allotment)?;
        Ok(Self {
            settings,
            lengths,
            allotment,
            is_together,
            entries,
            _lock: lock,
        })
    }

    /// The step of a candidate at a share of its run: one at which it is evaluated.
    fn step_at(&self, candidate: usize, share: f64) -> u64 {
        let steps = self.allotment.steps[candidate];
        let every = self.settings.candidates[candidate]
            .plan
            .config
            .eval
            .eval_steps;
        if share >= 1.0 || every == 0 {
            return steps;
        }
        let step = (share * steps as f64).ceil() as u64;
        (step.div_ceil(every) * every).min(steps)
    }

    /// Takes all runs that have not been given up to a share of their steps.
    fn advance(
        &self,
        turns: &mut Turns,
        given_up: &[Option<f64>],
        share: f64,
    ) -> Result<(), CompareError> {
        for (number, &seed) in self.settings.seeds.iter().enumerate() {
            let alive = |entry: &&Entry| entry.seed == seed && given_up[entry.candidate].is_none();
            let mut group: Vec<(&Entry, u64)> = self
                .entries
                .iter()
                .filter(alive)
                .map(|entry| (entry, self.step_at(entry.candidate, share)))
                .collect();
            // Whoever begins has a machine that is a little colder.
            let first = number % group.len().max(1);
            group.rotate_left(first);
            turns.advance(&group)?;
        }
        Ok(())
    }

    /// Gives up the candidates with the highest validation losses at a share of the run.
    fn rank(
        &self,
        turns: &mut Turns,
        given_up: &mut [Option<f64>],
        share: f64,
    ) -> Result<(), CompareError> {
        let Some(early) = &self.settings.early_stop else {
            return Ok(());
        };
        let mut ranked = Vec::new();
        for candidate in (0..given_up.len()).filter(|&number| given_up[number].is_none()) {
            let step = self.step_at(candidate, share);
            let mut losses = Vec::new();
            for entry in self
                .entries
                .iter()
                .filter(|entry| entry.candidate == candidate)
            {
                let course = self.course(entry)?;
                let diverged = |course: &&Course| course.state == CourseState::Diverged;
                let mut at = course
                    .iter()
                    .filter(|course| !diverged(course))
                    .flat_map(|course| &course.evaluations);
                let last = at.rfind(|point| point.step <= step);
                let loss = last.and_then(|point| point.val_loss);
                losses.push(loss.unwrap_or(f64::INFINITY));
            }
            let mean = losses.iter().sum::<f64>() / losses.len() as f64;
            ranked.push((mean, candidate));
        }
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let keep = (early.keep * ranked.len() as f64).ceil() as usize;
        let numbers = |part: &[(f64, usize)]| part.iter().map(|(_, number)| *number).collect();
        let (kept, rest) = ranked.split_at(keep.max(1).min(ranked.len()));
        for &(_, number) in rest {
            given_up[number] = Some(share);
        }
        (turns.notice)(&Notice::Ranked {
            at: share,
            kept: numbers(kept),
            given_up: numbers(rest),
        });
        Ok(())
    }

    fn course(&self, entry: &Entry) -> Result<Option<Course>, CompareError> {
        let name = &self.settings.candidates[entry.candidate].name;
        Course::read(&entry.folder).map_err(CompareError::train(name))
    }

    fn results(&self, given_up: &[Option<f64>]) -> Result<Results, CompareError> {
        let settings = self.settings;
        let (keys, values) = varied_keys(&settings.candidates, settings.budget.is_some());
        let mut courses = Vec::new();
        for entry in &self.entries {
            courses.push(self.course(entry)?);
        }
        let mut candidates: Vec<CandidateResult> = Vec::new();
        for (number, candidate) in settings.candidates.iter().enumerate() {
            let from = self.lengths[number].comparable_from();
            let own = self.entries.iter().zip(&courses);
            let own = own.filter(|(entry, _)| entry.candidate == number);
            let runs = own.enumerate().map(|(place, (entry, course))| {
                let folder = entry.folder.clone();
                let mut run = RunResult::new((entry.seed, folder), course.as_ref(), from);
                let first = candidates.first();
                let of_first = match first {
                    Some(first) => first.runs[place].final_val_loss(),
                    None => run.final_val_loss(),
                };
                let of_first = of_first.filter(|_| settings.has_baseline);
                if let Some(target) = settings.target_loss.or(of_first) {
                    run.aim(target, course.as_ref(), from);
                }
                run
            });
            let runs: Vec<RunResult> = runs.collect();
            let steps = self.allotment.steps[number];
            let values = values[number].clone();
            let mut result = CandidateResult::new((candidate, number), values, steps, runs);
            result.given_up_at = given_up[number];
            if let Some(first) = candidates.first().filter(|_| settings.has_baseline) {
                result.compare_with(first);
            }
            candidates.push(result);
        }
        candidates.sort_by(|a, b| {
            let (a, b) = (a.rank(), b.rank());
            let losses = a.1.total_cmp(&b.1).then(a.2.total_cmp(&b.2));
            a.0.cmp(&b.0).then(losses)
        });
        Ok(Results {
            budget: settings.budget.map(|budget| budget.to_string()),
            seeds: settings.seeds.clone(),
            target_loss: settings.target_loss,
            loss_unit: self
                .lengths
                .first()
                .map_or_else(String::new, Lengths::loss_unit),
            keys,
            candidates,
            took_turns: self.is_together,
        })
    }
}

/// Whether all runs of a seed fit in memory: one trains, the others wait. Says so if not.
fn fit_together(lengths: &[Lengths], available: Option<u64>, note: &mut dyn FnMut(&str)) -> bool {
    let Some(available) = available else {
        return true;
    };
    let waiting: u64 = lengths
        .iter()
        .map(|own| own.forecast().waiting_bytes())
        .sum();
    let needed = lengths.iter().map(|own| {
        let forecast = own.forecast();
        waiting - forecast.waiting_bytes() + forecast.peak_bytes
    });
    let needed = needed.max().unwrap_or(0);
    if needed <= available {
        return true;
    }
    note(&format!(
        "warning: the runs of a seed need {} together and {} is available: they run one after another \
         and not in turns",
        bytes(needed),
        bytes(available)
    ));
    false
}

/// All runs, by seed and then by candidate.
fn entries(settings: &Settings, allotment: &Allotment) -> Result<Vec<Entry>, CompareError> {
    let mut entries = Vec::new();
    // A run that may be cut is another one than a run that may not.
    let limit = allotment
        .seconds
        .map_or(String::new(), |seconds| seconds.to_string());
    for &seed in &settings.seeds {
        for (number, candidate) in settings.candidates.iter().enumerate() {
            let steps = allotment.steps[number];
            let hash = hash_of(&candidate.run(seed, steps, PathBuf::new()), &limit);
            let folder = run_folder(settings, &format!("-seed{seed}-{hash}"), &candidate.name)?;
            let plan = candidate.run(seed, steps, folder.clone());
            // The length may contradict the schedule, which is better known before the first step.
            Plan::from_config(plan.config.clone())
                .map_err(|error| CompareError::length(&candidate.name, steps)(error.into()))?;
            entries.push(Entry {
                candidate: number,
                seed,
                plan,
                steps,
                folder,
            });
        }
    }
    Ok(entries)
}

/// The folder of a run. A run that is there already is found by its seed and hash, whatever its
/// candidate is called by now.
fn run_folder(settings: &Settings, key: &str, name: &str) -> Result<PathBuf, CompareError> {
    let runs = settings.folder.join("runs");
    match std::fs::read_dir(&runs) {
        Ok(entries) => {
            for entry in entries {
                let entry = entry.map_err(CompareError::io(&runs))?;
                if entry.file_name().to_string_lossy().ends_with(key) {
                    return Ok(entry.path());
                }
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(CompareError::io(&runs)(error)),
    }
    Ok(runs.join(format!("{}{key}", file_name(name))))
}

/// A name as a part of a file's name.
fn file_name(name: &str) -> String {
    let safe = |c: char| {
        if c.is_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '_'
        }
    };
    name.chars().map(safe).take(60).collect()
}

#[cfg(test)]
mod tests;
