//! metrics.jsonl and metrics.csv: one row per logged step.
//!
//! A row is complete when the next step begins, since the evaluation of a step follows the step.
//! Rows are flushed one by one: after a crash the files end at the last logged step. A resumed run
//! first drops the rows past its checkpoint, so that no step appears twice.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Evaluation, Event, Observer, StepRecord, TrainError};
use crate::durable;

/// One line of the metrics files.
#[derive(Debug, Clone, Copy, Serialize)]
struct Row {
    #[serde(flatten)]
    step: StepRecord,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    evaluation: Option<Evaluation>,
}

/// Pairs each logged step with its evaluation.
#[derive(Debug)]
struct Rows {
    every: u64,
    pending: Option<Row>,
}

impl Rows {
    fn new(every: u64) -> Self {
        Self {
            every,
            pending: None,
        }
    }

    /// Takes an event, gives the row that it completes.
    fn take(&mut self, event: &Event) -> Option<Row> {
        match event {
            Event::Step(step) => {
                let done = self.pending.take().filter(|row| self.is_logged(row));
                self.pending = Some(Row {
                    step: *step,
                    evaluation: None,
                });
                done
            }
            Event::Evaluated {
                step, evaluation, ..
            } => {
                let row = self.pending.as_mut().filter(|row| row.step.step == *step)?;
                row.evaluation = Some(*evaluation);
                None
            }
            // Whatever was measured before a save must not be lost if the run dies after it.
            Event::Saved { .. } | Event::Finished { .. } => {
                self.pending.take().filter(|row| self.is_logged(row))
            }
            _ => None,
        }
    }

    /// The first step, every n-th, and every evaluated one.
    fn is_logged(&self, row: &Row) -> bool {
        row.step.step == 1 || row.step.step % self.every == 0 || row.evaluation.is_some()
    }
}

/// Writes metrics.jsonl: one JSON object a line.
#[derive(Debug)]
pub struct JsonlMetrics {
    path: PathBuf,
    file: File,
    rows: Rows,
}

impl JsonlMetrics {
    /// Appends to `path` after dropping the rows of steps past `resumed_at`.
    ///
    /// # Errors
    /// The file system's.
    pub fn open(path: &Path, every: u64, resumed_at: u64) -> Result<Self, TrainError> {
        keep_lines(path, |line| {
            let row: Option<serde_json::Value> = serde_json::from_str(line).ok();
            row.and_then(|row| row["step"].as_u64())
                .is_some_and(|step| step <= resumed_at)
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            file: append(path)?,
            rows: Rows::new(every),
        })
    }
}

impl Observer for JsonlMetrics {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        let Some(row) = self.rows.take(event) else {
            return Ok(());
        };
        let line = serde_json::to_string(&row).map_err(std::io::Error::from);
        line.and_then(|line| self.file.write_all(format!("{line}\n").as_bytes()))
            .map_err(TrainError::io(&self.path))
    }
}

/// Writes metrics.csv, with empty cells where a step was not evaluated.
#[derive(Debug)]
pub struct CsvMetrics {
    path: PathBuf,
    file: File,
    rows: Rows,
}

const CSV_HEADER: &str = "step,tokens,loss,lr,grad_norm,tokens_per_second,val_loss,bits_per_byte";

impl CsvMetrics {
    /// Appends to `path` after dropping the rows of steps past `resumed_at`.
    ///
    /// # Errors
    /// The file system's.
    pub fn open(path: &Path, every: u64, resumed_at: u64) -> Result<Self, TrainError> {
        keep_lines(path, |line| {
            let step = line
                .split(',')
                .next()
                .and_then(|cell| cell.parse::<u64>().ok());
            step.is_some_and(|step| step <= resumed_at)
        })?;
        let mut file = append(path)?;
        // What a header precedes was dropped with it, so it is written anew above what was kept.
        if file.metadata().map_err(TrainError::io(path))?.len() == 0 {
            writeln!(file, "{CSV_HEADER}").map_err(TrainError::io(path))?;
        }
        Ok(Self {
            path: path.to_path_buf(),
            file,
            rows: Rows::new(every),
        })
    }
}

impl Observer for CsvMetrics {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        let Some(Row {
            step: s,
            evaluation,
        }) = self.rows.take(event)
        else {
            return Ok(());
        };
        let [val_loss, bits] = match evaluation {
            Some(evaluation) => {
                [evaluation.val_loss, evaluation.bits_per_byte].map(|v| v.to_string())
            }
            None => [String::new(), String::new()],
        };
        let cells = [s.loss, s.lr, s.grad_norm, s.tokens_per_second].map(|value| value.to_string());
        let line = format!(
            "{},{},{},{val_loss},{bits}\n",
            s.step,
            s.tokens,
            cells.join(",")
        );
        self.file
            .write_all(line.as_bytes())
            .map_err(TrainError::io(&self.path))
    }
}

fn append(path: &Path) -> Result<File, TrainError> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(TrainError::io(path))
}

/// Rewrites a file with the lines to keep; a last line cut short by a crash is not one of them.
fn keep_lines(path: &Path, keep: impl Fn(&str) -> bool) -> Result<(), TrainError> {
    let text = match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(TrainError::io(path)(error)),
    };
    let header = text.lines().next().filter(|line| *line == CSV_HEADER);
    let rows = text
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n') && keep(line.trim_end()));
    let mut kept: String = header.map(|line| format!("{line}\n")).unwrap_or_default();
    kept.extend(rows);
    durable::replace_with(path, kept).map_err(TrainError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Event<'static> {
        Event::Step(StepRecord {
            step,
            tokens: step * 8,
            loss: 1.5,
            lr: 0.1,
            grad_norm: 2.0,
            tokens_per_second: 3.0,
        })
    }

    fn evaluated(step: u64) -> Event<'static> {
        let evaluation = Evaluation {
            val_loss: 1.25,
            bits_per_byte: 0.5,
            tokens: 9,
        };
        Event::Evaluated {
            step,
            evaluation,
            best: true,
        }
    }

    fn watch(observer: &mut impl Observer, events: &[Event]) {
        events
            .iter()
            .for_each(|event| observer.observe(event).unwrap());
    }

    #[test]
    fn r12_rows_are_the_first_step_every_nth_and_the_evaluated_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = JsonlMetrics::open(&path, 2, 0).unwrap();
        watch(
            &mut metrics,
            &[step(1), step(2), step(3), evaluated(3), step(4), step(5)],
        );
        watch(&mut metrics, &[Event::Finished { step: 5 }]);
        let rows: Vec<serde_json::Value> = fs::read_to_string(&path)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let steps: Vec<u64> = rows
            .iter()
            .map(|row| row["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        assert_eq!(rows[2]["val_loss"], 1.25);
        assert!(rows[3].get("val_loss").is_none());
        assert_eq!(rows[3]["tokens"], 32);
    }

    #[test]
    fn r10_a_resumed_run_drops_what_came_after_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let (jsonl, csv) = (folder.path().join("m.jsonl"), folder.path().join("m.csv"));
        for resumed_at in [0, 2] {
            let mut observers: [Box<dyn Observer>; 2] = [
                Box::new(JsonlMetrics::open(&jsonl, 1, resumed_at).unwrap()),
                Box::new(CsvMetrics::open(&csv, 1, resumed_at).unwrap()),
            ];
            for observer in &mut observers {
                for event in [
                    step(resumed_at + 1),
                    step(resumed_at + 2),
                    step(resumed_at + 3),
                ] {
                    observer.observe(&event).unwrap();
                }
                observer
                    .observe(&Event::Finished {
                        step: resumed_at + 3,
                    })
                    .unwrap();
            }
            // The crash comes in the middle of a line.
            append(&jsonl).unwrap().write_all(b"{\"step\": 1").unwrap();
        }
        let csv = fs::read_to_string(&csv).unwrap();
        let first_cells: Vec<&str> = csv.lines().map(|l| l.split(',').next().unwrap()).collect();
        assert_eq!(first_cells, ["step", "1", "2", "3", "4", "5"]);
        assert_eq!(fs::read_to_string(&jsonl).unwrap().lines().count(), 6);
    }
}
