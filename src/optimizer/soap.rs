//! SOAP (Vyas et al., 2024, arXiv 2409.11321) for the matrices of the blocks: Adam in the eigenbasis of
//! Shampoo's two matrices. All other parameters take AdamW's rule.
//!
//! L and R are running means of G Gᵀ and Gᵀ G. The gradient is turned into their eigenvectors, Q_L and Q_R;
//! the mean of its squares is kept there, the mean of the gradient in the parameter's own basis. Every
//! `precondition_frequency` updates the bases take one step of power iteration, L Q_L and R Q_R made
//! orthonormal again. As in the authors' code, the first gradient only begins L and R, so that no gradient
//! is divided by itself; the bases of a step never know its gradient; and epsilon is added to the root of the
//! mean of squares before it is corrected for its start. Unlike there, decay goes by the weights before the
//! update, as in our other rules.
//!
//! A side that is longer than `max_precondition_dim` is not turned and keeps no matrices. Eigenvectors
//! and orthonormal bases are computed on the host, whatever the device.

use burn::tensor::{DType, Tensor};

use super::adamw::{self, MOMENT_1, MOMENT_2, averaged};
use super::decay::Decay;
use super::eigenbasis::{eigenbasis, orthonormal};
use super::muon::{as_matrix, from_matrix};
use super::ramp::Ramped;
use super::rule::{StateLayout, StateTensor};
use super::rules::Rules;
use super::tensor_rule::{Own, TensorRule, TensorState};
use crate::config::SoapPlan;

/// The names of a side's running mean and of its basis.
const SIDES: [[&str; 2]; 2] = [["left", "left_basis"], ["right", "right_basis"]];

pub(super) fn rules(plan: &SoapPlan) -> Rules {
    let adamw = &plan.adamw;
    let rule = Soap {
        beta_1: adamw.betas[0] as f32,
        beta_2: Ramped::new(adamw.betas[1], adamw.beta2_warmup),
        shampoo_beta: plan.shampoo_beta as f32,
        eps: adamw.eps as f32,
        frequency: plan.precondition_frequency.max(1),
        largest: plan.max_precondition_dim,
        decay: Decay::new(adamw.weight_decay, adamw.cautious_weight_decay),
    };
    adamw::rules(adamw).with_block_matrices(Own(rule))
}

/// The rule with its parameters.
#[derive(Debug, Clone)]
struct Soap {
    beta_1: f32,
    beta_2: Ramped,
    shampoo_beta: f32,
    eps: f32,
    /// Updates from one change of the bases to the next.
    frequency: u64,
    /// Longer sides are not turned.
    largest: usize,
    decay: Decay,
}

/// A basis of each side; None for a side that is not turned.
type Bases = [Option<Tensor<2>>; 2];

impl Soap {
    /// Takes a gradient into the running mean of each side that is turned, and returns the means.
    fn averaged_products(&self, gradient: &Tensor<2>, state: &mut TensorState) -> Bases {
        let dims = gradient.dims();
        [0, 1].map(|side| {
            if dims[side] > self.largest {
                return None;
            }
            let (g, transposed) = (gradient.clone(), gradient.clone().transpose());
            let product = match side {
                0 => g.matmul(transposed),
                _ => transposed.matmul(g),
            };
            let [mean, _] = SIDES[side];
            let averaged = averaged(state.take::<2>(mean), self.shampoo_beta, product);
            Some(state.put(mean, averaged))
        })
    }

    /// The first gradient: it begins the running means and their eigenbases.
    fn begin(&self, gradient: &Tensor<2>, state: &mut TensorState) {
        let means = self.averaged_products(gradient, state);
        put_bases(both(means, eigenbasis), state);
        state.put(MOMENT_1, gradient.zeros_like());
        state.put(MOMENT_2, gradient.zeros_like());
    }

    /// One step of power iteration of each basis. The directions are sorted by their share of the
    /// running mean first, the largest first, and `squares` with them.
    fn turn_bases(
        means: Bases,
        bases: Bases,
        mut squares: Tensor<2>,
        state: &mut TensorState,
    ) -> Tensor<2> {
        let mut next: Bases = [None, None];
        for (side, (mean, basis)) in means.into_iter().zip(bases).enumerate() {
            let (Some(mean), Some(basis)) = (mean, basis) else {
                continue;
            };
            let product = mean.matmul(basis.clone());
            // The diagonal of Qᵀ L Q.
            let shares = (basis * product.clone()).sum_dim(0);
            let order = shares.squeeze_dim::<1>(0).argsort_descending(0);
            squares = squares.select(side, order.clone());
            next[side] = Some(product.select(1, order));
        }
        put_bases(both(next, orthonormal), state);
        squares
    }
}

/// Computes something for both sides at the same time.
fn both(matrices: Bases, compute: fn(Tensor<2>) -> Tensor<2>) -> Bases {
    let [left, right] = matrices;
    let (left, right) = rayon::join(|| left.map(compute), || right.map(compute));
    [left, right]
}

fn put_bases(bases: Bases, state: &mut TensorState) {
    for ([_, name], basis) in SIDES.iter().zip(bases) {
        if let Some(basis) = basis {
            state.put(name, basis);
        }
    }
}

/// The matrix in the bases: Q_Lᵀ X Q_R.
fn turned(x: Tensor<2>, [left, right]: &Bases) -> Tensor<2> {
    let x = match left {
        Some(left) => left.clone().transpose().matmul(x),
        None => x,
    };
    match right {
        Some(right) => x.matmul(right.clone()),
        None => x,
    }
}

/// The inverse: Q_L X Q_Rᵀ.
fn turned_back(x: Tensor<2>, [left, right]: &Bases) -> Tensor<2> {
    let x = match left {
        Some(left) => left.clone().matmul(x),
        None => x,
    };
    match right {
        Some(right) => x.matmul(right.clone().transpose()),
        None => x,
    }
}

impl TensorRule for Soap {
    fn family(&self) -> &'static str {
        "soap"
    }

    fn layout(&self, dims: &[usize]) -> StateLayout {
        let tensor = |name, dims: Vec<usize>| StateTensor {
            name,
            dtype: DType::F32,
            dims,
        };
        let mut tensors = vec![
            tensor(MOMENT_1, dims.to_vec()),
            tensor(MOMENT_2, dims.to_vec()),
        ];
        for (names, &side) in SIDES.iter().zip(dims) {
            if side <= self.largest {
                tensors.extend(names.map(|name| tensor(name, vec![side, side])));
            }
        }
        StateLayout {
            tensors,
            scalars: &["updates"],
        }
    }

    fn update<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        state: &mut TensorState,
    ) -> Tensor<D> {
        let gradient = as_matrix(gradient);
        // The first gradient takes no step.
        let Some(time) = state.updates.checked_sub(1).filter(|time| *time > 0) else {
            self.begin(&gradient, state);
            return value;
        };
        let bases = SIDES.map(|[_, name]| {
            let basis = state.take::<2>(name)?;
            Some(state.put(name, basis))
        });
        let in_bases = turned(gradient.clone(), &bases);
        let beta_2 = self.beta_2.at(time);
        let squares = averaged(state.take(MOMENT_2), beta_2, in_bases.square());
        let mean = averaged(state.take(MOMENT_1), self.beta_1, gradient.clone());
        let mean = state.put(MOMENT_1, mean);
        let spread = squares.clone().sqrt().add_scalar(self.eps);
        let update = turned_back(turned(mean, &bases).div(spread), &bases);
        let update = from_matrix(update);
        let value = self.decay.decayed(learning_rate, value, &update);
        let power = i32::try_from(time).unwrap_or(i32::MAX);
        let corrections = [
            f64::from(1.0 - self.beta_1.powi(power)),
            f64::from(self.beta_2.correction(time)),
        ];
        let rate = learning_rate * corrections[1].sqrt() / corrections[0];
        let value = value - update.mul_scalar(rate);
        // What this gradient says of the bases counts from the next step on.
        let means = self.averaged_products(&gradient, state);
        let squares = if time.is_multiple_of(self.frequency) {
            Self::turn_bases(means, bases, squares, state)
        } else {
            squares
        };
        state.put(MOMENT_2, squares);
        value
    }
}
