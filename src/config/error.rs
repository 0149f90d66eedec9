//! What can be wrong with a configuration. Every one of these is exit code 2.

use std::fmt;
use std::path::PathBuf;

use super::source::{Origin, Sources};

/// One thing to fix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issue {
    /// What is wrong, naming the key.
    pub message: String,
    /// Where it was written; absent when the whole file is meant.
    pub origin: Option<Origin>,
    /// What to do about it.
    pub help: Option<String>,
}

/// A configuration that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is missing or unreadable.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file as named.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is larger than any configuration.
    #[error("{} is larger than {limit} bytes: not a configuration", path.display())]
    TooLarge {
        /// The file as named.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// The file is not UTF-8 text.
    #[error("{} is not UTF-8 text: invalid byte at offset {offset} (line {line})", path.display())]
    NotUtf8 {
        /// The file as named.
        path: PathBuf,
        /// Offset of the first invalid byte.
        offset: usize,
        /// Its line, from 1.
        line: usize,
    },
    /// The text says something that cannot be run: everything that is wrong with it, at once.
    #[error("{}", list(sources, issues))]
    Invalid {
        /// The texts that the issues point into.
        sources: Sources,
        /// At least one, in reading order.
        issues: Vec<Issue>,
    },
}

impl ConfigError {
    /// The issues of an invalid configuration; empty when it could not be read at all.
    pub fn issues(&self) -> &[Issue] {
        match self {
            ConfigError::Invalid { issues, .. } => issues,
            _ => &[],
        }
    }

    /// The process exit code: always 2.
    pub fn exit_code(&self) -> u8 {
        2
    }
}

/// One line per issue, `file:line:column: message (help)`: for logs and library users. The
/// terminal's rendering, with source lines, is the command line's business.
fn list(sources: &Sources, issues: &[Issue]) -> String {
    let lines: Vec<String> = issues
        .iter()
        .map(|issue| Line { sources, issue }.to_string())
        .collect();
    lines.join("\n")
}

struct Line<'a> {
    sources: &'a Sources,
    issue: &'a Issue,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.issue.origin {
            Some(origin) => {
                let at = self.sources.locate(origin);
                write!(f, "{}:{}:{}: ", at.name, at.line, at.column)?;
            }
            None => write!(f, "{}: ", self.sources.path.display())?,
        }
        f.write_str(&self.issue.message)?;
        match &self.issue.help {
            Some(help) => write!(f, " ({help})"),
            None => Ok(()),
        }
    }
}
