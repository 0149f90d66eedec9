//! Forward and backward pass over one shard of a batch, with low peak memory.
//!
//! The output head is done a chunk of tokens at a time: logits, their softmax and their gradient
//! are `[tokens, vocab]` each, by far the largest tensors of a step with a large vocabulary, and a
//! chunk's are freed before the next chunk's are made. That costs nothing but a few additions.
//!
//! With gradient checkpointing by block (Chen et al., 2016) the forward pass keeps only what goes
//! into each block. The backward pass takes the blocks from last to first, computes each again with
//! a graph of its own, and frees that graph before the next: one block's graph at a time instead of
//! all of them, for one more forward pass.
//!
//! Pieces are joined by a scalar: an output y receives its gradient g through `sum(y · g)`, whose
//! derivative with respect to y is exactly g. The operations are those of one whole graph; only the
//! order in which gradients of joining paths are added differs, so the result is the same to
//! rounding.

use std::borrow::Cow;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Tensor;

use super::ShardPass;
use crate::data::Batch;
use crate::gradient::{Gradient, ParameterOrder};
use crate::model::{Context, Decoder, ModelError};

/// Returns Σ weight · nats over `batch`, and the gradient of `pass.scale` times that sum, in the
/// model's dtype. `reweigh` replaces the weights, computing them from the tokens' nats.
pub(super) fn forward_backward(
    model: &Decoder,
    batch: &Batch,
    pass: &ShardPass,
    reweigh: Option<&mut Reweigh>,
) -> Result<(f64, Gradient), ModelError> {
    if pass.precision.gradient_checkpointing {
        by_block(model, batch, pass, reweigh)
    } else {
        whole(model, batch, pass, reweigh)
    }
}

/// Forward and backward over `batch` with the graph of one block at a time.
fn by_block(
    model: &Decoder,
    batch: &Batch,
    pass: &ShardPass,
    reweigh: Option<&mut Reweigh>,
) -> Result<(f64, Gradient), ModelError> {
    let context = model.context(batch).with_dropout(pass.dropout);
    let (inputs, output) = forward_no_grad(model, &context, batch)?;
    let reweighted = reweighted(model, &output, batch, reweigh);
    let mut head = head_backward(model, output, &reweighted, pass);
    // Nothing below the first block with something to train needs a gradient.
    let through = model.trains_embedding();
    let first = if through {
        Some(0)
    } else {
        model.first_trained_block()
    };
    let blocks = model.layers.iter().zip(inputs);
    for (block, input) in blocks.skip(first.unwrap_or(usize::MAX)).rev() {
        let x = Tensor::from_inner(input).require_grad();
        let y = block.forward(x.clone(), &context);
        let objective = inner_product(y, head.upstream);
        head.upstream = vjp(&objective, &x, &mut head.gradient, block);
    }
    if !through {
        return Ok((head.nats, head.gradient));
    }
    let objective = inner_product(model.embed_batch(batch)?, head.upstream);
    let embedding = Gradient::from_grads(objective.backward(), model, &pass.order);
    Ok((head.nats, head.gradient.add(embedding)))
}

/// Forward and backward over `batch` with the graph of all blocks at once.
fn whole(
    model: &Decoder,
    batch: &Batch,
    pass: &ShardPass,
    reweigh: Option<&mut Reweigh>,
) -> Result<(f64, Gradient), ModelError> {
    let context = model.context(batch).with_dropout(pass.dropout);
    let hidden = model.hidden_in(&context, batch)?;
    let output = hidden.clone().inner();
    let reweighted = reweighted(model, &output, batch, reweigh);
    let head = head_backward(model, output, &reweighted, pass);
    if !hidden.is_tracked() {
        return Ok((head.nats, head.gradient));
    }
    let objective = inner_product(hidden, head.upstream);
    let below = Gradient::from_grads(objective.backward(), model, &pass.order);
    Ok((head.nats, head.gradient.add(below)))
}

/// New loss weights for a batch, from the weight · nats of each of its tokens: for losses that are no
/// sum over tokens.
pub(super) type Reweigh<'a> = dyn FnMut(&[f32], &Batch) -> Vec<f32> + 'a;

/// The batch with the weights that `reweigh` computes from the output of the last block.
fn reweighted<'a>(
    model: &Decoder,
    output: &Tensor<2>,
    batch: &'a Batch,
    reweigh: Option<&mut Reweigh>,
) -> Cow<'a, Batch> {
    let Some(reweigh) = reweigh else {
        return Cow::Borrowed(batch);
    };
    let nats = model.valid().token_nats(output.clone(), batch);
    let weights = reweigh(&nats, batch);
    Cow::Owned(Batch {
        weights,
        ..batch.clone()
    })
}

/// What the last norm, the output head and the loss give back.
struct Head {
    /// Σ weight · nats.
    nats: f64,
    /// Of the parameters of norm and head.
    gradient: Gradient,
    /// Of what came out of the last block, `[rows x cols, dim]`.
    upstream: Tensor<2>,
}

/// Norm, head and loss forward and backward, a chunk of tokens at a time.
fn head_backward(model: &Decoder, hidden: Tensor<2>, batch: &Batch, pass: &ShardPass) -> Head {
    let mut gradient = Gradient::empty(&pass.order);
    let (mut sums, mut upstream) = (Vec::new(), Vec::new());
    for tokens in model.logit_chunks(batch.targets.len()) {
        let chunk = hidden.clone().narrow(0, tokens.start, tokens.len());
        let chunk = Tensor::from_inner(chunk).require_grad();
        let loss = model.loss_of_tokens(chunk.clone(), batch, tokens, pass.scale);
        upstream.push(vjp(&loss.objective, &chunk, &mut gradient, model));
        sums.push(loss.sum);
    }
    let sums = Tensor::cat(sums, 0).into_data();
    Head {
        nats: sums.iter::<f32>().map(f64::from).sum(),
        gradient,
        upstream: Tensor::cat(upstream, 0),
    }
}

/// The inputs of the blocks, first to last, and the output of the last one. Nothing is kept for a
/// backward pass.
fn forward_no_grad(
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

/// The vector-Jacobian product: runs the backward pass from `objective`, adds the gradients of
/// `module`'s parameters to `gradient`, and returns the gradient of `input`.
fn vjp(
    objective: &Tensor<1>,
    input: &Tensor<2>,
    gradient: &mut Gradient,
    module: &impl Module,
) -> Tensor<2> {
    let mut grads = objective.backward();
    let own = input.grad_remove(&mut grads);
    let sum = std::mem::take(gradient);
    let order: Arc<ParameterOrder> = sum.order().clone();
    *gradient = sum.add(Gradient::from_grads(grads, module, &order));
    // Every objective here is a function of its input.
    own.expect("the objective depends on its input")
}
