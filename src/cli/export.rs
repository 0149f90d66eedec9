//! `runner export`: a trained model in another form.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::{Args, ValueEnum};

use super::CliError;
use super::output::{check_empty, copy_beside};
use crate::config::{DecoderSpec, PackedLayout, SaveDtype};
use crate::model::folder::{self, SaveOptions};
use crate::model::{ModelError, Tensors};
use crate::readable::{bytes, grouped};

/// Arguments of `runner export`.
#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// A run folder or a Hugging Face model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The form to export to
    #[arg(long, value_name = "FORMAT")]
    to: Target,
    /// The folder to write: absent or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How packed weights lie in the file: 2 bits each, as products read them, or 1.6
    #[arg(long, value_name = "LAYOUT", default_value = "compute")]
    layout: PackedLayout,
    /// Number format of the other weights
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    dtype: SaveDtype,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Target {
    /// Ternary weights in 2 or 1.6 bits each, for inference
    Packed,
}

pub(super) fn run(args: &ExportArgs) -> Result<(), CliError> {
    let Target::Packed = args.to;
    check_empty(&args.out)?;
    let spec = folder::read_config(&args.model)?;
    if spec.shape.ternary.is_none() {
        return Err(ModelError::NotTernary.into());
    }
    let latent = folder::load_as(&spec, &args.model, &Device::flex())?;
    let model = latent.packed(args.layout)?;
    let tensors = folder::hf_tensors(&model);
    fs::create_dir_all(&args.out).map_err(CliError::io(&args.out))?;
    let options = SaveOptions {
        dtype: args.dtype,
        ..SaveOptions::default()
    };
    // First: weights that do not fit into `dtype` leave the folder empty, to be tried again.
    folder::save(&args.out, model.spec(), &tensors, &options)?;
    copy_beside(&[&args.model], &args.out)?;
    summarise(args, model.spec(), &tensors)
}

fn summarise(args: &ExportArgs, spec: &DecoderSpec, tensors: &Tensors) -> Result<(), CliError> {
    let weights = spec.shape.ternary_parameters();
    let packed = tensors
        .values()
        .filter(|data| data.dtype() == burn::tensor::DType::U8);
    let packed: usize = packed.map(|data| data.num_elements()).sum();
    let size = |folder: &Path| -> Result<u64, CliError> {
        let files = folder::files(folder)?;
        let sizes = files
            .iter()
            .map(|file| Ok(fs::metadata(file).map_err(CliError::io(file))?.len()));
        sizes.sum()
    };
    super::print_line(&format!(
        "packed   {} ternary weights in {} ({:.2} bits each, {})\nmodel    {} -> {}\nwritten  {}",
        grouped(weights),
        bytes(packed as u64),
        8.0 * packed as f64 / weights as f64,
        args.layout.name(),
        bytes(size(&args.model)?),
        bytes(size(&args.out)?),
        args.out.display(),
    ))
}
