//! Where a key or value was written: the file, or a `--set` argument.
//!
//! Every issue a person has to fix points at text they wrote. [`Sources`] keeps that text, an
//! [`Origin`] is a range of it, and a [`Location`] is what a terminal or an editor wants to know.

use std::ops::Range;
use std::path::PathBuf;

/// The texts a configuration was read from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    /// The file, as it was named on the command line.
    pub path: PathBuf,
    /// The file's contents.
    pub text: String,
    /// The `--set` arguments, in order.
    pub sets: Vec<String>,
}

/// A byte range of one of the texts in [`Sources`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A range of the file.
    File(Range<usize>),
    /// A range of the n-th `--set` argument.
    Set {
        /// Which argument, from 0.
        index: usize,
        /// The range within it.
        span: Range<usize>,
    },
}

impl Origin {
    /// From the start of `self` to the end of `other` where both lie in the same text in that
    /// order, else `other`.
    pub fn to(&self, other: &Origin) -> Origin {
        match (self, other) {
            (Origin::File(a), Origin::File(b)) if a.start <= b.end => Origin::File(a.start..b.end),
            (
                Origin::Set { index, span: a },
                Origin::Set {
                    index: same,
                    span: b,
                },
            ) if index == same && a.start <= b.end => Origin::Set {
                index: *index,
                span: a.start..b.end,
            },
            _ => other.clone(),
        }
    }

    /// Orders issues as a reader meets them: down the file, then along the command line.
    pub(super) fn rank(&self) -> (usize, usize) {
        match self {
            Origin::File(span) => (0, span.start),
            Origin::Set { index, span } => (1 + index, span.start),
        }
    }
}

/// An origin in a person's terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location<'a> {
    /// The file's name, or `--set`.
    pub name: String,
    /// The whole text that `span` is a range of.
    pub text: &'a str,
    /// Byte range, clamped to character boundaries of `text`.
    pub span: Range<usize>,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

impl Sources {
    /// Finds an origin's text, line and column.
    pub fn locate(&self, origin: &Origin) -> Location<'_> {
        let (name, text, span) = match origin {
            Origin::File(span) => (self.path.display().to_string(), self.text.as_str(), span),
            Origin::Set { index, span } => {
                let text = self.sets.get(*index).map_or("", String::as_str);
                ("--set".to_string(), text, span)
            }
        };
        let start = text.floor_char_boundary(span.start);
        let end = text.ceil_char_boundary(span.end.max(start));
        let before = &text[..start];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Location {
            name,
            text,
            span: start..end,
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_count_characters_and_spans_never_split_one() {
        let sources = Sources {
            path: "x.toml".into(),
            text: "a = 1\nö = \"ü\"".to_string(),
            sets: vec!["k=v".to_string()],
        };
        let location = sources.locate(&Origin::File(9..12));
        assert_eq!((location.line, location.column), (2, 3));
        assert_eq!(location.name, "x.toml");
        let split = sources.locate(&Origin::File(7..7));
        assert_eq!(split.span, 6..8, "inside the two bytes of the ö");
        let beyond = sources.locate(&Origin::File(90..99));
        assert_eq!(beyond.span, 15..15);
        let set = sources.locate(&Origin::Set {
            index: 0,
            span: 2..3,
        });
        assert_eq!((set.text, set.column), ("k=v", 3));
    }
}
