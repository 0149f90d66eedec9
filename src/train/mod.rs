//! Training: from a [`Plan`](crate::config::Plan) to a model in a run folder.
//!
//! [`Run::prepare`] builds everything a run needs or says what is wrong with it, [`Run::train`] is
//! the loop, and every [`Observer`] is told what happens on the way: the terminal, the metrics
//! files, a program's own.
//!
//! Read `run.rs` first, which has the loop. `step.rs` is one training step without disk and events,
//! `state.rs` is the state that a step changes, and `session.rs` has everything else that a run
//! uses.
//!
//! ```
//! use firebrick::config::{Config, DatasetConfig, Plan, Preset, TokenizerKind};
//! use firebrick::train::{Options, Run};
//!
//! let folder = tempfile::tempdir()?;
//! let text = folder.path().join("text.txt");
//! std::fs::write(&text, "one two three four five six\n".repeat(20))?;
//!
//! let mut config = Config::default();
//! config.output_dir = folder.path().join("run");
//! config.model.preset = Some(Preset::Stories260K);
//! config.tokenizer.kind = TokenizerKind::Char;
//! config.data.sequence_len = 8;
//! config.data.datasets.push(DatasetConfig::new(text.display().to_string()));
//! config.train.max_steps = Some(2);
//! let plan = Plan::from_config(config)?;
//!
//! let run = Run::prepare(&plan, Options::default())?.ok_or("the folder is new")?;
//! let outcome = run.train()?;
//! assert_eq!(outcome.progress.step, 2);
//! assert!(outcome.folder.join("model.safetensors").is_file());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod average;
mod card;
mod clock;
mod course;
#[cfg(test)]
mod crash;
mod error;
mod estimate;
mod evaluate;
mod event;
mod export;
mod finish;
mod folder;
mod inputs;
mod interrupt;
mod lengths;
mod model_init;
mod observers;
mod predict;
mod predictor;
mod prepare;
mod regulate;
mod regulator;
mod report;
mod resume;
mod run;
mod same_run;
mod saving;
mod session;
mod state;
mod step;
mod team;

pub use crate::objective::Evaluation;
pub(crate) use average::OWNER as AVERAGE_OWNER;
pub use average::{Average, AverageSettings};
pub use course::{Course, CoursePoint, CourseState};
pub use error::TrainError;
pub use estimate::{Estimate, Summary};
pub use event::{EvaluatedWeights, Event, Observer, Prediction, StepRecord};
pub use folder::{RunFolder, kept_checkpoints};
pub use interrupt::{Interrupt, Signal};
pub use lengths::{Lengths, StepTimer, Totals};
pub use observers::{CsvMetrics, EventLines, JsonlMetrics, TensorboardEvents, Terminal};
pub use predictor::Predictor;
pub use prepare::Options;
pub use regulator::{Irregular, Regulator, StepLimits};
pub use resume::Resume;
pub(crate) use resume::flat_config;
pub use run::{Advance, Outcome, Run};
pub use saving::InsufficientDisk;
use session::Session;
pub use state::TrainState;
pub use step::{StepError, StepOutcome, StepReport, StepSettings, StepTime, train_step};
