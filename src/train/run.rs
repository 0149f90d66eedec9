//! The loop.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::{FloatDType, TensorData};

use super::card::model_card;
use super::evaluate::{evaluate_batches, evaluate_pairs};
use super::folder::FinalRecord;
use super::start::CHANGED_BASE;
use super::{Evaluation, Event, Interrupt, Observer, RunFolder, StepRecord, TrainError};
use crate::adapter::Adapter;
use crate::checkpoint::{BestEvaluation, CheckpointStore, Progress};
use crate::config::{OnNonfinite, Plan, SaveDtype};
use crate::data::{Batch, Bigram, Feed};
use crate::device::lanes;
use crate::environment::resident_memory_bytes;
use crate::generate::{GenerateError, Sampling, TextRequest, complete};
use crate::gradient::{Gradient, Precision, Preference, backward_preference, backward_with};
use crate::model::{Decoder, DecoderSpec, Tensors};
use crate::optimizer::Optimizer;
use crate::phase::{Phase, Timeline};

/// Non-finite steps in a row after which a run is given up.
const MOST_NONFINITE: u32 = 3;
/// Largest training split that the bigram baseline is fitted on: it is counted in memory.
const BIGRAM_LIMIT: u64 = 50_000_000;

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
    /// The base model as it came, which answers are held against (task = "dpo").
    pub(super) reference: Option<Decoder>,
    /// The adapter as it began, where that is not nothing.
    pub(super) beginning: Option<Adapter>,
    pub(super) optimizer: Optimizer,
    pub(super) progress: Progress,
    pub(super) clock: Clock,
    pub(super) store: CheckpointStore,
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
            evaluation = self.evaluate_if_due(&model)?;
            self.save_if_due(&model, evaluation)?;
            self.stop_if_asked(&model)?;
        }
        // A run that begins at its end, or past it, has not been evaluated there.
        if self.progress.step == step && self.progress.val_loss.is_none() {
            evaluation = self.evaluate(&model)?;
            self.save_if_due(&model, evaluation)?;
        }
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
    fn preference(&self) -> Option<(Preference, &Decoder)> {
        let dpo = self.plan.dpo()?;
        let preference = Preference {
            beta: dpo.beta,
            label_smoothing: dpo.label_smoothing,
        };
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

    fn evaluate_if_due(&mut self, model: &Decoder) -> Result<Option<Evaluation>, TrainError> {
        if self.is_due(self.plan.config.eval.eval_steps) {
            self.evaluate(model)
        } else {
            Ok(None)
        }
    }

    /// Measures the validation split and completes the sample prompts.
    fn evaluate(&mut self, model: &Decoder) -> Result<Option<Evaluation>, TrainError> {
        // Off the autodiff device: a tracked forward without a backward keeps its graph for good.
        let model = model.valid().for_inference().cast(self.dtype);
        let step = self.progress.step;
        let mut result = None;
        let config = &self.plan.config;
        // All lanes together hold as much as a training step does.
        let lanes = lanes(&model.device());
        let rows = config.train.micro_batch_size.div_ceil(lanes);
        let seq = config.data.sequence_len;
        let batches = self.feed.eval_batches(seq, rows);
        let measured = batches
            .map(|batches| match self.preference() {
                Some((preference, reference)) => {
                    let reference = reference.clone().cast(self.dtype);
                    evaluate_pairs([&model, &reference], batches, preference)
                }
                None => evaluate_batches(&model, batches, self.feed.val_bytes()),
            })
            .transpose()?;
        if let Some(evaluation) = measured {
            let val_loss = evaluation.val_loss;
            let lower = |best: BestEvaluation| val_loss < best.val_loss;
            let best = val_loss.is_finite() && self.progress.best.is_none_or(lower);
            self.progress.val_loss = Some(val_loss);
            self.progress.evaluations_since_best += 1;
            if best {
                self.progress.best = Some(BestEvaluation { step, val_loss });
                self.progress.evaluations_since_best = 0;
            }
            self.tell(&Event::Evaluated {
                step,
                evaluation,
                best,
            })?;
            result = Some(evaluation);
        }
        for prompt in self.plan.config.eval.sample_prompts.clone() {
            // What cannot be shown is no reason to lose what has been trained.
            let event = match self.sample(&model, &prompt) {
                Ok(completion) => Event::Sample {
                    step,
                    prompt,
                    completion,
                },
                Err(error) => Event::Note {
                    text: format!("warning: no sample of {prompt:?}: {error}"),
                },
            };
            self.tell(&event)?;
        }
        Ok(result)
    }

    fn sample(&self, model: &Decoder, prompt: &str) -> Result<String, GenerateError> {
        let eval = &self.plan.config.eval;
        let sampling = Sampling {
            temperature: eval.sample_temperature,
            ..Sampling::default()
        };
        let prompt = self.feed.prompt(prompt)?;
        let request = TextRequest {
            prompt: &prompt,
            max_new_tokens: eval.sample_tokens,
            sampling,
            seed: self.plan.config.seed,
            stop: &[],
        };
        Ok(complete(model, self.feed.tokenizer(), &request, |_| {})?.0)
    }

    /// Exports the best model, else the last, and closes the record.
    fn finish(&mut self, evaluation: Option<Evaluation>) -> Result<Outcome, TrainError> {
        let last = self.progress.step;
        let stopped_early = self.stops_early();
        if stopped_early {
            self.tell(&Event::StoppedEarly {
                step: last,
                evaluations: self.progress.evaluations_since_best,
                best_step: self.progress.best.map_or(0, |best| best.step),
            })?;
        }
        let best = self.progress.best.map(|best| best.step);
        let exported_step = best.filter(|&step| self.store.has(step)).unwrap_or(last);
        let tensors = self.store.load_model(exported_step)?;
        let weights: usize = tensors.values().map(TensorData::num_elements).sum();
        let bytes = self.exported_bytes(weights as u64);
        self.check_room("the exported model".to_string(), bytes)?;
        let dtype = self.plan.config.checkpoint.save_dtype;
        self.export(tensors, dtype)?;
        self.progress.seconds = self.clock.total_seconds();
        let mut record = self.folder.read_record()?;
        let device = record
            .as_ref()
            .and_then(|record| record.device["name"].as_str());
        let card = model_card(
            (&self.plan, device),
            &self.feed,
            &self.progress,
            exported_step,
        );
        self.folder.write("README.md", &card)?;
        let bigram = self.bigram();
        if let Some(record) = &mut record {
            record.exported_step = Some(exported_step);
            record.bigram_loss = bigram;
            self.folder.write_record(record)?;
        }
        self.tell(&Event::Finished {
            step: last,
            exported_step,
            bigram,
            stopped_early,
        })?;
        // Last of all: a run whose record has an end is complete, and not looked at again.
        if let Some(mut record) = record {
            let steps = self.timeline.steps();
            record.end = Some(FinalRecord::new(&self.progress, steps, stopped_early));
            self.folder.write_record(&record)?;
        }
        let folder = self.folder.path().to_path_buf();
        Ok(Outcome {
            folder,
            progress: self.progress.clone(),
            evaluation,
            bigram,
            exported_step,
            stopped_early,
        })
    }

    /// Writes the tokenizer and the model, or the adapter, ready for Hugging Face's tools and for
    /// `--model`.
    fn export(&self, tensors: Tensors, dtype: SaveDtype) -> Result<(), TrainError> {
        let config = &self.plan.config;
        let (Some(plan), Some(adapter), Some(base)) = (
            &self.plan.adapter,
            &config.adapter,
            &config.model.base_model,
        ) else {
            return self
                .folder
                .export(&self.spec, &tensors, self.feed.tokenizer(), dtype);
        };
        self.feed.tokenizer().save(self.folder.path())?;
        let learned = Adapter::from_tensors(&plan.layers, tensors);
        let learned = match &self.beginning {
            Some(beginning) => learned.since(beginning)?,
            None => learned,
        };
        let changed = self.folder.file(CHANGED_BASE);
        let base = if self.plan.changes_base() {
            &changed
        } else {
            base
        };
        learned.write(self.folder.path(), &self.spec, base, adapter.use_rslora)?;
        Ok(())
    }

    /// Nats per token of the bigram model on the validation split.
    fn bigram(&self) -> Option<f64> {
        // Of rows, which are trained in parts, it would say nothing.
        let Feed::Text { corpus, .. } = &self.feed else {
            return None;
        };
        if corpus.train_tokens() > BIGRAM_LIMIT {
            return None;
        }
        let train = corpus.train.iter().map(|stream| &stream.tokens);
        let model = Bigram::fit(train, corpus.tokenizer.vocab_size());
        model.nats_per_token(corpus.val.as_ref()?)
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

/// Wall-clock time of a run over all its sessions, and the speed of its last steps.
pub(super) struct Clock {
    started: Instant,
    before: f64,
    window: VecDeque<(Duration, f64)>,
    length: usize,
}

impl Clock {
    pub(super) fn new(seconds_before: f64, window: u64) -> Self {
        let length = window.clamp(1, 1000) as usize;
        Self {
            started: Instant::now(),
            before: seconds_before,
            window: VecDeque::new(),
            length,
        }
    }

    fn stepped(&mut self, time: Duration, tokens: f64) {
        self.window.push_back((time, tokens));
        if self.window.len() > self.length {
            self.window.pop_front();
        }
    }

    fn tokens_per_second(&self) -> f64 {
        let time: Duration = self.window.iter().map(|(time, _)| *time).sum();
        let tokens: f64 = self.window.iter().map(|(_, tokens)| tokens).sum();
        tokens / time.as_secs_f64().max(1e-9)
    }

    pub(super) fn total_seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }
}
