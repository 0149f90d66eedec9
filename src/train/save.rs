//! Saving: when a checkpoint is due, whether there is room for it, what is deleted after it.

use std::collections::BTreeMap;

use burn::tensor::TensorData;

use super::room::{Needs, check_now, most_saves};
use super::run::Trainer;
use super::saver::{Job, Saved};
use super::{Evaluation, Event, TrainError};
use crate::adapter::{OWN_BASE, trained_tensors, written_numbers};
use crate::checkpoint::{Capture, ChainOptions, Extras, Warning};
use crate::config::{CheckpointFormat, SaveDtype};
use crate::durable;
use crate::model::folder::{self as model_folder, SaveOptions, hf_tensors};
use crate::model::{Decoder, Tensors, parameters_into};
use crate::optimizer::{AppliedStep, OptimizerState};

/// What a checkpoint keeps of a model: all of it, or what is trained beside a base model.
fn weights(model: &Decoder) -> Tensors {
    if model.is_adapted() {
        trained_tensors(model)
    } else {
        hf_tensors(model)
    }
}

fn size_in_bytes(data: &TensorData) -> u64 {
    data.as_bytes().len() as u64
}

impl Trainer {
    /// What holds before the first step of this session: there is room for all that the run will
    /// save, and a new run has shown by a checkpoint of step 0 that it can.
    pub(super) fn prove_saving(&mut self, model: &Decoder) -> Result<(), TrainError> {
        let mut needs = self.needs(model)?;
        let base = self.changed_base(model, needs.trial);
        let of_base = base
            .as_ref()
            .map(|tensors| tensors.values().map(size_in_bytes).sum());
        needs.base = of_base.unwrap_or(0);
        let folder = self.folder.path();
        let free = (self.free_space)(folder).map_err(TrainError::io(folder))?;
        if let Some(text) = needs.check(folder, free)? {
            self.tell(&Event::Note { text })?;
        }
        if let Some(tensors) = base {
            let path = self.folder.file(OWN_BASE);
            durable::create_folder(&path).map_err(TrainError::io(&path))?;
            model_folder::save(&path, model.spec(), &tensors, &SaveOptions::default())?;
        }
        if needs.trial {
            self.save(model, false)?;
            // What it is to show has to show now.
            self.settle()?;
        }
        Ok(())
    }

    /// The base model of a run that begins by changing it: an adapter is worth nothing without the
    /// weights it was trained beside.
    fn changed_base(&self, model: &Decoder, begins: bool) -> Option<Tensors> {
        (begins && self.plan.changes_base()).then(|| hf_tensors(model))
    }

    fn needs(&self, model: &Decoder) -> Result<Needs, TrainError> {
        let config = &self.plan.config;
        let parameters = model.trained_params() as u64;
        let step = self.progress.step;
        let eval_steps = match self.feed.val_tokens() {
            Some(_) => config.eval.eval_steps,
            None => 0,
        };
        let save_steps = config.checkpoint.save_steps;
        let existing = self.store.steps()?.len() as u64;
        Ok(Needs {
            base: 0,
            weights: 4 * parameters,
            moments: self.optimizer.state_bytes(model),
            export: self.exported_bytes(self.exported_numbers(parameters)),
            trial: existing == 0,
            saves: most_saves(step, self.timeline.steps(), save_steps, eval_steps),
            existing,
            limit: config.checkpoint.save_total_limit as u64,
            in_chains: config.checkpoint.format == CheckpointFormat::Delta,
        })
    }

    /// Saves on schedule, at the end, and whenever a new best was measured, so that `best` always
    /// has its weights.
    pub(super) fn save_if_due(
        &mut self,
        model: &Decoder,
        evaluation: Option<Evaluation>,
    ) -> Result<(), TrainError> {
        let best_now = evaluation.is_some()
            && self
                .progress
                .best
                .is_some_and(|best| best.step == self.progress.step);
        let due = self.is_due(self.plan.config.checkpoint.save_steps);
        if best_now || due || self.stops_early() {
            self.save(model, best_now)?;
        }
        Ok(())
    }

    /// Saves this step. In the background it is only begun: [`gather`](Self::gather) says when it is done.
    pub(super) fn save(&mut self, model: &Decoder, best: bool) -> Result<(), TrainError> {
        // What is under way decides whether there is room, and what this step is the difference from.
        self.settle()?;
        self.progress.seconds = self.clock.total_seconds();
        let step = self.progress.step;
        self.tell(&Event::Saving { step })?;
        let config = &self.plan.config.checkpoint;
        let (format, background) = (config.format, config.background);
        if self.store.is_saved(step, self.has_to_be_exact(best)) {
            self.store.renew(&self.progress)?;
        } else {
            let needs = self.needs(model)?;
            let moments = if step == 0 { 0 } else { needs.moments };
            let what = format!("the checkpoint of step {step}");
            self.check_room(what, needs.weights + moments)?;
            match format {
                CheckpointFormat::Full => {
                    let weights = || weights(model);
                    let moments = || self.optimizer.state(model);
                    self.store
                        .save(&self.progress, weights, moments, Extras::new)?;
                }
                CheckpointFormat::Delta => {
                    let job = self.job(model, best);
                    if background {
                        let folder = self.folder.path();
                        return self.saver.begin(job).map_err(TrainError::io(folder));
                    }
                    let (saved, _) = job.run()?;
                    return self.tell_of(saved);
                }
            }
        }
        if best {
            self.store.mark_best(step)?;
        }
        let seconds = self.progress.seconds;
        self.tell(&Event::Saved { step, seconds })?;
        self.rotate()
    }

    /// Whether a step is saved without loss whatever `checkpoint.lossy` says: its weights may be exported, or it is where
    /// the run will go on.
    fn has_to_be_exact(&self, best: bool) -> bool {
        let is_last = self.progress.step == self.timeline.steps() || self.stops_early();
        best || is_last || self.interrupt.raised().is_some()
    }

    fn job(&mut self, model: &Decoder, best: bool) -> Job {
        let (weights, moments) = self.saver.spare();
        let config = &self.plan.config.checkpoint;
        let capture = match model.is_adapted() {
            true => (trained_tensors(model), serde_json::Value::Null),
            false => (
                parameters_into(model, weights),
                self.spec.to_config_json(SaveDtype::F32),
            ),
        };
        let optimizer = self.optimizer.state_into(model, moments);
        Job {
            store: self.store.clone(),
            progress: self.progress.clone(),
            capture: Capture {
                steps: self.one_step(model, &optimizer),
                weights: capture.0,
                optimizer,
                extra: Extras::new(),
                config: capture.1,
            },
            best,
            options: ChainOptions {
                keyframe_every: config.keyframe_every,
                lossy: config.lossy.filter(|_| !self.has_to_be_exact(best)),
                lossy_moments: config.lossy_moments,
            },
            limit: config.save_total_limit,
        }
    }

    /// What led here from the last checkpoint, if that was one step.
    fn one_step(&self, model: &Decoder, state: &OptimizerState) -> BTreeMap<String, AppliedStep> {
        let before = self.progress.step.checked_sub(1);
        let phase = before.and_then(|step| Some((step, self.timeline.at(step)?)));
        match (phase, self.store.latest()) {
            (Some((step, phase)), Ok(Some(last))) if last == step => {
                let learning_rate = phase.learning_rate(step);
                self.optimizer.applied(model, state, learning_rate)
            }
            _ => BTreeMap::new(),
        }
    }

    /// Says what was saved in the background, if that is done.
    pub(super) fn gather(&mut self) -> Result<(), TrainError> {
        match self.saver.poll() {
            Some(saved) => self.tell_of(saved?),
            None => Ok(()),
        }
    }

    /// Waits for what is being saved in the background.
    pub(super) fn settle(&mut self) -> Result<(), TrainError> {
        match self.saver.wait() {
            Some(saved) => self.tell_of(saved?),
            None => Ok(()),
        }
    }

    fn tell_of(&mut self, saved: Saved) -> Result<(), TrainError> {
        let Saved {
            step,
            seconds,
            deleted,
            warnings,
        } = saved;
        self.tell(&Event::Saved { step, seconds })?;
        self.tell_warnings(&warnings)?;
        for step in deleted {
            self.tell(&Event::Deleted { step })?;
        }
        Ok(())
    }

    /// Deletes the checkpoints beyond those to keep, and says so.
    pub(super) fn rotate(&mut self) -> Result<(), TrainError> {
        let limit = self.plan.config.checkpoint.save_total_limit;
        let rotated = self.store.rotate(limit)?;
        self.tell_warnings(&rotated.warnings)?;
        for step in rotated.deleted {
            self.tell(&Event::Deleted { step })?;
        }
        Ok(())
    }

    fn tell_warnings(&mut self, warnings: &[Warning]) -> Result<(), TrainError> {
        warnings.iter().try_for_each(|warning| {
            let text = format!("warning: {warning}");
            self.tell(&Event::Note { text })
        })
    }

    /// Saves and ends the run if a signal has come.
    pub(super) fn stop_if_asked(&mut self, model: &Decoder) -> Result<(), TrainError> {
        let step = self.progress.step;
        let Some(signal) = self.interrupt.raised() else {
            return Ok(());
        };
        if step == self.timeline.steps() || self.stops_early() {
            return Ok(());
        }
        self.settle()?;
        if !self.store.is_saved(step, true) {
            self.save(model, false)?;
            self.settle()?;
        }
        Err(TrainError::Interrupted { signal, step })
    }

    /// That there is room for something of so many bytes of tensors, before it is begun.
    pub(super) fn check_room(&self, what: String, tensors: u64) -> Result<(), TrainError> {
        let folder = self.folder.path();
        let free = (self.free_space)(folder).map_err(TrainError::io(folder))?;
        check_now(folder, free, (what, tensors), self.store.latest()?)?;
        Ok(())
    }

    /// Weights of the exported model or adapter, of which so many are trained.
    pub(super) fn exported_numbers(&self, trained: u64) -> u64 {
        let Some(adapter) = &self.plan.adapter else {
            return trained;
        };
        let layers = self.spec.shape.linear_layers(self.spec.vocab_size);
        let updates = layers.into_iter().filter_map(|layer| {
            let shape = adapter.layers.get(&layer.path)?;
            let [inputs, outputs] = layer.dims;
            let lengths = if shape.magnitude { outputs } else { 0 };
            Some((shape.rank * (inputs + outputs) + lengths) as u64)
        });
        // What a beginning takes out of the weights comes back as an update of its own.
        let doubled = self.beginning.is_some();
        let whole = trained.saturating_sub(updates.sum());
        whole + written_numbers(adapter, &self.spec, doubled)
    }

    /// Bytes of so many exported weights.
    pub(super) fn exported_bytes(&self, weights: u64) -> u64 {
        weights
            * match self.plan.config.checkpoint.save_dtype {
                SaveDtype::F32 => 4,
                SaveDtype::Bf16 | SaveDtype::F16 => 2,
            }
    }
}
