//! Runs that tests observe and stop.

// Each test uses a part of it.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use firebrick::config::{Architecture, Config, DatasetConfig, Plan, TokenizerKind};
use firebrick::train::{
    Event, Interrupt, Observer, Options, Outcome, Resume, Run, Signal, StepRecord, TrainError,
};
use serde_json::Value;

/// A folder with a text to train on.
pub struct Bench {
    pub folder: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("text.txt"), text()).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Records the events of a run, and asks it to stop after a given step.
#[derive(Clone, Default)]
pub struct Watch {
    pub events: Arc<Mutex<Vec<Event>>>,
    pub stop_after: Option<u64>,
    /// Fails after a given step, as an observer whose disk is full.
    pub fail_after: Option<u64>,
    pub interrupt: Interrupt,
}

impl Observer for Watch {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        if let Event::Step(record) = event
            && Some(record.step) == self.stop_after
        {
            self.interrupt.raise(Signal::Interrupt);
        }
        self.events.lock().unwrap().push(event.clone());
        if let Event::Step(record) = event
            && Some(record.step) == self.fail_after
        {
            let path = PathBuf::from("observer");
            let source = std::io::Error::other("no room");
            return Err(TrainError::Io { path, source });
        }
        Ok(())
    }
}

pub fn run(plan: &Plan, watch: &Watch) -> Result<Option<Outcome>, TrainError> {
    let options = Options {
        resume: Resume::Auto,
        interrupt: watch.interrupt.clone(),
        observers: vec![Box::new(watch.clone())],
        ..Options::default()
    };
    Run::prepare(plan, options)?.map(Run::train).transpose()
}

pub fn steps(watch: &Watch) -> Vec<StepRecord> {
    let events = watch.events.lock().unwrap();
    let steps = events.iter().filter_map(|event| match event {
        Event::Step(record) => Some(record.clone()),
        _ => None,
    });
    steps.collect()
}

/// The metrics that do not depend on the machine.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows = text.lines().map(|line| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row["tokens_per_second"] = Value::Null;
        row["memory_bytes"] = Value::Null;
        row["train_seconds"] = Value::Null;
        row
    });
    rows.collect()
}

/// A small model on `text.txt` in `folder`, whose run is in the folder `run` beside it.
pub fn config(folder: &Path, run: &str) -> Config {
    let mut config = Config {
        seed: 5,
        output_dir: folder.join(run),
        ..Config::default()
    };
    let model = &mut config.model;
    model.architecture = Some(Architecture::Llama);
    model.hidden_size = Some(16);
    model.intermediate_size = Some(24);
    model.num_hidden_layers = Some(2);
    model.num_attention_heads = Some(2);
    config.tokenizer.kind = TokenizerKind::Byte;
    config.data.sequence_len = 16;
    config.data.val_fraction = 0.1;
    let text = folder.join("text.txt").display().to_string();
    config.data.datasets.push(DatasetConfig::new(text));
    config.train.micro_batch_size = 2;
    config.optimizer.learning_rate = 1e-2;
    config.checkpoint.keyframe_every = 3;
    config.logging.logging_steps = 1;
    config
}

/// Words in an order that a model can learn.
pub fn text() -> String {
    let words = ["the ", "river ", "is ", "older ", "than ", "its ", "bed.\n"];
    (0..300)
        .map(|i| words[(i * i + i / 3) % words.len()])
        .collect()
}
