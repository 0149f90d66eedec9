//! What is worth saying about rows, kept with their tokens in the cache.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::encode::EncodedRow;
use super::{Place, RowFormat};
use crate::data::Tokenizer;
use crate::data::notes::counted;

/// Of all rows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct RowSummary {
    /// Per dataset.
    pub(super) datasets: Vec<Findings>,
    /// Of the validation file, if there is one.
    pub(super) val: Option<Findings>,
    /// UTF-8 bytes of the trained text of the validation rows, special tokens left out.
    pub(super) val_bytes: u64,
    /// The special token that every trained range ends with, if it is always the same.
    pub(super) turn_end: Option<u32>,
    pub(super) rows: Counts,
}

/// Of one dataset.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Findings {
    pub(super) format: RowFormat,
    pub(super) rows: u64,
    /// Fields of records that nothing is made of.
    pub(super) unused: BTreeSet<String>,
    /// Records with `label = false`.
    pub(super) bad_labels: u64,
}

/// Of rows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Counts {
    pub(super) dropped: Counted,
    pub(super) cut: Counted,
    pub(super) empty_answers: Counted,
    pub(super) tools_left_out: Counted,
    pub(super) straddling: Counted,
    /// Rows in which a trained range ends with no special token.
    pub(super) unended: Counted,
    pub(super) unknown: u64,
    turn_ends: BTreeSet<u32>,
}

/// How many, and where the first one is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Counted {
    pub(super) count: u64,
    pub(super) first: String,
}

impl Counted {
    pub(super) fn add(&mut self, count: u64, place: &dyn Fn() -> Place) {
        if count > 0 && self.count == 0 {
            self.first = place().to_string();
        }
        self.count += count;
    }

    fn describe(&self, one: &str) -> String {
        format!("{} (first: {})", counted(self.count, one), self.first)
    }
}

impl Counts {
    pub(super) fn add(&mut self, row: &EncodedRow, place: &dyn Fn() -> Place) {
        self.cut.add(u64::from(row.is_cut), place);
        self.straddling.add(row.straddling, place);
        let unended = row.ends.iter().any(Option::is_none);
        self.unended.add(u64::from(unended), place);
        self.unknown += row.unknown;
        self.turn_ends.extend(row.ends.iter().flatten());
    }

    /// The special token that every trained range ends with.
    pub(super) fn turn_end(&self) -> Option<u32> {
        let only = self.turn_ends.first().filter(|_| self.turn_ends.len() == 1);
        only.copied().filter(|_| self.unended.count == 0)
    }

    /// A line for each thing that is out of the ordinary, and always one for rows that are too long.
    pub(super) fn describe(&self, sequence_len: usize, tokenizer: &Tokenizer) -> Vec<String> {
        let longer = format!("longer than sequence_len = {sequence_len}");
        let mut lines = Vec::new();
        if self.dropped.count > 0 {
            let what = self.dropped.describe("row");
            lines.push(format!("warning: left out as {longer}: {what}"));
        }
        if self.cut.count > 0 {
            let what = self.cut.describe("row");
            lines.push(format!("warning: cut, being {longer}: {what}"));
        }
        if self.dropped.count + self.cut.count == 0 {
            lines.push(format!("0 rows are {longer}"));
        }
        let mut warn = |counted: &Counted, one: &str, what: &str| {
            if counted.count > 0 {
                lines.push(format!("warning: {} {what}", counted.describe(one)));
            }
        };
        warn(
            &self.empty_answers,
            "empty answer",
            "are trained to end at once",
        );
        warn(
            &self.tools_left_out,
            "row",
            "have tools that the chat template does not write",
        );
        warn(
            &self.unended,
            "row",
            "have answers that end without a special token: a model trained on them may not know where to stop",
        );
        if self.straddling.count > 0 {
            let what = self.straddling.describe("token");
            lines.push(format!(
                "trained though their first characters are the prompt's: {what}"
            ));
        }
        if self.unknown > 0 {
            let what = counted(self.unknown, "unknown token");
            lines.push(format!(
                "warning: the tokenizer does not know all of this text: {what}"
            ));
        }
        if tokenizer.unknown() == crate::data::Unknown::Dropped {
            lines.push(
                "warning: this tokenizer leaves out characters that it has no token for"
                    .to_string(),
            );
        }
        lines
    }
}
