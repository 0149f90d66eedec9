//! The runs, a seed at a time, in turns.
//!
//! Runs with the same seed are in memory together and take turns of a few seconds, so that whatever
//! else the machine does reaches all of them alike. Only one trains at a time.

use std::collections::VecDeque;
use std::path::PathBuf;

use super::{Candidate, CompareError, Notice};
use crate::config::Plan;
use crate::train::{Advance, Course, CourseState, Interrupt, Options, Resume, Run, TrainError};

/// Runs in memory at the same time, at most: each has some files open.
pub(super) const MOST_AT_ONCE: usize = 32;

/// A run of the comparison.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// The number of its candidate.
    pub(super) candidate: usize,
    pub(super) seed: u64,
    pub(super) plan: Plan,
    pub(super) steps: u64,
    pub(super) folder: PathBuf,
}

/// What all turns share.
pub(super) struct Turns<'a> {
    pub(super) candidates: &'a [Candidate],
    /// Seconds of a turn.
    pub(super) slice: f64,
    /// Seconds of training steps after which a run is cut.
    pub(super) limit: Option<f64>,
    /// Whether all runs of a seed fit in memory.
    pub(super) is_together: bool,
    pub(super) interrupt: Interrupt,
    pub(super) notice: &'a mut dyn FnMut(&Notice),
}

/// A run that has its turn now and then.
struct Live<'e> {
    entry: &'e Entry,
    run: Run,
    /// The step at which it is suspended, or its last.
    until: u64,
}

impl Turns<'_> {
    /// Takes each run to its step; what is past it is left alone.
    pub(super) fn advance(&mut self, entries: &[(&Entry, u64)]) -> Result<(), CompareError> {
        let mut open = Vec::new();
        for &(entry, until) in entries {
            let course = Course::read(&entry.folder).map_err(self.failed(entry))?;
            if course.is_none_or(|course| is_open(&course, until)) {
                open.push((entry, until));
            }
        }
        let size = if self.is_together { MOST_AT_ONCE } else { 1 };
        for group in open.chunks(size) {
            let mut live = VecDeque::new();
            let advanced = self.group(group, &mut live);
            if let Err(error) = advanced {
                self.suspend(live);
                return Err(error);
            }
        }
        Ok(())
    }

    fn group<'e>(
        &mut self,
        entries: &[(&'e Entry, u64)],
        live: &mut VecDeque<Live<'e>>,
    ) -> Result<(), CompareError> {
        for &(entry, until) in entries {
            let options = Options {
                resume: Resume::Auto,
                config_text: Some(self.candidates[entry.candidate].text.clone()),
                interrupt: self.interrupt.clone(),
                ..Options::default()
            };
            let run = Run::prepare(&entry.plan, options).map_err(self.failed(entry))?;
            if let Some(run) = run {
                live.push_back(Live { entry, run, until });
            }
        }
        while let Some(next) = live.pop_front() {
            if let Some(again) = self.turn(next)? {
                live.push_back(again);
            }
        }
        Ok(())
    }

    /// One turn of a run. Returns the run if it has more to do.
    fn turn<'e>(&mut self, live: Live<'e>) -> Result<Option<Live<'e>>, CompareError> {
        let Live {
            entry,
            mut run,
            until,
        } = live;
        let begun = run.progress().cost.train_seconds;
        let (slice, limit) = (self.slice, self.limit.unwrap_or(f64::INFINITY));
        let is_over = |step: u64, seconds: f64| step >= until || seconds >= limit;
        let (before, seconds) = (run.progress().step, begun);
        // A run that goes on from a save may be where it should be already.
        let advanced = if before > 0 && before < entry.steps && is_over(before, seconds) {
            Ok(Advance::Paused)
        } else {
            run.advance(|progress| {
                let seconds = progress.cost.train_seconds;
                is_over(progress.step, seconds) || seconds - begun >= slice
            })
        };
        let advanced = match advanced {
            Err(TrainError::Diverged { step, .. }) => {
                (self.notice)(&Notice::Ended {
                    candidate: entry.candidate,
                    seed: entry.seed,
                    step,
                    what: "diverged".to_string(),
                });
                return Ok(None);
            }
            other => other.map_err(self.failed(entry))?,
        };
        let (step, seconds) = (run.progress().step, run.progress().cost.train_seconds);
        (self.notice)(&Notice::Turn {
            candidate: entry.candidate,
            seed: entry.seed,
            step,
            steps: entry.steps,
            seconds,
        });
        let what = if advanced == Advance::Done {
            let outcome = run.finish().map_err(self.failed(entry))?;
            let loss = outcome.progress.val_loss;
            loss.map_or("finished".to_string(), |loss| {
                format!("finished: val loss {loss:.4}")
            })
        } else if seconds >= limit {
            let reason = cut_reason(limit, step, entry.steps);
            run.cut(&reason).map_err(self.failed(entry))?;
            reason
        } else if step >= until {
            let reason = "other combinations take their turns";
            run.suspend(reason).map_err(self.failed(entry))?;
            return Ok(None);
        } else {
            return Ok(Some(Live { entry, run, until }));
        };
        (self.notice)(&Notice::Ended {
            candidate: entry.candidate,
            seed: entry.seed,
            step,
            what,
        });
        Ok(None)
    }

    /// Saves the runs that wait, so that the same command goes on from here. Another error has
    /// ended the comparison already, and is the one to report.
    fn suspend(&mut self, live: VecDeque<Live>) {
        for Live { entry, run, .. } in live {
            let step = run.progress().step;
            if step == 0 {
                continue;
            }
            if let Err(error) = run.suspend("the comparison was stopped") {
                let name = self.name(entry);
                let text = format!("warning: {name} could not be saved at step {step}: {error}");
                (self.notice)(&Notice::Note { text });
            }
        }
    }

    fn name(&self, entry: &Entry) -> String {
        format!(
            "{}, seed {}",
            self.candidates[entry.candidate].name, entry.seed
        )
    }

    fn failed(&self, entry: &Entry) -> impl FnOnce(TrainError) -> CompareError + use<> {
        CompareError::train(&self.name(entry))
    }
}

fn cut_reason(limit: f64, step: u64, steps: u64) -> String {
    format!("cut at the budget of {limit:.1} s, after step {step} of {steps}")
}

/// Whether a run has steps to take before this one.
fn is_open(course: &Course, until: u64) -> bool {
    let reached = course
        .evaluations
        .last()
        .is_some_and(|point| point.step >= until);
    course.state == CourseState::Begun && !(reached && course.is_suspended)
}
