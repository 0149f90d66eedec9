//! Typed access to a config.json, each failure naming its field.

use serde_json::{Map, Value};

use super::SpecError;

/// One object of a config.json.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    config: &'a Map<String, Value>,
    /// Where the object is, as `rope_scaling.`; empty for the file itself.
    within: &'a str,
}

/// What a message shows of a value.
const SHOWN: usize = 200;

impl<'a> Fields<'a> {
    pub(super) fn new(config: &'a Value) -> Result<Self, SpecError> {
        let within = "";
        match config {
            Value::Object(config) => Ok(Self { config, within }),
            other => Err(SpecError::Field {
                field: "(the whole file)".to_string(),
                found: shown(other),
                expected: "an object".to_string(),
            }),
        }
    }

    /// The object in a field; `within` is its name and a dot.
    pub(super) fn inner(&self, field: &str, within: &'a str) -> Result<Option<Self>, SpecError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(config)) => Ok(Some(Self { config, within })),
            Some(_) => Err(self.invalid(field, "an object")),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.config.is_empty()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.config.keys().map(String::as_str)
    }

    /// Whether the file says anything about a field, null included.
    pub(super) fn has(&self, field: &str) -> bool {
        self.config.contains_key(field)
    }

    /// A field that is there and not null.
    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.config.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn invalid(&self, field: &str, expected: &str) -> SpecError {
        let found = self.config.get(field);
        SpecError::Field {
            field: format!("{}{field}", self.within),
            found: found.map_or("nothing".to_string(), shown),
            expected: expected.to_string(),
        }
    }

    pub(super) fn unsupported(&self, field: &str) -> SpecError {
        let value = self.config.get(field);
        SpecError::Unsupported {
            field: format!("{}{field}", self.within),
            value: value.map_or("nothing".to_string(), shown),
        }
    }

    /// A field that, where present, must have the one value this build implements.
    pub(super) fn require(&self, field: &str, supported: &Value) -> Result<(), SpecError> {
        let same = |value: &Value| match (value.as_f64(), supported.as_f64()) {
            // 0 and 0.0 are different numbers to serde_json.
            (Some(value), Some(supported)) => value == supported,
            _ => value == supported,
        };
        match self.get(field) {
            Some(value) if !same(value) => Err(self.unsupported(field)),
            _ => Ok(()),
        }
    }

    pub(super) fn text(&self, field: &str) -> Result<&'a str, SpecError> {
        self.get(field)
            .and_then(Value::as_str)
            .ok_or_else(|| self.invalid(field, "a string"))
    }

    pub(super) fn count(&self, field: &str) -> Result<usize, SpecError> {
        self.get(field)
            .and_then(Value::as_u64)
            .and_then(|value| usize::try_from(value).ok())
            .filter(|&value| value > 0)
            .ok_or_else(|| self.invalid(field, "a positive integer"))
    }

    /// A count; `default` where the field is absent or null.
    pub(super) fn count_or(&self, field: &str, default: usize) -> Result<usize, SpecError> {
        self.get(field).map_or(Ok(default), |_| self.count(field))
    }

    /// A count; `default` where the field is absent, none where it is null.
    pub(super) fn optional_count(
        &self,
        field: &str,
        default: Option<usize>,
    ) -> Result<Option<usize>, SpecError> {
        match (self.has(field), self.get(field)) {
            (false, _) => Ok(default),
            (true, None) => Ok(None),
            (true, Some(_)) => self.count(field).map(Some),
        }
    }

    /// A number above 0, `default` where the field is absent.
    pub(super) fn positive_or(&self, field: &str, default: f64) -> Result<f64, SpecError> {
        match self.get(field) {
            None => Ok(default),
            Some(_) => self.positive(field),
        }
    }

    pub(super) fn positive(&self, field: &str) -> Result<f64, SpecError> {
        self.get(field)
            .and_then(Value::as_f64)
            .filter(|value| value.is_finite() && *value > 0.0)
            .ok_or_else(|| self.invalid(field, "a number above 0"))
    }

    pub(super) fn flag_or(&self, field: &str, default: bool) -> Result<bool, SpecError> {
        self.get(field).map_or(Ok(default), |value| {
            value
                .as_bool()
                .ok_or_else(|| self.invalid(field, "true or false"))
        })
    }

    /// A token id; `default` where the field is absent, none where it is null.
    pub(super) fn token(
        &self,
        field: &str,
        default: Option<u32>,
    ) -> Result<Option<u32>, SpecError> {
        if !self.has(field) {
            return Ok(default);
        }
        // Newer configs list several end tokens; the first is the one texts are ended with.
        let value = match self.get(field) {
            Some(Value::Array(several)) => several.first(),
            other => other,
        };
        let Some(value) = value else { return Ok(None) };
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(Some)
            .ok_or_else(|| self.invalid(field, "a token id"))
    }
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
