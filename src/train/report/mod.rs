//! report.html: the run on one page that needs no network and no server.
//!
//! The page is a function of what lies in the run folder: the journal (`logs/events.jsonl`) for the
//! course of the run, `run.json`, `resolved.toml` and the checkpoints for the rest. So it does not
//! matter which other reports are asked for, nor since when this one is. It is written anew, beside
//! its place and renamed over it, when a run starts, at every evaluation and save, and at the end.

mod history;
mod page;
mod series;

use std::path::{Path, PathBuf};

use self::history::History;
use self::page::Page;
use super::observers::{Entries, Journal};
use super::{Event, Observer, TrainError};
use crate::checkpoint::CheckpointStore;
use crate::durable;
use crate::environment::peak_memory_bytes;

/// Writes report.html.
#[derive(Debug)]
pub(super) struct HtmlReport {
    folder: PathBuf,
    entries: Entries,
    history: History,
}

impl HtmlReport {
    /// The report of the run in `folder`, whose journal is open already and holds what happened
    /// before this session. `at` is the step the session starts from.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn open(folder: &Path, every: u64, at: u64) -> Result<Self, TrainError> {
        let mut history = History::default();
        Journal::read(&folder.join("logs/events.jsonl"), |entry| {
            history.take(entry)
        })?;
        Ok(Self {
            folder: folder.to_path_buf(),
            entries: Entries::new(every, at),
            history,
        })
    }

    fn write(&self) -> Result<(), TrainError> {
        let read = |name: &str| {
            let path = self.folder.join(name);
            std::fs::read_to_string(&path).map_err(TrainError::io(path))
        };
        let record =
            serde_json::from_str(&read("run.json")?).map_err(|error| TrainError::Record {
                path: self.folder.join("run.json"),
                message: error.to_string(),
            })?;
        let store = CheckpointStore::new(&self.folder);
        let name = self.folder.file_name().unwrap_or_default();
        let page = Page {
            name: &name.to_string_lossy(),
            history: &self.history,
            record: &record,
            config: &read("resolved.toml")?,
            checkpoints: &store.steps()?,
            best_checkpoint: store.best(),
            peak_memory: peak_memory_bytes(),
        };
        let path = self.folder.join("report.html");
        durable::replace_with(&path, page.html()).map_err(TrainError::io(path))
    }
}

impl Observer for HtmlReport {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        if let Some(step) = event.back_to() {
            // The journal has dropped what is void, and has this event already.
            *self = Self::open(&self.folder, self.entries.every(), step)?;
            return self.write();
        }
        for entry in self.entries.take(event) {
            self.history.take(&entry);
        }
        match event {
            Event::Started { .. }
            | Event::Evaluated { .. }
            | Event::Sample { .. }
            | Event::Saved { .. }
            | Event::Stopped { .. }
            | Event::Finished { .. } => self.write(),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
