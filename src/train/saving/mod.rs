//! Saving: when a checkpoint is due, whether there is room for it, what is deleted after it.

mod disk;
mod saver;

use std::collections::BTreeMap;

use burn::tensor::TensorData;

pub use self::disk::InsufficientDisk;
pub(super) use self::disk::free_space;
use self::disk::{DiskBudget, check_now, most_saves};
pub(super) use self::saver::Saver;
use self::saver::{Job, Saved};
use super::model_init::optimizer;
use super::{Event, Session, TrainError, TrainState};
use crate::adapter::{OWN_BASE, saved_tensors, written_numbers};
use crate::checkpoint::{BestEvaluation, Capture, ChainOptions, Progress, Warning};
use crate::config::{CheckpointFormat, SaveDtype};
use crate::durable;
use crate::model::folder::{self as model_folder, SaveOptions, hf_tensors};
use crate::model::{Decoder, Tensors, parameters_into};
use crate::optimizer::{AppliedStep, OptimizerState};

/// The weights that a checkpoint holds: all of the model's, or those trained beside a base model.
fn weights(model: &Decoder) -> Tensors {
    if model.is_adapted() {
        saved_tensors(model)
    } else {
        hf_tensors(model)
    }
}

/// How many numbers a checkpoint holds of a model: all of them, or those of an adapter and of what
/// is trained whole beside it. What a phase freezes is saved all the same.
fn saved_parameters(model: &Decoder) -> u64 {
    model.saved_params() as u64
}

fn size_in_bytes(data: &TensorData) -> u64 {
    data.as_bytes().len() as u64
}

impl Session {
    /// Makes sure, before the first step of this session, that there is room for all that the run
    /// will save. A new run shows by a checkpoint of step 0 that it can save.
    pub(super) fn preflight_save(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        let mut needs = self.disk_budget(state)?;
        let base = self.changed_base(state.model(), needs.trial);
        let of_base = base
            .as_ref()
            .map(|tensors| tensors.values().map(size_in_bytes).sum());
        needs.base = of_base.unwrap_or(0);
        let folder = self.folder.path();
        let free = (self.free_space)(folder).map_err(TrainError::io(folder))?;
        if let Some(text) = needs.check(folder, free)? {
            self.emit(&Event::Note { text })?;
        }
        if let Some(tensors) = base {
            let path = self.folder.file(OWN_BASE);
            durable::create_folder(&path).map_err(TrainError::io(&path))?;
            model_folder::save(
                &path,
                state.model().spec(),
                &tensors,
                &SaveOptions::default(),
            )?;
        }
        if needs.trial {
            self.save(state, false)?;
            // A failure has to show before the first step.
            self.wait_for_save()?;
        }
        Ok(())
    }

    /// The base model of a run that begins by changing it: an adapter is worth nothing without the
    /// weights it was trained beside.
    fn changed_base(&self, model: &Decoder, begins: bool) -> Option<Tensors> {
        (begins && self.plan.changes_base()).then(|| hf_tensors(model))
    }

    fn disk_budget(&self, state: &TrainState) -> Result<DiskBudget, TrainError> {
        let config = &self.plan.config;
        let (parameters, moments) = self.most_saved(state)?;
        let step = state.progress.step;
        let eval_steps = match self.active.data.source.val_tokens() {
            Some(_) => config.eval.eval_steps,
            None => 0,
        };
        let save_steps = config.checkpoint.save_steps;
        let existing = self.store.steps()?.len() as u64;
        Ok(DiskBudget {
            base: 0,
            weights: 4 * parameters,
            moments,
            export: self.exported_bytes(self.exported_numbers(parameters)),
            trial: existing == 0,
            saves: most_saves(step, self.timeline.steps(), save_steps, eval_steps),
            existing,
            limit: config.checkpoint.save_total_limit as u64,
            in_chains: config.checkpoint.format == CheckpointFormat::Delta,
        })
    }

    /// The most saved parameters, and the most bytes of optimizer state, that any phase from this
    /// one on has.
    fn most_saved(&self, state: &TrainState) -> Result<(u64, u64), TrainError> {
        let model = state.model();
        let mut most = (saved_parameters(model), state.optimizer.state_bytes(model));
        for phase in &self.plan.phases[self.active.phase.number + 1..] {
            let model = model.clone().with_frozen(&phase.freeze)?;
            let moments = optimizer(&self.plan, phase).state_bytes(&model);
            most = (most.0.max(saved_parameters(&model)), most.1.max(moments));
        }
        Ok(most)
    }

    /// Saves on schedule, at the end, and whenever a new best was measured, so that `best` always
    /// has its weights.
    pub(super) fn save_if_due(
        &mut self,
        state: &mut TrainState,
        is_evaluated: bool,
    ) -> Result<(), TrainError> {
        let progress = &state.progress;
        let is_best = |best: BestEvaluation| best.step == progress.step;
        let best_now = is_evaluated && progress.best.is_some_and(is_best);
        let due = self.is_due(progress.step, self.plan.config.checkpoint.save_steps);
        if best_now || due || self.stops_early(progress) {
            self.save(state, best_now)?;
        }
        Ok(())
    }

    /// Saves this step. In the background it is only begun: [`poll_save`](Self::poll_save) says
    /// when it is done.
    pub(super) fn save(&mut self, state: &mut TrainState, best: bool) -> Result<(), TrainError> {
        // A new save waits for the previous one, which decides whether there is room, and what this
        // step is the difference from.
        self.wait_for_save()?;
        state.progress.seconds = self.clock.total_seconds();
        let (model, step) = (state.model(), state.progress.step);
        self.emit(&Event::Saving { step })?;
        let config = &self.plan.config.checkpoint;
        let (format, background) = (config.format, config.background);
        let is_exact = self.has_to_be_exact(&state.progress, best);
        if self.store.is_saved(step, is_exact) {
            self.store.renew(&state.progress)?;
        } else {
            let moments = match step {
                0 => 0,
                _ => state.optimizer.state_bytes(model),
            };
            let what = format!("the checkpoint of step {step}");
            self.check_room(what, 4 * saved_parameters(model) + moments)?;
            match format {
                CheckpointFormat::Full => {
                    let weights = || weights(model);
                    let moments = || state.optimizer.state(model);
                    let extra = || state.pipeline.state();
                    self.store.save(&state.progress, weights, moments, extra)?;
                }
                CheckpointFormat::Delta => {
                    let job = self.job(state, best);
                    if background {
                        let folder = self.folder.path();
                        return self.saver.begin(job).map_err(TrainError::io(folder));
                    }
                    let (saved, _) = job.run()?;
                    return self.emit_saved(saved);
                }
            }
        }
        if best {
            self.store.mark_best(step)?;
        }
        let seconds = state.progress.seconds;
        self.emit(&Event::Saved { step, seconds })?;
        self.rotate()
    }

    /// Whether a step is saved without loss whatever `checkpoint.lossy` says: its weights may be
    /// exported, or the run will go on from it.
    fn has_to_be_exact(&self, progress: &Progress, best: bool) -> bool {
        let is_last = progress.step == self.timeline.steps() || self.stops_early(progress);
        best || is_last || self.interrupt.raised().is_some()
    }

    fn job(&mut self, state: &TrainState, best: bool) -> Job {
        let model = state.model();
        let (weights, moments) = self.saver.spare();
        let is_exact = self.has_to_be_exact(&state.progress, best);
        let config = &self.plan.config.checkpoint;
        let capture = match model.is_adapted() {
            true => (saved_tensors(model), serde_json::Value::Null),
            false => (
                parameters_into(model, weights),
                self.spec.to_config_json(SaveDtype::F32),
            ),
        };
        let optimizer = state.optimizer.state_into(model, moments);
        Job {
            store: self.store.clone(),
            progress: state.progress.clone(),
            capture: Capture {
                steps: self.one_step(state, &optimizer),
                weights: capture.0,
                optimizer,
                extra: state.pipeline.state(),
                config: capture.1,
            },
            best,
            options: ChainOptions {
                keyframe_every: config.keyframe_every,
                lossy: config.lossy.filter(|_| !is_exact),
                lossy_moments: config.lossy_moments,
            },
            limit: config.save_total_limit,
        }
    }

    /// The one step that led here from the last checkpoint, by parameter; empty where there were
    /// more.
    fn one_step(
        &self,
        state: &TrainState,
        moments: &OptimizerState,
    ) -> BTreeMap<String, AppliedStep> {
        let before = state.progress.step.checked_sub(1);
        let phase = before.and_then(|step| Some((step, self.timeline.at(step)?)));
        match (phase, self.store.latest()) {
            (Some((step, phase)), Ok(Some(last))) if last == step => {
                let learning_rate = phase.learning_rate(step);
                state
                    .optimizer
                    .applied(state.model(), moments, learning_rate)
            }
            _ => BTreeMap::new(),
        }
    }

    /// Says what was saved in the background, if that is done.
    pub(super) fn poll_save(&mut self) -> Result<(), TrainError> {
        match self.saver.poll() {
            Some(saved) => self.emit_saved(saved?),
            None => Ok(()),
        }
    }

    /// Waits for the save that is under way in the background.
    pub(super) fn wait_for_save(&mut self) -> Result<(), TrainError> {
        match self.saver.wait() {
            Some(saved) => self.emit_saved(saved?),
            None => Ok(()),
        }
    }

    fn emit_saved(&mut self, saved: Saved) -> Result<(), TrainError> {
        let Saved {
            step,
            seconds,
            deleted,
            warnings,
        } = saved;
        self.emit(&Event::Saved { step, seconds })?;
        self.emit_warnings(&warnings)?;
        for step in deleted {
            self.emit(&Event::Deleted { step })?;
        }
        Ok(())
    }

    /// Deletes the checkpoints beyond those to keep, and says so.
    pub(super) fn rotate(&mut self) -> Result<(), TrainError> {
        let limit = self.plan.config.checkpoint.save_total_limit;
        let rotated = self.store.rotate(limit)?;
        self.emit_warnings(&rotated.warnings)?;
        for step in rotated.deleted {
            self.emit(&Event::Deleted { step })?;
        }
        Ok(())
    }

    fn emit_warnings(&mut self, warnings: &[Warning]) -> Result<(), TrainError> {
        warnings.iter().try_for_each(|warning| {
            let text = format!("warning: {warning}");
            self.emit(&Event::Note { text })
        })
    }

    /// Saves and ends the run if a signal has come.
    pub(super) fn stop_if_asked(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        let step = state.progress.step;
        let Some(signal) = self.interrupt.raised() else {
            return Ok(());
        };
        if step == self.timeline.steps() || self.stops_early(&state.progress) {
            return Ok(());
        }
        self.wait_for_save()?;
        if !self.store.is_saved(step, true) {
            self.save(state, false)?;
            self.wait_for_save()?;
        }
        Err(TrainError::Interrupted { signal, step })
    }

    /// Refuses to begin what takes so many bytes of tensors where there is no room for it.
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
        // What the initial adapter takes out of the weights comes back as an update of its own.
        let doubled = self.initial_adapter.is_some();
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
