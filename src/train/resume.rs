//! Continuing the run found in the output folder, and refusing to continue another one.

use std::collections::BTreeMap;
use std::fs;

use std::path::Path;

use super::TrainError;
use crate::checkpoint::{CheckpointError, CheckpointStore};
use crate::config::Plan;
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

/// Keys that a resumed run may change: its length, what it reports, what it keeps, where it lies.
/// The number of threads and the device may change too, at the price of bit-equality, which is
/// announced.
const FREE: [&str; 10] = [
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
];

/// Where to start: the checkpoint to load, or none for a fresh run.
pub(super) fn starting_point(
    folder: &Path,
    plan: &Plan,
    resume: Resume,
) -> Result<Option<u64>, TrainError> {
    let available = CheckpointStore::new(folder).steps()?;
    let step = match (resume, available.last()) {
        (Resume::Never, _) if is_used(folder)? => {
            let folder = folder.to_path_buf();
            return Err(TrainError::NotEmpty { folder });
        }
        // A run that died before its first save has a resolved.toml and can be started over.
        (Resume::Auto, None) if is_used(folder)? && !folder.join("resolved.toml").exists() => {
            let folder = folder.to_path_buf();
            return Err(TrainError::NotARun { folder });
        }
        (Resume::Never, _) | (Resume::Auto, None) => return Ok(None),
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
    Ok(Some(step))
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

fn same_config(folder: &Path, plan: &Plan) -> Result<(), TrainError> {
    let path = folder.join("resolved.toml");
    let text = fs::read_to_string(&path).map_err(TrainError::io(&path))?;
    let record = |message: String| TrainError::Record {
        path: path.clone(),
        message,
    };
    let old: toml::Table = text
        .parse()
        .map_err(|error: toml::de::Error| record(error.to_string()))?;
    let new = toml::Table::try_from(&plan.config).map_err(|error| record(error.to_string()))?;
    let (old, new) = (flatten(&old), flatten(&new));

    let absent = "(absent)".to_string();
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let lines: Vec<String> = keys
        .into_iter()
        .filter(|key| !FREE.iter().any(|free| key.starts_with(free)))
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
