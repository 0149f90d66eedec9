//! The state of an optimizer on the host, as checkpoints keep it.

use std::collections::BTreeMap;

use burn_pack::Scalar;

use crate::extra::StateScalar;
use crate::model::Tensors;

/// The whole state of an [`Optimizer`](super::Optimizer) on the host. Tensors are keyed
/// `<parameter path>.<state path>`, as in `norm.weight.momentum.moment_1`; so are scalars, such as
/// the number of updates a parameter has had.
#[derive(Debug, Default)]
pub struct OptimizerState {
    /// Moments and the like.
    pub tensors: Tensors,
    /// Counters and the like.
    pub scalars: BTreeMap<String, StateScalar>,
    /// What kind of state each parameter has, by the parameter's path: `adam`, `lion` and so on.
    /// Rules whose states mean the same share a name, as Adam and AdamW do. A parameter that is not
    /// listed has a state that does not say whose it is; it is then told by its tensors.
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
