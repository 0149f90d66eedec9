//! The command line: one file per verb. `main.rs` only calls [`run`].

mod chat;
mod ckpt;
mod compare;
mod delta;
mod env;
mod error;
mod estimate;
mod eval;
mod export;
mod generate;
mod init;
mod inspect;
mod logits;
mod merge;
mod model;
mod output;
pub mod report;
mod sampling;
mod schema;
mod sweep;
mod train;
mod validate;

use std::process::ExitCode;

use burn::tensor::Device;
use clap::{Args, Parser, Subcommand};

use crate::collective::{self, LaunchError};
use crate::config::Backend;
use crate::device::{self, ComputeDevice};

pub use error::CliError;

/// Train language models from TOML files.
#[derive(Debug, Parser)]
#[command(name = "runner", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train what a TOML file describes
    Train(train::TrainArgs),
    /// Check a TOML and say everything that is wrong with it
    Validate(validate::ValidateArgs),
    /// Say what a run will need: parameters, arithmetic, memory, time
    Estimate(estimate::EstimateArgs),
    /// Show what the model will see of the data, and which of it is trained
    Inspect(inspect::InspectArgs),
    /// Complete a prompt with a trained model
    Generate(generate::GenerateArgs),
    /// Talk with a trained model
    Chat(chat::ChatArgs),
    /// Train several experiments in turns, and say which is better and how sure that is
    Compare(compare::CompareArgs),
    /// Train all combinations of some values, and find the best
    Sweep(sweep::SweepArgs),
    /// Measure a model on a text
    Eval(eval::EvalArgs),
    /// Write a model's logits for some tokens to a file
    Logits(logits::LogitsArgs),
    /// Make one model of a base model and an adapter
    Merge(merge::MergeArgs),
    /// Write a trained model in another form
    Export(export::ExportArgs),
    /// List, verify, restore and tidy the checkpoints of a run
    Ckpt(ckpt::CkptArgs),
    /// Keep a model as the difference from another, and make it again
    Delta(delta::DeltaArgs),
    /// Write a commented TOML to start from
    Init(init::InitArgs),
    /// Print the JSON Schema of the TOML
    Schema(schema::SchemaArgs),
    /// Print what this build runs on
    Env(env::EnvArgs),
}

/// Parses the command line, runs the verb, reports its error, returns its exit code.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // `--help` and `--version` arrive here too; clap prints each where it belongs.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    if let (Some(ranks @ 2..), false) = (collective::started_ranks(), is_train(&cli.verb)) {
        let error = CliError::from(LaunchError::OneProcess { ranks });
        error.print();
        return ExitCode::from(error.exit_code());
    }
    let result = match cli.verb {
        Verb::Train(args) => train::run(&args),
        Verb::Compare(args) => compare::run(&args),
        Verb::Sweep(args) => sweep::run(&args),
        Verb::Validate(args) => validate::run(&args),
        Verb::Estimate(args) => estimate::run(&args),
        Verb::Inspect(args) => inspect::run(&args),
        Verb::Generate(args) => generate::run(&args),
        Verb::Chat(args) => chat::run(&args),
        Verb::Eval(args) => eval::run(&args),
        Verb::Logits(args) => logits::run(&args),
        Verb::Merge(args) => merge::run(&args),
        Verb::Export(args) => export::run(&args),
        Verb::Ckpt(args) => ckpt::run(&args),
        Verb::Delta(args) => delta::run(&args),
        Verb::Init(args) => init::run(&args),
        Verb::Schema(args) => schema::run(&args),
        Verb::Env(args) => env::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.print();
            ExitCode::from(error.exit_code())
        }
    }
}

/// Whether a verb shares its work among ranks.
fn is_train(verb: &Verb) -> bool {
    matches!(verb, Verb::Train(args) if !args.is_dry())
}

/// Says something on standard error, to whoever still listens.
fn remark(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// The `--set` arguments, with `--output-dir` as one more.
fn with_output_dir(sets: &[String], output_dir: Option<&str>) -> Vec<String> {
    let folder = output_dir.map(|folder| format!("output_dir={}", toml::Value::from(folder)));
    sets.iter().cloned().chain(folder).collect()
}

/// Where a verb that runs a model computes.
#[derive(Debug, Args)]
struct DeviceArgs {
    /// Where to compute
    #[arg(long, default_value = "auto", value_name = "auto|cpu|cuda|wgpu")]
    device: Backend,
}

impl DeviceArgs {
    /// Opens the device. Where `auto` had a choice, says what it is.
    fn open(&self) -> Result<Device, CliError> {
        let device = ComputeDevice::open(self.device)?;
        if self.device == Backend::Auto && device::compiled_in().len() > 1 {
            remark(&format!("device {}", device.describe()));
        }
        Ok(device.device)
    }
}

/// Prints a line to standard output. A closed pipe (`| head`) is an error like any other: the
/// program ends instead of going on unheard.
fn print_line(text: &str) -> Result<(), CliError> {
    use std::io::Write;
    writeln!(std::io::stdout().lock(), "{text}").map_err(CliError::io("standard output"))
}
