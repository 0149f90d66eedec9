//! `runner delta`: one model folder as the difference from another.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{CliError, print_line};
use crate::delta::{self, LossRecord, Lossy, Method, Opened, Options};
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
    /// Let matrices come back near what they are, for the sake of size
    #[arg(long, value_name = "METHOD")]
    lossy: Option<Method>,
    /// Store exactly what would keep less of its change, as a share of the sum of squares; lowrank takes the least rank
    /// that keeps it (0.95)
    #[arg(long, value_name = "SHARE", requires = "lossy", value_parser = share)]
    energy: Option<f64>,
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
    let options = Options {
        lossy: args.lossy.map(|method| Lossy {
            energy: args.energy,
            ..Lossy::new(method)
        }),
        ..Options::default()
    };
    let written = delta::make(&args.base, &args.tuned, &args.out, &options)?;
    let opened = delta::open(&args.out)?;
    let lost = match (args.lossy, lost(&opened)) {
        (None, _) => String::new(),
        (Some(_), None) => "\nlost     nothing: exact is as small".to_string(),
        (Some(_), Some(lost)) => format!("\nlost     {lost}"),
    };
    let codecs = opened.codecs().into_iter();
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
         chunks   {codecs}{lost}",
        args.out.display(),
        bytes(written.bytes),
        bytes(written.state_bytes),
        written.state_bytes as f64 / written.bytes as f64,
    ))
}

fn apply(args: &ApplyArgs) -> Result<(), CliError> {
    let files = delta::apply(&args.base, &args.delta, &args.out)?;
    let lost = lost(&delta::open(&args.delta)?);
    print_line(&format!(
        "written  {}: {} files, each tensor checked against its BLAKE3{}",
        args.out.display(),
        files.len(),
        lost.map_or(String::new(), |lost| format!("\nlost     {lost}"))
    ))
}

/// What a difference does not bring back.
fn lost(opened: &Opened) -> Option<String> {
    let lossy = opened.lossy();
    let method = lossy.values().next()?.method;
    let most = |of: fn(&LossRecord) -> f32| lossy.values().map(of).fold(0.0, f32::max);
    Some(format!(
        "{}, {} of {} tensors: no element is further off than {:.1e}, no tensor loses more than {:.2} % of its change (L2)",
        method.name(),
        lossy.len(),
        opened.state().tensors.len(),
        most(|of| of.largest_error),
        100.0 * most(|of| of.relative_error)
    ))
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if 0.0 < share && share < 1.0 => Ok(share),
        Ok(_) => Err("a share is between 0 and 1, like 0.95".to_string()),
        Err(_) => Err("it is no number".to_string()),
    }
}
