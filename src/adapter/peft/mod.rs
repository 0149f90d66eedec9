//! Adapter folders as Hugging Face's PEFT writes and reads them: adapter_config.json and
//! adapter_model.safetensors.
//!
//! Tensors are `base_model.model.<module>.lora_A.weight` `[r, in]`, `.lora_B.weight` `[out, r]` and
//! `.lora_magnitude_vector` `[out]`, where a module is named as the base model's files name it.
//! Where files fuse several of our layers into one module (phi3, gpt2), its update is one as well:
//! the A of the parts one under the other, and the B of each where its outputs are. The update is
//! the same; its rank is the sum of theirs.
//!
//! An adapter of the output head brings that layer's own weights as well, `.base_layer.weight`, and
//! they take the place of the base model's.

mod fields;
mod read;
mod write;

pub use read::base_model;
pub use write::PeftOptions;
pub(crate) use write::written_numbers;

use burn::tensor::TensorData;

/// The file name of what an adapter is.
pub const CONFIG: &str = "adapter_config.json";
/// The file name of its weights.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// The folder of a base model that belongs to one adapter, within the adapter's: what an
/// initialisation has left of the weights that it took its beginning from.
pub const OWN_BASE: &str = "base_model";

const PREFIX: &str = "base_model.model.";

fn dims(data: &TensorData) -> Vec<usize> {
    data.shape().as_slice().to_vec()
}

/// The last part of a module's name.
fn leaf(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}
