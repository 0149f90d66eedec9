//! Validation: a text of its own, and batches that walk through a stream once.

use std::path::Path;

use super::files::{FileRecord, existing_file};
use super::{Batch, DataError, TokenStream, Tokenizer, Unknown, documents, encode_documents};

/// A text to measure a model on.
#[derive(Debug, Clone)]
pub struct EvalText {
    /// Its tokens, at least two; each document is followed by the end token where there is one.
    pub tokens: TokenStream,
    /// UTF-8 bytes of the text.
    pub bytes: u64,
    /// Tokens that stand for text the tokenizer does not know.
    pub unknown: u64,
}

impl EvalText {
    /// Reads a text file, or the `text` fields of a .jsonl or .json file.
    ///
    /// # Errors
    /// A file that is missing, unreadable, not UTF-8 or malformed; text that is empty or one token.
    pub fn load(path: &Path, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let file = FileRecord::survey(&existing_file(path)?)?;
        let documents = documents::read(&file, "text")?;
        if documents.texts.is_empty() {
            let what = format!("`{}`", path.display());
            return Err(DataError::Empty { what });
        }
        let tokens = encode_documents(tokenizer, &documents.texts)?;
        if tokens.len() < 2 {
            return Err(DataError::NothingToPredict {
                path: path.to_path_buf(),
                tokens: tokens.len() as u64,
            });
        }
        let is_unknown = |id: &u32| tokenizer.unknown() == Unknown::Token(*id);
        Ok(Self {
            bytes: documents.texts.iter().map(|text| text.len() as u64).sum(),
            unknown: tokens.iter().filter(is_unknown).count() as u64,
            tokens,
        })
    }
}

/// Cuts a stream into chunks of `sequence_len + 1` tokens that overlap by one, so that every token
/// but the first is a target exactly once, and gives them `rows` at a time, `[rows, sequence_len]`.
///
/// The last chunk is filled up with predictions of weight 0 in a segment of their own; the last
/// batch may have fewer rows. A stream of fewer than two tokens gives no batch.
///
/// # Panics
/// If `sequence_len` or `rows` is 0.
pub fn eval_batches(
    stream: &TokenStream,
    sequence_len: usize,
    rows: usize,
) -> impl Iterator<Item = Batch> + '_ {
    assert!(
        sequence_len > 0 && rows > 0,
        "an empty batch holds no tokens"
    );
    let targets = stream.len().saturating_sub(1);
    let chunks = targets.div_ceil(sequence_len);
    (0..chunks).step_by(rows).map(move |first| {
        let mut batch = Batch {
            rows: rows.min(chunks - first),
            cols: sequence_len,
            tokens: Vec::new(),
            targets: Vec::new(),
            weights: Vec::new(),
            segment_ids: Vec::new(),
            positions: Vec::new(),
        };
        for chunk in first..first + batch.rows {
            let start = chunk * sequence_len;
            push_chunk(&mut batch, stream, start, sequence_len.min(targets - start));
        }
        batch
    })
}

/// Appends the predictions of `stream[start + 1..=start + count]`, and padding up to a row.
fn push_chunk(batch: &mut Batch, stream: &TokenStream, start: usize, count: usize) {
    let padding = batch.cols - count;
    let pad = std::iter::repeat_n(0, padding);
    batch
        .tokens
        .extend(stream.ids(start..start + count).chain(pad.clone()));
    batch
        .targets
        .extend(stream.ids(start + 1..start + count + 1).chain(pad));
    batch.weights.extend(std::iter::repeat_n(1.0, count));
    batch.weights.extend(std::iter::repeat_n(0.0, padding));
    batch.segment_ids.extend(std::iter::repeat_n(0, count));
    batch.segment_ids.extend(std::iter::repeat_n(1, padding));
    batch
        .positions
        .extend((0..count as u32).chain(0..padding as u32));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn r3_every_token_but_the_first_is_predicted_once(len in 0usize..200, sequence_len in 1usize..40, rows in 1usize..6) {
            let ids: Vec<u32> = (0..len as u32).collect();
            let stream = TokenStream::from_ids(&ids, 1000);
            let mut predicted = Vec::new();
            for batch in eval_batches(&stream, sequence_len, rows) {
                let size = batch.rows * sequence_len;
                prop_assert!(batch.rows <= rows && batch.cols == sequence_len);
                let lengths = [
                    batch.tokens.len(), batch.targets.len(), batch.weights.len(),
                    batch.segment_ids.len(), batch.positions.len(),
                ];
                prop_assert_eq!(lengths, [size; 5]);
                for i in 0..size {
                    if batch.weights[i] == 1.0 {
                        // The ids count up, so the next token is one more.
                        prop_assert_eq!(batch.targets[i], batch.tokens[i] + 1);
                        prop_assert_eq!(batch.positions[i] as usize, i % sequence_len);
                        prop_assert_eq!(batch.segment_ids[i], 0);
                        predicted.push(batch.targets[i]);
                    } else {
                        prop_assert_eq!(batch.weights[i], 0.0);
                        prop_assert_eq!(batch.segment_ids[i], 1);
                    }
                }
            }
            prop_assert_eq!(predicted, ids.into_iter().skip(1).collect::<Vec<_>>());
        }
    }
}
