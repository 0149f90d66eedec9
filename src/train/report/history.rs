//! What a report shows of a run's course, gathered event by event.

use std::collections::{BTreeMap, VecDeque};

use super::series::{Series, Spread};
use crate::checkpoint::Cost;
use crate::objective::{Evaluation, MetricSpec, ObjectiveSpec};
use crate::train::observers::{Entry, of_weights, stopped_early};
use crate::train::{EvaluatedWeights, Event, StepRecord};

/// Evaluations whose samples are shown, besides the newest.
const MOST_SAMPLED: usize = 12;
/// Lines in the list of events.
const MOST_LINES: usize = 200;
/// Rows that the training loss is a mean of.
pub(super) const RECENT_ROWS: usize = 10;

/// The course of a run.
#[derive(Debug)]
pub(super) struct History {
    pub(super) status: Status,
    pub(super) step: u64,
    /// Steps of the whole run.
    pub(super) steps: u64,
    pub(super) tokens: u64,
    /// The cost of all steps.
    pub(super) cost: Cost,
    /// Training time up to the last save, in seconds.
    pub(super) seconds: Option<f64>,
    /// When the last event was.
    pub(super) updated: String,
    pub(super) rows: u64,
    pub(super) loss: Series,
    recent_losses: VecDeque<f64>,
    pub(super) lr: Series,
    pub(super) grad_norm: Series,
    pub(super) speed: Series,
    pub(super) memory: Series,
    pub(super) val_loss: Series,
    /// The objectives of the run, with their metrics.
    pub(super) objectives: Vec<ObjectiveSpec>,
    /// The metrics of the objectives, by name.
    numbers: BTreeMap<String, Series>,
    /// Every evaluation, by step.
    pub(super) evaluations: Vec<(u64, Evaluation)>,
    /// The weights that were evaluated, by step; empty for a run that does not average them.
    weights: BTreeMap<u64, EvaluatedWeights>,
    pub(super) best: Option<(u64, f64)>,
    pub(super) samples: Spread<Samples>,
    pub(super) lines: VecDeque<Line>,
    /// Lines that had no place in the list.
    pub(super) lines_left_out: usize,
    pub(super) skips: Vec<u64>,
    /// The steps after which the phases begin, and their names; empty for a run with one phase.
    pub(super) phases: Vec<(u64, String)>,
    pub(super) resumes: Vec<u64>,
    speeds: f64,
    /// The step after which the phase begins that has no row yet.
    boundary: Option<u64>,
}

/// How a run stands.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Status {
    Running,
    Finished,
    FinishedEarly,
    /// Ended by an error: its kind and its message.
    Stopped {
        kind: String,
        message: String,
    },
}

/// The sample completions of one evaluation.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Samples {
    pub(super) step: u64,
    /// Prompt and completion.
    pub(super) texts: Vec<(String, String)>,
}

/// A line in the list of events.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    pub(super) step: u64,
    pub(super) time: String,
    pub(super) text: String,
}

impl Default for History {
    fn default() -> Self {
        Self {
            status: Status::Running,
            step: 0,
            steps: 0,
            tokens: 0,
            cost: Cost::default(),
            seconds: None,
            updated: String::new(),
            rows: 0,
            loss: Series::default(),
            recent_losses: VecDeque::new(),
            lr: Series::default(),
            grad_norm: Series::default(),
            speed: Series::default(),
            memory: Series::default(),
            val_loss: Series::default(),
            objectives: Vec::new(),
            numbers: BTreeMap::new(),
            evaluations: Vec::new(),
            weights: BTreeMap::new(),
            best: None,
            samples: Spread::new(MOST_SAMPLED),
            lines: VecDeque::new(),
            lines_left_out: 0,
            skips: Vec::new(),
            phases: Vec::new(),
            resumes: Vec::new(),
            speeds: 0.0,
            boundary: None,
        }
    }
}

impl History {
    pub(super) fn take(&mut self, entry: &Entry) {
        self.updated.clone_from(&entry.time);
        self.step = self.step.max(entry.at);
        match &entry.event {
            Event::Step(record) => self.row(record),
            Event::Started {
                steps, objectives, ..
            } => {
                self.steps = *steps;
                self.objectives.clone_from(objectives);
                self.status = Status::Running;
            }
            Event::Resumed { step } => self.resumes.push(*step),
            Event::Evaluated {
                step,
                evaluation,
                weights,
                best,
                ..
            } => {
                self.weights.extend(weights.map(|weights| (*step, weights)));
                self.val_loss.push(*step, evaluation.val_loss);
                self.take_numbers(*step, evaluation.metrics.iter());
                self.evaluations.push((*step, evaluation.clone()));
                if *best {
                    self.best = Some((*step, evaluation.val_loss));
                }
            }
            Event::Sample {
                step,
                prompt,
                completion,
            } => self.sample(*step, prompt, completion),
            Event::Saved { seconds, .. } => self.seconds = Some(*seconds),
            Event::Skipped { step, .. }
            | Event::Overflowed { step, .. }
            | Event::Regulated { step, .. } => self.skips.push(*step),
            Event::Saving { .. } | Event::StoppedEarly { .. } => {}
            Event::Predicted { .. } => {}
            // Losses of two phases may not be comparable.
            Event::PhaseStarted { step, .. } => self.boundary = Some(*step),
            Event::Stopped { kind, message, .. } => {
                let (kind, message) = (kind.clone(), message.clone());
                self.status = Status::Stopped { kind, message };
            }
            Event::Finished { stopped_early, .. } => {
                self.status = if *stopped_early {
                    Status::FinishedEarly
                } else {
                    Status::Finished
                };
            }
            Event::Note { .. } | Event::Deleted { .. } => {}
        }
        if let Some(text) = line(&entry.event) {
            if self.lines.len() == MOST_LINES {
                self.lines.pop_front();
                self.lines_left_out += 1;
            }
            self.lines.push_back(Line {
                step: entry.at,
                time: entry.time.clone(),
                text,
            });
        }
    }

    fn row(&mut self, record: &StepRecord) {
        let step = record.step;
        if let Some(phase) = &record.phase
            && self.phases.last().is_none_or(|(_, name)| name != phase)
        {
            // Only phases after the first have an event of their own.
            let begins = self.boundary.take().unwrap_or(step.saturating_sub(1));
            self.phases.push((begins, phase.clone()));
        }
        self.tokens = record.tokens;
        self.cost = record.cost;
        self.rows += 1;
        self.loss.push(step, record.loss);
        self.recent_losses.push_back(record.loss);
        if self.recent_losses.len() > RECENT_ROWS {
            self.recent_losses.pop_front();
        }
        self.lr.push(step, record.lr);
        if let Some(norm) = record.measured_grad_norm() {
            self.grad_norm.push(step, norm);
        }
        self.speed.push(step, record.tokens_per_second);
        self.speeds += record.tokens_per_second;
        if let Some(bytes) = record.memory_bytes {
            self.memory.push(step, bytes as f64);
        }
        self.take_numbers(step, record.metrics.iter());
    }

    fn take_numbers<'a>(&mut self, step: u64, numbers: impl Iterator<Item = (&'a str, f64)>) {
        for (name, value) in numbers {
            let series = self.numbers.entry(name.to_string()).or_default();
            series.push(step, value);
        }
    }

    /// The values of a metric; None if it was never measured.
    pub(super) fn number(&self, name: &str) -> Option<&Series> {
        self.numbers.get(name)
    }

    /// The metrics of steps, or of evaluations, of all objectives.
    pub(super) fn specs(
        &self,
        of: impl Fn(&ObjectiveSpec) -> &[MetricSpec],
    ) -> impl Iterator<Item = &MetricSpec> {
        self.objectives.iter().flat_map(of)
    }

    /// The unit of the loss; all units if the run's phases have several objectives.
    pub(super) fn loss_unit(&self) -> String {
        let mut units: Vec<&str> = Vec::new();
        for objective in &self.objectives {
            if !units.contains(&objective.loss_unit.as_ref()) {
                units.push(&objective.loss_unit);
            }
        }
        match units.as_slice() {
            [] => "nats per token".to_string(),
            units => units.join(" and "),
        }
    }

    fn sample(&mut self, step: u64, prompt: &str, completion: &str) {
        let text = (prompt.to_string(), completion.to_string());
        match self.samples.newest_mut() {
            Some(samples) if samples.step == step => samples.texts.push(text),
            _ => self.samples.push(Samples {
                step,
                texts: vec![text],
            }),
        }
    }

    /// Mean loss of the last [`RECENT_ROWS`] rows, where there are so many, else of the last one.
    pub(super) fn recent_loss(&self) -> Option<(f64, usize)> {
        let rows = self.recent_losses.len();
        let last = self.recent_losses.back()?;
        if rows < RECENT_ROWS {
            return Some((*last, 1));
        }
        Some((self.recent_losses.iter().sum::<f64>() / rows as f64, rows))
    }

    /// Mean speed of the rows, in tokens per second.
    pub(super) fn mean_speed(&self) -> Option<f64> {
        (self.rows > 0).then(|| self.speeds / self.rows as f64)
    }

    /// Which weights the evaluation of a step measured, behind its loss or step.
    pub(super) fn weights_of(&self, step: u64) -> &'static str {
        of_weights(self.weights.get(&step).copied())
    }

    /// The evaluation of a step.
    pub(super) fn evaluation_of(&self, step: u64) -> Option<&Evaluation> {
        let found = self.evaluations.iter().rev().find(|other| other.0 == step);
        found.map(|(_, evaluation)| evaluation)
    }
}

/// What the list of events says; nothing of what has a place of its own in the report.
fn line(event: &Event) -> Option<String> {
    Some(match event {
        Event::Started { step: 0, .. } => "started".to_string(),
        Event::PhaseStarted { name, .. } => format!("phase {name} begins"),
        Event::Resumed { step } => format!("resumed from the checkpoint of step {step}"),
        Event::Note { text } if text.starts_with("warning") => text.clone(),
        Event::Skipped {
            loss, grad_norm, ..
        } => {
            let (loss, norm) = (short(loss), short(grad_norm));
            format!("step skipped: loss {loss}, gradient norm {norm}")
        }
        Event::Regulated { .. } => event.decision()?,
        Event::Overflowed { loss_scale, .. } => {
            format!("step skipped: a gradient overflowed f16; loss scale {loss_scale}")
        }
        Event::Deleted { step } => format!("deleted the checkpoint of step {step}"),
        Event::StoppedEarly {
            evaluations,
            best_step,
            ..
        } => stopped_early(*evaluations, *best_step),
        Event::Stopped { message, .. } => message.clone(),
        Event::Finished {
            exported_step,
            exported_weights: Some(EvaluatedWeights::Average),
            ..
        } => format!("finished; the average of step {exported_step} is exported"),
        Event::Finished { exported_step, .. } => {
            format!("finished; the weights of step {exported_step} are exported")
        }
        _ => return None,
    })
}

/// A number that came as text, in as many digits as a person reads.
fn short(number: &str) -> String {
    let parsed = number.parse::<f64>();
    parsed.map_or(number.to_string(), |number| format!("{number:.4}"))
}
