//! What the fields of a record mean.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{DatasetKind, FieldNames};

/// What a dataset's records hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowFormat {
    /// `text`.
    Text,
    /// `prompt`, `completion`.
    Completion,
    /// `instruction`, `input`, `output`.
    Alpaca,
    /// `conversations` of `from`, `value`.
    Sharegpt,
    /// `messages` of `role`, `content`.
    Messages,
    /// `chosen`, `rejected`, and a `prompt` or a conversation.
    Preference,
}

impl RowFormat {
    /// What the config says; none where it leaves it to the records.
    pub(super) fn of_kind(kind: DatasetKind) -> Option<Self> {
        match kind {
            DatasetKind::Auto => None,
            DatasetKind::Text => Some(Self::Text),
            DatasetKind::Completion => Some(Self::Completion),
            DatasetKind::Alpaca => Some(Self::Alpaca),
            DatasetKind::Sharegpt => Some(Self::Sharegpt),
            DatasetKind::Messages => Some(Self::Messages),
            DatasetKind::Preference => Some(Self::Preference),
        }
    }

    /// What a record's fields say, the more specific formats first.
    pub fn detect(record: &Map<String, Value>, names: &FieldNames) -> Option<Self> {
        let has = |all: &[&str]| all.iter().all(|name| record.contains_key(*name));
        let formats: [(Self, &[&str]); 6] = [
            (Self::Preference, &[&names.chosen, &names.rejected]),
            (Self::Messages, &[&names.messages]),
            (Self::Sharegpt, &[&names.conversations]),
            (Self::Alpaca, &[&names.instruction, &names.output]),
            (Self::Completion, &[&names.prompt, &names.completion]),
            (Self::Text, &[&names.text]),
        ];
        let found = formats.into_iter().find(|(_, fields)| has(fields));
        found.map(|(format, _)| format)
    }

    /// Whether its rows can only be written with a chat template.
    pub(super) fn is_conversation(self) -> bool {
        matches!(self, Self::Sharegpt | Self::Messages)
    }

    /// The fields without which there is no row.
    pub(super) fn required(self, names: &FieldNames) -> Vec<&str> {
        match self {
            Self::Text => vec![&names.text],
            Self::Completion => vec![&names.prompt, &names.completion],
            Self::Alpaca => vec![&names.instruction, &names.output],
            Self::Sharegpt => vec![&names.conversations],
            Self::Messages => vec![&names.messages],
            Self::Preference => vec![&names.chosen, &names.rejected],
        }
    }

    /// The fields that are read from its records.
    pub(super) fn fields(self, names: &FieldNames) -> Vec<&str> {
        match self {
            Self::Text => vec![&names.text],
            Self::Completion => vec![
                &names.prompt,
                &names.completion,
                &names.system,
                &names.tools,
            ],
            Self::Alpaca => vec![
                &names.instruction,
                &names.input,
                &names.output,
                &names.system,
                &names.history,
            ],
            Self::Sharegpt => vec![&names.conversations, &names.system, &names.tools],
            Self::Messages => vec![&names.messages, &names.tools],
            Self::Preference => vec![
                &names.prompt,
                &names.conversations,
                &names.messages,
                &names.system,
                &names.tools,
                &names.chosen,
                &names.rejected,
            ],
        }
    }

    /// The key of `fields` that a missing field is most likely to be named by.
    pub(super) fn key_of(self, field: &str) -> String {
        let names = FieldNames::default();
        let known = names.all().into_iter().find(|(_, name)| *name == field);
        known.map_or_else(|| field.to_string(), |(key, _)| key.to_string())
    }
}

impl fmt::Display for RowFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Completion => "completion",
            Self::Alpaca => "alpaca",
            Self::Sharegpt => "sharegpt",
            Self::Messages => "messages",
            Self::Preference => "preference",
        })
    }
}
