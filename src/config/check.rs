//! The strict check: the document against the keys that exist.
//!
//! The walk never stops at a mistake. Whatever is wrong is reported and cut out of the document,
//! and its path is remembered as rejected, so that the cross-field checks can run on the rest and
//! keep silent about anything that a rejected key would have decided.

use super::document::{Document, Node, Table, Value};
use super::error::Issue;
use super::hints::{self, Hints, describe, header};
use super::schema::{self, Key, Kind, Range, Section};
use super::source::Origin;

/// A document whose remaining keys all exist and hold values of the right type and range.
pub(super) struct Checked {
    pub(super) document: Document,
    pub(super) issues: Vec<Issue>,
    /// Dotted paths of what was cut out, and of what was probably meant by it.
    pub(super) rejected: Vec<String>,
}

/// Checks every key and value of a configuration.
pub(super) fn check(document: Document) -> Checked {
    check_section(document, schema::root())
}

/// Checks every key and value of a document whose keys are `root`.
pub(super) fn check_section(mut document: Document, root: &'static Section) -> Checked {
    let mut checker = Checker {
        hints: Hints::new(root),
        issues: Vec::new(),
        rejected: Vec::new(),
    };
    let whole = Origin::File(0..0);
    checker.section(&mut document.root, root, "", &whole);
    Checked {
        document,
        issues: checker.issues,
        rejected: checker.rejected,
    }
}

struct Checker {
    hints: Hints<'static>,
    issues: Vec<Issue>,
    rejected: Vec<String>,
}

impl Checker {
    /// Checks a table's entries and cuts out the bad ones. False when what is left lacks a
    /// required key.
    fn section(&mut self, table: &mut Table, section: &Section, path: &str, at: &Origin) -> bool {
        table.entries.retain_mut(|entry| {
            let entry_path = join(path, &entry.key);
            let good = match section.get(&entry.key) {
                Some(key) => self.value(&mut entry.node, &key.kind, &entry_path),
                None => {
                    self.unknown(path, &entry.key, &entry.key_origin, &mut entry.node);
                    false
                }
            };
            if !good {
                self.rejected.push(entry_path);
            }
            good
        });
        let mut complete = true;
        for key in section.keys.iter().filter(|key| key.required) {
            if table.get(&key.name).is_some() {
                continue;
            }
            complete = false;
            let path = join(path, &key.name);
            if !self.rejected.contains(&path) {
                self.missing(key, &path, at);
            }
        }
        complete
    }

    fn missing(&mut self, key: &Key, path: &str, at: &Origin) {
        let section = path.rsplit_once('.').map_or("", |(section, _)| section);
        let purpose = key.doc.lines().next().unwrap_or_default();
        self.report(
            at,
            format!("{} needs `{}`", header(section), key.name),
            Some(purpose.to_string()),
        );
    }

    fn unknown(&mut self, path: &str, name: &str, at: &Origin, node: &mut Node) {
        let is_section = matches!(node.value, Value::Table(_));
        let shown = name.escape_debug();
        let message = if path.is_empty() && is_section {
            format!("unknown section [{shown}]")
        } else if path.is_empty() {
            format!("unknown key `{shown}` at the top level")
        } else {
            format!("unknown key `{shown}` in {}", header(path))
        };
        let hint = self.hints.unknown_key(path, name, is_section);
        self.report(at, message, Some(hint.help));
        let Some((meant, key)) = hint.meant else {
            return;
        };
        // A misspelled section still says what its keys are meant to be: check them too.
        if let (Value::Table(table), Kind::Section(section)) = (&mut node.value, &key.kind) {
            let origin = node.origin.clone();
            self.section(table, section, &meant, &origin);
        }
        self.rejected.push(meant);
    }

    /// Checks one value; false when it cannot be used.
    fn value(&mut self, node: &mut Node, kind: &Kind, path: &str) -> bool {
        match (kind, &mut node.value) {
            (Kind::String, Value::String(_)) | (Kind::Boolean, Value::Boolean(_)) => true,
            (Kind::Integer(range) | Kind::Number(range), Value::Integer(number)) => {
                // Bounds are far below 2^53, where f64 starts to round.
                let (value, shown) = (*number as f64, number.to_string());
                if i64::try_from(*number).is_ok() || !range.contains(value) {
                    return self.range(range, value, &shown, path, &node.origin);
                }
                let place = describe(path);
                let message = format!("{place} must fit a signed 64-bit integer, found {shown}");
                self.report(&node.origin, message, None);
                false
            }
            (Kind::Number(range), Value::Float(number)) => {
                let (number, shown) = (*number, number.to_string());
                self.range(range, number, &shown, path, &node.origin)
            }
            (Kind::Choice(choices), Value::String(text)) => {
                let known = choices.iter().any(|choice| choice.name == *text);
                if !known {
                    let message = format!(
                        "unknown value \"{}\" for {}",
                        text.escape_debug(),
                        describe(path)
                    );
                    let help = hints::choice(choices, text);
                    self.report(&node.origin, message, Some(help));
                }
                known
            }
            (Kind::List { item, min, max }, Value::Array(items)) => {
                let length = self.length(items.len(), *min, *max, path, &node.origin);
                let mut good = length;
                for (position, node) in items.iter_mut().enumerate() {
                    good &= self.value(node, item, &join(path, &position.to_string()));
                }
                good
            }
            (Kind::Section(section), Value::Table(table)) => {
                self.section(table, section, path, &node.origin)
            }
            (Kind::Map(item), Value::Table(table)) => {
                let entries = table.entries.iter_mut();
                let good =
                    entries.map(|entry| self.value(&mut entry.node, item, &join(path, &entry.key)));
                good.fold(true, |all, one| all & one)
            }
            (Kind::Either(kinds), value) => {
                let fitting = kinds.iter().find(|kind| accepts(kind, value));
                match fitting {
                    Some(fitting) => self.value(node, fitting, path),
                    None => self.wrong_type(node, kind, path),
                }
            }
            _ => self.wrong_type(node, kind, path),
        }
    }

    fn range(&mut self, range: &Range, number: f64, shown: &str, path: &str, at: &Origin) -> bool {
        let place = describe(path);
        if !number.is_finite() {
            self.report(
                at,
                format!("{place} must be a finite number, found {shown}"),
                None,
            );
            return false;
        }
        let good = range.contains(number);
        if !good {
            let message = format!("{place} must be {}, found {shown}", range.describe());
            self.report(at, message, None);
        }
        good
    }

    fn length(&mut self, len: usize, min: usize, max: usize, path: &str, at: &Origin) -> bool {
        let good = (min..=max).contains(&len);
        if !good {
            let wanted = match (min, max) {
                _ if min == max => format!("{min} elements"),
                (_, usize::MAX) => format!("at least {min} elements"),
                _ => format!("{min} to {max} elements"),
            };
            let message = format!("{} must have {wanted}, found {len}", describe(path));
            self.report(at, message, None);
        }
        good
    }

    fn wrong_type(&mut self, node: &Node, kind: &Kind, path: &str) -> bool {
        let message = format!(
            "{} must be {}, found {}",
            describe(path),
            expected(kind, path),
            found(&node.value)
        );
        let key = path.rsplit('.').next().unwrap_or(path);
        let help = match (kind, &node.value) {
            (Kind::Section(_), _) => self.hints.inside(path),
            _ => rewrite(kind, &node.value).map(|value| match node.origin {
                Origin::File(_) if key.parse::<usize>().is_ok() => format!("write {value}"),
                Origin::File(_) => format!("write {key} = {value}"),
                Origin::Set { .. } => format!("write --set '{path}={value}'"),
            }),
        };
        self.report(&node.origin, message, help);
        false
    }

    fn report(&mut self, at: &Origin, message: String, help: Option<String>) {
        self.issues.push(Issue {
            message,
            origin: Some(at.clone()),
            help,
        });
    }
}

/// Whether a kind is the one meant by a value of this TOML type.
fn accepts(kind: &Kind, value: &Value) -> bool {
    matches!(
        (kind, value),
        (Kind::String | Kind::Choice(_), Value::String(_))
            | (Kind::Boolean, Value::Boolean(_))
            | (Kind::Integer(_) | Kind::Number(_), Value::Integer(_))
            | (Kind::Number(_), Value::Float(_))
            | (Kind::List { .. }, Value::Array(_))
            | (Kind::Section(_) | Kind::Map(_), Value::Table(_))
    )
}

/// "a whole number", "a section: [train]".
fn expected(kind: &Kind, path: &str) -> String {
    match kind {
        Kind::String | Kind::Choice(_) => "a string".to_string(),
        Kind::Boolean => "true or false".to_string(),
        Kind::Integer(_) => "a whole number".to_string(),
        Kind::Number(_) => "a number".to_string(),
        Kind::List { item, .. } => match **item {
            Kind::Section(_) => format!("a list of sections, each starting with [[{path}]]"),
            _ => "a list".to_string(),
        },
        Kind::Section(_) => format!("a section, {}", header(path)),
        Kind::Map(_) => "a table of names and values".to_string(),
        Kind::Either(kinds) => {
            let kinds: Vec<String> = kinds.iter().map(|kind| expected(kind, path)).collect();
            kinds.join(" or ")
        }
    }
}

fn found(value: &Value) -> String {
    match value {
        Value::String(text) if text.chars().count() <= 40 => {
            format!("the string \"{}\"", text.escape_debug())
        }
        Value::String(_) => "a string".to_string(),
        Value::Integer(number) => format!("the whole number {number}"),
        Value::Float(number) => format!("the number {number:?}"),
        Value::Boolean(truth) => truth.to_string(),
        Value::Datetime(_) => "a date or time".to_string(),
        Value::Array(_) => "a list".to_string(),
        Value::Table(_) => "a section".to_string(),
    }
}

/// The value as it was probably meant, in TOML.
fn rewrite(kind: &Kind, value: &Value) -> Option<String> {
    match (kind, value) {
        (Kind::Integer(_), Value::Float(number)) => {
            let whole = number.fract() == 0.0 && number.abs() < 1e15;
            whole.then(|| format!("{number}"))
        }
        (Kind::Integer(_), Value::String(text)) => text.parse::<i64>().ok().map(|n| n.to_string()),
        (Kind::Number(_), Value::String(text)) => {
            let number = text
                .parse::<f64>()
                .ok()
                .filter(|number| number.is_finite())?;
            Some(format!("{number:?}"))
        }
        (Kind::Boolean, Value::String(text)) => match text.to_lowercase().as_str() {
            "true" | "yes" | "on" => Some("true".to_string()),
            "false" | "no" | "off" => Some("false".to_string()),
            _ => None,
        },
        (Kind::Boolean, Value::Integer(0 | 1)) => {
            Some(matches!(value, Value::Integer(1)).to_string())
        }
        (Kind::String, _) => as_string(value),
        (Kind::List { item, .. }, _) if accepts(item, value) => match value {
            Value::Table(_) => None,
            Value::String(text) => Some(format!("[{}]", toml::Value::from(text.as_str()))),
            other => scalar(other).map(|text| format!("[{text}]")),
        },
        (Kind::Either(kinds), _) => kinds.iter().find_map(|kind| rewrite(kind, value)),
        _ => None,
    }
}

fn as_string(value: &Value) -> Option<String> {
    scalar(value).map(|text| format!("\"{text}\""))
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(format!("{number:?}")),
        Value::Boolean(truth) => Some(truth.to_string()),
        Value::Datetime(text) => Some(text.clone()),
        _ => None,
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_string()
    } else {
        format!("{path}.{key}")
    }
}
