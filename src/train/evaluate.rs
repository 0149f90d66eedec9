//! Validation: the mean loss over the whole split, every token but the first predicted once.

use serde::Serialize;

use crate::data::{TokenStream, eval_batches};
use crate::model::{Decoder, ModelError};

/// A validation result.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// Nats per token.
    pub val_loss: f64,
    /// Bits per UTF-8 byte of the split: comparable between tokenizers.
    pub bits_per_byte: f64,
    /// Tokens predicted.
    #[serde(skip)]
    pub tokens: u64,
}

/// Evaluates `model` (on a plain device) on `stream`, which stands for `bytes` UTF-8 bytes of text,
/// in chunks of `sequence_len` + 1 tokens overlapping by one, `rows` chunks at a time.
///
/// # Errors
/// A sequence length the model has no positions for.
pub fn evaluate(
    model: &Decoder,
    stream: &TokenStream,
    bytes: u64,
    sequence_len: usize,
    rows: usize,
) -> Result<Evaluation, ModelError> {
    let (mut nats, mut tokens) = (0.0, 0.0);
    for batch in eval_batches(stream, sequence_len, rows) {
        // Summed in f64 across batches; within one, f32 loses nothing that matters.
        nats += f64::from(model.evaluate(&batch)?.into_scalar::<f32>());
        tokens += batch.weight();
    }
    let bits_per_byte = nats / std::f64::consts::LN_2 / bytes as f64;
    Ok(Evaluation { val_loss: nats / tokens, bits_per_byte, tokens: tokens as u64 })
}
