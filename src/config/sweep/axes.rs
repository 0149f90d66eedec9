//! The values of a sweep: `[grid]` and `[[pairs]]`.

use std::collections::{BTreeMap, BTreeSet};

use super::{MOST_COMBINATIONS, Reader};
use crate::config::document::{Entry, Node, Table, Value};
use crate::config::source::Origin;

/// Keys that a sweep sets by itself.
const OWN_KEYS: [&str; 2] = ["seed", "output_dir"];

/// Keys that a budget takes the place of.
const LENGTH_KEYS: [&str; 3] = ["train.max_steps", "train.num_epochs", "train.max_tokens"];

/// A key of the experiment and a value for it.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    pub(super) key: String,
    pub(super) value: String,
    pub(super) origin: Origin,
}

/// Settings of which one alternative is in each combination.
pub(super) type Axis = Vec<Vec<Setting>>;

impl Reader {
    /// Reads the axes of the sweep from the tables `[grid]` and `[[pairs]]`.
    pub(super) fn axes(&mut self, entries: &[Entry]) -> Vec<Axis> {
        let mut axes = Vec::new();
        let mut alternatives = Vec::new();
        for entry in entries {
            match (entry.key.as_str(), &entry.node.value) {
                ("grid", Value::Table(table)) => self.grid(table, "", &mut axes),
                ("grid", _) => {
                    let message = "`grid` must be a section".to_string();
                    self.report(&entry.node.origin, message, Some("write [grid]"));
                }
                (_, Value::Array(items)) => self.pairs(items, &mut axes, &mut alternatives),
                _ => {
                    let message = "`pairs` must be a list of sections".to_string();
                    self.report(&entry.node.origin, message, Some("write [[pairs]]"));
                }
            }
        }
        if !alternatives.is_empty() {
            axes.push(alternatives);
        }
        axes
    }

    /// `[grid]`: an axis for every list.
    fn grid(&mut self, table: &Table, path: &str, axes: &mut Vec<Axis>) {
        for entry in &table.entries {
            let key = join(path, &entry.key);
            match &entry.node.value {
                Value::Table(inner) => self.grid(inner, &key, axes),
                Value::Array(values) if values.is_empty() => {
                    self.report(
                        &entry.node.origin,
                        format!("`{key}` in [grid] has no values"),
                        None,
                    );
                }
                Value::Array(values) => {
                    let axis = values.iter().map(|value| vec![setting(&key, value)]);
                    axes.push(axis.collect());
                    self.repeated(&key, values);
                }
                _ => {
                    let message = format!("`{key}` in [grid] must be a list of values");
                    self.report(
                        &entry.node.origin,
                        message,
                        Some("a value that does not vary belongs in the base"),
                    );
                }
            }
        }
    }

    fn repeated(&mut self, key: &str, values: &[Node]) {
        let mut seen = BTreeSet::new();
        for value in values {
            let setting = setting(key, value);
            if !seen.insert(setting.value.clone()) {
                let message = format!("`{key}` has the value {} twice", setting.value);
                self.report(&setting.origin, message, None);
            }
        }
    }

    /// `[[pairs]]`: sections of single values are alternatives of one axis; a section of lists is
    /// an axis by itself, with one alternative per position.
    fn pairs(&mut self, items: &[Node], axes: &mut Vec<Axis>, alternatives: &mut Axis) {
        for item in items {
            let Value::Table(table) = &item.value else {
                let message = "`pairs` must be a list of sections".to_string();
                self.report(&item.origin, message, Some("write [[pairs]]"));
                continue;
            };
            let mut leaves = Vec::new();
            leaves_of(table, "", &mut leaves);
            let lists: Vec<usize> = leaves
                .iter()
                .filter_map(|(_, node)| match &node.value {
                    Value::Array(values) => Some(values.len()),
                    _ => None,
                })
                .collect();
            if leaves.is_empty() {
                self.report(&item.origin, "an empty [[pairs]]".to_string(), None);
            } else if lists.len() < leaves.len() {
                let settings = leaves.iter().map(|(key, node)| setting(key, node));
                alternatives.push(settings.collect());
            } else if lists
                .iter()
                .any(|&length| length != lists[0] || length == 0)
            {
                let message =
                    "the lists of this [[pairs]] have different lengths, or none".to_string();
                self.report(
                    &item.origin,
                    message,
                    Some("the first values go together, then the second ones, …"),
                );
            } else {
                let at = |position: usize| {
                    let settings = leaves.iter().filter_map(|(key, node)| match &node.value {
                        Value::Array(values) => Some(setting(key, &values[position])),
                        _ => None,
                    });
                    settings.collect()
                };
                axes.push((0..lists[0]).map(at).collect());
            }
        }
    }

    /// Refuses keys that are in two axes, and keys that the sweep sets.
    pub(super) fn keys(&mut self, axes: &[Axis], has_budget: bool) {
        let mut seen = BTreeSet::new();
        for axis in axes {
            let settings = axis.iter().flatten();
            let keys: BTreeMap<&str, &Origin> = settings
                .map(|setting| (setting.key.as_str(), &setting.origin))
                .collect();
            for (key, origin) in keys {
                if !seen.insert(key.to_string()) {
                    self.report(origin, format!("`{key}` is varied in two places"), None);
                }
                if OWN_KEYS.contains(&key) {
                    let message = format!("a sweep sets `{key}` by itself");
                    self.report(
                        origin,
                        message,
                        Some("seeds = [1, 2, 3] at the top, or output_dir"),
                    );
                }
                if has_budget && LENGTH_KEYS.contains(&key) {
                    let message =
                        format!("`{key}` together with `budget`: both are the length of a run");
                    self.report(origin, message, Some("keep one of them"));
                }
            }
        }
        let count = axes
            .iter()
            .try_fold(1usize, |count, axis| count.checked_mul(axis.len()));
        if count.is_none_or(|count| count > MOST_COMBINATIONS) {
            let message = format!("more than {MOST_COMBINATIONS} combinations");
            self.report(&Origin::File(0..0), message, None);
        }
    }
}

/// The combination with this number. The last axis varies fastest.
pub(super) fn combination(axes: &[Axis], number: usize) -> Vec<Setting> {
    let mut left = number;
    let mut chosen: Vec<&[Setting]> = Vec::new();
    for axis in axes.iter().rev() {
        chosen.push(&axis[left % axis.len()]);
        left /= axis.len();
    }
    chosen.into_iter().rev().flatten().cloned().collect()
}

fn setting(key: &str, node: &Node) -> Setting {
    Setting {
        key: key.to_string(),
        value: node.to_toml().to_string(),
        origin: node.origin.clone(),
    }
}

/// The values below a table, with their dotted paths.
fn leaves_of<'t>(table: &'t Table, path: &str, leaves: &mut Vec<(String, &'t Node)>) {
    for entry in &table.entries {
        let key = join(path, &entry.key);
        match &entry.node.value {
            Value::Table(inner) => leaves_of(inner, &key, leaves),
            _ => leaves.push((key, &entry.node)),
        }
    }
}

fn join(path: &str, key: &str) -> String {
    match path {
        "" => key.to_string(),
        path => format!("{path}.{key}"),
    }
}
