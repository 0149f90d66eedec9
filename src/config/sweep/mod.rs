//! A sweep: one experiment, and the keys of it that are varied.
//!
//! A value of the grid is a `--set` argument of the experiment, so it passes through the same
//! checks. Every combination is resolved before anything runs, and an issue points at the value in
//! the sweep's file that caused it.

mod axes;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use axes::{Axis, Setting, combination};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::budget::Budget;
use crate::config::check::check_section;
use crate::config::document::Document;
use crate::config::error::{ConfigError, Issue};
use crate::config::plan::{Plan, read};
use crate::config::schema::{self, Section};
use crate::config::source::{Origin, Sources};

/// A sweep whose every combination can be run.
#[derive(Debug, Clone)]
pub struct Sweep {
    /// The experiment.
    pub base: PathBuf,
    /// The experiment's file as it was read.
    pub base_text: String,
    /// What will run, for each seed. At least one.
    pub combinations: Vec<Combination>,
    /// The seeds; empty for the experiment's own.
    pub seeds: Vec<u64>,
    /// How much each run may use; none for its own length.
    pub budget: Option<Budget>,
    /// When combinations are given up.
    pub early_stop: Option<EarlyStop>,
    /// Where the runs go; none for a folder named after the file.
    pub output_dir: Option<PathBuf>,
}

/// Some values that go together.
#[derive(Debug, Clone)]
pub struct Combination {
    /// The values as `--set` arguments: `optimizer.learning_rate=0.001`.
    pub sets: Vec<String>,
    /// The experiment with these values.
    pub plan: Plan,
}

/// `[early_stop]`: combinations with a higher validation loss than others are given up.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EarlyStop {
    /// Shares of the run at which combinations are ranked, ascending.
    #[schemars(length(min = 1, max = 16), inner(range(min = 0.01, max = 0.99)))]
    pub at: Vec<f64>,
    /// The share of the combinations that goes on each time, rounded up.
    #[schemars(range(min = 0.01, max = 0.99))]
    pub keep: f64,
}

/// The keys of a sweep's file.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SweepFile {
    /// The experiment that is varied: a path, relative to the working directory.
    base: PathBuf,
    /// Seeds. Every combination is run once with each.
    #[serde(default)]
    #[schemars(length(min = 1, max = 1000), inner(range(min = 0)))]
    seeds: Option<Vec<i64>>,
    /// How much each run may use: "wall:300s", "tokens:2M", "steps:500", "backward:500",
    /// "flops:1e15".
    #[serde(default)]
    budget: Option<String>,
    /// Where the runs go, instead of a folder in outputs/ named after the file.
    #[serde(default)]
    output_dir: Option<PathBuf>,
    /// Gives up combinations by their rank.
    #[serde(default)]
    early_stop: Option<EarlyStop>,
    /// Keys of the experiment with lists of values. All combinations are run.
    #[serde(default, rename = "grid")]
    #[schemars(with = "BTreeMap<String, String>")]
    #[expect(
        dead_code,
        reason = "the values are read with their places; this documents the key"
    )]
    grid: Option<toml::Table>,
    /// Values that go together.
    #[serde(default, rename = "pairs")]
    #[schemars(with = "Vec<BTreeMap<String, String>>")]
    #[expect(
        dead_code,
        reason = "the values are read with their places; this documents the key"
    )]
    pairs: Option<Vec<toml::Table>>,
}

fn root() -> &'static Section {
    static ROOT: LazyLock<Section> =
        LazyLock::new(|| schema::section_of(&schemars::schema_for!(SweepFile).to_value()));
    &ROOT
}

/// A sweep that cannot be run: everything that is wrong with its file, then with its experiment.
#[derive(Debug, thiserror::Error)]
#[error("{}", lines(.0))]
pub struct SweepError(pub Vec<ConfigError>);

fn lines(errors: &[ConfigError]) -> String {
    let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

/// Most combinations of a sweep.
const MOST_COMBINATIONS: usize = 4096;

/// Reads a sweep's file and resolves every combination. `sets` are `--set` arguments for the
/// experiment; the values of the grid come after them.
///
/// # Errors
/// Everything that is wrong with the file, the values and the experiment.
pub fn load_sweep(path: &Path, sets: &[String]) -> Result<Sweep, SweepError> {
    let text = read(path).map_err(|error| SweepError(vec![error]))?;
    let sources = Sources {
        path: path.to_path_buf(),
        text,
        sets: Vec::new(),
    };
    let mut reader = Reader::default();
    let parsed = Document::parse(sources);
    let sources = parsed.document.sources.clone();
    reader.issues = parsed.issues;
    let (file, axes) = reader.file(parsed.document, parsed.is_partial);
    let sweep = match file {
        Some(file) => reader.resolve(file, &axes, sets),
        None => None,
    };
    let mut errors = Vec::new();
    if !reader.issues.is_empty() {
        let mut issues = reader.issues;
        issues.sort_by_key(|issue| issue.origin.as_ref().map(Origin::rank));
        errors.push(ConfigError::Invalid { sources, issues });
    }
    errors.extend(reader.base_error);
    match sweep {
        Some(sweep) if errors.is_empty() => Ok(sweep),
        _ => Err(SweepError(errors)),
    }
}

/// Where keys that are checked by hand are written.
struct Places {
    budget: Option<Origin>,
    seeds: Option<Origin>,
    early_stop: Option<Origin>,
}

#[derive(Default)]
struct Reader {
    issues: Vec<Issue>,
    /// What is wrong with the experiment by itself.
    base_error: Option<ConfigError>,
    /// Where `base` is written.
    base_origin: Option<Origin>,
}

impl Reader {
    fn report(&mut self, at: &Origin, message: String, help: Option<&str>) {
        let issue = Issue {
            message,
            origin: Some(at.clone()),
            help: help.map(str::to_string),
        };
        if !self.issues.contains(&issue) {
            self.issues.push(issue);
        }
    }

    /// Checks the file's keys. None if it cannot be said what was meant.
    fn file(
        &mut self,
        mut document: Document,
        is_partial: bool,
    ) -> (Option<(SweepFile, Option<Budget>)>, Vec<Axis>) {
        let varied = |key: &str| key == "grid" || key == "pairs";
        let (values, rest) = std::mem::take(&mut document.root.entries)
            .into_iter()
            .partition(|entry| varied(&entry.key));
        document.root.entries = rest;
        let axes = self.axes(&values);
        let origin = |path: &str| document.origin(path);
        self.base_origin = origin("base");
        let places = Places {
            budget: origin("budget"),
            seeds: origin("seeds"),
            early_stop: origin("early_stop.at"),
        };
        let checked = check_section(document, root());
        self.issues.extend(checked.issues);
        if is_partial {
            return (None, axes);
        }
        let Ok(file) = SweepFile::deserialize(checked.document.to_toml()) else {
            // What is missing or wrong has been reported.
            return (None, axes);
        };
        if values.is_empty() {
            let message = "a sweep without [grid] and [[pairs]]: nothing is varied".to_string();
            let help = "[grid] with optimizer.learning_rate = [1e-3, 3e-3], for instance";
            self.report(&Origin::File(0..0), message, Some(help));
        }
        let budget = self.budget(&file, places.budget);
        self.lists(&file, places.seeds, places.early_stop);
        self.keys(&axes, budget.is_some());
        (Some((file, budget)), axes)
    }

    /// The budget of the file.
    fn budget(&mut self, file: &SweepFile, at: Option<Origin>) -> Option<Budget> {
        match (&file.budget, at) {
            (Some(text), Some(at)) => match text.parse::<Budget>() {
                Ok(budget) => Some(budget),
                Err(message) => {
                    self.report(&at, message, None);
                    None
                }
            },
            _ => None,
        }
    }

    /// Checks lists whose elements depend on each other.
    fn lists(&mut self, file: &SweepFile, seeds_at: Option<Origin>, early_stop_at: Option<Origin>) {
        if let (Some(seeds), Some(at)) = (&file.seeds, seeds_at) {
            let different: BTreeSet<&i64> = seeds.iter().collect();
            if different.len() < seeds.len() {
                self.report(&at, "a seed is in `seeds` twice".to_string(), None);
            }
        }
        if let (Some(early), Some(at)) = (&file.early_stop, early_stop_at)
            && !early.at.is_sorted_by(|a, b| a < b)
        {
            self.report(&at, "`at` in [early_stop] must ascend".to_string(), None);
        }
    }

    fn resolve(
        &mut self,
        (file, budget): (SweepFile, Option<Budget>),
        axes: &[Axis],
        sets: &[String],
    ) -> Option<Sweep> {
        let base_text = match read(&file.base) {
            Ok(text) => text,
            Err(error) => {
                let at = self.base_origin.clone().unwrap_or(Origin::File(0..0));
                self.report(&at, error.to_string(), None);
                return None;
            }
        };
        let count = axes
            .iter()
            .try_fold(1usize, |count, axis| count.checked_mul(axis.len()))?;
        if count > MOST_COMBINATIONS {
            return None;
        }
        let sources = |settings: &[Setting]| {
            let own = settings
                .iter()
                .map(|setting| format!("{}={}", setting.key, setting.value));
            Sources {
                path: file.base.clone(),
                text: base_text.clone(),
                sets: sets.iter().cloned().chain(own).collect(),
            }
        };
        let mut combinations = Vec::new();
        for number in 0..count {
            let settings = combination(axes, number);
            let sources = sources(&settings);
            let own = sources.sets[sets.len()..].to_vec();
            match Plan::from_sources(sources) {
                Ok(plan) => combinations.push(Combination { sets: own, plan }),
                Err(error) => self.combination_error(error, (&settings, sets.len()), || {
                    Plan::from_sources(Sources {
                        path: file.base.clone(),
                        text: base_text.clone(),
                        sets: sets.to_vec(),
                    })
                }),
            }
        }
        Some(Sweep {
            base: file.base,
            base_text,
            combinations,
            seeds: file
                .seeds
                .unwrap_or_default()
                .iter()
                .map(|&seed| seed as u64)
                .collect(),
            budget,
            early_stop: file.early_stop,
            output_dir: file.output_dir,
        })
    }

    /// Reports what is wrong with a combination at the values that caused it.
    fn combination_error(
        &mut self,
        error: ConfigError,
        (settings, before): (&[Setting], usize),
        base: impl Fn() -> Result<Plan, ConfigError>,
    ) {
        let ConfigError::Invalid { sources, issues } = error else {
            self.base_error.get_or_insert(error);
            return;
        };
        for issue in issues {
            let own = match &issue.origin {
                Some(Origin::Set { index, .. }) => index.checked_sub(before),
                _ => None,
            };
            if let Some(setting) = own.and_then(|index| settings.get(index)) {
                self.report(&setting.origin, issue.message, issue.help.as_deref());
                continue;
            }
            if self.base_error.is_none() {
                self.base_error = base().err();
            }
            let of_base = self
                .base_error
                .as_ref()
                .map_or(&[][..], ConfigError::issues);
            if of_base.iter().any(|other| other.message == issue.message) {
                continue;
            }
            // The values contradict a line of the experiment.
            let place = issue.origin.as_ref().map(|origin| {
                let at = sources.locate(origin);
                format!(" ({}:{})", at.name, at.line)
            });
            let values: Vec<String> = settings
                .iter()
                .map(|setting| format!("{} = {}", setting.key, setting.value))
                .collect();
            let message = format!(
                "with {}: {}{}",
                values.join(", "),
                issue.message,
                place.unwrap_or_default()
            );
            if let Some(first) = settings.first() {
                self.report(&first.origin, message, issue.help.as_deref());
            }
        }
    }
}
