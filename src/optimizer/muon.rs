//! Muon (Jordan et al., 2024) for the matrices of the blocks: momentum, orthogonalised, with
//! decoupled weight decay. Embeddings, head, norms and biases take AdamW's rule.
//!
//! Updates are scaled to the size of AdamW's by 0.2 √(larger side) (Liu et al., 2025), so that both
//! share one learning rate. That scale is symmetric in the matrix's sides, so our `[in, out]` layout
//! does not matter to it.

use burn::tensor::{DType, Tensor};

use super::StateScalar;
use super::adamw;
use super::decay::Decay;
use super::ramp::Ramped;
use super::rule::{SavedState, StateLayout, StateTensor};
use super::rules::Rules;
use super::tensor_rule::{Own, TensorRule, TensorState};
use crate::config::{MuonPlan, NewtonSchulz};

/// AdamW's root mean square of an update, which that of an orthogonalised matrix is scaled to.
pub(super) const UPDATE_RMS: f64 = 0.2;

pub(super) const VELOCITY: &str = "momentum.velocity";
const UPDATES: &str = "updates";

pub(super) fn rules(plan: &MuonPlan) -> Rules {
    let rule = Muon {
        momentum: OrthogonalMomentum::new(plan),
        decay: Decay::new(plan.adamw.weight_decay, plan.adamw.cautious_weight_decay),
    };
    let form = adamw::Form {
        lr_ratio: plan.adamw_lr_ratio,
        ..adamw::Form::default()
    };
    adamw::rules_with(&plan.adamw, form).with_block_matrices(Own(rule))
}

/// The rule with its parameters.
#[derive(Debug, Clone)]
struct Muon {
    momentum: OrthogonalMomentum,
    decay: Decay,
}

/// The momentum of a matrix, orthogonalised.
#[derive(Debug, Clone)]
pub(super) struct OrthogonalMomentum {
    momentum: Ramped,
    nesterov: bool,
    newton_schulz: NewtonSchulz,
}

impl OrthogonalMomentum {
    pub(super) fn new(plan: &MuonPlan) -> Self {
        Self {
            momentum: Ramped::new(plan.momentum, plan.momentum_warmup),
            nesterov: plan.nesterov,
            newton_schulz: plan.newton_schulz,
        }
    }

    /// The velocity. Updates are counted only for a momentum that changes with them, as states of earlier versions
    /// have no count.
    pub(super) fn layout(&self, dims: &[usize]) -> StateLayout {
        StateLayout {
            tensors: vec![StateTensor {
                name: VELOCITY,
                dtype: DType::F32,
                dims: dims.to_vec(),
            }],
            scalars: if self.momentum.is_constant() {
                &[]
            } else {
                &[UPDATES]
            },
        }
    }

    /// The orthogonal matrix, `[in, out]`.
    pub(super) fn next(&self, gradient: Tensor<2>, state: &mut TensorState) -> Tensor<2> {
        let momentum = self.momentum.at(state.updates);
        let velocity = match state.take::<2>(VELOCITY) {
            Some(velocity) => gradient.clone().add(velocity.mul_scalar(momentum)),
            None => gradient.clone(),
        };
        let velocity = state.put(VELOCITY, velocity);
        let direction = if self.nesterov {
            velocity.mul_scalar(momentum).add(gradient)
        } else {
            velocity
        };
        self.newton_schulz.orthogonalized(direction)
    }

    /// The velocity of a state of Muon or NorMuon. A warm-up of the momentum begins anew in a state without a
    /// count.
    pub(super) fn adopt(&self, mut saved: SavedState) -> Option<SavedState> {
        if !matches!(saved.family(), Some("muon" | "normuon")) {
            return None;
        }
        saved.tensors.retain(|name, _| name == VELOCITY);
        if self.momentum.is_constant() {
            saved.scalars.clear();
        } else {
            let count = saved.scalars.entry(UPDATES.to_string());
            count.or_insert(StateScalar::Uint(0));
        }
        Some(saved)
    }
}

/// A tensor of another rank as a matrix.
///
/// # Panics
/// If it is none. Block matrices have rank 2: only they take such a rule.
pub(super) fn as_matrix<const D: usize>(tensor: Tensor<D>) -> Tensor<2> {
    assert_eq!(D, 2, "this rule is for matrices");
    Tensor::from_bridge(tensor.into_bridge())
}

/// The inverse of [`as_matrix`].
pub(super) fn from_matrix<const D: usize>(matrix: Tensor<2>) -> Tensor<D> {
    assert_eq!(D, 2, "this rule is for matrices");
    Tensor::from_bridge(matrix.into_bridge())
}

impl TensorRule for Muon {
    fn family(&self) -> &'static str {
        "muon"
    }

    fn layout(&self, dims: &[usize]) -> StateLayout {
        self.momentum.layout(dims)
    }

    fn update<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        state: &mut TensorState,
    ) -> Tensor<D> {
        let update = self.momentum.next(as_matrix(gradient), state);
        let [rows, columns] = update.dims();
        let scale = UPDATE_RMS * (rows.max(columns) as f64).sqrt();
        let update = from_matrix(update);
        let value = self.decay.decayed(learning_rate, value, &update);
        value - update.mul_scalar(learning_rate * scale)
    }

    fn adopt(&self, _dims: &[usize], saved: SavedState) -> Option<SavedState> {
        self.momentum.adopt(saved)
    }
}
