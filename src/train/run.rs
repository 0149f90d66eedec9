//! The loop.

use super::{
    Evaluation, Event, Session, StepOutcome, StepRecord, StepReport, TrainError, TrainState,
    train_step,
};
use crate::checkpoint::Progress;
use crate::collective::SingleProcess;
use crate::config::OnNonfinite;
use crate::environment::resident_memory_bytes;
use crate::phase::Phase;

/// Non-finite steps in a row after which a run is given up.
const MOST_NONFINITE: u32 = 3;

/// A run that is ready to start. Made by [`Run::prepare`]. It may be sent to another thread.
pub struct Run {
    /// The state that a step changes.
    pub(super) state: TrainState,
    /// Everything else: the plan, the data, the run folder, the observers.
    pub(super) session: Session,
}

/// How a finished run went.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Where everything is, the exported model included.
    pub folder: std::path::PathBuf,
    /// How far it came: steps, tokens, seconds, best evaluation.
    pub progress: Progress,
    /// The last evaluation.
    pub evaluation: Option<Evaluation>,
    /// The unit of the validation loss: "nats per token".
    pub loss_unit: String,
    /// Nats per token of a smoothed bigram model over the same tokens and split: what a language
    /// model must beat to have learned more than which token follows which.
    pub bigram: Option<f64>,
    /// The step whose weights were exported.
    pub exported_step: u64,
    /// Whether it ended before its last step because validation stopped improving.
    pub stopped_early: bool,
}

impl Run {
    /// Trains to the end.
    ///
    /// # Errors
    /// See [`TrainError`]. The last checkpoint stays good whatever happens.
    pub fn train(self) -> Result<Outcome, TrainError> {
        let Self {
            mut state,
            mut session,
        } = self;
        let _log = session.log_here();
        let trained = session.train(&mut state);
        let outcome = trained.and_then(|evaluation| session.finish(&mut state, evaluation));
        if let Err(error) = &outcome {
            tracing::error!("{error}");
            session.emit_end(state.progress.step, error);
        }
        outcome
    }
}

impl Session {
    /// All steps that are left. Returns the last evaluation.
    fn train(&mut self, state: &mut TrainState) -> Result<Option<Evaluation>, TrainError> {
        let first = state.progress.step;
        self.emit(&Event::Started {
            step: first,
            steps: self.timeline.steps(),
            objectives: self.objective_specs(),
        })?;
        self.preflight_save(state)?;
        self.stop_if_asked(state)?;
        let mut evaluation = None;
        while let Some(phase) = self.next_phase(&state.progress) {
            self.enter_phase(state, &phase)?;
            self.step(state)?;
            self.poll_save()?;
            evaluation = self.evaluate_if_due(state)?;
            self.save_if_due(state, evaluation.is_some())?;
            self.stop_if_asked(state)?;
        }
        // A run that begins at its end, or past it, has not been evaluated there.
        if state.progress.step == first && state.progress.val_loss.is_none() {
            evaluation = self.evaluate(state)?;
            self.save_if_due(state, evaluation.is_some())?;
        }
        self.wait_for_save()?;
        Ok(evaluation)
    }

    /// The phase of the next step; None after the last step, or when validation has stopped
    /// improving.
    fn next_phase(&self, progress: &Progress) -> Option<Phase> {
        let phase = self.timeline.at(progress.step)?;
        (!self.is_out_of_patience(progress)).then(|| phase.clone())
    }

    /// Whether the evaluation of this step was the last of too many without improvement.
    fn is_out_of_patience(&self, progress: &Progress) -> bool {
        let patience = self.plan.config.eval.early_stopping_patience;
        let evaluated = progress.val_loss.is_some();
        evaluated && patience > 0 && progress.evaluations_since_best >= patience
    }

    /// Whether the run is over before its last step.
    pub(super) fn stops_early(&self, progress: &Progress) -> bool {
        progress.step < self.timeline.steps() && self.is_out_of_patience(progress)
    }

    /// Takes one optimizer step and tells the observers about it.
    fn step(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        let (first_sequence, step) = (state.progress.sequences, state.progress.step);
        let settings = self.active.settings(step, self.plan.config.seed);
        let batches = self.micro_batches(first_sequence);
        let report = train_step(
            state,
            &batches,
            self.active.objective.as_ref(),
            &settings,
            &SingleProcess,
        )?;
        state.progress.sequences += self.active.phase.sequences_per_step();
        self.clock.stepped(
            report.time.backward + report.time.gradient + report.time.update,
            report.tokens,
        );
        match report.outcome {
            StepOutcome::Updated => self.emit(&Event::Step(StepRecord {
                step: state.progress.step,
                phase: self.phase_name(),
                tokens: state.progress.tokens,
                loss: report.loss,
                lr: settings.learning_rate,
                grad_norm: report.grad_norm,
                tokens_per_second: self.clock.tokens_per_second(),
                memory_bytes: resident_memory_bytes(),
                metrics: report.metrics,
            })),
            StepOutcome::Overflowed { loss_scale } => self.emit(&Event::Overflowed {
                step: state.progress.step,
                loss_scale,
            }),
            StepOutcome::NotFinite => self.skip(&state.progress, &report, first_sequence),
        }
    }

    /// The weights stay as they were; the batch is written down; too many in a row end the run.
    fn skip(
        &mut self,
        progress: &Progress,
        report: &StepReport,
        first_sequence: u64,
    ) -> Result<(), TrainError> {
        let sequences = self.active.phase.sequences_per_step();
        let event = Event::Skipped {
            step: progress.step,
            first_sequence,
            sequences,
            loss: report.loss.to_string(),
            grad_norm: report.grad_norm.to_string(),
        };
        let view = &self.active.data.view;
        let tokens = view.batch(first_sequence, sequences as usize).tokens;
        let dump = serde_json::json!({ "event": event, "tokens": tokens });
        let name = format!("logs/nonfinite-step-{:06}.json", progress.step);
        self.folder.write(&name, &format!("{dump}\n"))?;
        self.emit(&event)?;
        let most = match self.plan.config.train.on_nonfinite {
            OnNonfinite::Skip => MOST_NONFINITE,
            OnNonfinite::Stop => 1,
        };
        if progress.nonfinite_in_a_row < most {
            return Ok(());
        }
        self.wait_for_save()?;
        let checkpoint = self.store.latest()?;
        Err(TrainError::Diverged {
            step: progress.step,
            in_a_row: progress.nonfinite_in_a_row,
            checkpoint,
        })
    }
}
