//! From text to token ids with a mask.
//!
//! The whole text is tokenised at once, as it will be when the model is used, and a token is
//! trained if any part of it lies in a trained range. So of `Answer: Paris`, where the answer begins
//! before `Paris` and the token is ` Paris`, the answer is trained whole; tokenising the parts apart
//! would train tokens that the model never meets.

use std::ops::Range;

use super::write::Written;
use crate::config::Overlong;
use crate::data::{DataError, Tokenizer, Unknown};

/// A row as tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct EncodedRow {
    pub(super) ids: Vec<u32>,
    /// Ranges of tokens that are trained, in order.
    pub(super) trained: Vec<Range<usize>>,
    /// Bytes of text in them, special tokens left out.
    pub(super) trained_bytes: u64,
    /// Whether the end was cut off.
    pub(super) is_cut: bool,
    /// Trained tokens that begin before the trained text does.
    pub(super) straddling: u64,
    /// The special tokens that trained ranges end with; none for a range that ends with another.
    pub(super) ends: Vec<Option<u32>>,
    /// Tokens that stand for text the tokenizer does not know.
    pub(super) unknown: u64,
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Outcome {
    Row(EncodedRow),
    /// It does not fit: its tokens, and whether that is only a lower bound.
    TooLong {
        tokens: u64,
        is_bound: bool,
    },
    /// Nothing of it would be trained.
    Untrainable {
        reason: String,
        is_cut: bool,
    },
}

/// How rows are tokenised.
pub(super) struct Encoder<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    /// Predictions in a sequence: one fewer than tokens in the longest row.
    pub(super) sequence_len: usize,
    pub(super) overlong: Overlong,
}

impl Encoder<'_> {
    pub(super) fn encode(&self, mut row: Written) -> Result<Outcome, DataError> {
        let limit = self.sequence_len + 1;
        let mut is_cut = false;
        // What is certainly too long is not tokenised, which takes hundreds of times its memory.
        let certain = limit.saturating_mul(self.tokenizer.longest_token_bytes());
        if self.tokenizer.unknown() == Unknown::Never && row.text.len() > certain {
            if self.overlong != Overlong::Truncate {
                let tokens = row
                    .text
                    .len()
                    .div_ceil(self.tokenizer.longest_token_bytes());
                return Ok(Outcome::TooLong {
                    tokens: tokens as u64,
                    is_bound: true,
                });
            }
            // Behind the last token that is kept only for that token's own sake.
            row.text.truncate(boundary_after(&row.text, certain));
            is_cut = true;
        }
        let mut tokens = self.tokens(&row.text)?;
        if tokens.len() > limit {
            if self.overlong != Overlong::Truncate {
                return Ok(Outcome::TooLong {
                    tokens: tokens.len() as u64,
                    is_bound: false,
                });
            }
            is_cut = true;
        }
        let mask = self.mask(&row, &tokens);
        // The first token is given, not predicted.
        let has_any = |mask: &[bool]| mask.iter().skip(1).any(|&trained| trained);
        if !has_any(&mask[..mask.len().min(limit)]) {
            return Ok(self.untrainable(&row, &mask, is_cut));
        }
        tokens.truncate(limit);
        Ok(Outcome::Row(self.row(
            &row,
            &tokens,
            &mask[..tokens.len()],
            is_cut,
        )))
    }

    /// Why nothing is left to train.
    fn untrainable(&self, row: &Written, mask: &[bool], is_cut: bool) -> Outcome {
        let sequence_len = self.sequence_len;
        let start = mask.iter().skip(1).position(|&trained| trained);
        let (reason, is_cut) = match start {
            Some(start) => (
                format!(
                    "the trained part starts at token {}, data.sequence_len = {sequence_len}",
                    start + 2
                ),
                true,
            ),
            // Cut off before it was tokenised.
            None if is_cut && !row.trained.is_empty() => (
                format!("the trained part starts far behind data.sequence_len = {sequence_len}"),
                true,
            ),
            None => (row.reason.to_string(), false),
        };
        Outcome::Untrainable { reason, is_cut }
    }

    /// The tokens of a text, never with a second begin token.
    fn tokens(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, DataError> {
        let mut tokens = self.tokenizer.encode_with_offsets(text)?;
        let bos = self.tokenizer.bos().map(|token| token.id);
        if let [(first, _), (second, _), ..] = tokens.as_slice()
            && first == second
            && Some(*first) == bos
        {
            tokens.remove(0);
        }
        Ok(tokens)
    }

    /// Which tokens are trained.
    fn mask(&self, row: &Written, tokens: &[(u32, Range<usize>)]) -> Vec<bool> {
        let mut mask: Vec<bool> = tokens
            .iter()
            .map(|(_, at)| row.trained.iter().any(|span| overlap(at, span)))
            .collect();
        if row.ends_with_template {
            for span in &row.trained {
                self.cut_blanks(&row.text, tokens, span, &mut mask);
            }
        }
        mask
    }

    /// Takes the blanks after the special token that ends a turn out of the loss: the template
    /// writes them, the model has stopped by then.
    fn cut_blanks(
        &self,
        text: &str,
        tokens: &[(u32, Range<usize>)],
        span: &Range<usize>,
        mask: &mut [bool],
    ) {
        let own: Vec<usize> = (0..tokens.len())
            .filter(|&i| overlap(&tokens[i].1, span))
            .collect();
        let is_blank = |&&i: &&usize| {
            !self.tokenizer.is_special(tokens[i].0)
                && text
                    .get(tokens[i].1.clone())
                    .is_some_and(|text| text.trim().is_empty())
        };
        let blanks: Vec<usize> = own.iter().rev().take_while(is_blank).copied().collect();
        let before = own.len().checked_sub(blanks.len() + 1);
        if before.is_some_and(|last| self.tokenizer.is_special(tokens[own[last]].0)) {
            blanks.into_iter().for_each(|i| mask[i] = false);
        }
    }

    fn row(
        &self,
        row: &Written,
        tokens: &[(u32, Range<usize>)],
        mask: &[bool],
        is_cut: bool,
    ) -> EncodedRow {
        let mut encoded = EncodedRow {
            is_cut,
            ..EncodedRow::default()
        };
        let mut counted = 0;
        for (index, ((id, at), &trained)) in tokens.iter().zip(mask).enumerate() {
            encoded.ids.push(*id);
            encoded.unknown += u64::from(self.tokenizer.unknown() == Unknown::Token(*id));
            if !trained {
                continue;
            }
            match encoded.trained.last_mut() {
                Some(last) if last.end == index => last.end += 1,
                _ => encoded.trained.push(index..index + 1),
            }
            let starts = |span: &&Range<usize>| at.start < span.start && span.start < at.end;
            encoded.straddling += row.trained.iter().filter(starts).count() as u64;
            if index > 0 && !self.tokenizer.is_special(*id) {
                encoded.trained_bytes += at.end.saturating_sub(at.start.max(counted)) as u64;
            }
            counted = counted.max(at.end);
        }
        let ends = encoded.trained.iter().map(|range| range.end);
        // A range that was cut off has no end.
        let ends = ends.filter(|&end| !(is_cut && end == tokens.len()));
        let last = ends.map(|end| encoded.ids[end - 1]);
        encoded.ends = last
            .map(|id| self.tokenizer.is_special(id).then_some(id))
            .collect();
        encoded
    }
}

/// Whether a token lies in a span, in part at least. A token of no text lies where it begins.
fn overlap(token: &Range<usize>, span: &Range<usize>) -> bool {
    if token.is_empty() {
        return span.contains(&token.start);
    }
    token.start < span.end && span.start < token.end
}

fn boundary_after(text: &str, at: usize) -> usize {
    (at..=text.len())
        .find(|&at| text.is_char_boundary(at))
        .unwrap_or(text.len())
}
