//! The state that a training step changes.

use burn::module::Module;
use burn::tensor::Device;

use super::average::{self, Average};
use super::predictor::{self, Predictor, Role};
use super::regulator::{self, Regulator};
use super::{EvaluatedWeights, Prediction, TrainError};
use crate::checkpoint::Progress;
use crate::collective::Collective;
use crate::extra::Extras;
use crate::gradient::{Pipeline, Restored, trained_parameters};
use crate::model::Decoder;
use crate::optimizer::Optimizer;

/// The state that a training step changes: weights, optimizer state, the state of the gradient
/// pipeline, and progress. A process may have several states; they share nothing.
#[derive(Debug)]
pub struct TrainState {
    /// Taken out during an update, so that its memory has one owner and is updated in place.
    model: Option<Decoder>,
    /// Updates the weights.
    pub optimizer: Optimizer,
    /// The stages between backward pass and update.
    pub pipeline: Pipeline,
    /// Decides about steps whose loss or gradient norm leaps; None takes every finite step.
    pub regulator: Option<Regulator>,
    /// Predicts steps; None computes every step.
    pub predictor: Option<Predictor>,
    /// Averages the weights; None without an average.
    pub average: Option<Average>,
    /// The completed steps and other counters.
    pub progress: Progress,
}

impl TrainState {
    /// The state before the first step.
    pub fn new(model: Decoder, optimizer: Optimizer) -> Self {
        Self {
            model: Some(model),
            optimizer,
            pipeline: Pipeline::default(),
            regulator: None,
            predictor: None,
            average: None,
            progress: Progress::default(),
        }
    }

    /// The model, on an autodiff device.
    pub fn model(&self) -> &Decoder {
        // `change_model` puts it back before it returns.
        self.model
            .as_ref()
            .expect("the model is there between updates")
    }

    /// The model, without the rest of the state.
    pub fn into_model(self) -> Decoder {
        self.model.expect("the model is there between updates")
    }

    /// Enters another phase. `model` is the model of the new phase: the same one with other
    /// parameters frozen, or one that was made from it. `rules` is an optimizer without state. The
    /// optimizer state of a parameter is kept if it means the same under the new rules. It is
    /// dropped if the parameter is no longer trained, or if `is_new` says that another parameter
    /// has taken its path. Returns the trained parameters that begin without state.
    ///
    /// # Errors
    /// A state that does not fit its parameter; a compression that does not reach its ratio with the
    /// parameters of the phase.
    pub(super) fn enter_phase(
        &mut self,
        model: Decoder,
        rules: Optimizer,
        is_new: impl Fn(&str) -> bool,
        device: &Device,
    ) -> Result<Vec<String>, TrainError> {
        self.pipeline
            .enter_phase(&trained_parameters(&model), &is_new)?;
        let mut before = std::mem::replace(&mut self.optimizer, rules);
        before.forget(is_new);
        let fresh = self.optimizer.take_over(&before, &model, device)?;
        self.model = Some(model);
        if let Some(regulator) = &mut self.regulator {
            regulator.begin_window();
        }
        Ok(fresh)
    }

    /// The state that is saved besides model and optimizer, by owner, on rank 0. Called on every rank.
    pub(super) fn extras(&self, collective: &dyn Collective) -> Result<Extras, TrainError> {
        let mut extras = self.pipeline.state(collective)?;
        if let Some(regulator) = &self.regulator {
            extras.insert(regulator::OWNER.to_string(), regulator.state());
        }
        if let Some(predictor) = &self.predictor {
            extras.insert(predictor::OWNER.to_string(), predictor.state());
        }
        if let Some(average) = &self.average {
            extras.insert(average::OWNER.to_string(), average.state(self.model()));
        }
        Ok(extras)
    }

    /// Restores what [`extras`](Self::extras) returned. State without an owner is refused, because the next save would lose it.
    pub(super) fn restore_extras(
        &mut self,
        mut extras: Extras,
        device: &Device,
        collective: &dyn Collective,
    ) -> Result<Restored, TrainError> {
        let mut new = Vec::new();
        if let Some(mut predictor) = self.predictor.take() {
            match extras.remove(predictor::OWNER) {
                Some(saved) => predictor.load(&saved, self.model(), device)?,
                None => new.push("the predictor".to_string()),
            }
            self.predictor = Some(predictor);
        }
        if let Some(regulator) = &mut self.regulator {
            match extras.remove(regulator::OWNER) {
                Some(saved) => regulator.load(&saved)?,
                None => new.push("the regulator".to_string()),
            }
        }
        if let Some(mut average) = self.average.take() {
            match extras.remove(average::OWNER) {
                Some(saved) => average.load(saved, (self.model(), device), self.progress.step)?,
                None => new.push("the average of the weights".to_string()),
            }
            self.average = Some(average);
        }
        let Restored { new: stages, note } = self.pipeline.load(&mut extras, collective)?;
        new.extend(
            stages
                .into_iter()
                .map(|owner| format!("gradient stage `{owner}`")),
        );
        match extras.into_keys().next() {
            Some(owner) => Err(TrainError::UnknownOwner { owner }),
            None => Ok(Restored { new, note }),
        }
    }

    /// Takes the weights of a step that was taken into the average.
    pub(super) fn average_weights(&mut self) {
        if let Some(mut average) = self.average.take() {
            average.take(self.model(), self.progress.step);
            self.average = Some(average);
        }
    }

    /// The weights that are evaluated, on a plain device: the average as soon as it has begun. Says
    /// which they are, if the run has an average.
    pub(super) fn evaluated_model(&self) -> (Decoder, Option<EvaluatedWeights>) {
        let model = self.model().valid();
        let model = match &self.average {
            Some(average) => average.put_into(model),
            None => model,
        };
        (model, self.evaluated_weights())
    }

    /// Which weights are evaluated; None if the run does not average them.
    pub(super) fn evaluated_weights(&self) -> Option<EvaluatedWeights> {
        let average = self.average.as_ref()?;
        Some(match average.has_begun() {
            true => EvaluatedWeights::Average,
            false => EvaluatedWeights::Current,
        })
    }

    /// Decisions of the regulator so far; None without one.
    pub(super) fn decisions(&self) -> Option<u64> {
        self.regulator.as_ref().map(Regulator::decisions)
    }

    /// What is recorded about prediction at a step of this role.
    pub(super) fn prediction(&self, role: Option<Role>) -> Option<Prediction> {
        let (predictor, role) = (self.predictor.as_ref()?, role?);
        let [predicted, rejected] = predictor.counts();
        Some(Prediction {
            mode: role.name().to_string(),
            predicted,
            rejected,
            cosine: predictor.cosine(),
        })
    }

    /// Replaces the model by the result of `change`.
    pub(super) fn change_model(&mut self, change: impl FnOnce(Decoder, &mut Optimizer) -> Decoder) {
        let model = self
            .model
            .take()
            .expect("the model is there between updates");
        self.model = Some(change(model, &mut self.optimizer));
    }
}
