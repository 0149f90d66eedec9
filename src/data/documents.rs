//! From files to documents.
//!
//! A plain text file is one document. A `.jsonl`, `.json` or `.parquet` file holds records, and the
//! text field of each record is one document. Which of the two a file is depends on its name's
//! ending alone, so that the answer does not change with the first bytes of a file.
//!
//! Records without text in them are dropped and counted; records without a text *field* are an
//! error that names the line, because that is a config that means another field.

use std::path::Path;

use serde_json::{Map, Value};

use super::DataError;
use super::files::FileRecord;
use super::records::{self, type_name};

/// How a file's contents become documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// The whole file is one document.
    Text,
    /// One document per record.
    Records,
}

impl Format {
    /// The format of a file by its name's ending.
    pub fn of(path: &Path) -> Self {
        if records::holds_records(path) {
            Format::Records
        } else {
            Format::Text
        }
    }
}

/// The documents of one file, and what was noticed on the way.
#[derive(Debug, Default)]
pub struct Documents {
    /// The texts, in the order of the file; none is empty.
    pub texts: Vec<String>,
    /// Documents left out because they have no text.
    pub empty: u64,
    /// Whether a byte order mark was taken off.
    pub byte_order_mark: bool,
    /// NUL characters in the texts: kept, but a sign of a file that is not text.
    pub nul: u64,
}

/// Reads one file's documents. `field` is the records' text field.
pub fn read(file: &FileRecord, field: &str) -> Result<Documents, DataError> {
    let (texts, byte_order_mark) = match Format::of(&file.path) {
        Format::Text => {
            let contents = file.read_text()?;
            (vec![contents.text], contents.byte_order_mark)
        }
        Format::Records => {
            let mut texts = Vec::new();
            let read = records::read(file, &mut |mut fields, line| {
                texts.push(text_of(&file.path, line, &mut fields, field)?);
                Ok(())
            })?;
            (texts, read.byte_order_mark)
        }
    };
    let found = texts.len();
    let texts: Vec<String> = texts.into_iter().filter(|text| !text.is_empty()).collect();
    Ok(Documents {
        empty: (found - texts.len()) as u64,
        byte_order_mark,
        nul: texts.iter().map(|text| nul_count(text)).sum(),
        texts,
    })
}

fn nul_count(text: &str) -> u64 {
    text.bytes().filter(|&byte| byte == 0).count() as u64
}

/// Takes the text field out of a record.
fn text_of(
    path: &Path,
    line: usize,
    fields: &mut Map<String, Value>,
    field: &str,
) -> Result<String, DataError> {
    match fields.get_mut(field).map(Value::take) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(DataError::WrongType {
            path: path.to_path_buf(),
            line,
            what: format!("field `{field}`"),
            found: type_name(&other),
            wanted: "a string",
        }),
        None => Err(DataError::NoTextField {
            path: path.to_path_buf(),
            line,
            field: field.to_string(),
            fields: fields.keys().cloned().collect(),
        }),
    }
}
