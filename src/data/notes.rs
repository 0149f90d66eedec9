//! The lines that tell a user what was made of the data.
//!
//! A run that finds its tokens in the cache does not look into the files again, yet must say the
//! same things about them. So what is worth saying is collected in a [`Summary`] that is stored
//! with the tokens.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::documents::{Documents, Format};
use crate::config::DatasetKind;
use crate::readable::grouped;

/// What was found in the data when it was tokenised.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Summary {
    /// Per dataset.
    pub(super) datasets: Vec<Findings>,
    /// Of the validation file, if there is one.
    pub(super) val: Option<Findings>,
    /// UTF-8 bytes of the validation text.
    pub(super) val_bytes: u64,
    /// Tokens that stand for text the tokenizer has no token for.
    pub(super) unknown_tokens: u64,
}

/// What was found in some files.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Findings {
    documents: u64,
    characters: u64,
    empty: u64,
    nul: u64,
    byte_order_marks: u64,
}

impl Findings {
    pub(super) fn of(files: &[(Format, Documents)]) -> Self {
        let mut findings = Self::default();
        for (_, documents) in files {
            let characters = documents
                .texts
                .iter()
                .map(|text| text.chars().count() as u64);
            findings.documents += documents.texts.len() as u64;
            findings.characters += characters.sum::<u64>();
            findings.empty += documents.empty;
            findings.nul += documents.nul;
            findings.byte_order_marks += u64::from(documents.byte_order_mark);
        }
        findings
    }

    /// "4 documents, 1,115,394 characters", and what is out of the ordinary.
    pub(super) fn describe(&self) -> String {
        let mut parts = vec![
            counted(self.documents, "document"),
            counted(self.characters, "character"),
        ];
        if self.empty > 0 {
            parts.push(format!("{} left out", counted(self.empty, "empty text")));
        }
        if self.byte_order_marks > 0 {
            let marks = counted(self.byte_order_marks, "byte order mark");
            parts.push(format!("{marks} taken off"));
        }
        if self.nul > 0 {
            let nul = counted(self.nul, "NUL character");
            parts.push(format!("{nul} kept: are these text files?"));
        }
        parts.join(", ")
    }
}

/// "12 files (auto: 10 .rs as plain text, 2 .jsonl as records, field `text`)".
pub(super) fn formats(paths: &[PathBuf], kind: DatasetKind, field: &str) -> String {
    let mut endings: BTreeMap<(Format, String), u64> = BTreeMap::new();
    for path in paths {
        let ending = match path.extension() {
            Some(ending) => format!(".{}", ending.to_string_lossy()),
            None => "without ending".to_string(),
        };
        *endings.entry((Format::of(path), ending)).or_default() += 1;
    }
    let said: Vec<String> = endings
        .iter()
        .map(|((format, ending), count)| match format {
            Format::Text => format!("{count} {ending} as plain text"),
            Format::Records => format!("{count} {ending} as records, field `{field}`"),
        })
        .collect();
    let prefix = match kind {
        DatasetKind::Auto => "auto: ",
        _ => "",
    };
    format!(
        "{} ({prefix}{})",
        counted(paths.len() as u64, "file"),
        said.join("; ")
    )
}

/// "1 file", "2,000 files".
pub(super) fn counted(count: u64, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{} {what}{plural}", grouped(count))
}

/// A dataset in an error message: its number and its first path.
pub(super) fn dataset_name(index: usize, paths: &[PathBuf]) -> String {
    let first = paths
        .first()
        .map_or(Path::new(""), PathBuf::as_path)
        .display();
    match paths.len() {
        0 | 1 => format!("data.datasets[{index}] (`{first}`)"),
        n => format!("data.datasets[{index}] (`{first}` and {} more)", n - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        let numbers = [0, 999, 1_000, 123_456, 1_234_567].map(grouped);
        assert_eq!(numbers, ["0", "999", "1,000", "123,456", "1,234,567"]);
    }

    #[test]
    fn r3_the_detected_format_is_said() {
        let paths = ["a.rs", "b.rs", "c.jsonl", "LICENSE"].map(PathBuf::from);
        assert_eq!(
            formats(&paths, DatasetKind::Auto, "content"),
            "4 files (auto: 2 .rs as plain text; 1 without ending as plain text; \
             1 .jsonl as records, field `content`)"
        );
    }
}
