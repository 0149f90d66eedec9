//! Hugging Face model folders: `config.json`, and weights in one `model.safetensors` or in shards
//! that `model.safetensors.index.json` lists.
//!
//! Files name and lay out tensors as each family's class in transformers does (`table`, `layout`); in memory
//! all families have LLaMA's names. Files are read and turned into f32, or into codes (`blockwise`),
//! tensor by tensor (`weight_files`), so that loading takes the model's own memory and one tensor more.

mod blockwise;
mod layout;
mod packed;
mod parts;
mod table;
mod tensors;
mod weight_files;
mod write;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use firebrick_kernels::blockwise::{Quantised, quantise};

pub use layout::Quantiser;
pub(crate) use layout::is_exact as is_scale;
pub(crate) use layout::transpose;
pub(crate) use parts::{FileLinear, file_linears, some_file_tensors, some_own_tensors};
pub(crate) use tensors::{file_dtype, memory_dtype, read_float_tensors};
pub use tensors::{
    read_tensors, stream_tensors, tensors_from_bytes, tensors_header, write_tensors,
};
pub use write::{SaveOptions, save};
pub(crate) use write::{remove, write_tensors_as};

use super::{Decoder, DecoderSpec, ModelError, Tensors, parameters, with_parameters};
use crate::config::Blockwise;
pub use crate::config::CONFIG_JSON as CONFIG;
use weight_files::WeightFiles;

/// The file name of weights that are in one file.
pub const WEIGHTS: &str = "model.safetensors";
/// The file name of the list of shards, for weights that are not.
pub const INDEX: &str = "model.safetensors.index.json";

/// Loads a model folder onto a device.
///
/// # Errors
/// A missing or malformed file, a field this build does not support, a tensor that is missing,
/// unexpected, of another shape, or of another dtype than f32, bf16 or f16.
pub fn load(folder: &Path, device: &Device) -> Result<Decoder, ModelError> {
    load_as(&read_config(folder)?, folder, device)
}

/// Loads the weights of a folder into the decoder that `spec` describes.
///
/// # Errors
/// As [`load`].
pub fn load_as(spec: &DecoderSpec, folder: &Path, device: &Device) -> Result<Decoder, ModelError> {
    spec.check()?;
    // What the files hold is known, and right, before memory is taken for it.
    let files = WeightFiles::open(folder)?;
    files.check_layout(spec.shape.ternary.and_then(|ternary| ternary.packed))?;
    let own = layout::own_tensors(spec, files, None)?;
    build(spec, own, device)
}

/// Loads the dense weights of a folder as codes: those of the blocks' linear layers pass through
/// `quantiser` one tensor after the other, so that no more than one of them is dense at a time.
/// `spec` is what to build, its shape with `blockwise`.
///
/// # Errors
/// As [`load`], and the quantiser's.
pub fn load_quantising(
    spec: &DecoderSpec,
    folder: &Path,
    device: &Device,
    quantiser: &mut Quantiser,
) -> Result<Decoder, ModelError> {
    spec.check()?;
    let files = WeightFiles::open(folder)?;
    let mut dense = spec.clone();
    dense.shape.blockwise = None;
    let own = layout::own_tensors(&dense, files, Some(quantiser))?;
    build(spec, own, device)
}

/// The [`Quantiser`] that makes codes of weights as they are.
pub fn quantiser(
    blockwise: Blockwise,
) -> impl FnMut(&str, &[f32], [usize; 2]) -> Result<Quantised, ModelError> {
    move |path, weights, [outputs, inputs]| {
        let shape = blockwise.of_matrix([inputs, outputs]);
        quantise(weights, shape).map_err(|source| ModelError::Quantised {
            name: path.to_string(),
            source,
        })
    }
}

/// Reads `config.json` alone.
///
/// # Errors
/// As [`load`].
pub fn read_config(folder: &Path) -> Result<DecoderSpec, ModelError> {
    let missing = if !folder.join(CONFIG).exists() {
        Some(CONFIG)
    } else if !folder.join(WEIGHTS).exists() && !folder.join(INDEX).exists() {
        Some(WEIGHTS)
    } else {
        None
    };
    match missing {
        Some(missing) => Err(ModelError::NotAModel {
            path: folder.to_path_buf(),
            missing,
        }),
        None => Ok(DecoderSpec::read(folder)?),
    }
}

/// The files that fix a model: its config.json, and its weights with their index.
///
/// # Errors
/// A missing file, or an index that is not one.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let mut files = vec![folder.join(CONFIG)];
    files.extend(weight_files::weight_paths(folder)?);
    Ok(files)
}

/// A model's weights under Hugging Face's names and layout.
pub fn hf_tensors(model: &Decoder) -> Tensors {
    layout::file_tensors(model.spec(), parameters(model))
}

/// A decoder from weights under Hugging Face's names and layout.
///
/// # Errors
/// As [`load`].
pub fn decoder_from_hf(
    spec: &DecoderSpec,
    tensors: Tensors,
    device: &Device,
) -> Result<Decoder, ModelError> {
    spec.check()?;
    build(spec, layout::own_tensors(spec, tensors, None)?, device)
}

/// A decoder from weights by the parameters' paths, as they are in memory.
///
/// # Errors
/// As [`with_parameters`].
pub fn decoder_from_own(
    spec: &DecoderSpec,
    own: Tensors,
    device: &Device,
) -> Result<Decoder, ModelError> {
    spec.check()?;
    build(spec, own, device)
}

/// Weights by the parameters' paths under Hugging Face's names and layout. They have to be those of a model of this form.
pub fn hf_from_own(spec: &DecoderSpec, own: Tensors) -> Tensors {
    layout::file_tensors(spec, own)
}

fn build(spec: &DecoderSpec, own: Tensors, device: &Device) -> Result<Decoder, ModelError> {
    // The seed does not matter: every parameter is replaced before it is ever drawn.
    let model = Decoder::new(spec, 0, device)?;
    with_parameters(model, own, device)
}
