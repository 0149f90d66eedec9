//! `runner merge`: a base model and an adapter as one model.

use std::fs;
use std::path::PathBuf;

use burn::tensor::Device;
use clap::Args;

use super::model::ModelArgs;
use super::output::{check_empty, copy_beside};
use super::{CliError, print_line};
use crate::adapter::merge;
use crate::config::{DecoderSpec, SaveDtype};
use crate::model::folder::{self, SaveOptions};

/// Arguments of `runner merge`.
#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The folder to write: absent or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the merged weights
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    dtype: SaveDtype,
}

/// Tokens, at most, on which the merged model is held against base and adapter.
const COMPARED: usize = 64;

pub(super) fn run(args: &MergeArgs) -> Result<(), CliError> {
    check_empty(&args.out)?;
    let place = args.model.find()?;
    let (base, adapter) = place.parts(&Device::flex())?;
    let adapter = adapter.ok_or(CliError::NoAdapter)?;
    let merged = merge(&base, &adapter, &tokens(&place.spec))?;
    let tensors = folder::hf_tensors(&merged.model);
    fs::create_dir_all(&args.out).map_err(CliError::io(&args.out))?;
    let options = SaveOptions {
        dtype: args.dtype,
        ..SaveOptions::default()
    };
    folder::save(&args.out, merged.model.spec(), &tensors, &options)?;
    let mut sources = vec![place.base.as_path()];
    if let Some(adapter) = &place.adapter {
        sources.insert(0, adapter);
    }
    copy_beside(&sources, &args.out)?;
    print_line(&format!(
        "merged   {} layers, {} parameters trained whole\n\
         logits   within {:.1e} of base and adapter, in f32; the adapter moves them by up to {:.2e}\n\
         written  {}",
        adapter.layers.len(),
        adapter.saved.len(),
        merged.logit_error,
        merged.logit_change,
        args.out.display(),
    ))
}

/// Some tokens, all over the vocabulary; no more than the model has positions.
fn tokens(spec: &DecoderSpec) -> Vec<u32> {
    let count = COMPARED.min(spec.shape.max_position_embeddings);
    let stride = spec.vocab_size / count * 2 + 1;
    let tokens = (0..count).map(|i| (i * stride % spec.vocab_size) as u32);
    tokens.collect()
}
