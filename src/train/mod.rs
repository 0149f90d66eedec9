//! Training: from a [`Plan`](crate::config::Plan) to a model in a run folder.
//!
//! [`Run::prepare`] builds everything a run needs or says what is wrong with it, [`Run::train`] is
//! the loop, and every [`Observer`] is told what happens on the way: the terminal, the metrics
//! files, a program's own.
//!
//! Read `run.rs` first.

mod error;
mod evaluate;
mod event;
mod folder;
mod interrupt;
mod metrics;
mod prepare;
mod resume;
mod run;
mod terminal;

pub use error::TrainError;
pub use evaluate::{Evaluation, evaluate};
pub use event::{Event, Observer, StepRecord};
pub use folder::RunFolder;
pub use interrupt::{Interrupt, Signal};
pub use metrics::{CsvMetrics, JsonlMetrics};
pub use prepare::{Options, Summary};
pub use resume::Resume;
pub use run::{Outcome, Run};
pub use terminal::{EventLines, Terminal};
