//! The observers of a run's events: the metrics files, TensorBoard, the journal, the terminal.

mod journal;
mod metrics;
mod tensorboard;
mod terminal;

pub(super) use journal::{Entries, Entry, Journal, now};
pub use metrics::{CsvMetrics, JsonlMetrics};
pub(super) use metrics::{EXCHANGE, PHASE, PREDICTION, REGULATED, TRAFFIC, WEIGHTS};
pub use tensorboard::TensorboardEvents;
pub use terminal::{EventLines, Terminal};
pub(super) use terminal::{LogEvents, of_weights, stopped_early};

use super::{EvaluatedWeights, Evaluation, Event, Observer, StepRecord, TrainError};
