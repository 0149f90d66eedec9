//! `runner export`: a trained model in another form.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device};
use clap::{Args, ValueEnum};

use super::CliError;
use super::model::is_adapter;
use super::output::{check_empty, copy_beside};
use crate::config::{BlockFormat, BlockSize, Blockwise, DecoderSpec, PackedLayout, SaveDtype};
use crate::model::folder::{self, SaveOptions};
use crate::model::{Decoder, ModelError, Tensors};
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
    /// Codes that share a scale (nf4, fp4, int4, int8): a number, or `row`
    #[arg(long, value_name = "N|row", value_parser = block_size)]
    block_size: Option<BlockSize>,
    /// Put scales in eight bits too (nf4, fp4, int4, int8)
    #[arg(long)]
    double_quant: bool,
    /// Give each block a zero point (int4)
    #[arg(long)]
    asymmetric: bool,
    /// Number format of the other weights
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    dtype: SaveDtype,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Target {
    /// Ternary weights in 2 or 1.6 bits each, for inference
    Packed,
    /// Dense weights in four bits, at quantiles of a normal distribution
    Nf4,
    /// Dense weights in four bits as floats
    Fp4,
    /// Dense weights in four bits as whole numbers
    Int4,
    /// Dense weights in eight bits
    Int8,
}

fn block_size(text: &str) -> Result<BlockSize, String> {
    match (text, text.parse::<usize>()) {
        ("row", _) => Ok(BlockSize::Row),
        (_, Ok(size)) if (1..=1 << 20).contains(&size) => Ok(BlockSize::Weights(size)),
        _ => Err("must be `row` or a number from 1 to 1048576".to_string()),
    }
}

pub(super) fn run(args: &ExportArgs) -> Result<(), CliError> {
    check_empty(&args.out)?;
    check_flags(args)?;
    if is_adapter(&args.model) {
        let path = args.model.clone();
        return Err(CliError::AdapterAlone { path });
    }
    let spec = folder::read_config(&args.model)?;
    let (model, form) = match args.to.blockwise(args) {
        None => packed(args, &spec)?,
        Some(blockwise) => quantised(args, &spec, blockwise)?,
    };
    let tensors = folder::hf_tensors(&model);
    fs::create_dir_all(&args.out).map_err(CliError::io(&args.out))?;
    let options = SaveOptions {
        dtype: args.dtype,
        ..SaveOptions::default()
    };
    // First: weights that do not fit into `dtype` leave the folder empty, to be tried again.
    folder::save(&args.out, model.spec(), &tensors, &options)?;
    copy_beside(&[&args.model], &args.out)?;
    summarise(args, model.spec(), &tensors, &form)
}

/// A flag that the form would ignore is refused.
fn check_flags(args: &ExportArgs) -> Result<(), CliError> {
    let quantises = args.to != Target::Packed;
    let useless = [
        (
            "--layout",
            quantises && args.layout != PackedLayout::default(),
            "packed",
        ),
        (
            "--block-size",
            !quantises && args.block_size.is_some(),
            "nf4, fp4, int4 and int8",
        ),
        (
            "--double-quant",
            !quantises && args.double_quant,
            "nf4, fp4, int4 and int8",
        ),
        (
            "--asymmetric",
            args.to != Target::Int4 && args.asymmetric,
            "int4",
        ),
    ];
    match useless.iter().find(|(_, useless, _)| *useless) {
        Some((flag, _, forms)) => Err(CliError::UselessFlag { flag, forms }),
        None => Ok(()),
    }
}

impl Target {
    fn blockwise(self, args: &ExportArgs) -> Option<Blockwise> {
        let format = match self {
            Self::Packed => return None,
            Self::Nf4 => BlockFormat::Nf4,
            Self::Fp4 => BlockFormat::Fp4,
            Self::Int4 if args.asymmetric => BlockFormat::Int4Affine,
            Self::Int4 => BlockFormat::Int4Symmetric,
            Self::Int8 => BlockFormat::Int8,
        };
        let default = match self {
            Self::Int8 => BlockSize::Row,
            _ => BlockSize::Weights(64),
        };
        Some(Blockwise {
            format,
            block: args.block_size.unwrap_or(default),
            double: args.double_quant,
        })
    }
}

/// The model, and how its weights are kept in words.
fn packed(args: &ExportArgs, spec: &DecoderSpec) -> Result<(Decoder, String), CliError> {
    if spec.shape.ternary.is_none() {
        return Err(ModelError::NotTernary.into());
    }
    let latent = folder::load_as(spec, &args.model, &Device::flex())?;
    Ok((latent.packed(args.layout)?, args.layout.name().to_string()))
}

fn quantised(
    args: &ExportArgs,
    spec: &DecoderSpec,
    blockwise: Blockwise,
) -> Result<(Decoder, String), CliError> {
    if spec.shape.ternary.is_some() || spec.shape.blockwise.is_some() {
        return Err(ModelError::NotDense.into());
    }
    let mut target = spec.clone();
    target.shape.blockwise = Some(blockwise);
    let mut quantiser = folder::quantiser(blockwise);
    let model = folder::load_quantising(&target, &args.model, &Device::flex(), &mut quantiser)?;
    let form = if target.shape.is_bitsandbytes() {
        format!("{}, as bitsandbytes has it", blockwise.format.name())
    } else {
        blockwise.format.name().to_string()
    };
    Ok((model, form))
}

fn summarise(
    args: &ExportArgs,
    spec: &DecoderSpec,
    tensors: &Tensors,
    form: &str,
) -> Result<(), CliError> {
    let weights = spec.shape.block_parameters();
    // Of packed trits the bytes; of codes their scales too, which are a part of a weight's bits.
    let counts_scales = spec.shape.blockwise.is_some();
    let is_of_codes = |name: &String, data: &burn::tensor::TensorData| {
        data.dtype() == DType::U8 || counts_scales && folder::is_scale(spec, name)
    };
    let codes = tensors
        .iter()
        .filter(|(name, data)| is_of_codes(name, data));
    let codes: usize = codes.map(|(_, data)| data.as_bytes().len()).sum();
    let size = |folder: &Path| -> Result<u64, CliError> {
        let files = folder::files(folder)?;
        let sizes = files
            .iter()
            .map(|file| Ok(fs::metadata(file).map_err(CliError::io(file))?.len()));
        sizes.sum()
    };
    super::print_line(&format!(
        "packed   {} weights in {} ({:.2} bits each, {form})\nmodel    {} -> {}\nwritten  {}",
        grouped(weights),
        bytes(codes as u64),
        8.0 * codes as f64 / weights as f64,
        bytes(size(&args.model)?),
        bytes(size(&args.out)?),
        args.out.display(),
    ))
}
