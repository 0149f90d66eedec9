//! A record's fields, typed, with errors that say where it stands.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Place, RowError, RowFormat};
use crate::data::records::type_name;

/// A record and where it stands.
pub(super) struct Record<'a> {
    pub(super) fields: Map<String, Value>,
    pub(super) path: &'a Path,
    pub(super) line: usize,
    pub(super) format: RowFormat,
}

impl Record<'_> {
    pub(super) fn place(&self) -> Place {
        Place {
            path: self.path.to_path_buf(),
            line: self.line,
        }
    }

    /// A field that must be there.
    pub(super) fn take(&mut self, field: &str) -> Result<Value, RowError> {
        match self.fields.get_mut(field) {
            Some(value) => Ok(value.take()),
            None => Err(RowError::NoField {
                place: self.place(),
                format: self.format,
                field: field.to_string(),
                fields: self.fields.keys().cloned().collect(),
            }),
        }
    }

    /// A field that may be absent or null.
    pub(super) fn take_if_there(&mut self, field: &str) -> Option<Value> {
        let value = self.fields.get_mut(field)?.take();
        (!value.is_null()).then_some(value)
    }

    /// A text that must be there.
    pub(super) fn text(&mut self, field: &str) -> Result<String, RowError> {
        let value = self.take(field)?;
        self.string(value, || format!("field `{field}`"))
    }

    /// A text that may be absent, null or empty.
    pub(super) fn text_if_there(&mut self, field: &str) -> Result<Option<String>, RowError> {
        let Some(value) = self.take_if_there(field) else {
            return Ok(None);
        };
        let text = self.string(value, || format!("field `{field}`"))?;
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    pub(super) fn string(
        &self,
        value: Value,
        what: impl FnOnce() -> String,
    ) -> Result<String, RowError> {
        match value {
            Value::String(text) => Ok(text),
            other => Err(self.wrong(what(), &other, "a string")),
        }
    }

    pub(super) fn list(
        &self,
        value: Value,
        what: impl FnOnce() -> String,
    ) -> Result<Vec<Value>, RowError> {
        match value {
            Value::Array(items) => Ok(items),
            other => Err(self.wrong(what(), &other, "a list")),
        }
    }

    pub(super) fn object(
        &self,
        value: Value,
        what: impl FnOnce() -> String,
    ) -> Result<Map<String, Value>, RowError> {
        match value {
            Value::Object(fields) => Ok(fields),
            other => Err(self.wrong(what(), &other, "an object")),
        }
    }

    pub(super) fn wrong(&self, what: String, found: &Value, wanted: &'static str) -> RowError {
        RowError::WrongType {
            place: self.place(),
            what,
            found: type_name(found),
            wanted,
        }
    }
}
