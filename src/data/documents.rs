//! From files to documents.
//!
//! A plain text file is one document. A `.jsonl` or `.json` file holds records, and the text
//! field of each record is one document. Which of the two a file is depends on its name's
//! ending alone, so that the answer does not change with the first bytes of a file.
//!
//! Records without text in them are dropped and counted; records without a text *field* are an
//! error that names the line, because that is a config that means another field.

use std::path::Path;

use serde_json::Value;

use super::DataError;
use super::files::FileRecord;

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
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        if ["jsonl", "json"]
            .iter()
            .any(|e| ending.eq_ignore_ascii_case(e))
        {
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
    let contents = file.read_text()?;
    let texts = match Format::of(&file.path) {
        Format::Text => vec![contents.text],
        Format::Records => {
            let mut reader = Records {
                path: &file.path,
                field,
                texts: Vec::new(),
            };
            if contents.text.trim_start().starts_with('[') {
                reader.array(&contents.text)?;
            } else {
                reader.lines(&contents.text)?;
            }
            reader.texts
        }
    };
    let found = texts.len();
    let texts: Vec<String> = texts.into_iter().filter(|text| !text.is_empty()).collect();
    Ok(Documents {
        empty: (found - texts.len()) as u64,
        byte_order_mark: contents.byte_order_mark,
        nul: texts.iter().map(|text| nul_count(text)).sum(),
        texts,
    })
}

fn nul_count(text: &str) -> u64 {
    text.bytes().filter(|&byte| byte == 0).count() as u64
}

struct Records<'a> {
    path: &'a Path,
    field: &'a str,
    texts: Vec<String>,
}

impl Records<'_> {
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
        let wrong = |what: String, found: &Value, wanted| DataError::WrongType {
            path: self.path.to_path_buf(),
            line,
            what,
            found: type_name(found),
            wanted,
        };
        let Value::Object(mut fields) = record else {
            return Err(wrong("the record".to_string(), &record, "an object"));
        };
        match fields.get_mut(self.field).map(Value::take) {
            Some(Value::String(text)) => self.texts.push(text),
            Some(other) => {
                return Err(wrong(format!("field `{}`", self.field), &other, "a string"));
            }
            None => {
                return Err(DataError::NoTextField {
                    path: self.path.to_path_buf(),
                    line,
                    field: self.field.to_string(),
                    fields: fields.keys().cloned().collect(),
                });
            }
        }
        Ok(())
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

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
