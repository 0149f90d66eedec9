//! What can go wrong between the files on disk and the first batch.
//!
//! Every variant carries what a person needs to find the place: the file, the line, the field,
//! the numbers that did not fit. [`DataError::help`] says what to do about it, and
//! [`DataError::exit_code`] which of the runner's exit codes it ends with.

use std::io;
use std::path::PathBuf;

use super::chat::TemplateError;
use super::rows::RowError;

/// A problem with the training data, the tokenizer or the token cache.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The config names no data.
    #[error("there is nothing to train on: [[data.datasets]] is empty")]
    NoDatasets,
    /// A path without wildcards that is not there.
    #[error("`{}` does not exist (working directory: {})", path.display(), directory.display())]
    Missing {
        /// The path as written.
        path: PathBuf,
        /// What a relative path is relative to.
        directory: PathBuf,
    },
    /// A glob that matches no file.
    #[error("`{pattern}` matches no file (working directory: {})", directory.display())]
    NoMatch {
        /// The glob as written.
        pattern: String,
        /// What a relative path is relative to.
        directory: PathBuf,
    },
    /// A glob that is not one.
    #[error("`{pattern}` is not a valid glob: {reason} at character {position}")]
    BadPattern {
        /// The glob as written.
        pattern: String,
        /// Where in it, counted from 0.
        position: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// A folder where a file is wanted.
    #[error("`{}` is a directory", path.display())]
    IsDirectory {
        /// The folder.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot read `{}`: {source}", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file's bytes are not those that were hashed a moment ago.
    #[error("`{}` changed while it was being read", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Bytes that are not UTF-8.
    #[error("{}:{line}: not UTF-8: byte 0x{byte:02x} at offset {offset}", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Line of the first bad byte, from 1.
        line: usize,
        /// Offset of the first bad byte, from 0.
        offset: usize,
        /// The bad byte.
        byte: u8,
        /// Whether the file starts with a UTF-16 byte order mark.
        utf16: bool,
    },
    /// Files without a single character in them.
    #[error("no text in {what}")]
    Empty {
        /// The dataset or file, in words.
        what: String,
    },
    /// A record that does not parse.
    #[error("{}:{line}: {reason}", path.display())]
    BadJson {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What the parser says.
        reason: String,
    },
    /// A .parquet file, and a build that cannot read one.
    #[error("`{}`: this build does not read Parquet", path.display())]
    ParquetNotCompiledIn {
        /// The file.
        path: PathBuf,
    },
    /// A .parquet file that cannot be read.
    #[error("`{}`: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the library says.
        reason: String,
    },
    /// Rows of instruction or preference data.
    #[error(transparent)]
    Rows(Box<RowError>),
    /// The chat template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A record without the text field.
    #[error("{}:{line}: the record has no field `{field}` (it has: {})", path.display(), listed(fields))]
    NoTextField {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The field that was looked for.
        field: String,
        /// The fields the record has.
        fields: Vec<String>,
    },
    /// A record that is not an object, or whose text is not a string.
    #[error("{}:{line}: {what} is {found}, not {wanted}", path.display())]
    WrongType {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What has the wrong type: "the record", "field `text`".
        what: String,
        /// The type it has.
        found: &'static str,
        /// The type it should have.
        wanted: &'static str,
    },
    /// Training data that does not fill one sequence.
    #[error(
        "{what} has {tokens} training tokens; one sequence needs {} (sequence_len {sequence_len}, and the token after it)",
        sequence_len + 1
    )]
    TooShort {
        /// The dataset, in words.
        what: String,
        /// Tokens in its training part.
        tokens: u64,
        /// `data.sequence_len`.
        sequence_len: usize,
    },
    /// A validation split in which nothing can be predicted.
    #[error(
        "the validation split has {tokens} tokens; there is nothing to predict with fewer than 2"
    )]
    ValTooShort {
        /// Tokens in it.
        tokens: u64,
    },
    /// A text in which nothing can be predicted.
    #[error("`{}` has {tokens} tokens; there is nothing to predict with fewer than 2", path.display())]
    NothingToPredict {
        /// The file.
        path: PathBuf,
        /// Tokens in it.
        tokens: u64,
    },
    /// `type = "file"` without a path.
    #[error("tokenizer.type is \"file\" but tokenizer.path is not set")]
    TokenizerPathUnset,
    /// No tokenizer.json at that path.
    #[error("tokenizer `{}` does not exist (working directory: {})", path.display(), directory.display())]
    TokenizerMissing {
        /// The path as written.
        path: PathBuf,
        /// What a relative path is relative to.
        directory: PathBuf,
    },
    /// A tokenizer.json or tokenizer_config.json that cannot be used.
    #[error("tokenizer `{}`: {reason}", path.display())]
    TokenizerInvalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Token ids so sparse that most of an embedding matrix would be unused.
    #[error("tokenizer `{}`: {tokens} tokens, but ids up to {max_id}; id {first_gap} is the first without a token", path.display())]
    TokenizerGaps {
        /// The file.
        path: PathBuf,
        /// Number of tokens.
        tokens: usize,
        /// Largest id.
        max_id: u32,
        /// Smallest id that no token has.
        first_gap: u32,
    },
    /// The tokenizers library failed on valid input.
    #[error("the tokenizer failed to {action}: {reason}")]
    Tokenizer {
        /// What it was doing: "encode", "decode", "train".
        action: &'static str,
        /// What the library says.
        reason: String,
    },
    /// A character that a char tokenizer has no token for.
    #[error("character {character:?} (U+{:04X}) is not among the tokenizer's {known} characters: {near:?}", u32::from(*character))]
    UnknownChar {
        /// The character.
        character: char,
        /// The text around it.
        near: String,
        /// Number of characters that have a token.
        known: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    UnknownId {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// Tokenizer files that could not be written.
    #[error("cannot write `{}`: {source}", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The token cache cannot be used. Loading a corpus turns this into a note and goes on
    /// without the cache.
    #[error("token cache {}: {reason}", place.as_ref().map_or("(no folder)".to_string(), |p| format!("`{}`", p.display())))]
    Cache {
        /// The file or folder, where there is one.
        place: Option<PathBuf>,
        /// What is wrong.
        reason: String,
    },
}

impl DataError {
    /// What the user can do about it.
    pub fn help(&self) -> Option<String> {
        let help = match self {
            DataError::NoDatasets => "add a [[data.datasets]] with a path".to_string(),
            DataError::Missing { .. } => {
                "check data.datasets.path; relative paths are relative to the working directory".to_string()
            }
            DataError::NoMatch { .. } => {
                "`*` does not cross folders, `**` does; neither matches names that start with a dot".to_string()
            }
            DataError::BadPattern { .. } => "put [ ] around a *, ? or [ that is meant literally".to_string(),
            DataError::IsDirectory { path } => {
                format!("name its files, for example \"{}/**/*.txt\"", path.display())
            }
            DataError::Changed { .. } => "run again once nothing writes to the data any more".to_string(),
            DataError::NotUtf8 { path, utf16, .. } => {
                let from = if *utf16 { "UTF-16" } else { "LATIN1" };
                format!("convert it, for example: iconv -f {from} -t UTF-8 {} > utf8.txt", path.display())
            }
            DataError::NothingToPredict { .. } => "name a longer text".to_string(),
            DataError::Empty { .. } => "check that the path names the right files".to_string(),
            DataError::ParquetNotCompiledIn { .. } => {
                "build it with `--features parquet`, or convert the file to .jsonl".to_string()
            }
            DataError::Parquet { .. } => {
                "Parquet is read uncompressed or compressed with Snappy, gzip or LZ4".to_string()
            }
            DataError::Rows(error) => return error.help(),
            DataError::Template(error) => return error.help(),
            DataError::BadJson { .. } => {
                ".jsonl has one object per line; .json that, or one array of objects".to_string()
            }
            DataError::NoTextField { fields, .. } => {
                let field = fields.first().map_or("content", String::as_str);
                format!("name the field that holds the text: fields = {{ text = \"{field}\" }}")
            }
            DataError::WrongType { .. } => "records are objects whose text field is a string".to_string(),
            DataError::TooShort { tokens, .. } if *tokens > 1 => {
                format!("add data, or lower data.sequence_len to at most {}", tokens - 1)
            }
            DataError::TooShort { .. } => "add data, or lower data.val_fraction".to_string(),
            DataError::ValTooShort { .. } => {
                "raise data.val_fraction, name a longer data.val_path, or set val_fraction = 0 to train without validation"
                    .to_string()
            }
            DataError::TokenizerPathUnset => {
                "set tokenizer.path to a tokenizer.json, or tokenizer.type to \"bpe\", \"byte\" or \"char\"".to_string()
            }
            DataError::TokenizerMissing { .. } => {
                "check tokenizer.path, or train one: tokenizer.type = \"bpe\"".to_string()
            }
            DataError::TokenizerInvalid { .. } | DataError::TokenizerGaps { .. } => {
                "tokenizer.path must name a tokenizer.json as Hugging Face's tokenizers library writes it".to_string()
            }
            DataError::UnknownChar { .. } => {
                "a char tokenizer knows only the characters it was made from; \"byte\" and \"bpe\" know all".to_string()
            }
            DataError::Cache { .. } => "point FIREBRICK_CACHE at a folder that can be written".to_string(),
            DataError::Unreadable { .. }
            | DataError::Tokenizer { .. }
            | DataError::UnknownId { .. }
            | DataError::Unwritable { .. } => return None,
        };
        Some(help)
    }

    /// The exit code of a run that ends with this error: 1 = the disk, 2 = the tokenizer the
    /// config asks for, 3 = the data.
    pub fn exit_code(&self) -> u8 {
        match self {
            DataError::Cache { .. } | DataError::Unwritable { .. } => 1,
            DataError::TokenizerPathUnset
            | DataError::TokenizerMissing { .. }
            | DataError::TokenizerInvalid { .. }
            | DataError::TokenizerGaps { .. }
            | DataError::Tokenizer { .. }
            | DataError::UnknownChar { .. }
            | DataError::Template(_)
            | DataError::UnknownId { .. } => 2,
            DataError::Rows(error) => error.exit_code(),
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
