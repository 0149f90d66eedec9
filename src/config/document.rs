//! The TOML as a tree in which every key and value knows where it was written.
//!
//! serde would stop at the first mistake and forget where things came from; this tree keeps both
//! for the checker, which reports all mistakes, and for the cross-field checks, which point at the
//! lines that contradict each other. `--set` arguments are edits of the tree ([`super::overrides`])
//! that leave their own origin behind, so an error in one shows that argument.

use std::collections::BTreeSet;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use super::error::Issue;
use super::source::{Origin, Sources};

/// A configuration as written: file and `--set` arguments, not yet checked against the keys.
#[derive(Debug, Clone)]
pub struct Document {
    pub(super) sources: Sources,
    pub(super) root: Table,
}

/// The entries of a table, in the order written.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    pub(super) entries: Vec<Entry>,
}

/// `key = value`.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) key_origin: Origin,
    pub(super) node: Node,
}

/// A value and where it was written. For a table that is its `[header]`.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) value: Value,
}

/// TOML's types. No key takes a date, so dates are only kept as text to be refused by name.
#[derive(Debug, Clone)]
pub(super) enum Value {
    String(String),
    /// Wider than TOML's, so that the checker can name a number that is out of range.
    Integer(i128),
    Float(f64),
    Boolean(bool),
    Datetime(String),
    Array(Vec<Node>),
    Table(Table),
}

/// What parsing gives.
pub(super) struct Parsed {
    pub(super) document: Document,
    pub(super) issues: Vec<Issue>,
    /// The file has syntax errors: it is unknown what is missing from the document.
    pub(super) is_partial: bool,
    /// Paths that `--set` arguments failed to set.
    pub(super) rejected: Vec<String>,
}

impl Document {
    /// Parses the file's text and applies the `--set` arguments to it. Errors do not stop it:
    /// what could be read is in the document, what could not is in the issues.
    pub(super) fn parse(sources: Sources) -> Parsed {
        let (parsed, errors) = DeTable::parse_recoverable(&sources.text);
        let is_partial = !errors.is_empty();
        let reader = Reader::new(&sources.text, errors);
        let mut root = reader.table(parsed.into_inner());
        if reader.has_broken_header() {
            // What follows it was read into the wrong section: nothing can be said about it.
            root = Table::default();
        }
        let mut issues = reader.issues;
        let mut rejected = Vec::new();
        for (index, argument) in sources.sets.iter().enumerate() {
            if let Err(issue) = super::overrides::apply(&mut root, index, argument) {
                issues.push(issue);
                rejected.extend(argument.split('=').next().map(str::to_string));
            }
        }
        Parsed {
            document: Self { sources, root },
            issues,
            is_partial,
            rejected,
        }
    }

    /// Where the entry at a dotted path was written, `key = value` and all; array elements are
    /// numbers (`data.datasets.0.path`). `None` when it is not there.
    pub fn origin(&self, path: &str) -> Option<Origin> {
        let mut segments = path.split('.');
        let entry = self.root.get(segments.next()?)?;
        let (mut node, mut key) = (&entry.node, Some(&entry.key_origin));
        for segment in segments {
            match &node.value {
                Value::Table(table) => {
                    let entry = table.get(segment)?;
                    (node, key) = (&entry.node, Some(&entry.key_origin));
                }
                Value::Array(items) => {
                    (node, key) = (items.get(segment.parse::<usize>().ok()?)?, None);
                }
                _ => return None,
            }
        }
        let is_leaf = !matches!(node.value, Value::Table(_));
        Some(match key {
            Some(key) if is_leaf => key.to(&node.origin),
            _ => node.origin.clone(),
        })
    }

    /// The same tree without origins, for serde.
    pub(super) fn to_toml(&self) -> toml::Table {
        self.root.to_toml()
    }
}

impl Table {
    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    fn to_toml(&self) -> toml::Table {
        let pairs = self.entries.iter();
        pairs
            .map(|entry| (entry.key.clone(), entry.node.to_toml()))
            .collect()
    }
}

impl Node {
    pub(super) fn to_toml(&self) -> toml::Value {
        match &self.value {
            Value::String(text) | Value::Datetime(text) => toml::Value::String(text.clone()),
            Value::Integer(number) => {
                // The checker has refused what does not fit.
                let clamped = (*number).clamp(i64::MIN.into(), i64::MAX.into());
                toml::Value::Integer(clamped as i64)
            }
            Value::Float(number) => toml::Value::Float(*number),
            Value::Boolean(truth) => toml::Value::Boolean(*truth),
            Value::Array(items) => toml::Value::Array(items.iter().map(Node::to_toml).collect()),
            Value::Table(table) => toml::Value::Table(table.to_toml()),
        }
    }
}

/// Turns the parser's tree into ours, leaving out what a syntax error makes unreliable.
struct Reader<'t> {
    text: &'t str,
    /// Lines (from 0) that hold a syntax error.
    broken: BTreeSet<usize>,
    issues: Vec<Issue>,
}

impl<'t> Reader<'t> {
    fn new(text: &'t str, errors: Vec<toml::de::Error>) -> Self {
        let mut broken = BTreeSet::new();
        let mut issues: Vec<Issue> = Vec::new();
        for error in errors {
            let span = error.span().unwrap_or(0..0);
            // The parser's recovery often reports a line twice; the first says what is wrong.
            if broken.insert(line_of(text, span.start)) {
                issues.push(Issue {
                    message: format!("TOML syntax: {}", error.message()),
                    origin: Some(Origin::File(span)),
                    help: None,
                });
            }
        }
        Self {
            text,
            broken,
            issues,
        }
    }

    fn has_broken_header(&self) -> bool {
        let mut lines = self.text.lines().enumerate();
        lines.any(|(line, text)| text.trim_start().starts_with('[') && self.broken.contains(&line))
    }

    fn table(&self, table: DeTable<'_>) -> Table {
        let mut entries = Vec::new();
        for (key, value) in table {
            let key_origin = Origin::File(key.span());
            let is_section = matches!(value.get_ref(), DeValue::Table(_));
            let lines = line_of(self.text, key.span().start)..=line_of(self.text, value.span().end);
            if !is_section && !lines.is_empty() && self.broken.range(lines).next().is_some() {
                continue;
            }
            entries.push(Entry {
                key: key.into_inner().into_owned(),
                key_origin,
                node: self.node(value),
            });
        }
        Table { entries }
    }

    fn node(&self, value: Spanned<DeValue<'_>>) -> Node {
        let span = value.span();
        let value = match value.into_inner() {
            DeValue::String(text) => Value::String(text.into_owned()),
            DeValue::Integer(integer) => Value::Integer(saturating(&integer)),
            // Whatever Rust cannot read as a float is refused as not a number by the checker.
            DeValue::Float(float) => Value::Float(float.as_str().parse().unwrap_or(f64::NAN)),
            DeValue::Boolean(truth) => Value::Boolean(truth),
            DeValue::Datetime(date) => Value::Datetime(date.to_string()),
            DeValue::Array(items) => {
                Value::Array(items.into_iter().map(|item| self.node(item)).collect())
            }
            DeValue::Table(table) => Value::Table(self.table(table)),
        };
        Node {
            origin: Origin::File(span),
            value,
        }
    }
}

/// The value of a `--set` argument: TOML where it parses as such, else the text itself, so that
/// `--set optimizer.name=lion` needs no quotes. `offset` is where it starts in the argument.
pub(super) fn parse_override(text: &str, index: usize, offset: usize) -> Node {
    let origin = Origin::Set {
        index,
        span: offset..offset + text.len(),
    };
    let parsed = DeValue::parse(text).ok();
    let node = parsed.map(|value| Reader::new(text, Vec::new()).node(value));
    let mut node = node.unwrap_or_else(|| Node {
        origin: origin.clone(),
        value: Value::String(text.to_string()),
    });
    relocate(&mut node, &origin);
    node
}

/// Everything inside a `--set` value points at that value as a whole: it is one short line.
fn relocate(node: &mut Node, origin: &Origin) {
    node.origin = origin.clone();
    match &mut node.value {
        Value::Array(items) => items.iter_mut().for_each(|item| relocate(item, origin)),
        Value::Table(table) => {
            for entry in &mut table.entries {
                entry.key_origin = origin.clone();
                relocate(&mut entry.node, origin);
            }
        }
        _ => {}
    }
}

fn saturating(integer: &DeInteger<'_>) -> i128 {
    let digits = integer.as_str();
    let bound = if digits.starts_with('-') {
        i128::MIN
    } else {
        i128::MAX
    };
    i128::from_str_radix(digits, integer.radix()).unwrap_or(bound)
}

fn line_of(text: &str, offset: usize) -> usize {
    let end = offset.min(text.len());
    text.as_bytes()[..end]
        .iter()
        .filter(|&&byte| byte == b'\n')
        .count()
}
