//! Text in, text out: tokens are decoded as they come, and a stop string ends the completion.

use std::ops::ControlFlow;

use super::{Completion, GenerateError, Request, Sampling, generate};
use crate::data::Tokenizer;
use crate::model::Decoder;

/// What to complete.
#[derive(Debug, Clone, PartialEq)]
pub struct TextRequest<'a> {
    /// Text to continue.
    pub prompt: &'a str,
    /// Most tokens to add.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Seed of the choice.
    pub seed: u64,
    /// Texts that end the completion; they are not part of it.
    pub stop: &'a [String],
}

/// Continues a text. `on_text` gets the completion piece by piece, always whole characters, never
/// any part of a stop string. Returns the completion's text and what [`generate`] says about it.
///
/// # Errors
/// As [`generate`], and a prompt with characters the tokenizer does not know.
pub fn complete(
    model: &Decoder,
    tokenizer: &Tokenizer,
    request: &TextRequest,
    mut on_text: impl FnMut(&str),
) -> Result<(String, Completion), GenerateError> {
    let tokens = Request {
        prompt: tokenizer.encode(request.prompt)?,
        max_new_tokens: request.max_new_tokens,
        sampling: request.sampling.clone(),
        seed: request.seed,
        vocabulary: Some(tokenizer.vocab_size()),
    };
    let mut decoder = tokenizer.stream_after(&tokens.prompt);
    let mut gate = StopGate::new(request.stop);
    let mut failure = None;
    let completion = generate(model, &tokens, |token| match decoder.push(token) {
        Ok(piece) => gate.pass(&piece, &mut on_text),
        Err(error) => {
            failure = Some(error);
            ControlFlow::Break(())
        }
    })?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    if !gate.stopped {
        let _ = gate.pass(&decoder.finish()?, &mut on_text);
        gate.release(&mut on_text);
    }
    Ok((gate.text, completion))
}

/// Lets text through until a stop string is complete, holding back what may become one.
struct StopGate<'a> {
    stop: &'a [String],
    /// Text let through.
    text: String,
    /// Text that may turn out to be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl<'a> StopGate<'a> {
    fn new(stop: &'a [String]) -> Self {
        Self {
            stop,
            text: String::new(),
            held: String::new(),
            stopped: false,
        }
    }

    fn pass(&mut self, piece: &str, out: &mut impl FnMut(&str)) -> ControlFlow<()> {
        if self.stopped {
            return ControlFlow::Break(());
        }
        self.held.push_str(piece);
        let found = self.stop.iter().filter(|stop| !stop.is_empty());
        if let Some(at) = found.filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            self.release(out);
            self.stopped = true;
            return ControlFlow::Break(());
        }
        let keep = self
            .stop
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        self.release(out);
        self.held = rest;
        ControlFlow::Continue(())
    }

    fn release(&mut self, out: &mut impl FnMut(&str)) {
        if !self.held.is_empty() {
            out(&self.held);
            self.text.push_str(&self.held);
            self.held.clear();
        }
    }
}

/// Bytes at the end of `text` that are a proper beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let beginnings = stop.char_indices().map(|(at, _)| &stop[..at]);
    beginnings
        .filter(|beginning| text.ends_with(beginning))
        .map(str::len)
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gated(pieces: &[&str], stop: &[&str]) -> (String, bool) {
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        let mut gate = StopGate::new(&stop);
        let mut out = String::new();
        for piece in pieces {
            if gate.pass(piece, &mut |text| out.push_str(text)).is_break() {
                break;
            }
        }
        if !gate.stopped {
            gate.release(&mut |text| out.push_str(text));
        }
        assert_eq!(out, gate.text);
        (out, gate.stopped)
    }

    #[test]
    fn i2_stop_strings_are_found_across_pieces_and_never_shown() {
        assert_eq!(gated(&["one\n", "\ntwo"], &["\n\n"]), ("one".into(), true));
        assert_eq!(gated(&["ab", "ac"], &["abad"]), ("abac".into(), false));
        assert_eq!(gated(&["aa", "ab"], &["aab"]), ("a".into(), true));
        assert_eq!(gated(&["x=1;y", "=2"], &["y", ";"]), ("x=1".into(), true));
        assert_eq!(gated(&["é", "è"], &["èé"]), ("éè".into(), false));
        assert_eq!(gated(&["all"], &[]), ("all".into(), false));
        assert_eq!(gated(&["all"], &[""]), ("all".into(), false));
    }
}
