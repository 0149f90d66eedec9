//! Records of a file: the objects of a `.jsonl` or `.json` file, the rows of a `.parquet` file.
//!
//! Records are handed on one at a time with the line they begin on, counted from 1; of Parquet,
//! which has no lines, the number of the row.

use std::path::Path;

use serde_json::{Map, Value};

use super::DataError;
use super::files::FileRecord;

/// Takes a record and its line.
pub(super) type Take<'a> = dyn FnMut(Map<String, Value>, usize) -> Result<(), DataError> + 'a;

/// What was noticed about a file of records.
#[derive(Debug, Default)]
pub(super) struct RecordFile {
    /// Whether a byte order mark was taken off.
    pub(super) byte_order_mark: bool,
}

/// Whether the file's name says that it holds records.
pub(super) fn holds_records(path: &Path) -> bool {
    has_ending(path, &["jsonl", "json", "parquet"])
}

fn has_ending(path: &Path, endings: &[&str]) -> bool {
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    endings.iter().any(|e| ending.eq_ignore_ascii_case(e))
}

/// Reads a file's records in order.
pub(super) fn read(file: &FileRecord, take: &mut Take) -> Result<RecordFile, DataError> {
    if has_ending(&file.path, &["parquet"]) {
        super::parquet::read(file, take)?;
        return Ok(RecordFile::default());
    }
    let contents = file.read_text()?;
    let mut reader = Reader {
        path: &file.path,
        take,
    };
    if contents.text.trim_start().starts_with('[') {
        reader.array(&contents.text)?;
    } else {
        reader.lines(&contents.text)?;
    }
    Ok(RecordFile {
        byte_order_mark: contents.byte_order_mark,
    })
}

struct Reader<'a, 't> {
    path: &'a Path,
    take: &'a mut Take<'t>,
}

impl Reader<'_, '_> {
    /// One object per line; blank lines are skipped.
    fn lines(&mut self, contents: &str) -> Result<(), DataError> {
        for (index, line) in contents.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let record =
                serde_json::from_str(line).map_err(|error| self.bad_json(index + 1, &error))?;
            self.push(record, index + 1)?;
        }
        Ok(())
    }
    /// One array of objects. It is read element by element, not in one call, so that an error in
    /// the thousandth record names the thousandth record's line.
    fn array(&mut self, contents: &str) -> Result<(), DataError> {
        let mut cursor = Cursor {
            contents,
            position: 0,
            line: 1,
        };
        cursor.skip_blank();
        cursor.advance(1); // the bracket that brought us here
        cursor.skip_blank();
        let mut closed = cursor.take(']');
        while !closed {
            let line = cursor.line;
            let mut values = serde_json::Deserializer::from_str(cursor.rest()).into_iter::<Value>();
            let record = match values.next() {
                Some(Ok(record)) => record,
                Some(Err(error)) => {
                    return Err(self.bad_json(line + error.line().saturating_sub(1), &error));
                }
                None => {
                    return Err(self.bad_array(line, "the array is not closed: the file ends here"));
                }
            };
            cursor.advance(values.byte_offset());
            self.push(record, line)?;
            cursor.skip_blank();
            closed = cursor.take(']');
            if !closed && !cursor.take(',') {
                return Err(self.bad_array(cursor.line, "expected `,` or `]` after this record"));
            }
            cursor.skip_blank();
        }
        cursor.skip_blank();
        if !cursor.rest().is_empty() {
            return Err(self.bad_array(cursor.line, "more text after the array's closing `]`"));
        }
        Ok(())
    }

    fn push(&mut self, record: Value, line: usize) -> Result<(), DataError> {
        match record {
            Value::Object(fields) => (self.take)(fields, line),
            other => Err(DataError::WrongType {
                path: self.path.to_path_buf(),
                line,
                what: "the record".to_string(),
                found: type_name(&other),
                wanted: "an object",
            }),
        }
    }

    fn bad_json(&self, line: usize, error: &serde_json::Error) -> DataError {
        // serde_json counts lines from the start of the record; ours count from the file's.
        let message = error.to_string();
        let reason = message.split(" at line ").next().unwrap_or(&message);
        self.bad_array(
            line,
            &format!("invalid JSON at column {}: {reason}", error.column()),
        )
    }

    fn bad_array(&self, line: usize, reason: &str) -> DataError {
        DataError::BadJson {
            path: self.path.to_path_buf(),
            line,
            reason: reason.to_string(),
        }
    }
}

/// A place in a text that knows its line.
struct Cursor<'a> {
    contents: &'a str,
    position: usize,
    line: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        &self.contents[self.position..]
    }

    fn advance(&mut self, bytes: usize) {
        let passed = &self.contents.as_bytes()[self.position..self.position + bytes];
        self.line += passed.iter().filter(|&&b| b == b'\n').count();
        self.position += bytes;
    }

    fn skip_blank(&mut self) {
        let rest = self.rest();
        self.advance(rest.len() - rest.trim_start().len());
    }

    fn take(&mut self, character: char) -> bool {
        let found = self.rest().starts_with(character);
        if found {
            self.advance(character.len_utf8());
        }
        found
    }
}

/// What a JSON value is, in words.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
