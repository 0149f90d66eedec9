//! What a person sees of a run: a progress bar on a terminal, lines in a pipe, JSON for programs,
//! and the log file.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing::{info, warn};

use super::{EvaluatedWeights, Event, Observer, StepRecord, TrainError};
use crate::objective::MetricSpec;

/// Reports to standard error: a bar that redraws itself on a terminal, otherwise a line per
/// evaluation and per `every` steps.
pub struct Terminal {
    bar: ProgressBar,
    every: u64,
    quiet: bool,
    steps: u64,
    smoothed_loss: Option<f64>,
    val_loss: Option<f64>,
    /// The metrics of an evaluation.
    specs: Vec<MetricSpec>,
}

impl Terminal {
    /// A reporter with lines every `every` steps where there is no terminal. A quiet one reports
    /// only what needs attention: warnings, skipped steps, deleted checkpoints.
    pub fn new(every: u64, quiet: bool) -> Self {
        let bar = if quiet || !std::io::stderr().is_terminal() {
            ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden())
        } else {
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8))
        };
        Self {
            bar,
            every,
            quiet,
            steps: 0,
            smoothed_loss: None,
            val_loss: None,
            specs: Vec::new(),
        }
    }

    fn start(&mut self, step: u64, steps: u64) {
        self.steps = steps;
        let template = "{percent:>3}% [{bar:24}] {pos}/{len} {msg} eta {eta}";
        // The template is a constant; a mistake in it would show in the first test.
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_length(steps);
        self.bar.set_position(step);
        self.bar.reset_eta();
        self.bar.enable_steady_tick(Duration::from_millis(250));
    }

    fn step(&mut self, record: &StepRecord) {
        // The mean of about the last twenty steps, which a person can read a trend from.
        let smoothed = self
            .smoothed_loss
            .map_or(record.loss, |old| 0.95 * old + 0.05 * record.loss);
        self.smoothed_loss = Some(smoothed);
        let val = self
            .val_loss
            .map_or(String::new(), |val| format!(" val {val:.3}"));
        let phase = record.phase.as_ref();
        let phase = phase.map_or(String::new(), |name| format!("{name}: "));
        let status = format!(
            "{phase}loss {smoothed:.3}{val} lr {:.1e} {} tok/s",
            record.lr,
            thousands(record.tokens_per_second)
        );
        self.bar.set_message(status.clone());
        self.bar.set_position(record.step);
        let due = record.step == 1 || record.step.is_multiple_of(self.every);
        if self.bar.is_hidden() && due && !self.quiet {
            let percent = record.step * 100 / self.steps.max(1);
            to_stderr(&format!(
                "{percent:>3}% step {}/{} {status}",
                record.step, self.steps
            ));
        }
    }

    /// Says something about the course of the run.
    fn line(&self, text: &str) {
        if !self.quiet {
            self.always(text);
        }
    }

    /// Says something that needs attention.
    fn always(&self, text: &str) {
        self.bar.suspend(|| to_stderr(text));
    }
}

impl Observer for Terminal {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        match event {
            Event::Note { text } if text.starts_with("warning") => self.always(text),
            Event::Note { text } => self.line(text),
            Event::Resumed { step } => self.line(&resumed(*step)),
            Event::Started {
                step,
                steps,
                objectives,
            } => {
                let specs = objectives.iter().flat_map(|spec| spec.evaluation.iter());
                self.specs = specs.cloned().collect();
                self.start(*step, *steps);
            }
            Event::PhaseStarted { step, name, .. } => {
                self.line(&format!("step {step}: phase {name} begins"));
            }
            Event::Step(record) => self.step(record),
            Event::Evaluated {
                step,
                evaluation,
                weights,
                best,
                ..
            } => {
                self.val_loss = Some(evaluation.val_loss);
                let mark = if *best { "  best so far" } else { "" };
                let whose = of_weights(*weights);
                let known = self.specs.iter().filter_map(|spec| {
                    let value = evaluation.metrics.get(&spec.name)?;
                    Some(format!(", {}", spec.phrase(value)))
                });
                let more: String = known.collect();
                self.line(&format!(
                    "step {step}: val loss {:.4}{whose}{more}{mark}",
                    evaluation.val_loss
                ));
            }
            Event::Sample {
                prompt, completion, ..
            } => self.line(&indented(&format!("{prompt}{completion}"))),
            // Whoever called the run says how it ended.
            Event::Saving { .. } | Event::Saved { .. } | Event::Stopped { .. } => {}
            Event::Deleted { step } => {
                self.always(&format!("deleted the checkpoint of step {step}"));
            }
            Event::Skipped {
                step,
                loss,
                grad_norm,
                ..
            } => self.always(&format!(
                "warning: step {step} skipped: loss {loss}, gradient norm {grad_norm}; its batch is in logs/"
            )),
            // The metrics count them.
            Event::Predicted { .. } => {}
            Event::Regulated { back_to, .. } => {
                if let Some(step) = back_to {
                    self.bar.set_position(*step);
                }
                let text = event.decision().unwrap_or_default();
                self.always(&format!("warning: {text}"));
            }
            Event::Overflowed { step, loss_scale } => self.line(&format!(
                "step {step} skipped: a gradient overflowed f16; loss scale lowered to {loss_scale}"
            )),
            Event::StoppedEarly {
                evaluations,
                best_step,
                ..
            } => self.always(&stopped_early(*evaluations, *best_step)),
            Event::Finished { .. } => self.bar.finish_and_clear(),
        }
        Ok(())
    }
}

impl Drop for Terminal {
    /// A run that ends early leaves no half-drawn bar above its error message.
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// How a run that stopped early says so.
pub(in crate::train) fn stopped_early(evaluations: u64, best_step: u64) -> String {
    format!("stopped early: no improvement in {evaluations} evaluations since step {best_step}")
}

/// Which weights were evaluated, behind a loss; empty for a run that does not average them.
pub(in crate::train) fn of_weights(weights: Option<EvaluatedWeights>) -> &'static str {
    match weights {
        Some(EvaluatedWeights::Average) => " of the average",
        Some(EvaluatedWeights::Current) => " of the current weights",
        None => "",
    }
}

fn resumed(step: u64) -> String {
    format!("resumed from the checkpoint of step {step}")
}

/// With standard error closed or full there is no one left to tell; that is no reason to lose a run.
fn to_stderr(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// A text beside a margin, so that its end and its own blank lines can be seen. Control characters
/// that a young model writes do not reach the terminal.
fn indented(text: &str) -> String {
    let visible = |c: char| {
        if c.is_control() && c != '\t' {
            '\u{fffd}'
        } else {
            c
        }
    };
    let lines = text
        .split('\n')
        .map(|line| format!("  | {}", line.chars().map(visible).collect::<String>()));
    lines.collect::<Vec<_>>().join("\n")
}

fn thousands(number: f64) -> String {
    if number >= 10_000.0 {
        format!("{:.1}k", number / 1000.0)
    } else {
        format!("{number:.0}")
    }
}

/// Writes every event as one line of JSON to standard output, for programs.
#[derive(Debug, Default)]
pub struct EventLines;

impl Observer for EventLines {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        let line = serde_json::to_string(event).map_err(std::io::Error::from);
        line.and_then(|line| writeln!(std::io::stdout().lock(), "{line}"))
            .map_err(TrainError::io("standard output"))
    }
}

/// Passes events to `tracing`, and so to logs/train.log.
pub(in crate::train) struct LogEvents;

impl Observer for LogEvents {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        match event {
            Event::Note { text } => info!("{text}"),
            Event::Resumed { step } => info!("{}", resumed(*step)),
            Event::Started { step, steps, .. } => info!(step, steps, "started"),
            Event::PhaseStarted { step, phase, name } => info!(step, phase, name, "phase"),
            // The error is logged as one.
            Event::Step(_) | Event::Saving { .. } | Event::Stopped { .. } => {}
            Event::Evaluated {
                step,
                evaluation,
                weights,
                best,
                ..
            } => {
                let val_loss = evaluation.val_loss;
                info!(step, val_loss, best, "evaluated{}", of_weights(*weights));
            }
            Event::Sample {
                step,
                prompt,
                completion,
            } => info!(step, prompt, completion, "sample"),
            Event::Saved { step, .. } => info!(step, "saved"),
            Event::Deleted { step } => info!(step, "deleted"),
            Event::Skipped {
                step,
                first_sequence,
                sequences,
                loss,
                grad_norm,
            } => {
                warn!(
                    step,
                    first_sequence, sequences, loss, grad_norm, "skipped: not finite"
                );
            }
            Event::Predicted { step, is_kept, .. } => info!(step, is_kept, "predicted"),
            Event::Regulated { .. } => warn!("{}", event.decision().unwrap_or_default()),
            Event::Overflowed { step, loss_scale } => info!(step, loss_scale, "overflow"),
            Event::StoppedEarly {
                step,
                evaluations,
                best_step,
            } => info!(step, "{}", stopped_early(*evaluations, *best_step)),
            Event::Finished {
                step,
                exported_step,
                exported_weights,
                bigram,
                stopped_early,
            } => {
                let weights = of_weights(*exported_weights);
                info!(
                    step,
                    exported_step, bigram, stopped_early, "finished: export{weights}"
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_stand_beside_a_margin_without_control_characters() {
        assert_eq!(indented("a\n\n\tb"), "  | a\n  | \n  | \tb");
        assert_eq!(indented("\u{1b}[2J"), "  | \u{fffd}[2J");
    }
}
