//! The course of a run, read from its folder: whether and how it ended, and its evaluations.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::folder::RunRecord;
use super::observers::{Entry, Journal};
use super::{Event, TrainError};
use crate::checkpoint::{BestEvaluation, Cost};

/// The course of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Course {
    /// How it stands.
    pub state: CourseState,
    /// Whether it was saved on purpose to go on later.
    pub is_suspended: bool,
    /// Its evaluations in order.
    pub evaluations: Vec<CoursePoint>,
    /// Completed steps, tokens and cost at its end, or at its last recorded step.
    pub last: CoursePoint,
    /// The best evaluation; none before the first.
    pub best: Option<BestEvaluation>,
}

/// How a run stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CourseState {
    /// It has begun and not ended: it can go on.
    Begun,
    /// It has taken its last step.
    Finished,
    /// Validation stopped improving.
    StoppedEarly,
    /// It was ended before its last step, for this reason.
    Cut(String),
    /// Its loss was not finite too often.
    Diverged,
}

/// A point of a run's course.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct CoursePoint {
    /// Completed steps.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// The cost of the steps.
    pub cost: Cost,
    /// The validation loss; none where it was not measured, or was not a number.
    pub val_loss: Option<f64>,
}

impl Course {
    /// Reads the course of the run in a folder; none if no run has begun there.
    ///
    /// # Errors
    /// A record or journal that cannot be read.
    pub fn read(folder: &Path) -> Result<Option<Self>, TrainError> {
        let Some(record) = RunRecord::read(folder)? else {
            return Ok(None);
        };
        let mut course = Self {
            state: CourseState::Begun,
            is_suspended: false,
            evaluations: Vec::new(),
            last: CoursePoint::default(),
            best: None,
        };
        let journal = folder.join("logs/events.jsonl");
        if journal.exists() {
            Journal::read(&journal, |entry| course.take(entry))?;
        }
        if let Some(end) = record.end {
            course.state = match end.cut {
                Some(reason) => CourseState::Cut(reason),
                None if end.stopped_early => CourseState::StoppedEarly,
                None => CourseState::Finished,
            };
            course.last = CoursePoint {
                step: end.step,
                tokens: end.tokens,
                cost: Cost {
                    backward_passes: end.backward_passes,
                    flops: end.flops,
                    train_seconds: end.train_seconds,
                    sent_bytes: end.sent_bytes,
                    received_bytes: end.received_bytes,
                },
                val_loss: end.val_loss,
            };
        }
        Ok(Some(course))
    }

    fn take(&mut self, entry: &Entry) {
        match &entry.event {
            Event::Step(record) => {
                self.last = CoursePoint {
                    step: record.step,
                    tokens: record.tokens,
                    cost: record.cost,
                    val_loss: None,
                };
            }
            Event::Evaluated {
                step,
                evaluation,
                best,
                tokens,
                cost,
                ..
            } => {
                self.last = CoursePoint {
                    step: *step,
                    tokens: *tokens,
                    cost: *cost,
                    val_loss: Some(evaluation.val_loss).filter(|loss| loss.is_finite()),
                };
                self.evaluations.retain(|point| point.step < *step);
                self.evaluations.push(self.last);
                if *best {
                    let (step, val_loss) = (*step, evaluation.val_loss);
                    self.best = Some(BestEvaluation { step, val_loss });
                }
            }
            Event::Started { .. } | Event::Resumed { .. } => {
                self.state = CourseState::Begun;
                self.is_suspended = false;
            }
            Event::Stopped { kind, .. } if kind == "suspended" => self.is_suspended = true,
            Event::Stopped { kind, .. } if kind == "diverged" => {
                self.state = CourseState::Diverged;
            }
            _ => {}
        }
    }
}
