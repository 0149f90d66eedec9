//! Packed trits as the bytes of a file, and as the words that products read.

use burn::tensor::TensorData;
use firebrick_kernels::ternary::layout::{LayoutError, compute, storage};

use crate::config::PackedLayout;
use crate::model::ModelError;

/// Where the header of a file names the layout of its packed weights.
pub(super) const NAME_OF_LAYOUT: &str = "packed_layout";

/// Of a tensor of bytes for a matrix of `[outputs, inputs]`.
pub(super) fn file_shape(layout: PackedLayout, [outputs, inputs]: [usize; 2]) -> Vec<usize> {
    match layout {
        PackedLayout::Compute => {
            let groups = outputs.div_ceil(compute::BLOCK);
            vec![groups, 4 * compute::words(outputs, inputs) / groups]
        }
        PackedLayout::Storage => vec![outputs, storage::bytes(1, inputs)],
    }
}

/// Words `[groups, words of a group]` from a file's bytes, of the length that
/// [`file_shape`] says.
///
/// # Errors
/// [`ModelError::PackedWeights`] for bytes that are not trits.
pub(super) fn read(
    name: &str,
    bytes: Vec<u8>,
    layout: PackedLayout,
    [outputs, inputs]: [usize; 2],
) -> Result<TensorData, ModelError> {
    let invalid = |source: LayoutError| ModelError::PackedWeights {
        name: name.to_string(),
        source,
    };
    let words = match layout {
        PackedLayout::Compute => {
            let words = bytes.chunks_exact(4);
            let words: Vec<u32> = words
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            compute::check(&words, outputs, inputs).map_err(invalid)?;
            words
        }
        PackedLayout::Storage => {
            let trits = storage::unpack(&bytes, outputs, inputs).map_err(invalid)?;
            compute::pack(&trits, outputs, inputs).map_err(invalid)?
        }
    };
    let groups = outputs.div_ceil(compute::BLOCK);
    let width = words.len() / groups;
    Ok(TensorData::new(words, [groups, width]))
}

/// A file's bytes from words.
pub(super) fn write(words: TensorData, layout: PackedLayout, dims: [usize; 2]) -> TensorData {
    let words: Vec<u32> = words
        .try_into_vec()
        .unwrap_or_else(|error| unreachable!("packed weights are u32: {error:?}"));
    let bytes = match layout {
        PackedLayout::Compute => words.iter().flat_map(|word| word.to_le_bytes()).collect(),
        PackedLayout::Storage => {
            let [outputs, inputs] = dims;
            let trits = compute::unpack(&words, outputs, inputs);
            let bytes = trits.and_then(|trits| storage::pack(&trits, outputs, inputs));
            bytes.unwrap_or_else(|error| unreachable!("the model computes with it: {error}"))
        }
    };
    TensorData::new(bytes, file_shape(layout, dims))
}
