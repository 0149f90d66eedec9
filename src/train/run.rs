//! The loop.

use std::path::Path;
use std::time::Instant;

use burn::tensor::FloatDType;

use super::clock::Clock;
use super::saver::Saver;
use super::{Evaluation, Event, Interrupt, Observer, RunFolder, StepRecord, TrainError};
use crate::adapter::Adapter;
use crate::checkpoint::{CheckpointStore, Progress};
use crate::config::{OnNonfinite, Plan};
use crate::data::{Batch, Feed};
use crate::environment::resident_memory_bytes;
use crate::gradient::{Gradient, Precision, Preference, backward_preference, backward_with};
use crate::model::{Decoder, DecoderSpec};
use crate::optimizer::Optimizer;
use crate::phase::{Phase, Timeline};

/// Non-finite steps in a row after which a run is given up.
const MOST_NONFINITE: u32 = 3;

/// What a step's forward and backward pass found.
struct Pass {
    loss: f64,
    /// Trained tokens.
    tokens: f64,
    gradient: Gradient,
    reward_accuracy: Option<f64>,
    reward_margin: Option<f64>,
}

/// A run that only has to be started. Made by [`Run::prepare`].
pub struct Run {
    pub(super) model: Decoder,
    pub(super) trainer: Trainer,
}

/// Everything of a run but its weights.
pub(super) struct Trainer {
    pub(super) plan: Plan,
    pub(super) spec: DecoderSpec,
    pub(super) timeline: Timeline,
    pub(super) feed: Feed,
    /// What the forward and backward pass compute in.
    pub(super) dtype: FloatDType,
    /// The base model as it came, which answers are held against (task = "dpo"), in `dtype`.
    pub(super) reference: Option<Decoder>,
    /// The adapter as it began, where that is not nothing.
    pub(super) beginning: Option<Adapter>,
    pub(super) optimizer: Optimizer,
    pub(super) progress: Progress,
    pub(super) clock: Clock,
    pub(super) store: CheckpointStore,
    pub(super) saver: Saver,
    pub(super) folder: RunFolder,
    pub(super) observers: Vec<Box<dyn Observer>>,
    pub(super) interrupt: Interrupt,
    /// Bytes that may still be written beside a path: the disk's own word, but in tests.
    pub(super) free_space: fn(&Path) -> std::io::Result<u64>,
    /// Held, not read: sends this thread's log to the run folder.
    pub(super) _log: tracing::subscriber::DefaultGuard,
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
        let Self { model, mut trainer } = self;
        let trained = trainer.run(model);
        let outcome = trained.and_then(|evaluation| trainer.finish(evaluation));
        if let Err(error) = &outcome {
            tracing::error!("{error}");
            trainer.tell_of_end(error);
        }
        outcome
    }
}

impl Trainer {
    /// All steps that are left. Returns the last evaluation.
    fn run(&mut self, mut model: Decoder) -> Result<Option<Evaluation>, TrainError> {
        let (step, steps) = (self.progress.step, self.timeline.steps());
        self.tell(&Event::Started { step, steps })?;
        self.prove_saving(&model)?;
        self.stop_if_asked(&model)?;
        let mut evaluation = None;
        while let Some(phase) = self.next_phase() {
            model = self.step(model, &phase)?;
            self.gather()?;
            evaluation = self.evaluate_if_due(&model)?;
            self.save_if_due(&model, evaluation)?;
            self.stop_if_asked(&model)?;
        }
        // A run that begins at its end, or past it, has not been evaluated there.
        if self.progress.step == step && self.progress.val_loss.is_none() {
            evaluation = self.evaluate(&model)?;
            self.save_if_due(&model, evaluation)?;
        }
        self.settle()?;
        Ok(evaluation)
    }

    /// What holds for the next step; none when there is none, or when validation has stopped
    /// improving.
    fn next_phase(&self) -> Option<Phase> {
        let phase = self.timeline.at(self.progress.step)?;
        (!self.is_out_of_patience()).then(|| phase.clone())
    }

    /// Whether the evaluation of this step was the last of too many without improvement.
    fn is_out_of_patience(&self) -> bool {
        let patience = self.plan.config.eval.early_stopping_patience;
        let evaluated = self.progress.val_loss.is_some();
        evaluated && patience > 0 && self.progress.evaluations_since_best >= patience
    }

    /// Whether the run is over before its last step.
    pub(super) fn stops_early(&self) -> bool {
        self.progress.step < self.timeline.steps() && self.is_out_of_patience()
    }

    /// One optimizer step: micro-batches -> gradient -> clip -> update.
    fn step(&mut self, model: Decoder, phase: &Phase) -> Result<Decoder, TrainError> {
        let started = Instant::now();
        let step = self.progress.step;
        let batches = self.micro_batches(phase);
        let Pass {
            loss,
            tokens: weight,
            gradient,
            reward_accuracy,
            reward_margin,
        } = self.pass(&model, &batches)?;
        let norm = gradient.norm(&model);
        let learning_rate = phase.learning_rate(step);
        let finite = loss.is_finite() && norm.is_finite();
        let model = if finite {
            let gradient = gradient.clip(norm, self.plan.config.train.max_grad_norm, &model);
            self.optimizer.step(model, gradient, learning_rate)
        } else {
            model
        };

        let first_sequence = self.progress.sequences;
        self.progress.step += 1;
        self.progress.sequences += phase.sequences_per_step();
        self.progress.val_loss = None;
        self.clock.stepped(started.elapsed(), weight);
        if !finite {
            if !self.overflowed(loss)? {
                self.skip(loss, norm, first_sequence, phase)?;
            }
            return Ok(model);
        }
        if let Some(scale) = &mut self.progress.loss_scale {
            scale.held();
        }
        self.progress.nonfinite_in_a_row = 0;
        self.progress.tokens += weight as u64;
        self.tell(&Event::Step(StepRecord {
            step: self.progress.step,
            tokens: self.progress.tokens,
            loss,
            lr: learning_rate,
            grad_norm: norm,
            tokens_per_second: self.clock.tokens_per_second(),
            memory_bytes: resident_memory_bytes(),
            reward_accuracy,
            reward_margin,
        }))?;
        Ok(model)
    }

    /// Forward and backward over the micro-batches of a step.
    fn pass(&self, model: &Decoder, batches: &[Batch]) -> Result<Pass, TrainError> {
        let precision = self.precision();
        let Some((preference, reference)) = self.preference() else {
            let result = backward_with(model, batches, precision)?;
            return Ok(Pass {
                loss: result.loss(),
                tokens: result.weight,
                gradient: result.gradient,
                reward_accuracy: None,
                reward_margin: None,
            });
        };
        let result = backward_preference(model, reference, batches, (preference, precision))?;
        Ok(Pass {
            loss: result.loss(),
            tokens: batches.iter().map(Batch::weight).sum(),
            reward_accuracy: Some(result.won / result.pairs),
            reward_margin: Some(result.margin / result.pairs),
            gradient: result.gradient,
        })
    }

    /// What pairs of answers are judged by; none for other tasks.
    pub(super) fn preference(&self) -> Option<(Preference, &Decoder)> {
        let preference = self.plan.dpo()?.into();
        Some((preference, self.reference.as_ref()?))
    }

    /// The micro-batches of the next step: sequences in data order, whatever their grouping.
    fn micro_batches(&self, phase: &Phase) -> Vec<Batch> {
        let rows = phase.micro_batch_size;
        let first = self.progress.sequences;
        (0..phase.accumulation as u64)
            .map(|pass| self.feed.batch(first + pass * rows as u64, rows))
            .collect()
    }

    fn precision(&self) -> Precision {
        Precision {
            dtype: self.dtype,
            loss_scale: self.progress.loss_scale.map_or(1.0, |scale| scale.scale),
            gradient_checkpointing: self.plan.config.train.gradient_checkpointing,
            int8_forward: self.plan.multiplies_integers(),
            dropout_seed: Some([self.plan.config.seed, self.progress.step]),
        }
    }

    /// Whether a step that was not finite only says that the loss scale is too large: the loss is
    /// finite and the scale can be lowered.
    fn overflowed(&mut self, loss: f64) -> Result<bool, TrainError> {
        let Some(scale) = &mut self.progress.loss_scale else {
            return Ok(false);
        };
        if !loss.is_finite() || !scale.overflowed() {
            return Ok(false);
        }
        let (step, loss_scale) = (self.progress.step, scale.scale);
        self.tell(&Event::Overflowed { step, loss_scale })?;
        Ok(true)
    }

    /// The weights stay as they were; the batch is written down; too many in a row end the run.
    fn skip(
        &mut self,
        loss: f64,
        norm: f64,
        first_sequence: u64,
        phase: &Phase,
    ) -> Result<(), TrainError> {
        self.progress.nonfinite_in_a_row += 1;
        let in_a_row = self.progress.nonfinite_in_a_row;
        let event = Event::Skipped {
            step: self.progress.step,
            first_sequence,
            sequences: phase.sequences_per_step(),
            loss: loss.to_string(),
            grad_norm: norm.to_string(),
        };
        let tokens = self
            .feed
            .batch(first_sequence, phase.sequences_per_step() as usize)
            .tokens;
        let dump = serde_json::json!({ "event": event, "tokens": tokens });
        let name = format!("logs/nonfinite-step-{:06}.json", self.progress.step);
        self.folder.write(&name, &format!("{dump}\n"))?;
        self.tell(&event)?;
        let most = match self.plan.config.train.on_nonfinite {
            OnNonfinite::Skip => MOST_NONFINITE,
            OnNonfinite::Stop => 1,
        };
        if in_a_row < most {
            return Ok(());
        }
        self.settle()?;
        let checkpoint = self.store.latest()?;
        Err(TrainError::Diverged {
            step: self.progress.step,
            in_a_row,
            checkpoint,
        })
    }

    /// Whether something done every `every` steps is due; at the last step it always is.
    pub(super) fn is_due(&self, every: u64) -> bool {
        let step = self.progress.step;
        step == self.timeline.steps() || (every > 0 && step.is_multiple_of(every))
    }

    /// Tells every observer that the run ends early. That some of them cannot take it, perhaps
    /// because of the very error, matters less than the error.
    fn tell_of_end(&mut self, error: &TrainError) {
        let event = Event::Stopped {
            step: self.progress.step,
            kind: error.kind().to_string(),
            message: error.to_string(),
        };
        for observer in &mut self.observers {
            let _ = observer.observe(&event);
        }
    }

    pub(super) fn tell(&mut self, event: &Event) -> Result<(), TrainError> {
        self.observers
            .iter_mut()
            .try_for_each(|observer| observer.observe(event))
    }
}
