//! `runner sweep`: the best values of some keys.

use std::path::PathBuf;

use clap::Args;

use super::CliError;
use super::compare::{SharedArgs, run_and_print};
use crate::compare::{Candidate, Settings};
use crate::config::{Combination, Plan, load_sweep};

/// Arguments of `runner sweep`.
#[derive(Debug, Args)]
pub(super) struct SweepArgs {
    /// A TOML with `base`, [grid], [[pairs]], seeds, budget and [early_stop]
    grid: PathBuf,
    /// Measure the time to this validation loss
    #[arg(long, value_name = "LOSS")]
    target_loss: Option<f64>,
    #[command(flatten)]
    shared: SharedArgs,
}

pub(super) fn run(args: &SweepArgs) -> Result<(), CliError> {
    let sweep = load_sweep(&args.grid, &args.shared.sets)?;
    let candidates = sweep.combinations.iter().map(|combination| {
        let own = combination.sets.iter();
        Candidate {
            name: name(combination),
            config: sweep.base.clone(),
            text: sweep.base_text.clone(),
            sets: args.shared.sets.iter().chain(own).cloned().collect(),
            plan: combination.plan.clone(),
        }
    });
    let candidates: Vec<Candidate> = candidates.collect();
    let own_seed = candidates.first().map(|first| first.plan.config.seed);
    let seeds = match sweep.seeds.is_empty() {
        true => own_seed.into_iter().collect(),
        false => sweep.seeds.clone(),
    };
    let stem = args.grid.file_stem().unwrap_or_default();
    let folder = PathBuf::from("outputs").join(stem);
    let folder = args
        .shared
        .out
        .clone()
        .or(sweep.output_dir.clone())
        .unwrap_or(folder);
    let plan = candidates.first().map(|first| first.plan.clone());
    let settings = Settings {
        budget: sweep.budget,
        target_loss: args.target_loss,
        early_stop: sweep.early_stop.clone(),
        has_baseline: false,
        slice: args.shared.slice,
        ..Settings::new(candidates, seeds, folder)
    };
    let length = |steps: u64| length(plan.as_ref(), steps);
    let length = settings
        .budget
        .map(|_| &length as &dyn Fn(u64) -> Result<String, String>);
    run_and_print(&settings, &args.shared, length)
}

/// The `--set` argument that gives the base the length of the sweep's runs.
fn length(plan: Option<&Plan>, steps: u64) -> Result<String, String> {
    let train = plan.map(|plan| &plan.config.train);
    match train.is_some_and(|train| train.num_epochs.is_some() || train.max_tokens.is_some()) {
        false => Ok(format!("train.max_steps={steps}")),
        true => Err(format!(
            "with max_steps = {steps} in [train] instead of its own length: the runs had so many steps"
        )),
    }
}

/// "learning_rate=0.001,name=lion": the values, with the keys as short as they are clear.
fn name(combination: &Combination) -> String {
    let short = |key: &str| key.rsplit('.').next().unwrap_or(key).to_string();
    let pairs: Vec<(&str, &str)> = combination
        .sets
        .iter()
        .map(|set| set.split_once('=').unwrap_or((set, "")))
        .collect();
    let name = |key: &str| {
        let same = pairs.iter().filter(|(other, _)| short(other) == short(key));
        if same.count() == 1 {
            short(key)
        } else {
            key.to_string()
        }
    };
    let values = pairs
        .iter()
        .map(|(key, value)| format!("{}={}", name(key), value.trim_matches('"')));
    values.collect::<Vec<_>>().join(",")
}
