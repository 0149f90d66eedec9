//! `runner estimate`: what a run will need, before it starts.

use std::path::PathBuf;

use clap::Args;

use super::CliError;
use crate::config;
use crate::train::Run;

/// Arguments of `runner estimate`.
#[derive(Debug, Args)]
pub(super) struct EstimateArgs {
    /// The experiment
    config: PathBuf,
    /// Override a key: `--set train.micro_batch_size=4`; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Run folder, instead of the config's `output_dir`
    #[arg(long, value_name = "DIR")]
    output_dir: Option<String>,
    /// Also build the model and take a step, to see how long it takes
    #[arg(long)]
    time: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &EstimateArgs) -> Result<(), CliError> {
    let sets = super::with_output_dir(&args.sets, args.output_dir.as_deref());
    let plan = config::load(&args.config, &sets)?;
    let estimate = Run::estimate(&plan, args.time, |note| {
        if !args.json {
            super::remark(note);
        }
    })?;
    super::print_line(&if args.json {
        serde_json::json!(estimate).to_string()
    } else {
        estimate.describe(&plan)
    })
}
