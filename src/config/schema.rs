//! The keys as data: names, types, ranges, defaults and documentation, read from the JSON Schema
//! that schemars derives from [`super::Config`].
//!
//! JSON Schema says one thing in many ways (`$ref`, `anyOf` with null, `oneOf` of constants).
//! Reading it once into [`Section`], [`Key`] and [`Kind`] lets the checker, the reference page and
//! the templates each be a plain walk over a small tree, and keeps the Rust types the only place
//! where a key is defined.

use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::keys::Config;

/// A table of keys.
#[derive(Debug, Clone)]
pub(super) struct Section {
    pub(super) doc: String,
    /// The section whose keys these are, if they are documented there.
    pub(super) part_of: Option<String>,
    pub(super) keys: Vec<Key>,
}

/// One key of a section.
#[derive(Debug, Clone)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) doc: String,
    pub(super) kind: Kind,
    pub(super) default: Option<Value>,
    /// A value to show where there is no default.
    pub(super) example: Option<Value>,
    pub(super) required: bool,
    pub(super) aliases: Vec<Alias>,
}

/// What another trainer calls a key.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Alias {
    /// The trainer, where the name is one trainer's own.
    pub(super) tool: Option<String>,
    pub(super) name: String,
}

/// What values a key takes.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    String,
    Boolean,
    Integer(Range),
    Number(Range),
    /// One of these strings.
    Choice(Vec<Choice>),
    List {
        item: Box<Kind>,
        min: usize,
        max: usize,
    },
    Section(Section),
    /// A table of names that are the user's own, and values of one kind.
    Map(Box<Kind>),
    /// Any of these, told apart by their TOML type.
    Either(Vec<Kind>),
}

/// One of the strings a key takes.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    pub(super) name: String,
    pub(super) doc: String,
}

/// Bounds of a number.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Range {
    pub(super) min: Option<f64>,
    pub(super) above: Option<f64>,
    pub(super) max: Option<f64>,
    pub(super) below: Option<f64>,
}

impl Section {
    pub(super) fn get(&self, name: &str) -> Option<&Key> {
        self.keys.iter().find(|key| key.name == name)
    }
}

impl Kind {
    /// The section whose keys are those of this table, if they are documented there.
    pub(super) fn part_of(&self) -> Option<&str> {
        self.section()
            .and_then(|section| section.part_of.as_deref())
    }

    /// The keys of a section, or of the sections in a list.
    pub(super) fn section(&self) -> Option<&Section> {
        match self {
            Kind::Section(section) => Some(section),
            Kind::List { item, .. } => item.section(),
            _ => None,
        }
    }
}

impl Range {
    pub(super) fn contains(&self, number: f64) -> bool {
        self.min.is_none_or(|bound| number >= bound)
            && self.above.is_none_or(|bound| number > bound)
            && self.max.is_none_or(|bound| number <= bound)
            && self.below.is_none_or(|bound| number < bound)
    }

    /// "from 0 to 0.9", "at least 1", "greater than 0"; empty without bounds.
    pub(super) fn describe(&self) -> String {
        if let (Some(min), Some(max)) = (self.min, self.max) {
            return if min == max {
                format!("{min}")
            } else {
                format!("from {min} to {max}")
            };
        }
        let bounds = [
            (self.min, "at least"),
            (self.above, "greater than"),
            (self.max, "at most"),
            (self.below, "less than"),
        ];
        let parts: Vec<String> = bounds
            .iter()
            .filter_map(|(bound, words)| bound.map(|bound| format!("{words} {bound}")))
            .collect();
        parts.join(" and ")
    }
}

/// The JSON Schema (draft 2020-12) of a configuration file, for editors and other tools.
pub fn json_schema() -> Value {
    schemars::schema_for!(Config).to_value()
}

/// The root section: the whole file.
pub(super) fn root() -> &'static Section {
    static ROOT: LazyLock<Section> = LazyLock::new(|| section_of(&json_schema()));
    &ROOT
}

/// The keys of a struct, by its schema.
pub(super) fn section_of(schema: &Value) -> Section {
    match (Reader { schema }).kind(schema) {
        Kind::Section(section) => section,
        // Both files are structs; every test that loads one goes through here.
        other => unreachable!("a file is a section, not {other:?}"),
    }
}

/// Reads the subset of JSON Schema that schemars derives from the types in `keys`.
struct Reader<'s> {
    schema: &'s Value,
}

impl Reader<'_> {
    fn kind(&self, schema: &Value) -> Kind {
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            return self.kind(self.definition(reference));
        }
        for union in ["anyOf", "oneOf"] {
            if let Some(variants) = schema.get(union).and_then(Value::as_array) {
                return self.union(variants);
            }
        }
        if let Some(choices) = choices(schema) {
            return Kind::Choice(choices);
        }
        match type_name(schema) {
            Some("string") => Kind::String,
            Some("boolean") => Kind::Boolean,
            Some("integer") => Kind::Integer(range(schema)),
            Some("number") => Kind::Number(range(schema)),
            Some("array") => Kind::List {
                item: Box::new(self.kind(&schema["items"])),
                min: bound(schema, "minItems", 0),
                max: bound(schema, "maxItems", usize::MAX),
            },
            Some("object") => match schema.get("additionalProperties") {
                Some(item @ Value::Object(_)) => Kind::Map(Box::new(self.kind(item))),
                _ => Kind::Section(self.section(schema)),
            },
            // A new kind of key needs a reader here: the first test to load a config says so.
            other => unreachable!("no key has type {other:?}: {schema}"),
        }
    }

    fn definition(&self, reference: &str) -> &Value {
        let pointer = reference.trim_start_matches('#');
        // schemars emits the definition of everything it refers to.
        self.schema
            .pointer(pointer)
            .unwrap_or_else(|| unreachable!("{reference} is not defined"))
    }

    /// `Option<T>` is T or null; a documented enum is one constant or another; the rest are
    /// untagged enums.
    fn union(&self, variants: &[Value]) -> Kind {
        let present = || variants.iter().filter(|v| type_name(v) != Some("null"));
        let choices: Option<Vec<Vec<Choice>>> = present().map(choices).collect();
        if let Some(choices) = choices {
            return Kind::Choice(choices.concat());
        }
        let mut kinds: Vec<Kind> = present().map(|variant| self.kind(variant)).collect();
        if kinds.len() == 1 {
            return kinds.remove(0);
        }
        Kind::Either(kinds)
    }

    fn section(&self, schema: &Value) -> Section {
        let empty = Map::new();
        let properties = schema.get("properties").and_then(Value::as_object);
        let required = schema.get("required").and_then(Value::as_array);
        let is_required =
            |name: &str| required.is_some_and(|names| names.iter().any(|known| known == name));
        let keys = properties.unwrap_or(&empty).iter();
        Section {
            doc: doc(schema),
            part_of: schema
                .get("x-part-of")
                .and_then(Value::as_str)
                .map(str::to_string),
            keys: keys
                .map(|(name, schema)| self.key(name, schema, is_required(name)))
                .collect(),
        }
    }

    fn key(&self, name: &str, schema: &Value, required: bool) -> Key {
        let aliases = schema.get("x-aliases").and_then(Value::as_array);
        let aliases = aliases.into_iter().flatten().filter_map(Value::as_str);
        let examples = schema.get("examples").and_then(Value::as_array);
        Key {
            name: name.to_string(),
            doc: doc(schema),
            kind: self.kind(schema),
            default: schema.get("default").cloned(),
            example: examples.and_then(|examples| examples.first().cloned()),
            required,
            aliases: aliases.map(Alias::parse).collect(),
        }
    }
}

impl Alias {
    fn parse(text: &str) -> Self {
        match text.split_once(": ") {
            Some((tool, name)) => Alias {
                tool: Some(tool.to_string()),
                name: name.to_string(),
            },
            None => Alias {
                tool: None,
                name: text.to_string(),
            },
        }
    }
}

/// The schema's type, null aside (`["integer", "null"]` is an optional integer).
fn type_name(schema: &Value) -> Option<&str> {
    match schema.get("type")? {
        Value::String(name) => Some(name),
        Value::Array(names) => {
            let mut names = names.iter().filter_map(Value::as_str);
            names.find(|name| *name != "null")
        }
        _ => None,
    }
}

/// The constants of a plain enum (`enum`) or of one documented variant (`const`).
fn choices(schema: &Value) -> Option<Vec<Choice>> {
    let names: Vec<&str> = match (schema.get("const"), schema.get("enum")) {
        (Some(name), _) => vec![name.as_str()?],
        (None, Some(names)) => names.as_array()?.iter().filter_map(Value::as_str).collect(),
        (None, None) => return None,
    };
    let choice = |name: &str| Choice {
        name: name.to_string(),
        doc: doc(schema),
    };
    Some(names.into_iter().map(choice).collect())
}

fn range(schema: &Value) -> Range {
    let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
    Range {
        min: bound("minimum"),
        above: bound("exclusiveMinimum"),
        max: bound("maximum"),
        below: bound("exclusiveMaximum"),
    }
}

fn bound(schema: &Value, name: &str, absent: usize) -> usize {
    let bound = schema.get(name).and_then(Value::as_u64);
    bound
        .and_then(|bound| usize::try_from(bound).ok())
        .unwrap_or(absent)
}

fn doc(schema: &Value) -> String {
    let text = schema.get("description").and_then(Value::as_str);
    text.unwrap_or_default().to_string()
}
