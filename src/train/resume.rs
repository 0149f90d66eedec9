//! Continuing the run found in the output folder, and refusing to continue another one.

use std::collections::BTreeMap;
use std::fs;

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::TrainError;
use super::folder::RunRecord;
use crate::checkpoint::{CheckpointError, CheckpointStore};
use crate::config::{Config, Plan};
use crate::durable::is_temporary;

/// What to do with a run that is already in the output folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Resume {
    /// Continue it from its last checkpoint if its config is this one's.
    #[default]
    Auto,
    /// Insist on an empty or absent folder.
    Never,
    /// Go back to the checkpoint of this step.
    Step(u64),
}

impl std::str::FromStr for Resume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "never" => Ok(Self::Never),
            step => step
                .parse()
                .map(Self::Step)
                .map_err(|_| format!("`{step}` is not auto, never or a step")),
        }
    }
}

/// Keys that a resumed run may change: its length, what it reports, what it keeps, where it lies, and
/// where what has not begun begins.
/// The number of threads and the device may change too, at the price of bit-equality, which is
/// announced.
const FREE: [&str; 13] = [
    "train.max_steps",
    "train.num_epochs",
    "train.max_tokens",
    "train.threads",
    "train.on_nonfinite",
    "logging.",
    "eval.",
    "checkpoint.",
    "device.",
    "output_dir",
    // An average that has begun cannot be moved: its saved state says where it began.
    "average.start",
    // Residuals of other workers are shared out.
    "gradient.logical_workers",
    "gradient.timeout_seconds",
];

/// Whether a resumed run may change a key.
fn is_free(key: &str) -> bool {
    let is_length = key.starts_with("phase.") && key.ends_with(".length");
    // Losses over sequences of another length could not be compared with the best one so far.
    let decides_losses = key == "eval.sequence_len";
    (is_length || FREE.iter().any(|free| key.starts_with(free))) && !decides_losses
}

/// Where a run starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum StartingPoint {
    /// At the beginning of a new run.
    New,
    /// At the beginning again: the run in the folder has saved nothing, or its checkpoints are
    /// gone.
    Again,
    /// At the checkpoint of this step.
    Checkpoint(u64),
    /// Nowhere: the run in the folder ended at this step, and its checkpoints are gone.
    FinishedAt(u64),
}

impl StartingPoint {
    /// The checkpoint to load.
    pub(super) fn checkpoint(self) -> Option<u64> {
        match self {
            Self::Checkpoint(step) => Some(step),
            Self::New | Self::Again | Self::FinishedAt(_) => None,
        }
    }
}

/// Where a run in this folder starts.
pub(super) fn starting_point(
    folder: &Path,
    plan: &Plan,
    resume: Resume,
) -> Result<StartingPoint, TrainError> {
    let available = CheckpointStore::new(folder).steps()?;
    let step = match (resume, available.last()) {
        (Resume::Never, _) if is_used(folder)? => {
            let folder = folder.to_path_buf();
            return Err(TrainError::NotEmpty { folder });
        }
        (Resume::Never, _) => return Ok(StartingPoint::New),
        (Resume::Auto, None) => return without_checkpoints(folder, plan),
        (Resume::Auto, Some(&last)) => last,
        (Resume::Step(step), _) if available.contains(&step) => step,
        (Resume::Step(step), _) => {
            let folder = folder.join("checkpoints");
            return Err(CheckpointError::NoSuchStep {
                folder,
                step,
                available,
            }
            .into());
        }
    };
    same_config(folder, plan)?;
    Ok(StartingPoint::Checkpoint(step))
}

/// The starting point in a folder without checkpoints. A run that died before its first save has a
/// resolved.toml and can be started over; a finished run is not overwritten.
fn without_checkpoints(folder: &Path, plan: &Plan) -> Result<StartingPoint, TrainError> {
    if !is_used(folder)? {
        return Ok(StartingPoint::New);
    }
    if !folder.join("resolved.toml").exists() {
        let folder = folder.to_path_buf();
        return Err(TrainError::NotARun { folder });
    }
    let end = RunRecord::read(folder)?.and_then(|record| record.end);
    match end {
        Some(end) => {
            same_config(folder, plan)?;
            Ok(StartingPoint::FinishedAt(end.step))
        }
        None => Ok(StartingPoint::Again),
    }
}

/// Whether anything but what opening it makes is in the folder.
fn is_used(folder: &Path) -> Result<bool, TrainError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(TrainError::io(folder)(error)),
    };
    let mut names = entries
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    // What a kill in the middle of a write left is as good as nothing.
    let ours = |name: &str| name == ".lock" || name == "logs" || is_temporary(name);
    Ok(names.any(|name| !ours(&name)))
}

/// Compares the configs of the run in the folder and of this run, key by key after defaults. A key
/// that the older run did not know has its default there.
fn same_config(folder: &Path, plan: &Plan) -> Result<(), TrainError> {
    let old = flatten(&older_config(&folder.join("resolved.toml"))?);
    let new = flatten(&as_table(&plan.config));
    let absent = "(absent)".to_string();
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let lines: Vec<String> = keys
        .into_iter()
        .filter(|key| !is_free(key))
        .filter_map(|key| {
            let (old, new) = (
                old.get(key).unwrap_or(&absent),
                new.get(key).unwrap_or(&absent),
            );
            (old != new).then(|| format!("  {key}: {old} there, {new} here"))
        })
        .collect();
    if lines.is_empty() {
        return Ok(());
    }
    let (folder, difference) = (folder.to_path_buf(), lines.join("\n"));
    Err(TrainError::OtherConfig { folder, difference })
}

/// The config of a resolved.toml, with the defaults of keys that the file does not have.
fn older_config(path: &Path) -> Result<toml::Table, TrainError> {
    let text = fs::read_to_string(path).map_err(TrainError::io(path))?;
    let config: Config = toml::from_str(&text).map_err(|error| TrainError::Record {
        path: path.to_path_buf(),
        message: error.message().to_string(),
    })?;
    // Some defaults follow from other keys. A config that no longer resolves, because its base model
    // has been moved for instance, is compared as it was written.
    let resolved = Plan::from_config(config.clone()).map(|plan| plan.config);
    Ok(as_table(&resolved.unwrap_or(config)))
}

/// `a.b = v` for every leaf of a config, in TOML's form.
pub(crate) fn flat_config(config: &Config) -> BTreeMap<String, String> {
    flatten(&as_table(config))
}

fn as_table(config: &Config) -> toml::Table {
    // Every config was read from TOML, so all its numbers, strings and paths fit into it.
    toml::Table::try_from(config).expect("a config is TOML")
}

/// `a.b = v` for every leaf.
fn flatten(table: &toml::Table) -> BTreeMap<String, String> {
    fn walk(prefix: &str, value: &toml::Value, out: &mut BTreeMap<String, String>) {
        let mut descend = |name: &str, value: &toml::Value| {
            let path = if prefix.is_empty() {
                name.to_string()
            } else {
                format!("{prefix}.{name}")
            };
            walk(&path, value, out);
        };
        match value {
            toml::Value::Table(table) => table.iter().for_each(|(name, v)| descend(name, v)),
            toml::Value::Array(values) if values.iter().any(toml::Value::is_table) => {
                values
                    .iter()
                    .enumerate()
                    .for_each(|(i, v)| descend(&i.to_string(), v));
            }
            leaf => {
                out.insert(prefix.to_string(), leaf.to_string());
            }
        }
    }
    let mut out = BTreeMap::new();
    walk("", &toml::Value::Table(table.clone()), &mut out);
    out
}
