//! `runner logits`: what a model says after each token, as numbers for other tools.

use std::path::{Path, PathBuf};

use clap::Args;
use safetensors::tensor::{Dtype, TensorView};

use super::model::ModelArgs;
use super::{CliError, DeviceArgs};
use crate::data::Batch;
use crate::durable;
use crate::generate::{GenerateError, check_prompt};
use crate::model::{Decoder, ModelError};

/// Arguments of `runner logits`.
#[derive(Debug, Args)]
pub(super) struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, as 1,2,3
    #[arg(
        long,
        value_name = "IDS",
        value_delimiter = ',',
        required_unless_present = "text"
    )]
    tokens: Vec<u32>,
    /// Text, for the model's tokenizer
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "tokens"
    )]
    text: Option<String>,
    /// A safetensors file to write: `tokens` [seq] i64 and `logits` [seq, vocab] f32
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &LogitsArgs) -> Result<(), CliError> {
    let place = args.model.find()?;
    let asked = match &args.text {
        None => args.tokens.clone(),
        Some(text) => place.tokenizer()?.encode(text)?,
    };
    let tokens = check_prompt(&place.spec, &asked)?;
    let model = place.load(&args.device.open()?)?;
    let logits = logits(&model, &tokens)?;
    write(&args.out, &tokens, &logits)?;
    super::print_line(&format!(
        "{}: tokens [{seq}] i64, logits [{seq}, {}] f32",
        args.out.display(),
        place.spec.vocab_size,
        seq = tokens.len(),
    ))
}

/// `[seq, vocab]`, row-major.
fn logits(model: &Decoder, tokens: &[u32]) -> Result<Vec<f32>, GenerateError> {
    let batch = Batch::of_prompt(tokens);
    let logits: Vec<f32> = model.forward(&batch)?.into_data().iter::<f32>().collect();
    if logits.iter().all(|value| value.is_finite()) {
        Ok(logits)
    } else {
        Err(GenerateError::NotFinite)
    }
}

fn write(path: &Path, tokens: &[u32], logits: &[f32]) -> Result<(), CliError> {
    let ids: Vec<u8> = tokens
        .iter()
        .flat_map(|&id| i64::from(id).to_le_bytes())
        .collect();
    let values: Vec<u8> = logits
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let (seq, vocab) = (tokens.len(), logits.len() / tokens.len());
    let file = || {
        let views = [
            ("tokens", TensorView::new(Dtype::I64, vec![seq], &ids)?),
            (
                "logits",
                TensorView::new(Dtype::F32, vec![seq, vocab], &values)?,
            ),
        ];
        safetensors::serialize(views, None)
    };
    let bytes = file().map_err(|source| ModelError::Safetensors {
        path: path.to_path_buf(),
        source,
    })?;
    durable::replace_with(path, bytes).map_err(CliError::io(path))
}
