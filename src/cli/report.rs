//! How errors look in the terminal: what happened, where, what to do.
//!
//! ```text
//! error[config]: unknown key `max_step` in [train]
//!  --> configs/x.toml:14:1
//!    |
//! 14 | max_step = 16
//!    | ^^^^^^^^
//!    |
//!    = help: did you mean `max_steps`?
//! ```
//!
//! Every module's errors become [`Diagnostic`]s: a kind, a message, and where they help a snippet
//! and a way out. Colours only where a person is watching: standard error is a terminal and
//! `NO_COLOR` is unset.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer};

use crate::config::{ConfigError, Issue, Sources};

/// One error as it is shown.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Diagnostic {
    /// The word in `error[kind]`: config, data, model, io, …
    pub kind: &'static str,
    /// What happened; further lines are notes under the snippet.
    pub message: String,
    /// Where.
    pub snippet: Option<Snippet>,
    /// What to do.
    pub help: Option<String>,
}

/// The place that an error points at.
#[derive(Debug, Clone, PartialEq)]
pub struct Snippet {
    /// A file, or `--set`.
    pub name: String,
    /// The line to show; `None` when the file as a whole is meant.
    pub line: Option<SourceLine>,
}

/// One line of a file with a part of it marked.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceLine {
    /// Line number, from 1.
    pub number: usize,
    /// The line, without its end.
    pub text: String,
    /// Bytes of `text` to underline.
    pub span: Range<usize>,
}

impl Diagnostic {
    /// An error without a place.
    pub fn new(kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            ..Self::default()
        }
    }

    fn from_issue(issue: &Issue, sources: &Sources) -> Self {
        let snippet = match &issue.origin {
            None => Snippet {
                name: sources.path.display().to_string(),
                line: None,
            },
            Some(origin) => {
                let at = sources.locate(origin);
                Snippet {
                    line: Some(SourceLine::around(at.text, at.span, at.line)),
                    name: at.name,
                }
            }
        };
        Self {
            kind: "config",
            message: issue.message.clone(),
            snippet: Some(snippet),
            help: issue.help.clone(),
        }
    }
}

impl SourceLine {
    /// The line on which `span` begins, and as much of the span as lies on it.
    fn around(text: &str, span: Range<usize>, number: usize) -> Self {
        let start = text[..span.start]
            .rfind('\n')
            .map_or(0, |newline| newline + 1);
        let end = text[span.start..]
            .find('\n')
            .map_or(text.len(), |newline| span.start + newline);
        let line = text[start..end].trim_end_matches('\r');
        let within = |offset: usize| (offset - start).min(line.len());
        Self {
            number,
            text: line.to_string(),
            span: within(span.start)..within(span.end),
        }
    }
}

/// The errors as text, one block each. A file with more than [`MAX_SHOWN`] is cut short.
pub fn render(diagnostics: &[Diagnostic], styled: bool) -> String {
    let renderer = if styled {
        Renderer::styled()
    } else {
        Renderer::plain()
    };
    let shown = diagnostics.iter().take(MAX_SHOWN);
    let blocks: Vec<String> = shown
        .map(|diagnostic| renderer.render(&[group(diagnostic)]))
        .collect();
    blocks.join("\n\n") + "\n"
}

/// Nobody reads further before fixing these.
pub const MAX_SHOWN: usize = 100;

fn group(diagnostic: &Diagnostic) -> Group<'_> {
    let mut lines = diagnostic.message.lines();
    let title = Level::ERROR
        .primary_title(lines.next().unwrap_or_default())
        .id(diagnostic.kind);
    let mut group = Group::with_title(title);
    group = match &diagnostic.snippet {
        None => group,
        Some(Snippet { name, line: None }) => group.element(Origin::path(name.as_str())),
        Some(Snippet {
            name,
            line: Some(line),
        }) => group.element(
            annotate_snippets::Snippet::source(line.text.as_str())
                .line_start(line.number)
                .path(name.as_str())
                .annotation(AnnotationKind::Primary.span(line.span.clone())),
        ),
    };
    for note in lines {
        group = group.element(Level::NOTE.no_name().message(printable(note)));
    }
    match &diagnostic.help {
        Some(help) => group.element(Level::HELP.message(printable(help))),
        None => group,
    }
}

/// The renderer makes titles and snippets safe to print; notes and help it trusts.
fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().any(|c| c.is_control() && c != '\n') {
        Cow::Owned(text.escape_debug().to_string())
    } else {
        Cow::Borrowed(text)
    }
}

/// A configuration's errors, and a last line that counts them.
pub fn render_config(error: &ConfigError, styled: bool) -> String {
    let ConfigError::Invalid { sources, issues } = error else {
        let diagnostic = Diagnostic::new("config", error.to_string());
        return render(&[diagnostic], styled);
    };
    let diagnostics: Vec<Diagnostic> = issues
        .iter()
        .take(MAX_SHOWN)
        .map(|issue| Diagnostic::from_issue(issue, sources))
        .collect();
    let count = match issues.len() {
        1 => "1 error".to_string(),
        count if count > MAX_SHOWN => format!("the first {MAX_SHOWN} of {count} errors"),
        count => format!("{count} errors"),
    };
    let text = render(&diagnostics, styled);
    format!("{text}\n{count} in {}\n", sources.path.display())
}

/// Writes to standard error, with colours if a person is watching.
pub fn print(render: impl FnOnce(bool) -> String) {
    let mut stderr = std::io::stderr().lock();
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let text = render(stderr.is_terminal() && !no_color);
    // With standard error gone there is no one left to tell; the exit code still says it.
    let _ = stderr.write_all(text.as_bytes());
}
