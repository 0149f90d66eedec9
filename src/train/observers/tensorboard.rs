//! TensorBoard event files, under tb/ in the run folder.
//!
//! The file is a sequence of TFRecords (TensorFlow's `tfrecord` format, tensorflow.org/tutorials/
//! load_data/tfrecord): length as u64, masked CRC-32C of those eight bytes, the data, masked CRC-32C
//! of the data, all little-endian. A masked checksum is the checksum rotated right by 15 bits plus
//! `0xa282ead8`. Each record is an `Event` message; the messages and field numbers are those of
//! tensorboard/compat/proto/{event,summary,tensor,tensor_shape}.proto, of which this writes
//!
//! ```text
//! Event            1 wall_time double   2 step int64   3 file_version string
//!                  5 summary Summary    7 session_log SessionLog
//! SessionLog       1 status (1 = START)
//! Summary          1 value Value, repeated
//! Value            1 tag string   2 simple_value float   8 tensor TensorProto   9 metadata
//! SummaryMetadata  1 plugin_data { 1 plugin_name string }
//! TensorProto      1 dtype (7 = string)   2 tensor_shape { 2 dim { 1 size int64 } }   8 string_val bytes
//! ```
//!
//! The crates that write these files pin old protobuf runtimes or need `protoc` to build; nine
//! messages are less to keep.
//!
//! A resumed run writes a file of its own that begins with `SessionLog` START at the first step it
//! will do: readers then drop what earlier files have from that step on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::metrics::{Row, Rows, append, flush_before_save};
use super::{EvaluatedWeights, Event, Observer, TrainError};
use crate::durable;
use crate::objective::ObjectiveSpec;

/// Writes scalars for every row of the metrics, sample completions and the resolved config.
#[derive(Debug)]
pub struct TensorboardEvents {
    path: PathBuf,
    file: File,
    rows: Rows,
    /// The config to write as text when the run starts, and then no more.
    config: Option<String>,
    /// Place of the next sample within its evaluation.
    sample: usize,
    /// The weights of the last evaluation. They are written as text when they change.
    weights: Option<EvaluatedWeights>,
    /// The metrics of the objectives.
    objectives: Vec<ObjectiveSpec>,
}

impl TensorboardEvents {
    /// Starts a new events file in `folder`. `resumed_at` is the checkpoint that the run goes on
    /// from, none for a new run; `config` is shown as text.
    ///
    /// # Errors
    /// The file system's.
    pub fn open(
        folder: &Path,
        every: u64,
        resumed_at: Option<u64>,
        config: &str,
    ) -> Result<Self, TrainError> {
        if resumed_at.is_none() {
            // A run that begins anew has no past: what lies there is of one that never saved.
            remove_event_files(folder)?;
        }
        durable::create_folder(folder).map_err(TrainError::io(folder))?;
        let path = folder.join(next_name(folder, unix_time() as u64)?);
        let mut events = Self {
            file: append(&path)?,
            path,
            rows: Rows::new(every),
            config: Some(config.to_string()),
            sample: 0,
            weights: None,
            objectives: Vec::new(),
        };
        let version = Message::default().text(3, "brain.Event:2");
        events.write(0, &version)?;
        if let Some(step) = resumed_at {
            let start = Message::default().integer(1, SESSION_START);
            events.write(step + 1, &Message::default().message(7, &start))?;
        }
        Ok(events)
    }

    /// Begins a file that voids what was recorded after `step`.
    fn go_back(&mut self, step: u64) -> Result<(), TrainError> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let next = Self::open(folder, self.rows.every, Some(step), "")?;
        let before = std::mem::replace(self, next);
        self.objectives = before.objectives;
        self.config = before.config;
        Ok(())
    }

    fn row(&mut self, row: &Row) -> Result<(), TrainError> {
        let mut summary = Message::default();
        for (name, value) in row.cells() {
            let (Some(tag), Some(number)) = (self.tag(name), value.as_f64()) else {
                continue;
            };
            let value = Message::default().text(1, &tag).float(2, number as f32);
            summary = summary.message(1, &value);
        }
        self.write(row.step, &Message::default().message(5, &summary))
    }

    /// The tag of a metrics column, in the groups that other trainers use. None for the step, which
    /// every record has anyway.
    fn tag(&self, column: &str) -> Option<String> {
        let is_of_evaluation = |spec: &ObjectiveSpec| {
            let mut names = spec.evaluation.iter().map(|metric| &metric.name);
            names.any(|name| name == column)
        };
        Some(match column {
            "step" => return None,
            "memory_bytes" => "system/memory_bytes".to_string(),
            "val_loss" => "eval/val_loss".to_string(),
            column if self.objectives.iter().any(is_of_evaluation) => {
                format!("eval/{}", column.strip_prefix("val_").unwrap_or(column))
            }
            column => format!("train/{column}"),
        })
    }

    fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<(), TrainError> {
        let summary = text_summary(tag, text);
        self.write(step, &Message::default().message(5, &summary))
    }

    fn write(&mut self, step: u64, content: &Message) -> Result<(), TrainError> {
        let record = record(&event(unix_time(), step, content));
        durable::append(&mut self.file, &self.path, &record).map_err(TrainError::io(&self.path))
    }
}

impl Observer for TensorboardEvents {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        if let Some(step) = event.back_to() {
            return self.go_back(step);
        }
        if let Some(row) = self.rows.take(event) {
            self.row(&row)?;
        }
        match event {
            Event::Started {
                step, objectives, ..
            } => {
                self.objectives.clone_from(objectives);
                let config = self.config.take();
                config.map_or(Ok(()), |config| self.text(*step, "config", &config))
            }
            Event::Step(_) => {
                self.sample = 0;
                Ok(())
            }
            Event::Evaluated { step, weights, .. } if *weights != self.weights => {
                self.weights = *weights;
                let name = weights.map_or("", EvaluatedWeights::name);
                self.text(*step, "eval/weights", name)
            }
            Event::Sample {
                step,
                prompt,
                completion,
            } => {
                let tag = format!("samples/{}", self.sample);
                self.sample += 1;
                self.text(*step, &tag, &format!("{prompt}{completion}"))
            }
            _ => flush_before_save(&self.file, event).map_err(TrainError::io(&self.path)),
        }
    }
}

const SESSION_START: u64 = 1;
const TYPE_STRING: u64 = 7;

/// A `Summary` of one text. Readers render Markdown, so it is given as a code block: what a model
/// wrote shows as it is.
fn text_summary(tag: &str, text: &str) -> Message {
    let block: Vec<String> = text.split('\n').map(|line| format!("    {line}")).collect();
    let plugin = Message::default().text(1, "text");
    let shape = Message::default().message(2, &Message::default().integer(1, 1));
    let tensor = Message::default()
        .integer(1, TYPE_STRING)
        .message(2, &shape)
        .text(8, &block.join("\n"));
    let value = Message::default()
        .text(1, &format!("{tag}/text_summary"))
        .message(8, &tensor)
        .message(9, &Message::default().message(1, &plugin));
    Message::default().message(1, &value)
}

/// An `Event` with its common fields before the one that says what it is.
fn event(wall_time: f64, step: u64, content: &Message) -> Vec<u8> {
    let mut bytes = Message::default().double(1, wall_time).integer(2, step).0;
    bytes.extend(&content.0);
    bytes
}

/// A TFRecord.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut bytes = length.to_vec();
    bytes.extend(masked_crc(&length).to_le_bytes());
    bytes.extend(data);
    bytes.extend(masked_crc(data).to_le_bytes());
    bytes
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// A protobuf message in the making. Fields with the default value are written too, but integers
/// equal to 0, which no reader could tell from absent ones.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn integer(mut self, field: u64, value: u64) -> Self {
        if value != 0 {
            self.varint(field << 3);
            self.varint(value);
        }
        self
    }

    fn double(mut self, field: u64, value: f64) -> Self {
        self.varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn float(mut self, field: u64, value: f32) -> Self {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(self, field: u64, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    fn message(self, field: u64, message: &Message) -> Self {
        self.bytes(field, &message.0)
    }

    fn bytes(mut self, field: u64, bytes: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    /// Seven bits a byte, low ones first, the top bit set on all but the last.
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

fn unix_time() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

/// Readers take the files of a folder in the order of their names, so a later session's sorts after
/// an earlier one's, also within a second and when the clock was set back.
fn next_name(folder: &Path, now: u64) -> Result<String, TrainError> {
    let existing = event_files(folder)?;
    let numbers = existing.iter().filter_map(|name| {
        let (time, session) = name.strip_prefix(PREFIX)?.split_once(".firebrick.")?;
        Some((time.parse::<u64>().ok()?, session.parse::<u64>().ok()?))
    });
    let (time, session) = numbers.fold((now, 0), |(time, session), (other, number)| {
        (time.max(other), session.max(number + 1))
    });
    Ok(format!("{PREFIX}{time:010}.firebrick.{session:04}"))
}

/// What readers know an events file by.
const PREFIX: &str = "events.out.tfevents.";

fn event_files(folder: &Path) -> Result<Vec<String>, TrainError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(TrainError::io(folder)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(TrainError::io(folder))?.file_name();
        names.extend(
            name.into_string()
                .ok()
                .filter(|name| name.starts_with(PREFIX)),
        );
    }
    Ok(names)
}

fn remove_event_files(folder: &Path) -> Result<(), TrainError> {
    for name in event_files(folder)? {
        let path = folder.join(name);
        durable::remove_file(&path).map_err(TrainError::io(path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Cost;
    use crate::objective::{Evaluation, Metrics, Preference};
    use crate::train::StepRecord;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn r12_records_are_the_bytes_that_tensorboard_writes() {
        // Made with the `tensorboard` package 2.21.0: RecordWriter of these messages.
        let time = 1_700_000_000.25;
        let version = Message::default().text(3, "brain.Event:2");
        let start = Message::default().message(7, &Message::default().integer(1, SESSION_START));
        let scalar = |tag: &str, value| Message::default().text(1, tag).float(2, value);
        let scalars = Message::default()
            .message(1, &scalar("train/loss", 2.5))
            .message(1, &scalar("train/lr", 0.0));
        let text = text_summary("config", "a\nb \u{e9}");
        let golden = [
            (
                event(time, 0, &version),
                "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe9",
            ),
            (
                event(time, 301, &start),
                "100000000000000095fbfe180900001040fc54d94110ad023a020801cb79b93b",
            ),
            (
                event(time, 300, &Message::default().message(5, &scalars)),
                "3200000000000000241956ec0900001040fc54d94110ac022a240a110a0a747261696e2f6c6f73731500002040\
                 0a0f0a08747261696e2f6c721500000000a002ae18",
            ),
            (
                event(time, 0, &Message::default().message(5, &text)),
                "46000000000000007235b9a50900001040fc54d9412a3b0a390a13636f6e6669672f746578745f73756d6d6172\
                 7942180807120412020801420e20202020610a202020206220c3a94a080a060a04746578741d4ea4b1",
            ),
        ];
        for (event, expected) in golden {
            assert_eq!(hex(&record(&event)), expected);
        }
    }

    #[test]
    fn r12_a_resumed_run_starts_a_file_that_sorts_last_and_purges() {
        let folder = tempfile::tempdir().unwrap();
        let tb = folder.path().join("tb");
        drop(TensorboardEvents::open(&tb, 1, None, "").unwrap());
        // As if the clock had been set back since.
        let first = event_files(&tb).unwrap().remove(0);
        let future = format!("{PREFIX}9999999999.firebrick.0000");
        fs::rename(tb.join(first), tb.join(&future)).unwrap();
        drop(TensorboardEvents::open(&tb, 1, Some(7), "").unwrap());
        let mut names = event_files(&tb).unwrap();
        names.sort();
        assert_eq!(
            names,
            [future, format!("{PREFIX}9999999999.firebrick.0001")]
        );
        let bytes = fs::read(tb.join(&names[1])).unwrap();
        // Event { step: 8, session_log { status: START } } without its wall time.
        let purge = [0x10, 8, 0x3a, 2, 0x08, 1];
        assert!(bytes.windows(6).any(|window| window == purge));
        drop(TensorboardEvents::open(&tb, 1, None, "").unwrap());
        assert_eq!(event_files(&tb).unwrap().len(), 1);
    }

    #[test]
    fn r12_scalars_have_the_names_that_people_know() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = TensorboardEvents::open(folder.path(), 1, None, "seed = 1").unwrap();
        let record = StepRecord {
            step: 1,
            regulated: None,
            prediction: None,
            exchange: None,
            phase: None,
            tokens: 8,
            loss: 1.5,
            lr: 0.1,
            grad_norm: 2.0,
            tokens_per_second: 3.0,
            memory_bytes: Some(4096),
            cost: Cost::default(),
            metrics: Metrics::of(&Preference::SPEC.step, [0.75, 0.5]),
        };
        let sample = Event::Sample {
            step: 1,
            prompt: "a".to_string(),
            completion: "b".to_string(),
        };
        let saving = Event::Saving { step: 1 };
        let started = Event::Started {
            step: 0,
            steps: 1,
            objectives: vec![Preference::SPEC],
        };
        let evaluation = Evaluation {
            val_loss: 0.5,
            tokens: 9,
            metrics: Metrics::of(&Preference::SPEC.evaluation, [0.25]),
        };
        let evaluated = Event::Evaluated {
            step: 1,
            evaluation,
            weights: Some(EvaluatedWeights::Average),
            best: true,
            tokens: 9,
            cost: Cost::default(),
        };
        for event in [started, Event::Step(record), evaluated, sample, saving] {
            events.observe(&event).unwrap();
        }
        let bytes = fs::read(&events.path).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        for tag in [
            "train/tokens",
            "train/loss",
            "train/lr",
            "train/grad_norm",
            "train/tokens_per_second",
            "system/memory_bytes",
            "train/reward_accuracy",
            "train/reward_margin",
            "eval/val_loss",
            "eval/reward_accuracy",
            "eval/weights/text_summary",
            "    average",
            "config/text_summary",
            "    seed = 1",
            "samples/0/text_summary",
            "    ab",
        ] {
            assert!(text.contains(tag), "{tag}");
        }
        assert!(
            !text.contains("bits_per_byte"),
            "what is not measured is not there"
        );
    }
}
