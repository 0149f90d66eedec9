//! Documents to one stream of token ids, on all cores, in bounded memory.

use rayon::prelude::*;

use super::DataError;
use super::pieces::Pieces;
use super::token_stream::{PackedIds, TokenStream, Width};
use super::tokenizer::Tokenizer;

/// Long documents are cut into pieces of about this size.
const PIECE_BYTES: usize = 1 << 16;

/// Text that is in the tokenizer's hands at one time. The library needs some hundred bytes per
/// token while it works.
const GROUP_BYTES: usize = 1 << 23;

/// Tokenises documents one after the other, each followed by the end token where there is one.
pub fn encode_documents(
    tokenizer: &Tokenizer,
    documents: &[String],
) -> Result<TokenStream, DataError> {
    let mut ids = PackedIds::new(Width::of(tokenizer.vocab_size()));
    let agrees = |left: &str, right: &str| cut_is_safe(tokenizer, left, right);
    let mut pieces = documents.iter().flat_map(|document| {
        let mut pieces = Pieces::new(document, PIECE_BYTES, agrees).peekable();
        std::iter::from_fn(move || {
            let text = pieces.next()?;
            let ends_document = pieces.peek().is_none();
            Some((text, ends_document))
        })
    });
    loop {
        let mut group = Vec::new();
        let mut bytes = 0;
        while bytes < GROUP_BYTES
            && let Some((text, ends_document)) = pieces.next()
        {
            bytes += text.len();
            group.push((text, ends_document));
        }
        if group.is_empty() {
            return Ok(ids.into_stream());
        }
        let encoded: Vec<Vec<u32>> = group
            .par_iter()
            .map(|(text, _)| tokenizer.encode(text))
            .collect::<Result<_, _>>()?;
        for (piece, (_, ends_document)) in encoded.iter().zip(&group) {
            ids.extend(piece);
            if let (true, Some(eos)) = (ends_document, tokenizer.eos()) {
                ids.extend(&[eos.id]);
            }
        }
    }
}

/// Whether two neighbouring stretches of text give the same tokens apart and together. A failure
/// to tell is a no: tokenising the whole will report it.
fn cut_is_safe(tokenizer: &Tokenizer, left: &str, right: &str) -> bool {
    let apart = tokenizer.encode(left).and_then(|mut ids| {
        ids.extend(tokenizer.encode(right)?);
        Ok(ids)
    });
    let together = tokenizer.encode(&[left, right].concat());
    matches!((apart, together), (Ok(apart), Ok(together)) if apart == together)
}
