//! logs/events.jsonl: what happened in a run, over all its sessions.
//!
//! One JSON object a line: an [`Event`] with the time it was told and `at`, the optimizer steps
//! completed by then. Of the steps only those are kept that the metrics files have a row for, so
//! that the journal grows no faster than they do. It is written whatever `logging.report_to` says:
//! a report can be asked for when a run is resumed and still show the run from its beginning.
//!
//! As with the metrics files, a line is written at once, and a resumed run first drops the lines
//! past its checkpoint: they belong to a future that will not be.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::metrics::{append, flush_before_save, keep_lines};
use super::{Event, Observer, StepRecord, TrainError};
use crate::durable;

/// One line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::train) struct Entry {
    /// Completed optimizer steps when it happened.
    pub(in crate::train) at: u64,
    /// When, in UTC.
    pub(in crate::train) time: String,
    #[serde(flatten)]
    pub(in crate::train) event: Event,
}

/// Turns events into entries: tells which steps are kept, and when what happened.
#[derive(Debug)]
pub(in crate::train) struct Entries {
    every: u64,
    at: u64,
    /// A step that is kept only if it turns out to be evaluated.
    pending: Option<StepRecord>,
}

impl Entries {
    pub(in crate::train) fn new(every: u64, at: u64) -> Self {
        Self {
            every,
            at,
            pending: None,
        }
    }

    pub(in crate::train) fn every(&self) -> u64 {
        self.every
    }

    /// The entries that an event makes.
    pub(in crate::train) fn take(&mut self, event: &Event) -> Vec<Entry> {
        self.at = event.completed_steps().unwrap_or(self.at);
        let pending = self.pending.take();
        match event {
            Event::Step(record) if record.step != 1 && !record.step.is_multiple_of(self.every) => {
                self.pending = Some(record.clone());
                Vec::new()
            }
            Event::Evaluated { step, .. } => {
                let step = pending.filter(|record| record.step == *step);
                let events = step.map(Event::Step).into_iter().chain([event.clone()]);
                events.map(|event| self.entry(event)).collect()
            }
            _ => vec![self.entry(event.clone())],
        }
    }

    fn entry(&self, event: Event) -> Entry {
        Entry {
            at: self.at,
            time: now(),
            event,
        }
    }
}

/// The time of day as run.json writes it.
pub(in crate::train) fn now() -> String {
    jiff::Timestamp::now()
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        .to_string()
}

/// Writes the journal.
#[derive(Debug)]
pub(in crate::train) struct Journal {
    path: PathBuf,
    file: File,
    entries: Entries,
}

impl Journal {
    /// Opens the journal of a run that begins anew, or that goes on from a checkpoint.
    ///
    /// # Errors
    /// The file system's.
    pub(in crate::train) fn open(
        path: &Path,
        every: u64,
        checkpoint: Option<u64>,
    ) -> Result<Self, TrainError> {
        keep_lines(path, |line| {
            let entry: Option<Entry> = serde_json::from_str(line).ok();
            entry.is_some_and(|entry| checkpoint.is_some_and(|step| entry.at <= step))
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            file: append(path)?,
            entries: Entries::new(every, checkpoint.unwrap_or(0)),
        })
    }

    /// Calls `take` with every entry in the file.
    ///
    /// # Errors
    /// The file system's; a line that is not an entry.
    pub(in crate::train) fn read(
        path: &Path,
        mut take: impl FnMut(&Entry),
    ) -> Result<(), TrainError> {
        let file = fs::File::open(path).map_err(TrainError::io(path))?;
        for line in BufReader::new(file).lines() {
            let line = line.map_err(TrainError::io(path))?;
            let entry = serde_json::from_str(&line).map_err(|error| TrainError::Record {
                path: path.to_path_buf(),
                message: error.to_string(),
            })?;
            take(&entry);
        }
        Ok(())
    }
}

impl Observer for Journal {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        if let Some(step) = event.back_to() {
            *self = Self::open(&self.path, self.entries.every, Some(step))?;
        }
        for entry in self.entries.take(event) {
            let line = serde_json::to_string(&entry).map_err(std::io::Error::from);
            line.and_then(|line| {
                let line = format!("{line}\n");
                durable::append(&mut self.file, &self.path, line.as_bytes())
            })
            .map_err(TrainError::io(&self.path))?;
        }
        flush_before_save(&self.file, event).map_err(TrainError::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Cost;
    use crate::objective::{CrossEntropy, Metrics, Preference};
    use crate::train::Evaluation;
    use std::io::Write;

    fn step(step: u64) -> Event {
        Event::Step(StepRecord {
            step,
            regulated: None,
            prediction: None,
            exchange: None,
            phase: None,
            tokens: step * 8,
            loss: 1.5,
            lr: 0.1,
            grad_norm: 2.0,
            tokens_per_second: 3.0,
            memory_bytes: None,
            cost: Cost::default(),
            metrics: Metrics::of(&Preference::SPEC.step, [0.75, -0.5]),
        })
    }

    fn evaluated(step: u64, val_loss: f64) -> Event {
        let evaluation = Evaluation {
            val_loss,
            tokens: 0,
            metrics: Metrics::of(&CrossEntropy::SPEC.evaluation, [0.5]),
        };
        Event::Evaluated {
            step,
            evaluation,
            weights: None,
            best: true,
            tokens: 9,
            cost: Cost::default(),
        }
    }

    fn read(path: &Path) -> Vec<Entry> {
        let mut entries = Vec::new();
        Journal::read(path, |entry| entries.push(entry.clone())).unwrap();
        entries
    }

    #[test]
    fn r12_the_journal_keeps_every_event_and_the_steps_that_the_metrics_have() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let mut journal = Journal::open(&path, 2, None).unwrap();
        let text = "a note\nof two lines".to_string();
        let events = [
            Event::Note { text },
            Event::Started {
                step: 0,
                steps: 9,
                objectives: vec![Preference::SPEC],
            },
            step(1),
            step(2),
            step(3),
            evaluated(3, 1.25),
            Event::Saved {
                step: 3,
                seconds: 0.5,
            },
            Event::Deleted { step: 1 },
            step(5),
            step(6),
        ];
        for event in &events {
            journal.observe(event).unwrap();
        }
        let entries = read(&path);
        let expected: Vec<&Event> = events.iter().filter(|event| **event != step(5)).collect();
        assert_eq!(
            entries.iter().map(|entry| &entry.event).collect::<Vec<_>>(),
            expected
        );
        let at: Vec<u64> = entries.iter().map(|entry| entry.at).collect();
        assert_eq!(at, [0, 0, 1, 2, 3, 3, 3, 3, 6]);
    }

    #[test]
    fn r10_a_resumed_journal_drops_what_came_after_its_checkpoint_and_a_new_one_everything() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let mut journal = Journal::open(&path, 1, None).unwrap();
        for event in [
            step(1),
            step(2),
            Event::Deleted { step: 1 },
            step(3),
            Event::Deleted { step: 2 },
        ] {
            journal.observe(&event).unwrap();
        }
        // The crash comes in the middle of a line.
        append(&path).unwrap().write_all(b"{\"at\": 1").unwrap();
        let mut journal = Journal::open(&path, 1, Some(2)).unwrap();
        journal.observe(&Event::Deleted { step: 3 }).unwrap();
        journal.observe(&Event::Resumed { step: 2 }).unwrap();
        let events: Vec<Event> = read(&path).into_iter().map(|entry| entry.event).collect();
        let (deleted, later) = (Event::Deleted { step: 1 }, Event::Deleted { step: 3 });
        assert_eq!(
            events,
            [step(1), step(2), deleted, later, Event::Resumed { step: 2 }]
        );
        assert_eq!(read(&path)[3].at, 2);
        Journal::open(&path, 1, None).unwrap();
        assert_eq!(read(&path), []);
    }

    #[test]
    fn r12_a_validation_loss_that_is_not_a_number_survives_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let mut journal = Journal::open(&path, 1, None).unwrap();
        journal.observe(&evaluated(3, f64::NAN)).unwrap();
        let entries = read(&path);
        let Event::Evaluated { evaluation, .. } = &entries[0].event else {
            panic!("{entries:?}");
        };
        assert!(evaluation.val_loss.is_nan());
    }
}
