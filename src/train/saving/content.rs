//! The weights that a checkpoint holds: all of them, or only those that the base model does not
//! have.

use serde_json::{Value, json};

use crate::adapter::saved_tensors;
use crate::config::{DecoderSpec, Held, PhaseModel, SaveDtype};
use crate::model::folder::hf_tensors;
use crate::model::{Decoder, Tensors, is_of_adapter, parameters_into};

/// The weights of a full checkpoint: model weights under Hugging Face's names, adapters under their
/// paths.
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

/// The weights of a delta checkpoint, by their paths, and a description of the model. A checkpoint
/// is stored as a difference only from one with the same description. `spare` is an earlier copy
/// whose memory may be used again, and `spec` is the spec of the run's first model.
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
            // The weights and the adapter both belong to the phase in which the adapter began.
            config["firebrick_adapter"] = json!({ "since_phase": form.adapter_since });
            (parameters_into(model, spare), config)
        }
    }
}

/// The number of values in a checkpoint of a model. Frozen parameters are saved too.
pub(super) fn count(model: &Decoder, form: PhaseModel) -> u64 {
    match form.held() {
        Held::Weights | Held::Adapter => model.saved_params() as u64,
        Held::Both => model.params(),
    }
}
