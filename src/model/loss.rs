//! Cross-entropy over the vocabulary, with its gradient written down instead of taped.
//!
//! For logits z `[rows, vocab]`, targets y and weights w, the loss is Σ w · (logsumexp(z) - z_y) and
//! its gradient (softmax(z) - onehot(y)) · w. Both come from one softmax outside the autodiff
//! graph; the graph only sees Σ z · gradient, whose derivative with respect to z is that gradient.
//! Taping log-softmax instead costs five more passes over `[rows, vocab]`. On the CPU one
//! [operation](firebrick_kernels::layers::token_nats) has both.

use burn::tensor::activation::softmax;
use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use firebrick_kernels::layers::token_nats;

use crate::device::is_cpu;

/// The loss of one micro-batch.
#[derive(Debug, Clone)]
pub struct TokenLoss {
    /// Σ weight · nats `[1]`, off the autodiff graph.
    pub sum: Tensor<1>,
    /// A scalar `[1]` whose gradient is that of `scale x sum`; its own value means nothing.
    pub objective: Tensor<1>,
}

/// Cross-entropy of `logits` `[rows, vocab]` against `targets` `[rows]`, weighted by `weights`
/// `[rows]`. Gradients are multiplied by `scale`: one over the trained tokens of the whole
/// optimizer step, so that micro-batches simply add up.
///
/// Targets and weights live on the plain (not autodiff) device.
pub fn cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Tensor<1>,
    scale: f64,
) -> TokenLoss {
    if is_cpu(&logits.device()) {
        let nats = token_nats(logits, targets) * Tensor::from_inner(weights);
        return TokenLoss {
            sum: nats.clone().inner().sum(),
            objective: nats.sum().mul_scalar(scale),
        };
    }
    let plain = logits.clone().inner();
    let probabilities = softmax(plain.clone(), 1);
    let sum = weighted_nats(plain, &probabilities, targets.clone(), weights.clone()).sum();

    let [rows] = targets.dims();
    let minus_one = Tensor::full([rows, 1], -1.0, &probabilities.device());
    let gradient = probabilities.scatter(
        1,
        targets.unsqueeze_dim(1),
        minus_one,
        IndexingUpdateOp::Add,
    ) * weights.mul_scalar(scale).unsqueeze_dim(1);
    let objective = (logits * Tensor::from_inner(gradient)).sum();
    TokenLoss { sum, objective }
}

/// Σ weight · nats `[1]` without a gradient, for evaluation.
pub fn cross_entropy_sum(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Tensor<1>,
) -> Tensor<1> {
    cross_entropy_nats(logits, targets, weights).sum()
}

/// Weight · nats of each row `[rows]`, without a gradient.
pub(crate) fn cross_entropy_nats(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Tensor<1>,
) -> Tensor<1> {
    if is_cpu(&logits.device()) {
        return token_nats(logits, targets) * weights;
    }
    let probabilities = softmax(logits.clone(), 1);
    weighted_nats(logits, &probabilities, targets, weights)
}

/// logsumexp is recovered from the largest logit and its probability, which is at least 1/vocab
/// and so never underflows, where the target's own probability may.
fn weighted_nats(
    logits: Tensor<2>,
    probabilities: &Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Tensor<1>,
) -> Tensor<1> {
    let log_sum_exp = logits.clone().max_dim(1) - probabilities.clone().max_dim(1).log();
    let target_logits = logits.gather(1, targets.unsqueeze_dim(1));
    let nats: Tensor<1> = (log_sum_exp - target_logits).squeeze_dim(1);
    nats * weights
}
