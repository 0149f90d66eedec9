//! `runner compare`: which of several files trains better.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;

use super::CliError;
use super::train::shell_word;
use crate::compare::{Candidate, Notice, Results, Settings, compare};
use crate::config::{self, Budget};
use crate::readable::duration;
use crate::train::Interrupt;

/// Arguments of `runner compare`.
#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// The experiments; the others are held against the first
    #[arg(required = true)]
    configs: Vec<PathBuf>,
    /// A number of seeds, from the first file's own on, or the seeds themselves: 1,2,5
    #[arg(long, default_value = "1", value_name = "N|A,B,…")]
    seeds: Seeds,
    /// What each run may use: wall:300s, tokens:2M, steps:500, backward:500, flops:1e15; without an
    /// amount what the first file needs. Default: each at its own length
    #[arg(long, value_name = "KIND[:AMOUNT]")]
    budget: Option<Budget>,
    /// Measure the time to this validation loss, instead of the first file's final one
    #[arg(long, value_name = "LOSS")]
    target_loss: Option<f64>,
    #[command(flatten)]
    shared: SharedArgs,
}

/// Arguments of `runner compare` and `runner sweep`.
#[derive(Debug, Args)]
pub(super) struct SharedArgs {
    /// Override a key of every experiment; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) sets: Vec<String>,
    /// Where the runs and the results go
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Seconds of training steps until another run has its turn
    #[arg(long, default_value_t = 5.0, value_name = "SECONDS")]
    pub(super) slice: f64,
    /// Report only what needs attention
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Print the results as JSON, and what happens as lines of JSON on standard error
    #[arg(long)]
    pub(super) json: bool,
}

/// `--seeds 3` or `--seeds 1,2,5`.
#[derive(Debug, Clone, PartialEq)]
enum Seeds {
    Count(u64),
    Listed(Vec<u64>),
}

impl std::str::FromStr for Seeds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || format!("`{text}` is neither a number of seeds nor a list such as 1,2,5");
        let numbers: Result<Vec<u64>, _> =
            text.split(',').map(|part| part.trim().parse()).collect();
        let numbers = numbers.map_err(|_| problem())?;
        match numbers.as_slice() {
            _ if text.contains(',') => Ok(Self::Listed(numbers)),
            [count] if (1..=1000).contains(count) => Ok(Self::Count(*count)),
            _ => Err(problem()),
        }
    }
}

pub(super) fn run(args: &CompareArgs) -> Result<(), CliError> {
    let mut candidates = Vec::new();
    for (path, name) in args.configs.iter().zip(names(&args.configs)) {
        candidates.push(Candidate {
            name,
            config: path.clone(),
            text: std::fs::read_to_string(path).unwrap_or_default(),
            sets: args.shared.sets.clone(),
            plan: config::load(path, &args.shared.sets)?,
        });
    }
    let first = candidates.first().map_or(0, |first| first.plan.config.seed);
    let seeds = match &args.seeds {
        Seeds::Count(count) => (0..*count).map(|number| first + number).collect(),
        Seeds::Listed(seeds) => seeds.clone(),
    };
    let names: Vec<&str> = candidates
        .iter()
        .map(|candidate| candidate.name.as_str())
        .collect();
    let folder = format!("outputs/{}", names.join("-vs-"));
    let folder = args.shared.out.clone().unwrap_or_else(|| folder.into());
    let settings = Settings {
        budget: args.budget,
        target_loss: args.target_loss,
        slice: args.shared.slice,
        ..Settings::new(candidates, seeds, folder)
    };
    run_and_print(&settings, &args.shared, None)
}

/// Runs a comparison and prints its results. `length` says how the command of the best gets its
/// length.
pub(super) fn run_and_print(
    settings: &Settings,
    args: &SharedArgs,
    length: Option<&dyn Fn(u64) -> Result<String, String>>,
) -> Result<(), CliError> {
    let interrupt = Interrupt::new();
    interrupt
        .listen()
        .map_err(CliError::io("signal handlers"))?;
    let results = compare(settings, interrupt, &mut |notice| {
        say(settings, args, notice)
    })?;
    if args.json {
        return super::print_line(&serde_json::json!(results).to_string());
    }
    super::print_line(&results.describe())?;
    if let Some(command) = winner(&results, length) {
        super::print_line(&command)?;
    }
    let folder = settings.folder.display();
    super::print_line(&format!(
        "written  {folder}/comparison.html, comparison.csv, comparison.json"
    ))
}

fn say(settings: &Settings, args: &SharedArgs, notice: &Notice) {
    if args.json {
        return super::remark(&serde_json::json!(notice).to_string());
    }
    let name = |number: usize| settings.candidates[number].name.as_str();
    let names = |numbers: &[usize]| {
        let names: Vec<&str> = numbers.iter().map(|&number| name(number)).collect();
        names.join(", ")
    };
    let text = match notice {
        Notice::Note { text } => text.clone(),
        Notice::Turn {
            candidate,
            seed,
            step,
            steps,
            seconds,
        } => format!(
            "{} seed {seed}: step {step}/{steps}, {} of training steps",
            name(*candidate),
            duration(*seconds)
        ),
        Notice::Ended {
            candidate,
            seed,
            step,
            what,
        } => format!("{} seed {seed}: {what} (step {step})", name(*candidate)),
        Notice::Ranked { at, given_up, .. } if given_up.is_empty() => {
            format!("at {:.0} % of the run nothing is given up", 100.0 * at)
        }
        Notice::Ranked { at, given_up, .. } => {
            format!(
                "given up at {:.0} % of the run: {}",
                100.0 * at,
                names(given_up)
            )
        }
    };
    let is_warning = text.starts_with("warning") || matches!(notice, Notice::Ranked { .. });
    if !args.quiet || is_warning {
        super::remark(&text);
    }
}

/// The command that trains the best one alone.
fn winner(
    results: &Results,
    length: Option<&dyn Fn(u64) -> Result<String, String>>,
) -> Option<String> {
    let best = results.winner()?;
    let mut command = format!(
        "best     runner train {}",
        shell_word(&best.config.to_string_lossy())
    );
    for set in &best.sets {
        command.push_str(&format!(" --set {}", shell_word(set)));
    }
    match length.map(|length| length(best.steps)) {
        None => {}
        Some(Ok(set)) => command.push_str(&format!(" --set {}", shell_word(&set))),
        Some(Err(remark)) => command.push_str(&format!("\n         {remark}")),
    }
    Some(command)
}

/// The files' names without what they share, each different.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let stem = |path: &Path| {
        path.file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let names = paths.iter().map(|path| {
        let name = stem(path);
        let count = seen.entry(name.clone()).or_default();
        *count += 1;
        match *count {
            1 => name,
            count => format!("{name}-{count}"),
        }
    });
    names.collect()
}
