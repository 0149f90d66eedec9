//! metrics.jsonl and metrics.csv: one row per logged step.
//!
//! A row is complete when the next step begins, since the evaluation of a step follows the step.
//! Rows are flushed one by one: after a crash the files end at the last logged step. A resumed run
//! first drops the rows past its checkpoint, so that no step appears twice.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{EvaluatedWeights, Evaluation, Event, Observer, StepRecord, TrainError};
use crate::checkpoint::Cost;
use crate::durable;
use crate::objective::{Metrics, ObjectiveSpec};

/// One line of the metrics files.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) step: u64,
    /// None for a step that was skipped as not finite but evaluated.
    pub(super) record: Option<StepRecord>,
    pub(super) evaluation: Option<Evaluation>,
    /// The weights that were evaluated, in a run that averages them.
    pub(super) weights: Option<EvaluatedWeights>,
    pub(super) cost: Cost,
}

impl Row {
    /// Names and values in order, without those that are missing or not finite.
    pub(super) fn cells(&self) -> Vec<(&str, Value)> {
        let mut cells = vec![("step", json!(self.step))];
        if let Some(record) = &self.record {
            cells.extend([
                (PHASE, json!(record.phase)),
                ("tokens", json!(record.tokens)),
                ("loss", json!(record.loss)),
                ("lr", json!(record.lr)),
                ("grad_norm", json!(record.measured_grad_norm())),
                ("tokens_per_second", json!(record.tokens_per_second)),
            ]);
        }
        if let Some(evaluation) = &self.evaluation {
            cells.push(("val_loss", json!(evaluation.val_loss)));
            cells.extend(numbers(&evaluation.metrics));
            cells.push((WEIGHTS, json!(self.weights)));
        }
        if let Some(record) = &self.record {
            cells.push(("memory_bytes", json!(record.memory_bytes)));
            cells.push((REGULATED, json!(record.regulated)));
            if let Some(prediction) = &record.prediction {
                let [mode, predicted, rejected, cosine] = PREDICTION;
                cells.extend([
                    (mode, json!(prediction.mode)),
                    (predicted, json!(prediction.predicted)),
                    (rejected, json!(prediction.rejected)),
                    (cosine, json!(prediction.cosine)),
                ]);
            }
            if let Some(exchange) = &record.exchange {
                let [energy, cosine, residual] = EXCHANGE;
                cells.extend([
                    (energy, json!(exchange.sent_energy)),
                    (cosine, json!(exchange.cosine)),
                    (residual, json!(exchange.residual_norm)),
                ]);
            }
            cells.extend(numbers(&record.metrics));
        }
        if self.cost.sent_bytes > 0 {
            let [sent, received] = TRAFFIC;
            cells.extend([
                (sent, json!(self.cost.sent_bytes)),
                (received, json!(self.cost.received_bytes)),
            ]);
        }
        cells.extend([
            ("backward_passes", json!(self.cost.backward_passes)),
            ("flops", json!(self.cost.flops)),
            ("train_seconds", json!(self.cost.train_seconds)),
        ]);
        cells.retain(|(_, value)| !value.is_null());
        cells
    }

    /// One object.
    fn json_line(&self) -> String {
        let cells = self.cells().into_iter();
        let object: Map<String, Value> = cells
            .map(|(name, value)| (name.to_string(), value))
            .collect();
        format!("{}\n", Value::Object(object))
    }

    /// Comma-separated, a missing value an empty cell.
    fn csv_line(&self, columns: &[String]) -> String {
        let cells = self.cells();
        let text = |column: &String| {
            let found = cells.iter().find(|(name, _)| name == column);
            found.map_or(String::new(), |(_, value)| csv_cell(value))
        };
        let texts: Vec<String> = columns.iter().map(text).collect();
        format!("{}\n", texts.join(","))
    }
}

/// The column of the phase's name.
pub(in crate::train) const PHASE: &str = "phase";

/// The column of the weights that were evaluated.
pub(in crate::train) const WEIGHTS: &str = "weights";

/// The column of the regulator's decisions.
pub(in crate::train) const REGULATED: &str = "regulated";

/// The columns of prediction.
pub(in crate::train) const PREDICTION: [&str; 4] = ["mode", "predicted", "rejected", "cosine"];

/// The columns of compressed gradients: of the step, and added up over the run.
pub(in crate::train) const EXCHANGE: [&str; 3] =
    ["sent_energy", "exchange_cosine", "residual_norm"];
pub(in crate::train) const TRAFFIC: [&str; 2] = ["sent_bytes", "received_bytes"];

/// A value as a cell of a CSV file (RFC 4180): texts are quoted.
fn csv_cell(value: &Value) -> String {
    match value {
        Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        other => other.to_string(),
    }
}

fn numbers(metrics: &Metrics) -> impl Iterator<Item = (&str, Value)> {
    metrics.iter().map(|(name, value)| (name, json!(value)))
}

/// The columns of metrics.csv: those of every run, then the metrics of its objectives, then those
/// that only some runs have.
fn csv_columns(objectives: &[ObjectiveSpec], optional: &[&str]) -> Vec<String> {
    let of_evaluations = objectives.iter().flat_map(|spec| spec.evaluation.iter());
    let of_steps = objectives.iter().flat_map(|spec| spec.step.iter());
    let always = [
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "val_loss",
    ];
    let mut columns: Vec<String> = always.map(str::to_string).to_vec();
    columns.extend(of_evaluations.map(|spec| spec.name.to_string()));
    columns.push("memory_bytes".to_string());
    columns.extend(of_steps.map(|spec| spec.name.to_string()));
    columns.extend(["backward_passes", "flops", "train_seconds"].map(str::to_string));
    columns.extend(optional.iter().map(|column| column.to_string()));
    columns.dedup();
    columns
}

/// Pairs each logged step with its evaluation.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) every: u64,
    pending: Option<Row>,
}

impl Rows {
    pub(super) fn new(every: u64) -> Self {
        Self {
            every,
            pending: None,
        }
    }

    /// Takes an event, gives the row that it completes.
    pub(super) fn take(&mut self, event: &Event) -> Option<Row> {
        match event {
            Event::Step(record) => {
                let done = self.finished();
                self.pending = Some(Row {
                    step: record.step,
                    record: Some(record.clone()),
                    evaluation: None,
                    weights: None,
                    cost: record.cost,
                });
                done
            }
            Event::Evaluated {
                step,
                evaluation,
                weights,
                cost,
                ..
            } => {
                let other = self.pending.as_ref().is_none_or(|row| row.step != *step);
                let done = if other { self.finished() } else { None };
                let row = self.pending.get_or_insert(Row {
                    step: *step,
                    record: None,
                    evaluation: None,
                    weights: None,
                    cost: *cost,
                });
                row.evaluation = Some(evaluation.clone());
                row.weights = *weights;
                done
            }
            // Whatever was measured must be there if the run ends here: a checkpoint without its
            // row would leave a hole for good, since a resumed run begins after it.
            Event::Saving { .. }
            | Event::Skipped { .. }
            | Event::Overflowed { .. }
            | Event::Regulated { .. }
            | Event::Stopped { .. }
            | Event::Finished { .. } => self.finished(),
            _ => None,
        }
    }

    /// The pending row, if it is one to log: the first step, every n-th, and every evaluated one.
    fn finished(&mut self) -> Option<Row> {
        let row = self.pending.take()?;
        let nth = row.step == 1 || row.step.is_multiple_of(self.every);
        (nth || row.evaluation.is_some()).then_some(row)
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
        if let Some(step) = event.back_to() {
            *self = Self::open(&self.path, self.rows.every, step)?;
            return Ok(());
        }
        let line = self.rows.take(event).map(|row| row.json_line());
        write_line(&mut self.file, &self.path, line, event)
    }
}

/// Writes metrics.csv, with empty cells where a step was not evaluated.
#[derive(Debug)]
pub struct CsvMetrics {
    path: PathBuf,
    file: File,
    rows: Rows,
    columns: Vec<String>,
}

impl CsvMetrics {
    /// Appends to `path`, after dropping the rows of steps past `resumed_at`. The columns are those
    /// that the file already has, followed by missing metrics of the objectives.
    ///
    /// # Errors
    /// The file system's.
    pub fn open(
        path: &Path,
        every: u64,
        resumed_at: u64,
        objectives: &[ObjectiveSpec],
        optional: &[&str],
    ) -> Result<Self, TrainError> {
        let kept = whole_lines(path, |line| {
            let first = line.split(',').next();
            let step = first.and_then(|cell| cell.parse::<u64>().ok());
            first == Some("step") || step.is_some_and(|step| step <= resumed_at)
        })?;
        let mut lines = kept.lines();
        let header = lines.next().filter(|line| line.starts_with("step"));
        let mut columns: Vec<String> = header
            .map(|line| line.split(',').map(str::to_string).collect())
            .unwrap_or_default();
        let before = columns.len();
        for column in csv_columns(objectives, optional) {
            if !columns.contains(&column) {
                columns.push(column);
            }
        }
        // Rows from before a column was added get an empty cell.
        let padding = ",".repeat(columns.len() - before);
        let rows: String = match header {
            Some(_) => lines.map(|line| format!("{line}{padding}\n")).collect(),
            None => String::new(),
        };
        let text = format!("{}\n{rows}", columns.join(","));
        durable::replace_with(path, text).map_err(TrainError::io(path))?;
        Ok(Self {
            path: path.to_path_buf(),
            file: append(path)?,
            rows: Rows::new(every),
            columns,
        })
    }
}

impl Observer for CsvMetrics {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        if let Some(step) = event.back_to() {
            // The file has its columns already.
            *self = Self::open(&self.path, self.rows.every, step, &[], &[])?;
            return Ok(());
        }
        let row = self.rows.take(event);
        let line = row.map(|row| row.csv_line(&self.columns));
        write_line(&mut self.file, &self.path, line, event)
    }
}

fn write_line(
    file: &mut File,
    path: &Path,
    line: Option<String>,
    event: &Event,
) -> Result<(), TrainError> {
    let line = line.unwrap_or_default();
    durable::append(file, path, line.as_bytes())
        .and_then(|()| flush_before_save(file, event))
        .map_err(TrainError::io(path))
}

/// A checkpoint is on the disk when it is saved; what was recorded up to it must be so before, or
/// a power failure leaves a hole that no resumed run fills.
pub(super) fn flush_before_save(file: &File, event: &Event) -> std::io::Result<()> {
    match event {
        Event::Saving { .. } => file.sync_data(),
        _ => Ok(()),
    }
}

pub(super) fn append(path: &Path) -> Result<File, TrainError> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(TrainError::io(path))
}

/// Rewrites a file with the lines to keep; a last line cut short by a crash is not one of them.
pub(super) fn keep_lines(path: &Path, keep: impl Fn(&str) -> bool) -> Result<(), TrainError> {
    if !path.exists() {
        return Ok(());
    }
    let kept = whole_lines(path, keep)?;
    durable::replace_with(path, kept).map_err(TrainError::io(path))
}

/// The lines of a file to keep; empty if the file does not exist.
fn whole_lines(path: &Path, keep: impl Fn(&str) -> bool) -> Result<String, TrainError> {
    let text = match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(TrainError::io(path)(error)),
    };
    let whole = text
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    Ok(whole.filter(|line| keep(line.trim_end())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::{CrossEntropy, Preference};
    use std::io::Write;

    const SPECS: [ObjectiveSpec; 1] = [CrossEntropy::SPEC];

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
            memory_bytes: Some(1 << 20),
            cost: cost(step),
            metrics: Metrics::default(),
        })
    }

    fn cost(step: u64) -> Cost {
        Cost {
            backward_passes: 2 * step,
            flops: 1e9 * step as f64,
            train_seconds: 0.25 * step as f64,
            ..Cost::default()
        }
    }

    fn finished(step: u64) -> Event {
        Event::Finished {
            step,
            exported_step: step,
            exported_weights: None,
            bigram: None,
            stopped_early: false,
        }
    }

    fn evaluated(step: u64) -> Event {
        let evaluation = Evaluation {
            val_loss: 1.25,
            tokens: 9,
            metrics: Metrics::of(&CrossEntropy::SPEC.evaluation, [0.5]),
        };
        Event::Evaluated {
            step,
            evaluation,
            weights: None,
            best: true,
            tokens: step * 8,
            cost: cost(step),
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
        watch(&mut metrics, &[finished(5)]);
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
    fn r12_an_evaluation_after_a_skipped_step_is_a_row_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let (jsonl, csv) = (folder.path().join("m.jsonl"), folder.path().join("m.csv"));
        let events = [step(1), evaluated(2), finished(2)];
        watch(&mut JsonlMetrics::open(&jsonl, 5, 0).unwrap(), &events);
        watch(
            &mut CsvMetrics::open(&csv, 5, 0, &SPECS, &[]).unwrap(),
            &events,
        );
        let jsonl = fs::read_to_string(&jsonl).unwrap();
        let last = jsonl.lines().last().unwrap();
        assert_eq!(
            last,
            r#"{"step":2,"val_loss":1.25,"bits_per_byte":0.5,"backward_passes":4,"flops":2000000000.0,"train_seconds":0.5}"#
        );
        let csv = fs::read_to_string(&csv).unwrap();
        assert_eq!(
            csv.lines().last().unwrap(),
            "2,,,,,,1.25,0.5,,4,2000000000.0,0.5"
        );
        assert_eq!(csv.lines().count(), 3);
    }

    #[test]
    fn r10_a_resumed_run_drops_what_came_after_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let (jsonl, csv) = (folder.path().join("m.jsonl"), folder.path().join("m.csv"));
        for resumed_at in [0, 2] {
            let mut observers: [Box<dyn Observer>; 2] = [
                Box::new(JsonlMetrics::open(&jsonl, 1, resumed_at).unwrap()),
                Box::new(CsvMetrics::open(&csv, 1, resumed_at, &SPECS, &[]).unwrap()),
            ];
            for observer in &mut observers {
                for event in [
                    step(resumed_at + 1),
                    step(resumed_at + 2),
                    step(resumed_at + 3),
                ] {
                    observer.observe(&event).unwrap();
                }
                observer.observe(&finished(resumed_at + 3)).unwrap();
            }
            // The crash comes in the middle of a line.
            append(&jsonl).unwrap().write_all(b"{\"step\": 1").unwrap();
        }
        let csv = fs::read_to_string(&csv).unwrap();
        let first_cells: Vec<&str> = csv.lines().map(|l| l.split(',').next().unwrap()).collect();
        assert_eq!(first_cells, ["step", "1", "2", "3", "4", "5"]);
        assert_eq!(fs::read_to_string(&jsonl).unwrap().lines().count(), 6);
    }

    #[test]
    fn r12_a_resumed_csv_keeps_its_columns_and_gets_those_it_needs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.csv");
        // A file of a run with another objective, or of an older version.
        let old = "step,tokens,loss,lr,grad_norm,tokens_per_second,val_loss,bits_per_byte,memory_bytes,more\n\
                   1,8,1.5,0.1,2.0,3.0,,,,7\n2,16,1.5,0.1,2.0,3.0,1.0,0.5,,\n3,24,";
        fs::write(&path, old).unwrap();
        let specs = [CrossEntropy::SPEC, Preference::SPEC];
        let mut csv = CsvMetrics::open(&path, 1, 1, &specs, &[PHASE]).unwrap();
        let metrics = Metrics::of(&Preference::SPEC.step, [0.75, 0.25]);
        let Event::Step(record) = step(2) else {
            unreachable!()
        };
        let record = StepRecord {
            metrics,
            phase: Some("the \"second\", say".to_string()),
            ..record
        };
        watch(&mut csv, &[Event::Step(record), finished(2)]);
        let text = fs::read_to_string(&path).unwrap();
        let expected = "step,tokens,loss,lr,grad_norm,tokens_per_second,val_loss,bits_per_byte,memory_bytes,more,\
                        val_reward_accuracy,reward_accuracy,reward_margin,backward_passes,flops,train_seconds,phase\n\
                        1,8,1.5,0.1,2.0,3.0,,,,7,,,,,,,\n\
                        2,16,1.5,0.1,2.0,3.0,,,1048576,,,0.75,0.25,4,2000000000.0,0.5,\"the \"\"second\"\", say\"\n";
        assert_eq!(text, expected);
    }
}
