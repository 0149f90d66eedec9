//! Decoding while tokens arrive.
//!
//! A token may be part of a character (byte-level BPE splits `é` and emoji), and how a token
//! decodes may depend on those before it (SentencePiece drops the first space). So the new text is
//! the difference between decoding with and without the newest tokens, over a short window, and it
//! is held back while it ends in U+FFFD, the mark of an incomplete character. A text may really
//! end in U+FFFD; that is held back too until it is known what follows.

use super::Tokenizer;
use crate::data::DataError;

/// Turns tokens into text one at a time; the pieces of text add up to the text of all tokens.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens of the window: those already shown, kept as context, then those waiting.
    ids: Vec<u32>,
    /// How many of `ids` are already shown.
    shown: usize,
}

/// Tokens of a prompt that are kept to read the first new one by.
const CONTEXT: usize = 8;

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        let context = &prompt[prompt.len().saturating_sub(CONTEXT)..];
        Self {
            tokenizer,
            ids: context.to_vec(),
            shown: context.len(),
        }
    }

    /// Takes the next token and returns the text that is now complete, often one token's, empty
    /// in the middle of a character.
    pub fn push(&mut self, id: u32) -> Result<String, DataError> {
        self.ids.push(id);
        let text = self.waiting_text()?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(text)
    }

    /// The text still held back at the end: an incomplete character, as U+FFFD.
    pub fn finish(self) -> Result<String, DataError> {
        self.waiting_text()
    }

    fn waiting_text(&self) -> Result<String, DataError> {
        let before = self.tokenizer.decode(&self.ids[..self.shown])?;
        let mut all = self.tokenizer.decode(&self.ids)?;
        // If the context reads differently now, only what follows its length is new.
        let mut start = before.len().min(all.len());
        while !all.is_char_boundary(start) {
            start += 1;
        }
        Ok(all.split_off(start))
    }
}
