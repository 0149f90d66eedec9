//! State that a run saves in addition to its model and its optimizer.
//!
//! A part of the run that keeps something from step to step, such as a stage of the gradient
//! pipeline, is an owner. An owner saves tensors and numbers in a checkpoint under its own name,
//! and gets them back when the run is resumed. The checkpoint names them `extra.<owner>.<name>`.

use std::collections::BTreeMap;

use burn::tensor::TensorData;
use serde::{Deserialize, Serialize};

/// The saved state of all owners of a run, by owner. An owner's name is one or more of a-z, 0-9,
/// `_` and `-`.
pub type Extras = BTreeMap<String, ExtraState>;

/// Whether `name` is a valid owner's name.
pub(crate) fn is_owner(name: &str) -> bool {
    let is_plain = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '_' | '-');
    !name.is_empty() && name.chars().all(is_plain)
}

/// The saved state of one owner.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExtraState {
    /// Tensors by name, on the host, of any type that a model's or an optimizer's tensors may have:
    /// f64, f32, f16, bf16, i64, i32, u32, u8. They come back bit for bit, in lossy checkpoints too.
    /// Names may have dots in them.
    pub tensors: BTreeMap<String, TensorData>,
    /// Numbers by name. Floats have to be finite.
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
