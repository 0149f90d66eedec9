//! State that a run saves beside its model and its optimizer.
//!
//! A part of the run that keeps something from step to step (a stage of the gradient pipeline, say)
//! is an owner. It gives a checkpoint its tensors and numbers under its own name, and gets them back
//! when the run goes on. In a checkpoint they are `extra.<owner>.<name>`.

use std::collections::BTreeMap;

use burn::tensor::TensorData;
use serde::{Deserialize, Serialize};

/// What the owners of a run have to save, by owner. An owner's name is one or more of a-z, 0-9, `_`
/// and `-`.
pub type Extras = BTreeMap<String, ExtraState>;

/// Whether an owner may have this name.
pub(crate) fn is_owner(name: &str) -> bool {
    let is_plain = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '_' | '-');
    !name.is_empty() && name.chars().all(is_plain)
}

/// What one owner has to save.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExtraState {
    /// Tensors by name, on the host, of any type that a model's or an optimizer's tensors may have:
    /// f64, f32, f16, bf16, i64, i32, u32, u8. They come back bit for bit, in lossy checkpoints too.
    /// Names may have dots in them.
    pub tensors: BTreeMap<String, TensorData>,
    /// Numbers by name, finite where they are floats.
    pub scalars: BTreeMap<String, StateScalar>,
}

/// A number in a saved state.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateScalar {
    /// A signed integer.
    Int(i64),
    /// An unsigned integer.
    Uint(u64),
    /// A float.
    Float(f64),
    /// A flag.
    Bool(bool),
}
