//! What is compared: plans with names, and whether they can be compared at all.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::CompareError;
use crate::config::{Length, Plan};
use crate::train::{Lengths, flat_config};

/// One of the things that are compared.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Its name in tables and charts.
    pub name: String,
    /// Its file.
    pub config: PathBuf,
    /// The file's text, to be kept in the run folders.
    pub text: String,
    /// The `--set` arguments that make it of its file.
    pub sets: Vec<String>,
    /// What will run. The seed and the folder are set for each run.
    pub plan: Plan,
}

impl Candidate {
    /// Its run with a seed, a number of steps and a folder.
    pub(super) fn run(&self, seed: u64, steps: u64, folder: PathBuf) -> Plan {
        let mut plan = self.plan.clone();
        plan.config.seed = seed;
        plan.config.output_dir = folder;
        if plan.length != Length::Steps(steps) {
            plan.length = Length::Steps(steps);
            plan.config.train.max_steps = Some(steps);
            plan.config.train.num_epochs = None;
            plan.config.train.max_tokens = None;
        }
        plan
    }

    /// A hash of its configuration, whatever the folder and the seed.
    pub(super) fn hash(&self) -> String {
        hash_of(&self.run(0, 0, PathBuf::new()), "")
    }

    /// A hash of its configuration and its own length.
    pub(super) fn own_hash(&self) -> String {
        let mut plan = self.plan.clone();
        plan.config.seed = 0;
        hash_of(&plan, "")
    }
}

/// A short hash of a plan, without its folder, and of a text.
pub(super) fn hash_of(plan: &Plan, text: &str) -> String {
    let mut plan = plan.clone();
    plan.config.output_dir = PathBuf::new();
    let mut hasher = blake3::Hasher::new();
    hasher.update(plan.to_toml().as_bytes());
    // Phases of a plan that was made in code are not in its TOML.
    hasher.update(format!("{:?}", plan.phases).as_bytes());
    hasher.update(text.as_bytes());
    hasher.finalize().to_hex().to_string()[..12].to_string()
}

/// Keys that say nothing about what was compared.
const LEFT_OUT: [&str; 4] = ["output_dir", "seed", "logging.", "checkpoint."];

/// The keys whose values differ between candidates, with each candidate's value.
pub(super) fn varied_keys(
    candidates: &[Candidate],
    has_budget: bool,
) -> (Vec<String>, Vec<BTreeMap<String, String>>) {
    let tables: Vec<BTreeMap<String, String>> = candidates
        .iter()
        .map(|candidate| flat_config(&candidate.plan.config))
        .collect();
    let is_length =
        |key: &str| ["train.max_steps", "train.num_epochs", "train.max_tokens"].contains(&key);
    let mut keys: Vec<String> = tables
        .iter()
        .flat_map(|table| table.keys().cloned())
        .collect();
    keys.sort();
    keys.dedup();
    keys.retain(|key| {
        let differs = tables
            .iter()
            .any(|table| table.get(key) != tables[0].get(key));
        let left_out = LEFT_OUT.iter().any(|prefix| key.starts_with(prefix));
        differs && !left_out && !(has_budget && is_length(key))
    });
    let values = tables.iter().map(|table| {
        let own = keys
            .iter()
            .filter_map(|key| Some((key.clone(), unquoted(table.get(key)?))));
        own.collect()
    });
    let values = values.collect();
    (keys, values)
}

/// A value as a person reads it: a string without its quotes.
fn unquoted(value: &str) -> String {
    let inner = value
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'));
    let plain = inner.filter(|inner| !inner.contains(['"', '\\']));
    plain.unwrap_or(value).to_string()
}

/// Checks that every candidate is another one, and that all can share a process and a ranking.
pub(super) fn check(
    candidates: &[Candidate],
    lengths: &[Lengths],
    has_budget: bool,
) -> Result<(), CompareError> {
    for (number, candidate) in candidates.iter().enumerate() {
        for earlier in &candidates[..number] {
            same(earlier, candidate, has_budget)?;
        }
        if !lengths[number].has_validation() {
            let name = candidate.name.clone();
            return Err(CompareError::NoValidation { name });
        }
    }
    let Some((first, others)) = candidates.split_first() else {
        return Err(CompareError::TooFew);
    };
    for (candidate, own) in others.iter().zip(&lengths[1..]) {
        shared(first, candidate)?;
        comparable((first, &lengths[0]), (candidate, own))?;
    }
    Ok(())
}

/// A budget gives both the same length.
fn same(first: &Candidate, second: &Candidate, has_budget: bool) -> Result<(), CompareError> {
    let hash = |candidate: &Candidate| match has_budget {
        true => candidate.hash(),
        false => candidate.own_hash(),
    };
    if hash(first) != hash(second) {
        return Ok(());
    }
    Err(CompareError::Same {
        first: first.name.clone(),
        second: second.name.clone(),
    })
}

fn shared(first: &Candidate, second: &Candidate) -> Result<(), CompareError> {
    let (a, b) = (&first.plan.config, &second.plan.config);
    let key = if a.train.threads != b.train.threads {
        "train.threads"
    } else if a.device.backend != b.device.backend {
        "device.backend"
    } else {
        return Ok(());
    };
    Err(CompareError::NotShared {
        first: first.name.clone(),
        second: second.name.clone(),
        key,
    })
}

/// The last phases decide: their validation losses are the results.
fn comparable(
    (first, own): (&Candidate, &Lengths),
    (second, other): (&Candidate, &Lengths),
) -> Result<(), CompareError> {
    let refuse = |what: String| {
        Err(CompareError::NotComparable {
            first: first.name.clone(),
            second: second.name.clone(),
            what,
        })
    };
    if let (Some(a), Some(b)) = (first.plan.phases.last(), second.plan.phases.last())
        && !a.is_evaluated_as(b)
    {
        let (a, b) = (
            flat_config(&first.plan.config),
            flat_config(&second.plan.config),
        );
        let evaluated = |key: &&String| {
            let decides = ["data.", "task", "dpo.", "phase."];
            decides.iter().any(|prefix| key.starts_with(prefix))
        };
        let keys = a.keys().chain(b.keys()).filter(evaluated);
        let mut lines: Vec<String> = keys
            .filter(|key| a.get(*key) != b.get(*key))
            .map(|key| {
                let value = |table: &BTreeMap<String, String>| {
                    table
                        .get(key)
                        .cloned()
                        .unwrap_or_else(|| "(absent)".to_string())
                };
                format!("{key} is {} and {}", value(&a), value(&b))
            })
            .collect();
        lines.sort();
        lines.dedup();
        if lines.is_empty() {
            lines.push("their last phases differ in data or objective".to_string());
        }
        return refuse(lines.join(", "));
    }
    if own.token_inputs() != other.token_inputs() {
        return refuse("the tokenizer, its special tokens or the chat template differ".to_string());
    }
    Ok(())
}
