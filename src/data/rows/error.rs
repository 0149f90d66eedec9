//! What can be wrong with a row.

use std::fmt;
use std::path::PathBuf;

use super::RowFormat;
use crate::data::{DataError, TemplateError};
use crate::readable::grouped;

/// Where a row comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// Line from 1; of a Parquet file, the row.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
    }
}

/// A row, or rows, that cannot be trained on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RowError {
    /// A record whose fields are those of no format.
    #[error(
        "{place}: the record's fields are those of no known format (it has: {})",
        listed(fields)
    )]
    UnknownFormat {
        /// The record.
        place: Place,
        /// Its fields.
        fields: Vec<String>,
    },
    /// A record without a field of its format.
    #[error(
        "{place}: {format} rows have a field `{field}`, this record has not (it has: {})",
        listed(fields)
    )]
    NoField {
        /// The record.
        place: Place,
        /// What the dataset holds.
        format: RowFormat,
        /// The field that was looked for.
        field: String,
        /// The fields the record has.
        fields: Vec<String>,
    },
    /// So few pairs that training or validation has none.
    #[error("{count} preference pairs: {train} to train on, {} to validate on", count - train)]
    TooFewPairs {
        /// All pairs.
        count: usize,
        /// Those to train on.
        train: usize,
    },
    /// A row is longer than the sequences of a phase: it was read for longer ones.
    #[error("a row takes {longest} places, and sequences have {sequence_len}")]
    ShorterView {
        /// Tokens of the longest row.
        longest: usize,
        /// Tokens of a sequence.
        sequence_len: usize,
    },
    /// A field of the wrong type.
    #[error("{place}: {what} is {found}, not {wanted}")]
    WrongType {
        /// The record.
        place: Place,
        /// What has the wrong type.
        what: String,
        /// The type it has.
        found: &'static str,
        /// The type it should have.
        wanted: &'static str,
    },
    /// A conversation without messages.
    #[error("{place}: `{field}` is empty")]
    NoMessages {
        /// The record.
        place: Place,
        /// The list's field.
        field: String,
    },
    /// A message by someone unknown.
    #[error("{place}: message {message} is by `{role}`, who is none of: {}", known.join(", "))]
    UnknownRole {
        /// The record.
        place: Place,
        /// Which message, from 1.
        message: usize,
        /// Its role.
        role: String,
        /// The roles there are.
        known: Vec<&'static str>,
    },
    /// Content that is not text.
    #[error("{place}: message {message} holds {what}; only text can be trained on")]
    NotText {
        /// The record.
        place: Place,
        /// Which message, from 1.
        message: usize,
        /// What it holds.
        what: String,
    },
    /// A call of a function that is not one.
    #[error("{place}: message {message} calls a function, but {reason}")]
    BadCall {
        /// The record.
        place: Place,
        /// Which message, from 1.
        message: usize,
        /// What is wrong.
        reason: String,
    },
    /// Tools that are not a list of functions.
    #[error("{place}: `{field}`: {reason}")]
    BadTools {
        /// The record.
        place: Place,
        /// The field.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// A row that the template does not render.
    #[error("{place}: {source}")]
    Template {
        /// The row.
        place: Place,
        /// Why.
        source: TemplateError,
    },
    /// A template in whose text the assistant's turns cannot be found.
    #[error(
        "{place}: chat template {template} rewrites earlier messages when more follow, \
         so that the text of message {message} cannot be told apart"
    )]
    NotConsistent {
        /// The row.
        place: Place,
        /// The template, in words.
        template: String,
        /// Which message, from 1.
        message: usize,
    },
    /// A template that leaves out calls of functions.
    #[error("{place}: chat template {template} leaves out the call of `{function}`")]
    CallLeftOut {
        /// The row.
        place: Place,
        /// The template, in words.
        template: String,
        /// The function.
        function: String,
    },
    /// Conversations, and no template.
    #[error("{what} holds conversations, and there is no chat template: {source}")]
    NoTemplate {
        /// The dataset, in words.
        what: String,
        /// Why there is none.
        source: TemplateError,
    },
    /// Preference pairs where rows are wanted.
    #[error("{what} holds preference pairs, which task = \"sft\" does not train on")]
    Preference {
        /// The dataset, in words.
        what: String,
        /// The field with the better answer.
        chosen: String,
    },
    /// Rows where preference pairs are wanted.
    #[error("{what} holds {format} rows, not preference pairs")]
    NotPreference {
        /// The dataset, in words.
        what: String,
        /// What it holds.
        format: RowFormat,
    },
    /// A tokenizer that would have to be learned from rows.
    #[error("rows need a tokenizer that is already there, not one learned from the data")]
    LearnedTokenizer,
    /// Rows that do not fit a sequence.
    #[error(
        "{} of {} rows are longer than data.sequence_len = {sequence_len}\nfirst: {place} - {} tokens; the longest has {}",
        grouped(*count), grouped(*rows), at_least(*tokens), at_least(*longest)
    )]
    Overlong {
        /// How many.
        count: u64,
        /// Of how many.
        rows: u64,
        /// The first.
        place: Place,
        /// Its tokens, and whether that is only known to be a lower bound.
        tokens: (u64, bool),
        /// Tokens of the longest, and whether that is only known to be a lower bound.
        longest: (u64, bool),
        /// `data.sequence_len`.
        sequence_len: usize,
    },
    /// Rows of which nothing would be learned.
    #[error(
        "{} of {} rows have no trainable token\nfirst: {place} - {reason}",
        grouped(*count), grouped(*rows)
    )]
    Untrainable {
        /// How many.
        count: u64,
        /// Of how many.
        rows: u64,
        /// The first.
        place: Place,
        /// Why it has none.
        reason: String,
        /// Whether it was cut off by truncation.
        cut: bool,
    },
    /// Weights that repeat rows too often.
    #[error("an epoch of {rows} rows, weights included, does not fit into memory")]
    TooManyRows {
        /// Rows of an epoch.
        rows: u128,
    },
    /// Nothing left to train on.
    #[error("{what}: no rows are left to {purpose} on, of {} in the files", grouped(*rows))]
    NothingLeft {
        /// The dataset, in words.
        what: String,
        /// To train on, or to validate on.
        purpose: &'static str,
        /// Rows in its files.
        rows: u64,
    },
}

impl From<RowError> for DataError {
    fn from(error: RowError) -> Self {
        Self::Rows(Box::new(error))
    }
}

impl RowError {
    /// What the user can do about it.
    pub fn help(&self) -> Option<String> {
        let help = match self {
            Self::UnknownFormat { fields, .. } => suggestion(fields),
            Self::ShorterView { .. } => {
                "raise data.sequence_len, or data.overlong = \"truncate\"".to_string()
            }
            Self::TooFewPairs { .. } => {
                "add pairs, or change data.val_fraction; 0 trains without validation".to_string()
            }
            Self::NoField { format, field, .. } => {
                let key = format.key_of(field);
                format!("name the field that holds it: fields = {{ {key} = \"...\" }}, or say what the dataset holds: type = \"...\"")
            }
            Self::WrongType { .. } | Self::NotText { .. } | Self::NoMessages { .. } => {
                "correct the row, or take it out".to_string()
            }
            Self::UnknownRole { .. } => {
                "name the role as one of these".to_string()
            }
            Self::BadCall { .. } => {
                "a call is {\"name\": ..., \"arguments\": {...}}, or a list of such".to_string()
            }
            Self::BadTools { .. } => {
                "tools are a list of {\"name\": ..., \"description\": ..., \"parameters\": ...}, as JSON or as a string of it".to_string()
            }
            Self::Template { source, .. } => return source.help(),
            Self::NoTemplate { source, .. } => return source.help(),
            Self::NotConsistent { .. } => {
                "put {% generation %} and {% endgeneration %} around what the assistant writes in the template, \
                 set data.train_on = \"last\", or name another: data.chat_template = \"chatml\"".to_string()
            }
            Self::CallLeftOut { .. } => {
                "use a template that writes tool_calls: data.chat_template = \"chatml\"".to_string()
            }
            Self::Preference { chosen, .. } => format!(
                "task = \"dpo\" does; to train on the better answers alone: type = \"completion\", fields = {{ completion = \"{chosen}\" }}"
            ),
            Self::NotPreference { .. } => {
                "preference rows have a prompt or a conversation, and the fields chosen and rejected".to_string()
            }
            Self::LearnedTokenizer => {
                "set model.base_model, or [tokenizer] type = \"file\" and path = \".../tokenizer.json\"".to_string()
            }
            Self::Overlong { longest, .. } => format!(
                "raise data.sequence_len to {}, or set data.overlong = \"drop\" or \"truncate\"",
                longest.0.saturating_sub(1)
            ),
            Self::Untrainable { cut: true, .. } => {
                "raise data.sequence_len, or leave such rows out: data.overlong = \"drop\"".to_string()
            }
            Self::Untrainable { .. } => {
                "take them out, or train on every token: data.train_on = \"all\"".to_string()
            }
            Self::TooManyRows { .. } => "lower the weights of the datasets".to_string(),
            Self::NothingLeft { purpose: "train", .. } => {
                "add rows, raise data.sequence_len, or lower data.val_fraction".to_string()
            }
            Self::NothingLeft { .. } => {
                "raise data.val_fraction, or set it to 0 to train without validation".to_string()
            }
        };
        Some(help)
    }

    /// The exit code of a run that ends with this error: 2 = the config, 3 = the data.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoTemplate { .. } | Self::LearnedTokenizer => 2,
            Self::Template { source, .. } if source.is_about_template() => 2,
            _ => 3,
        }
    }
}

fn listed(fields: &[String]) -> String {
    if fields.is_empty() {
        "none".to_string()
    } else {
        fields.join(", ")
    }
}

fn at_least((tokens, is_bound): (u64, bool)) -> String {
    let bound = if is_bound { "at least " } else { "" };
    format!("{bound}{}", grouped(tokens))
}

/// What a person with these fields probably means.
fn suggestion(fields: &[String]) -> String {
    let has = |names: &[&'static str]| {
        let found = names
            .iter()
            .find(|name| fields.iter().any(|field| field == *name));
        found.copied()
    };
    let prompt = has(&[
        "prompt",
        "question",
        "query",
        "instruction",
        "input",
        "problem",
    ]);
    let completion = has(&["completion", "answer", "response", "output", "solution"]);
    match (prompt, completion) {
        (Some(prompt), Some(completion)) => format!(
            "if these are prompts and answers: fields = {{ prompt = \"{prompt}\", completion = \"{completion}\" }}"
        ),
        _ => "formats: messages; conversations; instruction, input, output; prompt, completion; text. \
              `fields` names fields that are called otherwise"
            .to_string(),
    }
}
