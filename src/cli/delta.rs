//! `runner delta`: one model folder as the difference from another.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{CliError, print_line};
use crate::delta;
use crate::readable::bytes;

/// Arguments of `runner delta`.
#[derive(Debug, Args)]
pub(super) struct DeltaArgs {
    #[command(subcommand)]
    verb: DeltaVerb,
}

#[derive(Debug, Subcommand)]
enum DeltaVerb {
    /// Write what a model folder is beside the one it was made from
    Make(MakeArgs),
    /// Make a model folder again, byte for byte, out of its base and the difference
    Apply(ApplyArgs),
}

#[derive(Debug, Args)]
struct MakeArgs {
    /// The folder that the other was made from: a Hugging Face model folder or a run folder
    base: PathBuf,
    /// The folder to write as a difference
    tuned: PathBuf,
    /// The file to write; it must not exist
    #[arg(value_name = "OUT.safetensors")]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct ApplyArgs {
    /// The folder that the difference was made from, unchanged
    base: PathBuf,
    /// What `runner delta make` wrote
    delta: PathBuf,
    /// The folder to write: absent or empty
    #[arg(value_name = "OUT_DIR")]
    out: PathBuf,
}

pub(super) fn run(args: &DeltaArgs) -> Result<(), CliError> {
    match &args.verb {
        DeltaVerb::Make(args) => make(args),
        DeltaVerb::Apply(args) => apply(args),
    }
}

fn make(args: &MakeArgs) -> Result<(), CliError> {
    let written = delta::make(&args.base, &args.tuned, &args.out)?;
    let codecs = delta::open(&args.out)?.codecs().into_iter();
    let codecs: Vec<String> = codecs
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    let codecs = if codecs.is_empty() {
        "none: nothing differs".to_string()
    } else {
        codecs.join(", ")
    };
    print_line(&format!(
        "written  {}, read back\n\
         size     {} of {} ({:.2}x smaller)\n\
         chunks   {codecs}",
        args.out.display(),
        bytes(written.bytes),
        bytes(written.state_bytes),
        written.state_bytes as f64 / written.bytes as f64,
    ))
}

fn apply(args: &ApplyArgs) -> Result<(), CliError> {
    let files = delta::apply(&args.base, &args.delta, &args.out)?;
    print_line(&format!(
        "written  {}: {} files, each tensor checked against its BLAKE3",
        args.out.display(),
        files.len()
    ))
}
