//! `runner eval`: nats per token and bits per byte of a model on a text.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::model::ModelArgs;
use super::{CliError, DeviceArgs};
use crate::data::{EvalText, Tokenizer, Unknown};
use crate::generate::GenerateError;
use crate::model::{DecoderSpec, ModelError};
use crate::objective::evaluate_text;
use crate::readable::grouped;

/// Arguments of `runner eval`.
#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A text file, or a .jsonl or .json file of records with a field `text`
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Tokens a prediction is made from at most; default: what the model is made for, up to 2048
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    sequence_len: Option<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Scores of attention grow with the square of the length.
const LONGEST_BY_DEFAULT: usize = 2048;
/// Tokens that one core evaluates at a time.
const TOKENS_AT_A_TIME: usize = 2048;

pub(super) fn run(args: &EvalArgs) -> Result<(), CliError> {
    let place = args.model.find()?;
    let tokenizer = place.tokenizer()?;
    let sequence_len = sequence_len(args, &place.spec)?;
    let text = EvalText::load(&args.data, &tokenizer)?;
    warn(&tokenizer, &text);

    let model = place.load(&args.device.open()?)?;
    // A short text needs no long rows.
    let cols = sequence_len.min(text.tokens.len() - 1);
    let rows = (TOKENS_AT_A_TIME / cols).max(1);
    let found = evaluate_text(&model, &text.tokens, text.bytes, cols, rows)?;
    // The evaluation used cross-entropy, which measures bits per byte.
    let bits_per_byte = found.metrics.get("bits_per_byte");
    if !found.val_loss.is_finite() {
        return Err(GenerateError::NotFinite.into());
    }
    super::print_line(&if args.json {
        json!({
            "val_loss": found.val_loss,
            "bits_per_byte": bits_per_byte,
            "tokens": found.tokens,
        })
        .to_string()
    } else {
        format!(
            "val_loss {:.4} nats per token, {:.4} bits per byte, {} tokens predicted",
            found.val_loss,
            bits_per_byte.unwrap_or(f64::NAN),
            grouped(found.tokens)
        )
    })
}

/// What was asked for, or a default that is said.
fn sequence_len(args: &EvalArgs, spec: &DecoderSpec) -> Result<usize, CliError> {
    let made_for = spec.shape.max_position_embeddings;
    let Some(asked) = args.sequence_len else {
        let length = made_for.min(LONGEST_BY_DEFAULT);
        super::remark(&format!(
            "sequence length {length} (the model is made for {made_for}; --sequence-len)"
        ));
        return Ok(length);
    };
    let length = asked as usize;
    match spec.position_limit() {
        Some(limit) if length > limit => Err(ModelError::TooLong { length, limit }.into()),
        _ => {
            if length > made_for {
                super::remark(&format!(
                    "warning: the model is made for sequences of {made_for} tokens"
                ));
            }
            Ok(length)
        }
    }
}

fn warn(tokenizer: &Tokenizer, text: &EvalText) {
    if text.unknown > 0 {
        let count = grouped(text.unknown);
        super::remark(&format!(
            "warning: {count} tokens stand for text that the tokenizer does not know"
        ));
    }
    if tokenizer.unknown() == Unknown::Dropped {
        super::remark("warning: this tokenizer leaves out characters that it has no token for");
    }
}
