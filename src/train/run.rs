//! The loop.

use std::time::Instant;

use super::predictor::Role;
use super::{
    EvaluatedWeights, Evaluation, Event, Session, StepOutcome, StepRecord, StepReport, TrainError,
    TrainState, train_step,
};
use crate::checkpoint::{Cost, Progress};
use crate::config::OnNonfinite;
use crate::data::Batch;
use crate::device::is_cpu;
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
    /// The step that this session began at; none before it began.
    pub(super) first: Option<u64>,
    /// The last evaluation of this session.
    pub(super) evaluation: Option<Evaluation>,
}

/// Where [`Run::advance`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advance {
    /// It was asked to pause; more steps are left.
    Paused,
    /// All steps are taken.
    Done,
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
    /// Which weights of that step; None if the run does not average them.
    pub exported_weights: Option<EvaluatedWeights>,
    /// Whether it ended before its last step because validation stopped improving.
    pub stopped_early: bool,
}

impl Run {
    /// Trains to the end.
    ///
    /// # Errors
    /// See [`TrainError`]. The last checkpoint stays good whatever happens.
    pub fn train(mut self) -> Result<Outcome, TrainError> {
        self.advance(|_| false)?;
        self.finish()
    }

    /// Trains to the end, or until `pause` returns true after a step. While a run is paused,
    /// nothing of it goes on in the background, and its clock stands still.
    ///
    /// # Errors
    /// As [`train`](Self::train). After an error the run is over.
    pub fn advance(&mut self, pause: impl FnMut(&Progress) -> bool) -> Result<Advance, TrainError> {
        let _log = self.session.log_here();
        self.session.clock.go_on();
        let advanced = self.steps(pause);
        self.session.clock.pause();
        advanced.inspect_err(|error| self.report(error))
    }

    /// Ends the run where it is, before its last step, and exports its model as at the end. The
    /// run's record keeps the reason.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn cut(mut self, reason: &str) -> Result<Outcome, TrainError> {
        let _log = self.session.log_here();
        self.session.clock.go_on();
        self.session.cut = Some(reason.to_string());
        let ended = self.end();
        ended.inspect_err(|error| self.report(error))?;
        self.finish()
    }

    /// Saves the run where it is and lets go of it. It can be prepared again and goes on from here.
    /// The reason is what its report shows until then.
    ///
    /// # Errors
    /// A save that fails.
    pub fn suspend(mut self, reason: &str) -> Result<(), TrainError> {
        let _log = self.session.log_here();
        self.session.clock.go_on();
        let saved = self.session.save_here(&mut self.state);
        saved.inspect_err(|error| self.report(error))?;
        let step = self.state.progress.step;
        self.session.emit(&Event::Stopped {
            step,
            kind: "suspended".to_string(),
            message: format!("suspended after step {step}: {reason}"),
        })
    }

    /// Closes the record of a run whose steps are taken, and exports its model.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn finish(mut self) -> Result<Outcome, TrainError> {
        let _log = self.session.log_here();
        self.session.clock.go_on();
        let evaluation = self.evaluation.take();
        let outcome = self.session.finish(&mut self.state, evaluation);
        outcome.inspect_err(|error| self.report(error))
    }

    /// How far the run has come.
    pub fn progress(&self) -> &Progress {
        &self.state.progress
    }

    /// The loop: all steps that are left, or those until `pause` returns true.
    fn steps(&mut self, mut pause: impl FnMut(&Progress) -> bool) -> Result<Advance, TrainError> {
        self.begin()?;
        let Self { state, session, .. } = self;
        while let Some(phase) = session.next_phase(&state.progress) {
            session.enter_phase(state, &phase)?;
            let before = state.progress.step;
            session.step(state)?;
            if Some(before) == self.first {
                session.check_ranks(state)?;
            }
            session.poll_save()?;
            if state.progress.step <= before {
                // The run has gone back to a checkpoint, which was evaluated and saved in its time.
                session.stop_if_asked(state)?;
                continue;
            }
            self.evaluation = session.evaluate_if_due(state)?;
            session.save_if_due(state, self.evaluation.is_some())?;
            session.stop_if_asked(state)?;
            if pause(&state.progress) && session.next_phase(&state.progress).is_some() {
                session.wait_for_device(state);
                session.wait_for_save()?;
                return Ok(Advance::Paused);
            }
        }
        self.end()?;
        Ok(Advance::Done)
    }

    /// What comes before the first step of a session.
    fn begin(&mut self) -> Result<(), TrainError> {
        if self.first.is_some() {
            return Ok(());
        }
        let Self { state, session, .. } = self;
        self.first = Some(state.progress.step);
        session.emit(&Event::Started {
            step: state.progress.step,
            steps: session.timeline.steps(),
            objectives: session.objective_specs(),
        })?;
        session.preflight_save(state)?;
        session.stop_if_asked(state)
    }

    /// What comes after the last step.
    fn end(&mut self) -> Result<(), TrainError> {
        let Self { state, session, .. } = self;
        let is_cut = session.cut.is_some();
        // A run that begins at its end, or past it, has not been evaluated there; nor has one that
        // is cut.
        let begins_here = Some(state.progress.step) == self.first;
        let is_new = state.progress.val_loss.is_none() && (begins_here || is_cut);
        if is_new {
            self.evaluation = session.evaluate(state)?;
        }
        if is_new || is_cut {
            session.save_if_due(state, self.evaluation.is_some())?;
        }
        session.wait_for_save()
    }

    fn report(&mut self, error: &TrainError) {
        tracing::error!("{error}");
        self.session.emit_end(self.state.progress.step, error);
    }
}

impl Session {
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
        let is_over = self.cut.is_some() || self.is_out_of_patience(progress);
        progress.step < self.timeline.steps() && is_over
    }

    /// Takes one optimizer step and tells the observers about it.
    fn step(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        let begun = Instant::now();
        let (first_sequence, step) = (state.progress.sequences, state.progress.step);
        let mut settings = self.active.settings(step, self.plan.config.seed);
        if let Some(regulator) = &state.regulator {
            settings.limits = regulator.limits();
            settings.learning_rate *= regulator.learning_rate_factor();
        }
        self.last_learning_rate = settings.learning_rate;
        let role = self.role(state);
        if role == Some(Role::Predict) && self.predict(state, &settings)? {
            return Ok(());
        }
        let batches = self.active.micro_batches(first_sequence, self.team.rank());
        let before = state.begin_step(role);
        let report = train_step(
            state,
            &batches,
            self.active.objective.as_ref(),
            &settings,
            self.team.collective(),
        )?;
        state.progress.sequences += self.active.phase.sequences_per_step();
        state.progress.cost += self.cost_of(&batches, &report, begun)?;
        self.clock.stepped(
            report.time.backward + report.time.gradient + report.time.update,
            report.tokens,
        );
        if let (StepOutcome::Updated, Some(regulator)) = (report.outcome, &mut state.regulator) {
            regulator.took(report.loss, report.grad_norm);
        }
        if report.outcome == StepOutcome::Updated {
            state.learn_to_predict(report.loss, before);
            self.note_turned_off(state)?;
            self.note_average(state)?;
        }
        match report.outcome {
            StepOutcome::Irregular(cause) => {
                self.regulate(state, cause, (&report, settings.limits), first_sequence)
            }
            StepOutcome::Updated => self.emit(&Event::Step(StepRecord {
                step: state.progress.step,
                phase: self.phase_name(),
                tokens: state.progress.tokens,
                loss: report.loss,
                lr: settings.learning_rate,
                grad_norm: report.grad_norm,
                tokens_per_second: self.clock.tokens_per_second(),
                memory_bytes: resident_memory_bytes(),
                regulated: state.decisions(),
                prediction: state.prediction(role),
                exchange: report.exchange,
                cost: state.progress.cost,
                metrics: report.metrics,
            })),
            StepOutcome::Overflowed { loss_scale } => self.emit(&Event::Overflowed {
                step: state.progress.step,
                loss_scale,
            }),
            StepOutcome::NotFinite => self.skip(&state.progress, &report, first_sequence),
        }
    }

    /// The cost of a step on these batches. Masked tokens and padding are computed too.
    fn cost_of(
        &self,
        batches: &[Batch],
        report: &StepReport,
        begun: Instant,
    ) -> Result<Cost, TrainError> {
        let exchange = report.exchange.unwrap_or_default();
        let own: usize = batches.iter().map(|batch| batch.rows * batch.cols).sum();
        let mut tokens = [own as f64];
        self.team.collective().sum(&mut tokens)?;
        Ok(Cost {
            backward_passes: self.active.phase.plan.micro_batches_per_step(),
            flops: tokens[0] * self.flops_per_token[self.active.phase.number].step,
            train_seconds: begun.elapsed().as_secs_f64(),
            sent_bytes: exchange.sent_bytes,
            received_bytes: exchange.received_bytes,
        })
    }

    /// Waits for work that a GPU has queued, so that the next run does not wait for it. The time
    /// belongs to the steps of this run.
    fn wait_for_device(&self, state: &mut TrainState) {
        if is_cpu(&self.device.device) {
            return;
        }
        let begun = Instant::now();
        // Reading what was written last takes until all is done.
        state.model().norm.weight.val().into_data();
        state.progress.cost.train_seconds += begun.elapsed().as_secs_f64();
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
        if self.team.is_lead() {
            let view = &self.active.data.view;
            let tokens = view.batch(first_sequence, sequences as usize).tokens;
            let dump = serde_json::json!({ "event": event, "tokens": tokens });
            let name = format!("logs/nonfinite-step-{:06}.json", progress.step);
            self.folder.write(&name, &format!("{dump}\n"))?;
        }
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
