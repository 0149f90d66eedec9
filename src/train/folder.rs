//! The run folder: who owns it, where things are, what is recorded about the run.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::observers::now;
use super::{EvaluatedWeights, TrainError};
use crate::adapter::OWN_BASE;
use crate::checkpoint::{CheckpointStore, Progress};
use crate::config::{Plan, SaveDtype};
use crate::data::{FileRecord, Tokenizer};
use crate::device::ComputeDevice;
use crate::durable;
use crate::environment::{Environment, peak_memory_bytes};
use crate::model::{DecoderSpec, Tensors, folder as model_folder};

/// A run folder that this process owns until it is dropped, or that rank 0 of its run owns.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// Held, not read: the lock goes with the file handle, also when the process is killed. None on
    /// the ranks that only read the folder.
    _lock: Option<File>,
}

/// run.json: what ran, on what, with which data, and how it ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RunRecord {
    pub(super) started: String,
    /// Ranks of the last session; absent if there was one.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub(super) ranks: usize,
    /// Logical workers of each rank; absent if there was one.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub(super) logical_workers: usize,
    pub(super) git: Option<String>,
    pub(super) environment: serde_json::Value,
    #[serde(default)]
    pub(super) device: serde_json::Value,
    pub(super) seed: u64,
    pub(super) parameters: u64,
    /// Of them, those that are trained.
    #[serde(default)]
    pub(super) trainable: u64,
    pub(super) train_tokens: u64,
    pub(super) val_tokens: u64,
    pub(super) data: serde_json::Value,
    /// Everything besides the data files that decides the tokens, by phase; null in older records.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub(super) token_inputs: serde_json::Value,
    /// The phases of a plan that was made in code; null if resolved.toml describes them completely.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub(super) phases: serde_json::Value,
    /// The first step of each phase; empty for a run with a single phase.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) phase_starts: Vec<u64>,
    /// The files of `model.base_model`, as `data`; null without one.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub(super) base_model: serde_json::Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) exported_step: Option<u64>,
    /// Which weights of that step; None if the run does not average them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) exported_weights: Option<EvaluatedWeights>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bigram_loss: Option<f64>,
    #[serde(rename = "final", skip_serializing_if = "Option::is_none")]
    pub(super) end: Option<FinalRecord>,
}

/// How a run ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct FinalRecord {
    pub(super) step: u64,
    pub(super) val_loss: Option<f64>,
    pub(super) best_val_loss: Option<f64>,
    /// The weights that `val_loss` was measured with; None if the run does not average them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) weights: Option<EvaluatedWeights>,
    pub(super) seconds: f64,
    pub(super) tokens: u64,
    pub(super) peak_rss_bytes: Option<u64>,
    /// Steps the run was to have.
    #[serde(default)]
    pub(super) planned_steps: u64,
    /// Whether it ended before them because validation stopped improving.
    #[serde(default)]
    pub(super) stopped_early: bool,
    #[serde(default)]
    pub(super) evaluations_since_best: u64,
    /// Forward-backward passes of all steps.
    #[serde(default)]
    pub(super) backward_passes: u64,
    /// Multiplications and additions of all steps, by the forecast.
    #[serde(default)]
    pub(super) flops: f64,
    /// Seconds of training steps, evaluation and saving left out.
    #[serde(default)]
    pub(super) train_seconds: f64,
    /// Bytes that a worker sent to exchange gradients; absent without compression.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) sent_bytes: u64,
    /// Bytes that a worker received from the others.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) received_bytes: u64,
    /// Why the run was ended before its last step, by whoever ran it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cut: Option<String>,
}

fn one() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_one(number: &usize) -> bool {
    *number == 1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl RunRecord {
    pub(super) fn new(
        plan: &Plan,
        environment: &Environment,
        device: &ComputeDevice,
        [parameters, trainable]: [u64; 2],
        tokens: [u64; 2],
        files: &[FileRecord],
    ) -> Self {
        Self {
            started: now(),
            ranks: plan.phases.first().map_or(1, |phase| phase.ranks),
            logical_workers: plan.phases.first().map_or(1, |phase| phase.workers),
            git: git_commit(),
            environment: json!(environment),
            device: device_record(device),
            seed: plan.config.seed,
            parameters,
            trainable,
            train_tokens: tokens[0],
            val_tokens: tokens[1],
            data: data_record(files),
            token_inputs: serde_json::Value::Null,
            phases: serde_json::Value::Null,
            phase_starts: Vec::new(),
            base_model: serde_json::Value::Null,
            exported_step: None,
            exported_weights: None,
            bigram_loss: None,
            end: None,
        }
    }
}

impl RunRecord {
    /// Reads the record of the run in a folder; None if the folder has no record.
    pub(super) fn read(run_folder: &Path) -> Result<Option<Self>, TrainError> {
        let path = run_folder.join("run.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(TrainError::io(&path)(error)),
        };
        let record = serde_json::from_str(&text);
        record.map(Some).map_err(|error| TrainError::Record {
            path,
            message: error.to_string(),
        })
    }

    /// The time at which the run was started; the current time if the record does not have it.
    pub(super) fn start_time(&self) -> SystemTime {
        let time = self.started.parse::<jiff::Timestamp>();
        time.map_or_else(|_| SystemTime::now(), SystemTime::from)
    }
}

impl FinalRecord {
    pub(super) fn new(progress: &Progress, planned_steps: u64, stopped_early: bool) -> Self {
        let cost = progress.cost;
        Self {
            step: progress.step,
            val_loss: progress.val_loss,
            best_val_loss: progress.best.map(|best| best.val_loss),
            weights: None,
            seconds: progress.seconds,
            tokens: progress.tokens,
            peak_rss_bytes: peak_memory_bytes(),
            planned_steps,
            stopped_early,
            evaluations_since_best: progress.evaluations_since_best,
            backward_passes: cost.backward_passes,
            flops: cost.flops,
            train_seconds: cost.train_seconds,
            sent_bytes: cost.sent_bytes,
            received_bytes: cost.received_bytes,
            cut: None,
        }
    }

    /// Whether a run of `steps` with `patience` would have stopped early at the same step. A run
    /// that was cut stays so.
    pub(super) fn stays_stopped(&self, steps: u64, patience: u64) -> bool {
        let out_of_patience = patience > 0 && self.evaluations_since_best >= patience;
        self.stopped_early && (out_of_patience || self.cut.is_some()) && self.planned_steps == steps
    }
}

/// How long a lock is waited for. A process that is killed while it starts another, `git` here,
/// leaves a child with a copy of its files for the moment until that becomes the other program.
const PATIENCE: Duration = Duration::from_secs(1);

impl RunFolder {
    /// Creates the folder if need be, takes its lock, and clears away what a killed run left half
    /// written.
    ///
    /// # Errors
    /// A folder that cannot be created or written, or that a live run holds.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        durable::create_folder(&path.join("logs")).map_err(TrainError::io(path))?;
        let lock_path = path.join(".lock");
        let lock = File::create(&lock_path).map_err(TrainError::io(&lock_path))?;
        let asked = Instant::now();
        let mut locked = lock.try_lock();
        while matches!(locked, Err(TryLockError::WouldBlock)) && asked.elapsed() < PATIENCE {
            std::thread::sleep(PATIENCE / 50);
            locked = lock.try_lock();
        }
        match locked {
            Ok(()) => {
                let folder = Self {
                    path: path.to_path_buf(),
                    _lock: Some(lock),
                };
                folder.sweep()?;
                Ok(folder)
            }
            Err(TryLockError::WouldBlock) => Err(TrainError::Locked {
                folder: path.to_path_buf(),
            }),
            Err(TryLockError::Error(source)) => Err(TrainError::io(&lock_path)(source)),
        }
    }

    /// The folder of a run that rank 0 owns, to read from.
    pub(super) fn of_lead(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            _lock: None,
        }
    }

    fn sweep(&self) -> Result<(), TrainError> {
        for folder in [self.path.clone(), self.file("logs"), self.file(OWN_BASE)] {
            durable::sweep(&folder).map_err(TrainError::io(folder))?;
        }
        Ok(self.checkpoints().sweep()?)
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The run's checkpoints.
    pub fn checkpoints(&self) -> CheckpointStore {
        CheckpointStore::new(&self.path)
    }

    /// Where a file of the run lies.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(super) fn write(&self, name: &str, content: &str) -> Result<(), TrainError> {
        let path = self.file(name);
        durable::replace_with(&path, content).map_err(TrainError::io(path))
    }

    pub(super) fn write_record(&self, record: &RunRecord) -> Result<(), TrainError> {
        let text = serde_json::to_string_pretty(record).map_err(std::io::Error::from);
        let text = text.map_err(TrainError::io(self.file("run.json")))?;
        self.write("run.json", &format!("{text}\n"))
    }

    /// The record of the run in this folder; none in a folder without one.
    pub(super) fn read_record(&self) -> Result<Option<RunRecord>, TrainError> {
        RunRecord::read(&self.path)
    }

    /// Writes the tokenizer and a model, ready for Hugging Face's tools and for `--model`.
    pub(super) fn export(
        &self,
        spec: &DecoderSpec,
        tensors: &Tensors,
        tokenizer: &Tokenizer,
        dtype: SaveDtype,
    ) -> Result<(), TrainError> {
        tokenizer.save(&self.path)?;
        let options = model_folder::SaveOptions {
            dtype,
            ..Default::default()
        };
        model_folder::save(&self.path, spec, tensors, &options)?;
        Ok(())
    }

    /// A dispatcher that appends `tracing` records to logs/train.log.
    pub(super) fn log(&self) -> Result<tracing::Dispatch, TrainError> {
        let path = self.file("logs/train.log");
        let file = fs::OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(TrainError::io(path))?;
        let subscriber = tracing_subscriber::fmt()
            .with_writer(std::sync::Mutex::new(file))
            .with_ansi(false)
            .with_target(false)
            .finish();
        Ok(tracing::Dispatch::new(subscriber))
    }
}

/// How many checkpoints the run in a folder is to keep.
///
/// # Errors
/// A folder without a resolved.toml that says so.
pub fn kept_checkpoints(run_folder: &Path) -> Result<usize, TrainError> {
    let path = run_folder.join("resolved.toml");
    let text = fs::read_to_string(&path).map_err(TrainError::io(&path))?;
    let table: Result<toml::Table, _> = text.parse();
    let table = table.map_err(|error| TrainError::Record {
        path: path.clone(),
        message: error.to_string(),
    })?;
    let limit = &table
        .get("checkpoint")
        .and_then(|section| section.get("save_total_limit"));
    let limit = limit
        .and_then(toml::Value::as_integer)
        .and_then(|limit| usize::try_from(limit).ok());
    limit.ok_or_else(|| TrainError::Record {
        path,
        message: "no checkpoint.save_total_limit".to_string(),
    })
}

/// What computed.
pub(super) fn device_record(device: &ComputeDevice) -> serde_json::Value {
    json!({"backend": device.backend, "name": device.name})
}

/// The data files with their sizes and hashes.
pub(super) fn data_record(files: &[FileRecord]) -> serde_json::Value {
    let files = files
        .iter()
        .map(|file| json!({"path": file.path, "bytes": file.bytes, "blake3": file.blake3}));
    files.collect()
}

/// The commit the working directory stands on, `-dirty` if files differ from it.
fn git_commit() -> Option<String> {
    let output = std::process::Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_string())
}
