//! Cutting a long text into pieces that can be tokenised on their own.
//!
//! Tokenising a whole book at once takes many times the book's memory and one core. Cut at the
//! wrong place, though, the pieces give other tokens than the whole: in the middle of a word, or
//! anywhere at all with a tokenizer that puts a space before every text it is given. So a cut is
//! made only where a word certainly ends, before a space between two letters or after a line
//! break between two lines, and only if the tokenizer agrees, judged on the text around the cut.

/// Bytes of text on each side of a cut that the tokenizer is asked about.
const CONTEXT: usize = 64;

/// After this many refusals the rest of the text stays whole: the tokenizer refuses on principle.
const REFUSALS: usize = 8;

/// Iterator over the pieces of a text, in order; together they are the text.
pub(super) struct Pieces<'a, F> {
    rest: &'a str,
    target: usize,
    agrees: F,
    refusals_left: usize,
}

impl<'a, F: FnMut(&str, &str) -> bool> Pieces<'a, F> {
    /// Pieces of about `target` bytes. `agrees(left, right)` says whether tokenising the two
    /// apart gives the same as tokenising them together.
    pub(super) fn new(text: &'a str, target: usize, agrees: F) -> Self {
        Self {
            rest: text,
            target,
            agrees,
            refusals_left: REFUSALS,
        }
    }

    /// Where to end the next piece.
    fn cut(&mut self) -> usize {
        let text = self.rest;
        let mut from = self.target;
        while self.refusals_left > 0 && from < text.len() {
            let Some(at) = word_end(text, from) else {
                break;
            };
            let left = &text[boundary_before(text, at.saturating_sub(CONTEXT))..at];
            let right = &text[at..boundary_before(text, (at + CONTEXT).min(text.len()))];
            if (self.agrees)(left, right) {
                return at;
            }
            self.refusals_left -= 1;
            from = at + 1;
        }
        text.len()
    }
}

impl<'a, F: FnMut(&str, &str) -> bool> Iterator for Pieces<'a, F> {
    type Item = &'a str;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let (piece, rest) = self.rest.split_at(self.cut());
        self.rest = rest;
        Some(piece)
    }
}

/// The first place from byte `from` on where a word ends and another begins.
fn word_end(text: &str, from: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    (from.max(1)..bytes.len().saturating_sub(1)).find(|&i| {
        let (before, here, after) = (bytes[i - 1], bytes[i], bytes[i + 1]);
        let before_a_space =
            here == b' ' && before.is_ascii_alphabetic() && after.is_ascii_alphabetic();
        let after_a_line_break =
            before == b'\n' && i >= 2 && is_visible(bytes[i - 2]) && is_visible(here);
        before_a_space || (after_a_line_break && text.is_char_boundary(i))
    })
}

/// ASCII that is not blank. Beyond ASCII there are blanks of several bytes, so those do not count.
fn is_visible(byte: u8) -> bool {
    byte.is_ascii_graphic()
}

fn boundary_before(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str, target: usize, agrees: bool) -> Vec<&str> {
        Pieces::new(text, target, |_, _| agrees).collect()
    }

    #[test]
    fn r3_pieces_add_up_to_the_text() {
        let text = "one two,\nthree  four\r\nfünf sechs\n\nseven é eight nine";
        for target in 0..text.len() + 2 {
            assert_eq!(pieces(text, target, true).concat(), text, "target {target}");
        }
    }

    #[test]
    fn r3_cuts_only_between_words() {
        assert_eq!(pieces("ab cd ef", 1, true), ["ab", " cd", " ef"]);
        assert_eq!(pieces("a.\nb.\n\nc", 1, true), ["a.\n", "b.\n\nc"]);
        assert_eq!(pieces("a  b, c", 1, true), ["a  b, c"]);
    }

    #[test]
    fn r3_a_tokenizer_that_refuses_gets_the_whole_text() {
        let text = "ab ".repeat(100);
        assert_eq!(pieces(&text, 10, false), [text.as_str()]);
    }
}
