//! What can keep runs from being compared.

use std::path::PathBuf;

use crate::config::{Budget, ConfigError, SweepError};
use crate::durable;
use crate::train::TrainError;

/// A comparison that did not finish.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// A configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A sweep's file.
    #[error(transparent)]
    Sweep(#[from] SweepError),
    /// A run.
    #[error("{name}: {source}")]
    Train {
        /// The file or combination, and the seed.
        name: String,
        /// Why.
        source: Box<TrainError>,
    },
    /// There is only one thing to compare.
    #[error("a comparison takes at least two files")]
    TooFew,
    /// No seeds, or one twice.
    #[error("seeds must be different numbers, at least one")]
    Seeds,
    /// Two files describe the same run.
    #[error("{first} and {second} are the same configuration")]
    Same {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// Validation losses that mean different things.
    #[error("the validation losses of {first} and {second} cannot be compared: {what}")]
    NotComparable {
        /// One.
        first: String,
        /// The other.
        second: String,
        /// Keys that differ, with both values.
        what: String,
    },
    /// A run without validation has no result.
    #[error("{name} has no validation data: there is nothing to compare")]
    NoValidation {
        /// The file or combination.
        name: String,
    },
    /// All runs of a process share its threads and its device.
    #[error("{first} and {second} differ in {key}, which all runs of a comparison share")]
    NotShared {
        /// One.
        first: String,
        /// The other.
        second: String,
        /// The key.
        key: &'static str,
    },
    /// Ranks need evaluations on the way.
    #[error("{name}: [early_stop] ranks by evaluations on the way, and eval.eval_steps is 0")]
    NoEvaluations {
        /// The combination.
        name: String,
    },
    /// Not a single step fits into the budget.
    #[error("{name}: the budget {budget} is used up before the first step ends")]
    BudgetTooSmall {
        /// The file or combination.
        name: String,
        /// The budget.
        budget: Budget,
    },
    /// The length that a budget gives contradicts the file.
    #[error("{name} cannot have the length that its budget affords{}: {reason}", of_steps(*steps))]
    Length {
        /// The file or combination.
        name: String,
        /// Steps; 0 if they are not known.
        steps: u64,
        /// Why not.
        reason: String,
    },
    /// A file of the comparison cannot be understood.
    #[error("{}: {message}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// A file or folder.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl CompareError {
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(super) fn train(name: &str) -> impl FnOnce(TrainError) -> Self + use<> {
        let name = name.to_string();
        move |source| Self::Train {
            name,
            source: Box::new(source),
        }
    }

    pub(super) fn length(name: &str, steps: u64) -> impl FnOnce(TrainError) -> Self + use<> {
        let name = name.to_string();
        move |error| {
            let reason = match &error {
                // Where it was written is no place that a person wrote.
                TrainError::Config(error) if !error.issues().is_empty() => {
                    let issues = error.issues().iter();
                    let messages: Vec<&str> = issues.map(|issue| issue.message.as_str()).collect();
                    messages.join("; ")
                }
                error => error.to_string(),
            };
            Self::Length {
                name,
                steps,
                reason,
            }
        }
    }

    /// The process exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Train { source, .. } => source.exit_code(),
            Self::Record { .. } | Self::Io { .. } => 1,
            _ => 2,
        }
    }

    /// The word in brackets after `error`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Train { source, .. } => source.kind(),
            Self::Record { .. } | Self::Io { .. } => "io",
            _ => "config",
        }
    }

    /// What to do about it, where there is something to say.
    pub fn help(&self) -> Option<String> {
        let text = match self {
            Self::Train { source, .. } => return source.help(),
            Self::Io { source, .. } => durable::help(source)?,
            Self::Record { .. } => "name another --out, or delete the file",
            Self::NotComparable { .. } => {
                "give both the same data, sequence length, tokenizer and objective"
            }
            Self::NoValidation { .. } => "data.val_fraction = 0.1, or data.val_path",
            Self::NotShared { .. } => "set it for all: --set key=value",
            Self::NoEvaluations { .. } => "set eval.eval_steps in the base",
            Self::BudgetTooSmall { .. } => "a larger budget",
            _ => return None,
        };
        Some(text.to_string())
    }
}

fn of_steps(steps: u64) -> String {
    match steps {
        0 => String::new(),
        steps => format!(", {steps} steps"),
    }
}
