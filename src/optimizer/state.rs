//! The state of an optimizer on the host, as checkpoints keep it.

use std::collections::BTreeMap;

use burn_pack::Scalar;

use crate::extra::StateScalar;
use crate::model::Tensors;

/// The whole state of an [`Optimizer`](super::Optimizer) on the host. Tensors and scalars are keyed
/// `<parameter path>.<state path>`, such as `norm.weight.momentum.moment_1`.
#[derive(Debug, Default)]
pub struct OptimizerState {
    /// Moments and other state tensors.
    pub tensors: Tensors,
    /// Numbers, such as how many updates a parameter has had.
    pub scalars: BTreeMap<String, StateScalar>,
    /// The family of each parameter's state, by the parameter's path: `adam`, `lion` and so on.
    /// Rules whose states mean the same share a family, as Adam and AdamW do. A parameter that is
    /// not listed comes from an older checkpoint; its state is recognised by its tensors.
    pub families: BTreeMap<String, String>,
}

impl From<Scalar> for StateScalar {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::Int(value) => Self::Int(value),
            Scalar::UInt(value) => Self::Uint(value),
            Scalar::Float(value) => Self::Float(value),
            Scalar::Bool(value) => Self::Bool(value),
        }
    }
}

impl From<StateScalar> for Scalar {
    fn from(scalar: StateScalar) -> Self {
        match scalar {
            StateScalar::Int(value) => Self::Int(value),
            StateScalar::Uint(value) => Self::UInt(value),
            StateScalar::Float(value) => Self::Float(value),
            StateScalar::Bool(value) => Self::Bool(value),
        }
    }
}
