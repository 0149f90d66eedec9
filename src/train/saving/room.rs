//! How many bytes a run will save, and whether the disk has room for them.

use super::content;
use super::disk::{DiskBudget, check_now, most_saves};
use crate::adapter::written_numbers;
use crate::config::{CheckpointFormat, Held, PhaseModel, SaveDtype};
use crate::forecast::{averaged_weights, outline};
use crate::gradient::trained_parameters;
use crate::train::model_init::optimizer;
use crate::train::{Session, TrainError, TrainState};

/// The largest amounts that any phase saves or exports.
#[derive(Default)]
struct Most {
    /// Number of model values in a checkpoint.
    saved: u64,
    /// Bytes of optimizer state.
    moments: u64,
    /// Number of weights that have an average.
    averaged: u64,
    /// Bytes of the residuals of all workers.
    residuals: u64,
    /// Number of values of the exported model or adapter.
    exported: u64,
}

impl Session {
    pub(super) fn disk_budget(&self, state: &TrainState) -> Result<DiskBudget, TrainError> {
        let config = &self.plan.config;
        let most = self.most_saved(state)?;
        let step = state.progress.step;
        let left = &self.data[self.active.phase.number..];
        let is_evaluated = left.iter().any(|data| data.source.val_tokens().is_some());
        let eval_steps = if is_evaluated {
            config.eval.eval_steps
        } else {
            0
        };
        let save_steps = config.checkpoint.save_steps;
        let existing = self.store.steps()?.len() as u64;
        Ok(DiskBudget {
            base: 0,
            weights: 4 * most.saved,
            moments: most.moments + 4 * most.averaged + most.residuals,
            export: self.exported_bytes(most.exported),
            trial: existing == 0,
            saves: most_saves(step, self.timeline.steps(), save_steps, eval_steps),
            existing,
            limit: config.checkpoint.save_total_limit as u64,
            in_chains: config.checkpoint.format == CheckpointFormat::Delta,
        })
    }

    /// The largest checkpoint of this phase and all later ones, and the largest export of any
    /// phase: the best step may lie in an earlier one.
    fn most_saved(&self, state: &TrainState) -> Result<Most, TrainError> {
        let active = &self.active.phase;
        let mut most = Most {
            moments: state.optimizer.state_bytes(state.model()),
            ..Most::default()
        };
        for phase in self.timeline.phases() {
            let model = outline(&self.plan, phase.model, &self.spec)?;
            let saved = content::count(&model, phase.model);
            let exported = self.exported_numbers(phase.model, saved);
            most.exported = most.exported.max(exported);
            if phase.number < active.number {
                continue;
            }
            most.saved = most.saved.max(saved);
            let of = (&self.plan, &phase.plan, phase.model);
            most.averaged = most.averaged.max(averaged_weights(of, &self.spec)?);
            let model = model.with_frozen(&phase.plan.freeze)?;
            let keeps = self.plan.compression.as_ref();
            if keeps.is_some_and(|compression| compression.error_feedback) {
                let trained = trained_parameters(&model).into_iter();
                let elements = trained.map(|parameter| parameter.dims.iter().product::<usize>());
                let workers = phase.plan.workers * phase.plan.ranks;
                let residuals = 4 * (elements.sum::<usize>() * workers) as u64;
                most.residuals = most.residuals.max(residuals);
            }
            if phase.number > active.number {
                let moments = optimizer(&self.plan, &phase.plan).state_bytes(&model);
                most.moments = most.moments.max(moments);
            }
        }
        Ok(most)
    }

    /// Refuses to write `tensors` bytes of tensors if the disk has no room for them.
    pub(in crate::train) fn check_room(
        &self,
        what: String,
        tensors: u64,
    ) -> Result<(), TrainError> {
        let folder = self.folder.path();
        let free = (self.free_space)(folder).map_err(TrainError::io(folder))?;
        check_now(folder, free, (what, tensors), self.store.latest()?)?;
        Ok(())
    }

    /// The number of values that are exported from a model whose checkpoint holds `saved` values.
    pub(in crate::train) fn exported_numbers(&self, model: PhaseModel, saved: u64) -> u64 {
        let (held, Some(adapter)) = (model.held(), model.adapter(&self.plan)) else {
            return saved;
        };
        if held == Held::Both {
            // The adapter is merged into the weights, so the export has all of them.
            return self.spec.shape.parameters(self.spec.vocab_size);
        }
        let layers = self.spec.shape.linear_layers(self.spec.vocab_size);
        let updates = layers.into_iter().filter_map(|layer| {
            let shape = adapter.layers.get(&layer.path)?;
            let [inputs, outputs] = layer.dims;
            let lengths = if shape.magnitude { outputs } else { 0 };
            Some((shape.rank * (inputs + outputs) + lengths) as u64)
        });
        // An initial adapter is exported as a second update, since it was taken out of the weights.
        let doubled = self.initial_adapter.is_some();
        let whole = saved.saturating_sub(updates.sum());
        whole + written_numbers(adapter, &self.spec, doubled)
    }

    /// Bytes of `weights` exported values.
    pub(in crate::train) fn exported_bytes(&self, weights: u64) -> u64 {
        weights
            * match self.plan.config.checkpoint.save_dtype {
                SaveDtype::F32 => 4,
                SaveDtype::Bf16 | SaveDtype::F16 => 2,
            }
    }
}
