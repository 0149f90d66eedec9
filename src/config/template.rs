//! Commented files to start from: `runner init`.
//!
//! A template is a small model on files under `data/`, resolved like any configuration; every key
//! is then printed with its documentation. Keys that the template sets or that always have a
//! default are active; keys whose default depends on others are commented out, showing the value
//! that applies (or, where none does, an example).

use serde_json::Value;

use super::keys::{Architecture, Config, DatasetConfig, ModelConfig};
use super::plan::Plan;
use super::reference::toml_value;
use super::schema::{self, Key, Kind, Range, Section};

/// Which file to start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TemplateName {
    /// A small LLaMA with a tokenizer learned on the data.
    Llama,
    /// A small GPT-2.
    Gpt2,
}

impl TemplateName {
    /// The configuration that the template spells out.
    fn config(self) -> Config {
        let mut config = Config {
            model: ModelConfig {
                architecture: Some(match self {
                    TemplateName::Llama => Architecture::Llama,
                    TemplateName::Gpt2 => Architecture::Gpt2,
                }),
                hidden_size: Some(192),
                num_hidden_layers: Some(4),
                num_attention_heads: Some(6),
                ..ModelConfig::default()
            },
            ..Config::default()
        };
        config.data.datasets.push(DatasetConfig::new("data/*.txt"));
        config.train.max_steps = Some(1000);
        config.lr_scheduler.warmup_steps = Some(100);
        config.lr_scheduler.min_lr_ratio = Some(0.1);
        config
    }
}

/// The template's TOML. It runs as it is on text files under `data/`.
pub fn template(name: TemplateName) -> String {
    let config = name.config();
    // The templates are constants; a test resolves each.
    let plan = Plan::from_config(config.clone()).expect("a template is valid");
    let to_json = |config: &Config| serde_json::to_value(config).expect("a config is JSON");
    let writer = Writer {
        active: to_json(&config),
        resolved: to_json(&plan.config),
    };
    let mut text = String::from(HEADER);
    writer.keys(&mut text, schema::root(), "");
    writer.sections(&mut text, schema::root(), "");
    text
}

const HEADER: &str = "\
# Put text files under data/, then
#   runner validate THIS_FILE
#   runner train THIS_FILE
# Lines that start with `# key =` show what applies, or an example, when the key is absent.

";

struct Writer {
    /// What the template sets, defaults included.
    active: Value,
    /// The same with every default that depends on other keys.
    resolved: Value,
}

impl Writer {
    fn sections(&self, text: &mut String, section: &Section, pointer: &str) {
        for key in &section.keys {
            let Some(inner) = key.kind.section().filter(|inner| inner.part_of.is_none()) else {
                continue;
            };
            if pointer.contains("/datasets") {
                // Written inline by `keys`.
                continue;
            }
            // A header names no positions: [phase.predict] is inside the last [[phase]].
            let names = pointer.split('/').chain([key.name.as_str()]);
            let names = names.filter(|name| !name.is_empty() && *name != "0");
            let name = names.collect::<Vec<_>>().join(".");
            comment(text, &key.doc);
            let pointer = match key.kind {
                Kind::List { .. } => {
                    let pointer = format!("{pointer}/{}/0", key.name);
                    let absent = self.active.pointer(&pointer).is_none();
                    let off = if absent { "# " } else { "" };
                    text.push_str(&format!("{off}[[{name}]]\n"));
                    pointer
                }
                _ => {
                    let pointer = format!("{pointer}/{}", key.name);
                    // A section that is left out by default is shown, not begun.
                    let absent = self.active.pointer(&pointer).is_none();
                    let off = if absent { "# " } else { "" };
                    text.push_str(&format!("{off}[{name}]\n"));
                    pointer
                }
            };
            self.keys(text, inner, &pointer);
            self.sections(text, inner, &pointer);
        }
    }

    fn keys(&self, text: &mut String, section: &Section, pointer: &str) {
        for key in &section.keys {
            let is_inline = pointer.contains("/datasets");
            let is_section = key.kind.section().is_some() && key.kind.part_of().is_none();
            if is_section && !is_inline {
                continue;
            }
            let at = format!("{pointer}/{}", key.name);
            let active = self.active.pointer(&at).filter(|value| !value.is_null());
            let shown = active
                .or_else(|| self.resolved.pointer(&at).filter(|value| !value.is_null()))
                .cloned()
                .unwrap_or_else(|| example(key));
            let off = if active.is_some() { "" } else { "# " };
            comment(text, &documentation(key));
            text.push_str(&format!("{off}{} = {}\n", key.name, toml_value(&shown)));
        }
        text.push('\n');
    }
}

/// A value of the right kind for a key that has none by default.
fn example(key: &Key) -> Value {
    key.example.clone().unwrap_or_else(|| of_kind(&key.kind))
}

fn of_kind(kind: &Kind) -> Value {
    match kind {
        Kind::String => "".into(),
        Kind::Boolean => true.into(),
        Kind::Integer(Range { min, .. }) => (min.unwrap_or(0.0) as u64).into(),
        Kind::Number(range) => {
            let bound = range.min.or(range.above).unwrap_or(0.0);
            (if range.contains(bound) {
                bound
            } else {
                bound + 1.0
            })
            .into()
        }
        Kind::Choice(choices) => choices.first().map(|choice| choice.name.clone()).into(),
        Kind::List { item, min, .. } => vec![of_kind(item); *min].into(),
        Kind::Map(_) => serde_json::Map::new().into(),
        Kind::Either(kinds) => kinds.first().map(of_kind).into(),
        Kind::Section(section) => section
            .keys
            .iter()
            .map(|key| {
                let default = key.default.clone();
                (key.name.clone(), default.unwrap_or_else(|| example(key)))
            })
            .collect(),
    }
}

fn documentation(key: &Key) -> String {
    let choices = match &key.kind {
        Kind::Choice(choices) => choices.as_slice(),
        Kind::List { item, .. } => match &**item {
            Kind::Choice(choices) => choices.as_slice(),
            _ => &[],
        },
        _ => &[],
    };
    if choices.is_empty() {
        return key.doc.clone();
    }
    let names: Vec<&str> = choices.iter().map(|choice| choice.name.as_str()).collect();
    format!("{}\n{}", key.doc, names.join(" | "))
}

fn comment(text: &mut String, doc: &str) {
    for line in doc.lines() {
        text.push_str(&format!("# {line}\n"));
    }
}
