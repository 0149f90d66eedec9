//! Some of a model's tensors: its linear layers by the names of files, and modules by themselves, as
//! adapters have them.

use std::collections::HashSet;

use super::layout::Source;
use super::table::{FileTensor, Layout, table};
use crate::config::DecoderSpec;
use crate::model::{ModelError, Tensors};

/// A linear layer as files have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileLinear {
    /// The module's name.
    pub(crate) name: String,
    /// Width of what goes in.
    pub(crate) inputs: usize,
    /// Paths of our layers in it, in order, and their outputs.
    pub(crate) parts: Vec<(String, usize)>,
}

/// The linear layers of a model's files, with the names they have where weights are dense.
pub(crate) fn file_linears(spec: &DecoderSpec) -> Vec<FileLinear> {
    let dense = dense(spec);
    let known: HashSet<String> = dense
        .shape
        .linear_layers(dense.vocab_size)
        .into_iter()
        .map(|layer| format!("{}.weight", layer.path))
        .collect();
    let matrices = table(&dense).filter(|tensor| known.contains(&tensor.path()));
    let linears = matrices.map(|tensor| {
        let bare = |path: &str| path.trim_end_matches(".weight").to_string();
        let parts = tensor.parts.iter();
        FileLinear {
            name: bare(&tensor.name),
            inputs: match tensor.layout {
                Layout::Columns => tensor.shape[0],
                _ => tensor.shape[1],
            },
            parts: parts.map(|(path, width)| (bare(path), *width)).collect(),
        }
    });
    linears.collect()
}

/// The tensors of a model's files whose parameters are all in `own`, which is left with the rest.
pub(crate) fn some_file_tensors(spec: &DecoderSpec, own: &mut Tensors) -> Tensors {
    let dense = dense(spec);
    let whole = |tensor: &FileTensor, own: &Tensors| {
        let mut parts = tensor.parts.iter();
        !tensor.parts.is_empty() && parts.all(|(path, _)| own.contains_key(path))
    };
    let mut found = Tensors::new();
    for tensor in table(&dense) {
        if whole(&tensor, own) {
            let data = tensor.pack(own);
            found.insert(tensor.name, data);
        }
    }
    found
}

/// Our parameters out of those tensors of a model's files that `source` has, which is left with the
/// rest.
///
/// # Errors
/// A tensor of another shape.
pub(crate) fn some_own_tensors(
    spec: &DecoderSpec,
    source: &mut Tensors,
) -> Result<Tensors, ModelError> {
    let dense = dense(spec);
    let mut own = Tensors::new();
    for tensor in table(&dense) {
        match source.shape(&tensor.name) {
            None => {}
            Some(found) if found != tensor.shape => {
                return Err(ModelError::TensorMismatch {
                    name: tensor.name,
                    expected: format!("{:?}", tensor.shape),
                    found: format!("{found:?}"),
                });
            }
            Some(_) => {
                let values = source.take(&tensor.name)?;
                tensor.unpack(values, &mut own)?;
            }
        }
    }
    Ok(own)
}

/// The same decoder with weights that are not packed.
fn dense(spec: &DecoderSpec) -> DecoderSpec {
    let mut dense = spec.clone();
    dense.shape.ternary = None;
    dense.shape.blockwise = None;
    dense
}
