//! Exports the result of a run: its model or its adapter.

use burn::tensor::TensorData;

use super::{EvaluatedWeights, Session, TrainError, average};
use crate::adapter::{self, Adapter, OWN_BASE, PeftOptions};
use crate::checkpoint::Weights;
use crate::config::{Held, PhaseModel};
use crate::durable;
use crate::model::{Tensors, folder as model_folder, parameters};

/// What is exported of a run.
pub(super) struct Exported {
    pub(super) step: u64,
    pub(super) weights: Weights,
    /// Which weights these are; None if the run does not average them.
    pub(super) which: Option<EvaluatedWeights>,
}

impl Session {
    /// The weights to export from the checkpoint of a step: the average, if it had begun.
    pub(super) fn exported_at(&self, step: u64) -> Result<Exported, TrainError> {
        if self.average.is_none() {
            let weights = self.store.load_model(step)?;
            let which = None;
            return Ok(Exported {
                step,
                weights,
                which,
            });
        }
        let (weights, state) = self.store.load_model_and(step, average::OWNER)?;
        let average = state.map(|state| state.tensors).unwrap_or_default();
        let (weights, which) = match average.is_empty() {
            true => (weights, EvaluatedWeights::Current),
            false => {
                let model = self.timeline.of_completed(step).model;
                let weights = self.with_average(weights, model, average)?;
                (weights, EvaluatedWeights::Average)
            }
        };
        let which = Some(which);
        Ok(Exported {
            step,
            weights,
            which,
        })
    }

    /// The weights of a checkpoint with their average in the place of those that have one.
    fn with_average(
        &self,
        weights: Weights,
        model: PhaseModel,
        average: Tensors,
    ) -> Result<Weights, TrainError> {
        let mut own = match (model.held(), weights) {
            (Held::Adapter, weights) => weights.tensors(),
            (_, Weights::Own(own)) => own,
            (_, Weights::Files(files)) => {
                let (weights, adapter) = Weights::Files(files).split_adapter();
                let decoder = weights.decoder(&model.spec(&self.spec), &self.device.device)?;
                let mut own = parameters(&decoder);
                own.extend(adapter);
                own
            }
        };
        for (path, value) in average {
            match own.get_mut(&path) {
                Some(weight) if weight.shape() == value.shape() => *weight = value,
                _ => return Err(average::damaged(&path)),
            }
        }
        Ok(Weights::Own(own))
    }

    /// Writes the tokenizer and the model, or the adapter, for Hugging Face's tools and for
    /// `--model`. `weights` come from a checkpoint of a phase whose model has the form `model`. An
    /// adapter beside changed weights is merged into them in f32, because no other folder has these
    /// weights.
    pub(super) fn export(&self, model: PhaseModel, weights: Weights) -> Result<(), TrainError> {
        let tensors = match model.held() {
            Held::Adapter => weights.tensors(),
            Held::Weights => weights.files(&model.spec(&self.spec)),
            Held::Both => {
                let init = self.model_init();
                let adapted = init.of_weights(weights, model, &self.device.device)?;
                model_folder::hf_tensors(&adapted.merged())
            }
        };
        let count: usize = tensors.values().map(TensorData::num_elements).sum();
        let numbers = match model.held() {
            Held::Adapter => self.exported_numbers(model, count as u64),
            Held::Weights | Held::Both => count as u64,
        };
        let bytes = self.exported_bytes(numbers);
        self.check_room("the exported model".to_string(), bytes)?;
        self.clear_other_form(model)?;
        match model.held() {
            Held::Adapter => self.export_adapter(tensors),
            Held::Weights | Held::Both => {
                let tokenizer = self.exported_data().tokenizer();
                let dtype = self.plan.config.checkpoint.save_dtype;
                let spec = model.spec(&self.spec);
                self.folder.export(&spec, &tensors, tokenizer, dtype)
            }
        }
    }

    fn export_adapter(&self, tensors: Tensors) -> Result<(), TrainError> {
        let config = &self.plan.config;
        let (Some(plan), Some(adapter), Some(base)) = (
            &self.plan.adapter,
            &config.adapter,
            &config.model.base_model,
        ) else {
            unreachable!("an adapter has a section and a base model");
        };
        self.exported_data().tokenizer().save(self.folder.path())?;
        let learned = Adapter::from_tensors(&plan.layers, tensors);
        let initial = match &self.initial_adapter {
            Some(initial) => Some(initial.clone()),
            // This session began in a phase without the adapter, so it has not loaded the initial
            // adapter.
            None if self.active.phase.model.held() != Held::Adapter => {
                self.model_init().initial_adapter()?
            }
            None => None,
        };
        let learned = match &initial {
            Some(initial) => learned.since(initial)?,
            None => learned,
        };
        let own = self.folder.file(OWN_BASE);
        let options = PeftOptions {
            base: if self.plan.changes_base() { &own } else { base },
            use_rslora: adapter.use_rslora,
            dtype: config.checkpoint.save_dtype,
        };
        learned.write(self.folder.path(), &self.spec, &options)?;
        Ok(())
    }

    /// Deletes an exported model before an adapter is exported, and an exported adapter before a
    /// model is, if the run has phases of both kinds. A folder with both could not be loaded as
    /// either.
    fn clear_other_form(&self, model: PhaseModel) -> Result<(), TrainError> {
        let is_adapter = |model: PhaseModel| model.held() == Held::Adapter;
        let mut phases = self.timeline.phases().iter();
        if phases.all(|phase| is_adapter(phase.model) == is_adapter(model)) {
            return Ok(());
        }
        let folder = self.folder.path();
        if is_adapter(model) {
            return Ok(model_folder::remove(folder)?);
        }
        for name in [adapter::CONFIG, adapter::WEIGHTS] {
            let path = folder.join(name);
            durable::remove_file(&path).map_err(TrainError::io(path))?;
        }
        Ok(())
    }
}
