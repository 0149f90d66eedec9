//! `tojson` as chat templates know it: Python's `json.dumps` with `ensure_ascii=False`.
//!
//! Jinja's own filter escapes for HTML; the one of `transformers` does not. What models have seen
//! in training is Python's spacing, `{"a": 1, "b": [2, 3]}`, and Python's floats.

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind};
use serde_json::Value as Json;

/// The filter: `tojson(indent=4, ensure_ascii=True, sort_keys=True, separators=(",", ":"))`.
pub(super) fn to_json(
    value: &Value,
    indent: Option<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let invalid = |error: serde_json::Error| {
        Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}"))
    };
    let value = serde_json::to_value(value).map_err(invalid)?;
    let indent: Option<Value> = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get("indent")?,
    };
    let indent = match indent.filter(|indent| !indent.is_none()) {
        Some(indent) => Some(usize::try_from(indent)?.min(64)),
        None => None,
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ if indent.is_some() => (",".to_string(), ": ".to_string()),
        _ => (", ".to_string(), ": ".to_string()),
    };
    let writer = Writer {
        indent,
        item,
        key,
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let mut text = String::new();
    writer.value(&mut text, &value, 0);
    Ok(text)
}

struct Writer {
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
}

impl Writer {
    fn value(&self, text: &mut String, value: &Json, depth: usize) {
        match value {
            Json::Array(items) => self.all(text, ['[', ']'], items, depth, |text, item| {
                self.value(text, item, depth + 1);
            }),
            Json::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                if self.sort {
                    fields.sort_by_key(|(key, _)| *key);
                }
                self.all(text, ['{', '}'], &fields, depth, |text, (key, value)| {
                    self.string(text, key);
                    text.push_str(&self.key);
                    self.value(text, value, depth + 1);
                });
            }
            Json::String(string) => self.string(text, string),
            Json::Number(number) => match number.as_f64() {
                Some(float) if number.is_f64() => text.push_str(&python_float(float)),
                _ => text.push_str(&number.to_string()),
            },
            other => text.push_str(&other.to_string()),
        }
    }

    fn all<T>(
        &self,
        text: &mut String,
        brackets: [char; 2],
        items: &[T],
        depth: usize,
        mut write: impl FnMut(&mut String, &T),
    ) {
        text.push(brackets[0]);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                text.push_str(&self.item);
            }
            self.new_line(text, depth + 1);
            write(text, item);
        }
        if !items.is_empty() {
            self.new_line(text, depth);
        }
        text.push(brackets[1]);
    }

    fn new_line(&self, text: &mut String, depth: usize) {
        if let Some(indent) = self.indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&self, text: &mut String, string: &str) {
        let quoted = Json::from(string).to_string();
        if !self.ascii {
            text.push_str(&quoted);
            return;
        }
        for character in quoted.chars() {
            if character.is_ascii() {
                text.push(character);
            } else {
                let mut units = [0; 2];
                for unit in character.encode_utf16(&mut units) {
                    text.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

/// Python's `repr`: the shortest digits, an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') {
        plain
    } else {
        format!("{plain}.0")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected: Python 3's `repr`.
    #[test]
    fn r5_floats_are_pythons() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (1e100, "1e+100"),
        ];
        for (value, wanted) in cases {
            assert_eq!(python_float(value), wanted);
        }
    }
}
