//! `runner validate`: everything that is wrong with a configuration, or one line that says what it
//! would run. Reads the configuration only; the data may be elsewhere.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::CliError;
use crate::config::{self, ConfigError, Length, Plan};

/// Arguments of `runner validate`.
#[derive(Debug, Args)]
pub struct ValidateArgs {
    /// The experiment
    config: PathBuf,
    /// Override a key: `--set optimizer.learning_rate=3e-4`; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print one object: valid, and the issues with file, line, column, message, help
    #[arg(long)]
    json: bool,
}

/// Checks a configuration.
pub fn run(args: &ValidateArgs) -> Result<(), CliError> {
    match config::load(&args.config, &args.sets) {
        Ok(_) if args.json => super::print_line(&verdict(&[]).to_string()),
        Ok(plan) => {
            super::print_line(&summary(&args.config, &plan))?;
            let workers = plan.phases.first().map_or(1, |phase| phase.workers);
            if let (Some(compression), 1) = (&plan.compression, workers) {
                super::remark(&format!(
                    "warning: with one process, gradient.compression (\"{}\") only costs; it is for ranks \
                     under mpirun, or gradient.logical_workers",
                    compression.method.name()
                ));
            }
            Ok(())
        }
        Err(error) => {
            if args.json {
                super::print_line(&verdict(&issues(&args.config, &error)).to_string())?;
            }
            Err(error.into())
        }
    }
}

fn verdict(issues: &[Value]) -> Value {
    json!({ "valid": issues.is_empty(), "issues": issues })
}

fn issues(path: &Path, error: &ConfigError) -> Vec<Value> {
    let ConfigError::Invalid { sources, issues } = error else {
        return vec![json!({ "file": path, "message": error.to_string() })];
    };
    let entry = |issue: &config::Issue| {
        let mut entry = json!({ "file": path });
        if let Some(origin) = &issue.origin {
            let at = sources.locate(origin);
            // `--set` for an override, whose column then counts in the argument.
            entry["file"] = json!(at.name);
            entry["line"] = json!(at.line);
            entry["column"] = json!(at.column);
        }
        entry["message"] = json!(issue.message);
        entry["help"] = json!(issue.help);
        entry
    };
    issues.iter().map(entry).collect()
}

/// "x.toml is valid: llama, 4 layers, hidden 192, 600 steps of 16 x 128 tokens"
fn summary(path: &Path, plan: &Plan) -> String {
    let shape = &plan.shape;
    let batches: Vec<String> = plan
        .phases
        .iter()
        .map(|phase| {
            let batch = format!("{} x {}", phase.micro_batch_size, phase.data.sequence_len);
            match phase.gradient_accumulation_steps {
                1 => batch,
                passes => format!("{passes} x {batch}"),
            }
        })
        .collect();
    let batch = batches.join(", then ");
    let length = match plan.length {
        Length::Steps(steps) => format!("{steps} steps of {batch} tokens"),
        Length::Epochs(epochs) => format!("{epochs} epochs in steps of {batch} tokens"),
        Length::Tokens(tokens) => format!("{tokens} tokens in steps of {batch}"),
    };
    format!(
        "{} is valid: {}, {} layers, hidden {}, {length}",
        path.display(),
        shape.architecture.name(),
        shape.num_hidden_layers,
        shape.hidden_size,
    )
}
