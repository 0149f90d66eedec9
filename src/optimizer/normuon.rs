//! NorMuon (Li et al., 2025, arXiv 2510.05491) for the matrices of the blocks: Muon's orthogonal
//! matrix, each output neuron of which is divided by the root of a running mean of its squares. All
//! other parameters take AdamW's rule.
//!
//! The paper's matrices are `[out, in]`, and a neuron is a row. Ours are `[in, out]`, as burn's linear
//! layers have them, so a neuron is a column. The whole update is scaled to a root mean square of 0.2
//! (algorithm 1), AdamW's size, so that both halves share one learning rate.

use burn::tensor::{DType, Tensor, TensorData};

use super::adamw::{self, averaged};
use super::decay::Decay;
use super::muon::{OrthogonalMomentum, UPDATE_RMS, as_matrix, from_matrix};
use super::rule::{SavedState, StateLayout, StateTensor};
use super::rules::Rules;
use super::tensor_rule::{Own, TensorRule, TensorState};
use crate::config::MuonPlan;

/// The running mean of each neuron's mean square, `[1, out]`.
const NEURONS: &str = "neuron_second_moment";

/// Added to the root of a neuron's mean square, and to the norm of the whole.
const EPSILON: f64 = 1e-10;

pub(super) fn rules(plan: &MuonPlan, neuron_beta: f64) -> Rules {
    let rule = NorMuon {
        momentum: OrthogonalMomentum::new(plan),
        neuron_beta: neuron_beta as f32,
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
struct NorMuon {
    momentum: OrthogonalMomentum,
    neuron_beta: f32,
    decay: Decay,
}

impl TensorRule for NorMuon {
    fn family(&self) -> &'static str {
        "normuon"
    }

    fn layout(&self, dims: &[usize]) -> StateLayout {
        let mut layout = self.momentum.layout(dims);
        layout.tensors.push(StateTensor {
            name: NEURONS,
            dtype: DType::F32,
            dims: vec![1, neurons(dims)],
        });
        layout
    }

    fn update<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        state: &mut TensorState,
    ) -> Tensor<D> {
        let update = self.momentum.next(as_matrix(gradient), state);
        let weights = update.shape().num_elements();
        // The mean over the inputs of each output. It begins at 0 and is not corrected for that: the
        // correction would be a factor of the whole update, which is scaled below anyway.
        let squares = update.clone().square().mean_dim(0);
        let before = state.take(NEURONS);
        let before = before.unwrap_or_else(|| squares.zeros_like());
        let squares = state.put(NEURONS, averaged(Some(before), self.neuron_beta, squares));
        let update = update.div(squares.sqrt().add_scalar(EPSILON));
        let norm = update.clone().square().sum().sqrt().add_scalar(EPSILON);
        let norm = norm.unsqueeze();
        let scale = learning_rate * UPDATE_RMS * (weights as f64).sqrt();
        let step = from_matrix(update.clone().mul_scalar(scale).div(norm));
        let value = self
            .decay
            .decayed(learning_rate, value, &from_matrix(update));
        value - step
    }

    /// Muon's velocity means the same.
    fn adopt(&self, dims: &[usize], mut saved: SavedState) -> Option<SavedState> {
        let neurons = [1, neurons(dims)];
        let squares = saved.tensors.remove(NEURONS);
        let squares = squares.unwrap_or_else(|| TensorData::zeros::<f32, _>(neurons));
        let mut saved = self.momentum.adopt(saved)?;
        saved.tensors.insert(NEURONS.to_string(), squares);
        Some(saved)
    }
}

/// The output neurons of a matrix `[in, out]`.
fn neurons(dims: &[usize]) -> usize {
    dims.last().copied().unwrap_or(1)
}
