//! The book's reference page: every key, from the same types that are checked.

use std::fmt::Write;

use serde_json::Value;

use super::keys::Preset;
use super::schema::{self, Key, Kind, Section};
use crate::readable::grouped;

/// The reference page as Markdown.
pub fn reference_markdown() -> String {
    let mut page = String::from(INTRODUCTION);
    let root = schema::root();
    page.push_str("\n## Top level\n\n");
    keys(&mut page, root);
    sections(&mut page, root, "");
    presets(&mut page);
    page
}

const INTRODUCTION: &str = "\
# Configuration reference

<!-- Generated from the types in src/config/keys.rs; `FIREBRICK_BLESS=1 cargo test --release` rewrites it. -->

A configuration is a TOML file. Unknown keys are errors. `--set section.key=value` overrides a key
from the command line; `--set data.datasets.0.path=value` reaches into a list, and the number after
the last appends to it. A key that is absent takes its default. `runner schema` prints all of this
as a JSON Schema, `runner init` writes a commented file to start from.
";

fn sections(page: &mut String, section: &Section, path: &str) {
    for key in &section.keys {
        let Some(inner) = key.kind.section().filter(|inner| inner.part_of.is_none()) else {
            continue;
        };
        let path = format!("{path}{}", key.name);
        let heading = match key.kind {
            Kind::List { .. } => format!("[[{path}]]"),
            _ => format!("[{path}]"),
        };
        // The type's own words start with the heading, as in "`[model]`: a preset or a shape".
        let about = inner
            .doc
            .split_once(": ")
            .map_or(inner.doc.as_str(), |(_, rest)| rest);
        line(
            page,
            format_args!("\n## `{heading}`\n\n{}\n", sentence(about)),
        );
        keys(page, inner);
        sections(page, inner, &format!("{path}."));
    }
}

/// One item per key: name, type, default; meaning; choices; other trainers' names.
fn keys(page: &mut String, section: &Section) {
    for key in section
        .keys
        .iter()
        .filter(|key| key.kind.section().is_none() || key.kind.part_of().is_some())
    {
        let default = match (&key.default, key.required) {
            (Some(default), _) => format!(", default `{}`", toml_value(default)),
            (None, true) => ", required".to_string(),
            (None, false) => String::new(),
        };
        line(
            page,
            format_args!(
                "- **`{}`**: {}{default}. {}",
                key.name,
                type_name(&key.kind),
                flow(&key.doc)
            ),
        );
        for choice in choices(&key.kind) {
            line(
                page,
                format_args!("  - `\"{}\"`: {}", choice.name, flow(&choice.doc)),
            );
        }
        let elsewhere = elsewhere(key);
        if !elsewhere.is_empty() {
            line(page, format_args!("  - *Elsewhere:* {elsewhere}"));
        }
    }
}

fn choices(kind: &Kind) -> &[schema::Choice] {
    match kind {
        Kind::Choice(choices) => choices,
        Kind::List { item, .. } => choices(item),
        _ => &[],
    }
}

fn elsewhere(key: &Key) -> String {
    let others = key.aliases.iter().filter(|alias| alias.name != key.name);
    let names: Vec<String> = others
        .map(|alias| match &alias.tool {
            Some(tool) => format!("{tool} `{}`", alias.name),
            None => format!("`{}`", alias.name),
        })
        .collect();
    names.join(", ")
}

/// "whole number from 1 to 4096", "string or list of strings".
fn type_name(kind: &Kind) -> String {
    let bounded = |name: &str, range: &schema::Range| {
        format!("{name} {}", range.describe())
            .trim_end()
            .to_string()
    };
    match kind {
        Kind::String => "string".to_string(),
        Kind::Boolean => "true or false".to_string(),
        Kind::Integer(range) => bounded("whole number", range),
        Kind::Number(range) => bounded("number", range),
        Kind::Choice(_) => "one of the strings below".to_string(),
        Kind::List { item, min, max } if min == max => {
            format!("list of {min}, each a {}", type_name(item))
        }
        Kind::List { item, .. } => match **item {
            Kind::String => "list of strings".to_string(),
            _ => format!("list, each {}", type_name(item)),
        },
        Kind::Section(section) => match &section.part_of {
            Some(whole) => format!("table with keys of `[{whole}]`"),
            None => "section".to_string(),
        },
        Kind::Map(item) => format!("table of names, each with a {}", type_name(item)),
        Kind::Either(kinds) => {
            let names: Vec<String> = kinds.iter().map(type_name).collect();
            names.join(" or ")
        }
    }
}

fn presets(page: &mut String) {
    page.push_str(
        "\n## Presets\n\nThe published shapes that `model.preset` names. Parameters are those of the published \
         model;\na trained one has its own tokenizer's vocabulary.\n\n\
         | preset | architecture | parameters | hidden_size | intermediate_size | layers | heads | key/value heads | \
         positions | vocabulary | head tied |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|\n",
    );
    for preset in Preset::ALL {
        let shape = preset.shape();
        let vocab = preset.published_vocab_size();
        line(
            page,
            format_args!(
                "| `{}` | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                preset.name(),
                shape.architecture.name(),
                grouped(shape.parameters(vocab)),
                shape.hidden_size,
                shape.intermediate_size,
                shape.num_hidden_layers,
                shape.num_attention_heads,
                shape.num_key_value_heads,
                shape.max_position_embeddings,
                vocab,
                if shape.tie_word_embeddings {
                    "yes"
                } else {
                    "no"
                },
            ),
        );
    }
}

/// A JSON default as it is written in TOML.
pub(super) fn toml_value(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(toml_value).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(fields) => {
            let fields = fields.iter();
            let fields: Vec<String> = fields
                .map(|(key, value)| format!("{key} = {}", toml_value(value)))
                .collect();
            format!("{{ {} }}", fields.join(", "))
        }
        // JSON's numbers, strings and booleans are TOML's; small floats read better as 1e-8.
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => format!("{float:?}"),
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

/// Doc comments are wrapped for the source file; Markdown wraps by itself.
fn flow(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars).collect(),
        None => String::new(),
    }
}

fn line(page: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    writeln!(page, "{text}").expect("a String takes any text");
}
