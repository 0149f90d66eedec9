//! Gradient checkpointing by block (Chen et al., 2016): less memory, one more forward pass.
//!
//! The forward pass keeps only what goes into each block. The backward pass then takes the blocks
//! from last to first, computes each again with a graph of its own, and frees that graph before the
//! next. At any time there is one block's graph instead of all of them.
//!
//! A block's output y receives its gradient g through the scalar `sum(y · g)`, whose derivative
//! with respect to y is exactly g. The operations are those of the whole graph; only the order in
//! which the gradients of joining paths are added differs, so the gradient is the same to rounding.

use burn::module::Module;
use burn::tensor::Tensor;

use super::Gradient;
use crate::data::Batch;
use crate::model::{Context, Decoder, ModelError};

/// Σ weight · nats `[1]` over `batch` and the gradient of `scale` times it, in the model's dtype.
pub(super) fn blockwise(
    model: &Decoder,
    batch: &Batch,
    scale: f64,
) -> Result<(Tensor<1>, Gradient), ModelError> {
    let context = model.context(batch);
    let (inputs, output) = untracked(model, &context, batch)?;

    let hidden = Tensor::from_inner(output).require_grad();
    let loss = model.loss_after_blocks(hidden.clone(), batch, scale);
    let mut gradient = Gradient::default();
    let mut upstream = pull_back(&loss.objective, &hidden, &mut gradient, model);
    for (block, input) in model.layers.iter().zip(inputs).rev() {
        let x = Tensor::from_inner(input).require_grad();
        let y = block.forward(x.clone(), &context);
        upstream = pull_back(&inner_product(y, upstream), &x, &mut gradient, block);
    }
    let embedded = model.embed_batch(batch)?;
    let objective = inner_product(embedded, upstream);
    let embedding = Gradient::backward(&objective, model);
    Ok((loss.sum, gradient.accumulate(embedding, model)))
}

/// What goes into each block, first to last, and what comes out of the last one.
fn untracked(
    model: &Decoder,
    context: &Context,
    batch: &Batch,
) -> Result<(Vec<Tensor<2>>, Tensor<2>), ModelError> {
    let model = model.valid();
    let context = context.inner();
    let mut hidden = model.embed_batch(batch)?;
    let mut inputs = Vec::with_capacity(model.layers.len());
    for block in &model.layers {
        inputs.push(hidden.clone());
        hidden = block.forward(hidden, &context);
    }
    Ok((inputs, hidden))
}

/// A scalar whose derivative with respect to `y` is `upstream`.
fn inner_product(y: Tensor<2>, upstream: Tensor<2>) -> Tensor<1> {
    (y * Tensor::from_inner(upstream)).sum()
}

/// Runs backward from `objective`: adds the gradients of `module`'s parameters to `gradient` and
/// returns that of `input`.
fn pull_back(
    objective: &Tensor<1>,
    input: &Tensor<2>,
    gradient: &mut Gradient,
    module: &impl Module,
) -> Tensor<2> {
    let mut grads = objective.backward();
    let own = input.grad_remove(&mut grads);
    *gradient = std::mem::take(gradient).accumulate(Gradient::from_grads(grads, module), module);
    // Every objective here is a function of its input.
    own.expect("the objective depends on its input")
}
