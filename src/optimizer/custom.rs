//! Update rules from outside this crate.

use burn::tensor::{DType, Tensor};

use super::OptimizerError;
use super::rule::{StateLayout, StateTensor};
use super::rules::Rules;
use super::tensor_rule::{Own, TensorRule, TensorState};

/// An update rule of your own, in tensor operations. Its state is saved in checkpoints as that of
/// any other rule; `examples/custom_optimizer.rs` has one.
pub trait CustomRule: Send + Sync + 'static {
    /// A name for the form of the state, as `owner/rule`: no rule of this crate has a slash in its
    /// name. Rules with the same name can continue from each other's states; a state of another name
    /// is refused.
    fn family(&self) -> &'static str;

    /// The names and dimensions of the tensors that the rule keeps of a parameter of these
    /// dimensions, all f32 and of rank 1 to 5.
    fn state_tensors(&self, dims: &[usize]) -> Vec<(&'static str, Vec<usize>)>;

    /// Returns the updated parameter. `state` is empty at the first update; afterwards it has to
    /// hold every tensor that [`state_tensors`](Self::state_tensors) names.
    /// [`TensorState::updates`] counts this update already.
    fn update<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        state: &mut TensorState,
    ) -> Tensor<D>;
}

/// The count of updates in a saved state.
const UPDATES: &str = "updates";

struct Custom<R>(R);

impl<R: CustomRule> TensorRule for Custom<R> {
    fn family(&self) -> &'static str {
        self.0.family()
    }

    fn layout(&self, dims: &[usize]) -> StateLayout {
        let tensors = self.0.state_tensors(dims).into_iter();
        let tensors = tensors.map(|(name, dims)| StateTensor {
            name,
            dtype: DType::F32,
            dims,
        });
        StateLayout {
            tensors: tensors.collect(),
            scalars: &[UPDATES],
        }
    }

    fn update<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        state: &mut TensorState,
    ) -> Tensor<D> {
        self.0.update(learning_rate, value, gradient, state)
    }
}

/// One rule for matrices, another for vectors.
pub(super) fn rules(
    matrices: impl CustomRule,
    vectors: impl CustomRule,
) -> Result<Rules, OptimizerError> {
    for family in [matrices.family(), vectors.family()] {
        if !family.contains('/') {
            return Err(OptimizerError::Family { family });
        }
    }
    Ok(Rules::uniform(Own(Custom(matrices)), Own(Custom(vectors))))
}
