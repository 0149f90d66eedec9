//! What a training step changes.

use burn::tensor::Device;

use crate::checkpoint::Progress;
use crate::gradient::Pipeline;
use crate::model::Decoder;
use crate::optimizer::{Optimizer, OptimizerError};

/// What a training step changes: the weights, the optimizer's state, what the gradient pipeline
/// remembers, and how far the run has come. Several may exist in one process; they share nothing.
#[derive(Debug)]
pub struct TrainState {
    /// Taken out for the moment of an update, so that its memory has one owner and is updated in
    /// place.
    model: Option<Decoder>,
    /// Updates the weights.
    pub optimizer: Optimizer,
    /// What stands between backward and update.
    pub pipeline: Pipeline,
    /// How far the run has come.
    pub progress: Progress,
}

impl TrainState {
    /// The state before the first step.
    pub fn new(model: Decoder, optimizer: Optimizer) -> Self {
        Self {
            model: Some(model),
            optimizer,
            pipeline: Pipeline::default(),
            progress: Progress::default(),
        }
    }

    /// The model, on an autodiff device.
    pub fn model(&self) -> &Decoder {
        // `change_model` puts it back before anyone can look.
        self.model
            .as_ref()
            .expect("the model is there between updates")
    }

    /// The model, and nothing else of the state.
    pub fn into_model(self) -> Decoder {
        self.model.expect("the model is there between updates")
    }

    /// Goes over to another phase: `model` is the same model with other parameters frozen, or what
    /// has been made of it, `rules` an optimizer without state. What the optimizer keeps of a
    /// parameter goes on where it means the same under the new rules, and is dropped where the
    /// parameter is no longer trained, or where `is_new` says that it is another one under the same
    /// path. Returns the trained parameters that begin without state.
    ///
    /// # Errors
    /// A state that does not fit its parameter.
    pub(super) fn enter_phase(
        &mut self,
        model: Decoder,
        rules: Optimizer,
        is_new: impl Fn(&str) -> bool,
        device: &Device,
    ) -> Result<Vec<String>, OptimizerError> {
        let mut before = std::mem::replace(&mut self.optimizer, rules);
        before.forget(is_new);
        let fresh = self.optimizer.take_over(&before, &model, device)?;
        self.model = Some(model);
        Ok(fresh)
    }

    /// Puts what `change` makes of the model in its place.
    pub(super) fn change_model(&mut self, change: impl FnOnce(Decoder, &mut Optimizer) -> Decoder) {
        let model = self
            .model
            .take()
            .expect("the model is there between updates");
        self.model = Some(change(model, &mut self.optimizer));
    }
}
