//! `runner ckpt`: the checkpoints of a run.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::output::{check_empty, copy_beside};
use super::{CliError, print_line};
use crate::checkpoint::{CheckpointError, CheckpointStore, Details, Listed, Rotated, Stored};
use crate::readable::{bytes, grouped};
use crate::train::{AVERAGE_OWNER, RunFolder, kept_checkpoints};

/// Arguments of `runner ckpt`.
#[derive(Debug, Args)]
pub(super) struct CkptArgs {
    #[command(subcommand)]
    verb: CkptVerb,
}

#[derive(Debug, Subcommand)]
enum CkptVerb {
    /// List the checkpoints of a run
    Ls(RunArgs),
    /// Read checkpoints and hold them against what was saved
    Verify(StepArgs),
    /// Write a checkpoint to a folder of its own: a model folder, with the optimizer's state
    Restore(RestoreArgs),
    /// Delete what the run no longer keeps, and what a killed process left
    Gc(RunArgs),
    /// Make a checkpoint stand alone, so that it is the difference from no other
    Squash(StepArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The run folder
    run_dir: PathBuf,
}

#[derive(Debug, Args)]
struct StepArgs {
    #[command(flatten)]
    run: RunArgs,
    /// The checkpoint's step (verify: all of them; squash: the last)
    #[arg(long, value_name = "N")]
    step: Option<u64>,
}

#[derive(Debug, Args)]
struct RestoreArgs {
    #[command(flatten)]
    run: RunArgs,
    /// The checkpoint's step; the last without it
    #[arg(long, value_name = "N")]
    step: Option<u64>,
    /// Write the average of the weights as a model, and nothing to train on from
    #[arg(long)]
    average: bool,
    /// The folder to write: absent or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(super) fn run(args: &CkptArgs) -> Result<(), CliError> {
    match &args.verb {
        CkptVerb::Ls(args) => list(args),
        CkptVerb::Verify(args) => verify(args),
        CkptVerb::Restore(args) => restore(args),
        CkptVerb::Gc(args) => collect_garbage(args),
        CkptVerb::Squash(args) => squash(args),
    }
}

/// The checkpoints there are, which must be some.
fn store(run_dir: &Path) -> Result<(CheckpointStore, Vec<u64>), CliError> {
    let store = CheckpointStore::new(run_dir);
    let steps = store.steps()?;
    if steps.is_empty() {
        return Err(CliError::NoCheckpoints {
            path: run_dir.to_path_buf(),
        });
    }
    Ok((store, steps))
}

/// The step that was asked for, or the last.
fn step_or_last(store: &CheckpointStore, step: Option<u64>) -> Result<u64, CheckpointError> {
    match step {
        Some(step) => Ok(step),
        None => Ok(store.latest()?.unwrap_or_default()),
    }
}

fn list(args: &RunArgs) -> Result<(), CliError> {
    let (store, steps) = store(&args.run_dir)?;
    let list = store.list()?;
    let width = steps
        .iter()
        .map(|step| step.to_string().len())
        .max()
        .unwrap_or(0)
        .max(4);
    let mut lines = vec![format!(
        "{:>width$}  stored            size        of  smaller  val loss",
        "step"
    )];
    for Listed {
        step,
        bytes: size,
        best,
        details,
    } in &list
    {
        let mut mark = if *best { "  best" } else { "" }.to_string();
        let Details {
            stored,
            tensor_bytes,
            lossy,
            progress,
        } = match details {
            Ok(details) => details,
            Err(error) => {
                let (stored, size) = ("unreadable", bytes(*size));
                lines.push(format!(
                    "{step:>width$}  {stored:<12}{size:>10}{mark}  {error}"
                ));
                continue;
            }
        };
        let stored = match stored {
            Stored::Whole => "whole".to_string(),
            Stored::Alone => "alone".to_string(),
            Stored::Beside(step) => format!("beside {step}"),
        };
        let loss = progress
            .val_loss
            .map_or("-".to_string(), |loss| format!("{loss:.4}"));
        if let Some(method) = lossy {
            mark += &format!("  lossy: {}", method.name());
        }
        let ratio = *tensor_bytes as f64 / *size as f64;
        let (size, whole) = (bytes(*size), bytes(*tensor_bytes));
        lines.push(format!(
            "{step:>width$}  {stored:<12}{size:>10}{whole:>10}{ratio:>8.2}x  {loss:>8}{mark}"
        ));
    }
    let total: u64 = list.iter().map(|listed| listed.bytes).sum();
    let readable = list
        .iter()
        .filter_map(|listed| listed.details.as_ref().ok());
    let whole: u64 = readable.map(|details| details.tensor_bytes).sum();
    lines.push(format!(
        "{} checkpoints, {} of {} ({:.2}x smaller)",
        grouped(list.len() as u64),
        bytes(total),
        bytes(whole),
        whole as f64 / total as f64
    ));
    print_line(&lines.join("\n"))
}

fn verify(args: &StepArgs) -> Result<(), CliError> {
    let (store, steps) = store(&args.run.run_dir)?;
    let steps = args.step.map_or(steps, |step| vec![step]);
    let mut first = None;
    for step in steps {
        match store.verify(step) {
            Ok(()) => print_line(&format!("step {step}: as it was saved"))?,
            Err(error) => {
                print_line(&format!("step {step}: {error}"))?;
                first.get_or_insert(error);
            }
        }
    }
    first.map_or(Ok(()), |error| Err(error.into()))
}

fn restore(args: &RestoreArgs) -> Result<(), CliError> {
    let (store, _) = store(&args.run.run_dir)?;
    check_empty(&args.out)?;
    let step = step_or_last(&store, args.step)?;
    if args.average {
        return restore_average(&store, step, args);
    }
    let owners = store.restore(step, &args.out)?;
    copy_beside(&[&args.run.run_dir], &args.out)?;
    let mut text = format!(
        "written  {}: step {step}, each tensor checked against its BLAKE3",
        args.out.display()
    );
    if owners.iter().any(|owner| owner == AVERAGE_OWNER) {
        text += "\naverage  model.safetensors has the weights of the step; --average writes their average";
    }
    print_line(&text)
}

fn restore_average(store: &CheckpointStore, step: u64, args: &RestoreArgs) -> Result<(), CliError> {
    match store.restore_model_with(step, AVERAGE_OWNER, &args.out) {
        Ok(true) => {}
        Ok(false) => return Err(CliError::NoAverage { step }),
        Err(CheckpointError::NotInChain { folder }) => {
            return Err(CliError::AverageOfWhole { folder });
        }
        Err(error) => return Err(error.into()),
    }
    copy_beside(&[&args.run.run_dir], &args.out)?;
    print_line(&format!(
        "written  {}: the average of the weights at step {step}",
        args.out.display()
    ))
}

fn collect_garbage(args: &RunArgs) -> Result<(), CliError> {
    let (store, _) = store(&args.run_dir)?;
    // A run that is under way keeps its own order; opening its folder also clears away what a killed one left.
    let _lock = RunFolder::open(&args.run_dir)?;
    let keep = kept_checkpoints(&args.run_dir)?;
    let size = |list: Vec<Listed>| list.iter().map(|listed| listed.bytes).sum::<u64>();
    let before = size(store.list()?);
    let Rotated { deleted, warnings } = store.rotate(keep)?;
    for warning in warnings {
        super::remark(&format!("warning: {warning}"));
    }
    let after = size(store.list()?);
    let steps: Vec<String> = deleted.iter().map(u64::to_string).collect();
    let what = if steps.is_empty() {
        "nothing to delete".to_string()
    } else {
        format!("deleted  steps {}", steps.join(", "))
    };
    print_line(&format!(
        "{what}\nsize     {} before, {} after",
        bytes(before),
        bytes(after)
    ))
}

fn squash(args: &StepArgs) -> Result<(), CliError> {
    let (store, _) = store(&args.run.run_dir)?;
    let _lock = RunFolder::open(&args.run.run_dir)?;
    let step = step_or_last(&store, args.step)?;
    store.squash(step)?;
    print_line(&format!("step {step} stands alone"))
}
