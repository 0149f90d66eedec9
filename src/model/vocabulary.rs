//! A tokenizer and a model that belong together.

use super::{DecoderSpec, ModelError};
use crate::data::Tokenizer;

/// Checks that a model has an embedding for every token id.
///
/// # Errors
/// [`ModelError::TokenizerMismatch`].
pub fn check_vocabulary(spec: &DecoderSpec, tokenizer: &Tokenizer) -> Result<(), ModelError> {
    let (ids, rows) = (tokenizer.vocab_size(), spec.vocab_size);
    if ids <= rows {
        Ok(())
    } else {
        Err(ModelError::TokenizerMismatch { ids, rows })
    }
}
