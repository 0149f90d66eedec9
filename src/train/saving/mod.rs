//! Saves checkpoints: decides when one is due, checks the disk space, and deletes old ones.

mod content;
mod disk;
mod room;
mod saver;

use std::collections::BTreeMap;

use burn::tensor::TensorData;

pub use self::disk::InsufficientDisk;
pub(super) use self::disk::free_space;
pub(super) use self::saver::Saver;
use self::saver::{Job, Saved};
use super::{Event, Session, Signal, TrainError, TrainState};
use crate::adapter::OWN_BASE;
use crate::checkpoint::{BestEvaluation, Capture, ChainOptions, Progress, Warning};
use crate::config::{CheckpointFormat, Held};
use crate::durable;
use crate::extra::Extras;
use crate::model::folder::{self as model_folder, SaveOptions, hf_tensors};
use crate::model::{Decoder, Tensors};
use crate::optimizer::{AppliedStep, OptimizerState};

fn size_in_bytes(data: &TensorData) -> u64 {
    data.as_bytes().len() as u64
}

impl Session {
    /// Checks before the first step that the disk has room for everything the run will save. A new
    /// run also saves a trial checkpoint at step 0.
    pub(super) fn preflight_save(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        let trial = match self.team.is_lead() {
            true => self.preflight_disk(state)?,
            false => false,
        };
        // The state of all ranks is saved together.
        if self.team.tell(|| trial)? {
            self.save(state, false)?;
            // A failure has to be reported before the first step.
            self.wait_for_save()?;
        }
        Ok(())
    }

    /// Checks that there is room, and saves the base model of a run that has to keep its own. Returns
    /// whether a trial checkpoint is due.
    fn preflight_disk(&mut self, state: &TrainState) -> Result<bool, TrainError> {
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
        Ok(needs.trial)
    }

    /// The changed base model of a new run, which has to be saved because the adapter is useless
    /// without it. A run that begins by merging saves all weights anyway.
    fn changed_base(&self, model: &Decoder, begins: bool) -> Option<Tensors> {
        let is_beside = self.active.phase.model.held() == Held::Adapter;
        (begins && is_beside && self.plan.changes_base()).then(|| hf_tensors(model))
    }

    /// Saves on schedule, at the end, and after every new best evaluation, so that `best` always
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

    /// Saves this step. A background save is only started here; [`poll_save`](Self::poll_save)
    /// reports when it is done.
    pub(super) fn save(&mut self, state: &mut TrainState, best: bool) -> Result<(), TrainError> {
        self.check_ranks(state)?;
        let extra = state.extras(self.team.collective())?;
        if !self.team.is_lead() {
            return Ok(());
        }
        // A new save waits for the previous one, which decides whether there is room and which
        // checkpoint this one is the difference from.
        self.wait_for_save()?;
        state.progress.seconds = self.clock.total_seconds();
        let (model, step) = (state.model(), state.progress.step);
        let form = self.active.phase.model;
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
            let extra_tensors = extra.values().flat_map(|owner| owner.tensors.values());
            let extra_bytes: u64 = extra_tensors.map(size_in_bytes).sum();
            let what = format!("the checkpoint of step {step}");
            let bytes = 4 * content::count(model, form) + moments + extra_bytes;
            self.check_room(what, bytes)?;
            match format {
                CheckpointFormat::Full => {
                    let weights = || content::files(model, form);
                    let moments = || state.optimizer.state(model);
                    self.store
                        .save(&state.progress, weights, moments, || extra)?;
                }
                CheckpointFormat::Delta => {
                    let job = self.job(state, extra, best);
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

    /// Whether a step is saved exactly, whatever `checkpoint.lossy` says: its weights may be
    /// exported, or the run will be resumed from it.
    fn has_to_be_exact(&self, progress: &Progress, best: bool) -> bool {
        let is_last = progress.step == self.timeline.steps() || self.stops_early(progress);
        best || is_last || self.is_suspended
    }

    fn job(&mut self, state: &TrainState, extra: Extras, best: bool) -> Job {
        let model = state.model();
        let (weights, moments) = self.saver.spare();
        let is_exact = self.has_to_be_exact(&state.progress, best);
        let config = &self.plan.config.checkpoint;
        let (weights, model_config) =
            content::capture(model, (self.active.phase.model, &self.spec), weights);
        let optimizer = state.optimizer.state_into(model, moments);
        Job {
            store: self.store.clone(),
            progress: state.progress.clone(),
            capture: Capture {
                steps: self.one_step(state, &optimizer),
                weights,
                optimizer,
                extra,
                config: model_config,
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

    /// The optimizer step since the last checkpoint, by parameter; empty if there was more than
    /// one.
    fn one_step(
        &self,
        state: &TrainState,
        moments: &OptimizerState,
    ) -> BTreeMap<String, AppliedStep> {
        let before = state.progress.step.checked_sub(1);
        match (before, self.store.latest()) {
            (Some(step), Ok(Some(last))) if last == step => {
                state
                    .optimizer
                    .applied(state.model(), moments, self.last_learning_rate)
            }
            _ => BTreeMap::new(),
        }
    }

    /// Reports a background save that has finished.
    pub(super) fn poll_save(&mut self) -> Result<(), TrainError> {
        match self.saver.poll() {
            Some(saved) => self.emit_saved(saved?),
            None => Ok(()),
        }
    }

    /// Waits for the background save in progress.
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

    /// Deletes the checkpoints that exceed the limit, and reports it.
    pub(super) fn rotate(&mut self) -> Result<(), TrainError> {
        if !self.team.is_lead() {
            return Ok(());
        }
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

    /// Saves and ends the run if a signal was received.
    pub(super) fn stop_if_asked(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        let step = state.progress.step;
        let Some(signal) = self.asked_to_stop()? else {
            return Ok(());
        };
        if step == self.timeline.steps() || self.stops_early(&state.progress) {
            return Ok(());
        }
        self.save_here(state)?;
        Err(TrainError::Interrupted { signal, step })
    }

    /// The signal that one of the ranks received; that of the first of them if there are several.
    fn asked_to_stop(&self) -> Result<Option<Signal>, TrainError> {
        let own = self.interrupt.raised();
        let ranks = self.team.ranks();
        if ranks == 1 {
            return Ok(own);
        }
        let mut codes = vec![0.0; ranks];
        codes[self.team.rank()] = own.map_or(0.0, |signal| f64::from(signal.exit_code()));
        self.team.collective().sum(&mut codes)?;
        let mut signals = codes.into_iter();
        Ok(signals.find_map(|code| Signal::of_exit_code(code as usize)))
    }

    /// Saves this step exactly, unless that has been done.
    pub(super) fn save_here(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        self.wait_for_save()?;
        let is_saved = self.store.is_saved(state.progress.step, true);
        if !self.team.tell(|| is_saved)? {
            self.is_suspended = true;
            self.save(state, false)?;
            self.wait_for_save()?;
        }
        // A rank that ended now could end rank 0 in the middle of its save.
        Ok(self.team.wait_for_all()?)
    }
}
