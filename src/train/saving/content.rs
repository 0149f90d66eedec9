//! What a checkpoint holds of a model: the whole of it, or no more than the base model does not have.

use serde_json::{Value, json};

use crate::adapter::saved_tensors;
use crate::config::{DecoderSpec, Held, PhaseModel, SaveDtype};
use crate::model::folder::hf_tensors;
use crate::model::{Decoder, Tensors, is_of_adapter, parameters_into};

/// The weights of a checkpoint that is whole: under the names of files, and those of an adapter by
/// their paths.
pub(super) fn files(model: &Decoder, form: PhaseModel) -> Tensors {
    match form.held() {
        Held::Weights => hf_tensors(model),
        Held::Adapter => saved_tensors(model),
        Held::Both => {
            let mut files = hf_tensors(&model.clone().without_adapters());
            let saved = saved_tensors(model).into_iter();
            files.extend(saved.filter(|(path, _)| is_of_adapter(path)));
            files
        }
    }
}

/// The weights of a checkpoint that may be a difference, by their paths, where it can in the memory of
/// an earlier copy; and what it says of the model, which is another for every model that cannot be
/// the difference from it.
/// `spec` is what the run's first model is built from.
pub(super) fn capture(
    model: &Decoder,
    (form, spec): (PhaseModel, &DecoderSpec),
    spare: Tensors,
) -> (Tensors, Value) {
    let config = || form.spec(spec).to_config_json(SaveDtype::F32);
    match form.held() {
        Held::Weights => (parameters_into(model, spare), config()),
        Held::Adapter => (saved_tensors(model), Value::Null),
        Held::Both => {
            let mut config = config();
            // Beside it the weights are those of a phase, and so is the adapter.
            config["firebrick_adapter"] = json!({ "since_phase": form.adapter_since });
            (parameters_into(model, spare), config)
        }
    }
}

/// How many numbers a checkpoint holds of a model. What a phase freezes is saved all the same.
pub(super) fn count(model: &Decoder, form: PhaseModel) -> u64 {
    match form.held() {
        Held::Weights | Held::Adapter => model.saved_params() as u64,
        Held::Both => model.params(),
    }
}
