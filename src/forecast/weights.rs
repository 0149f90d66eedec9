//! The weights that a process holds: those of the model, of a reference model, and rounded ones.

use super::OfPhase;
use super::memory::Counts;
use super::term::{Term, product, term};
use crate::config::{AdapterInit, AdapterPlan, DecoderSpec, ModelShape};
use crate::readable::grouped;

/// The model's weights: all in f32, but for those of a base model that are codes or packed trits.
pub(super) fn weights(of: OfPhase, spec: &DecoderSpec, counts: Counts) -> Term {
    let (p, in_blocks) = (counts.parameters, spec.shape.block_parameters());
    let codes = if of.adapter.is_none() {
        None
    } else if let Some(blockwise) = spec.shape.blockwise {
        let layers = spec.shape.linear_layers(spec.vocab_size);
        let in_blocks = layers.iter().filter(|layer| layer.block.is_some());
        let bytes = in_blocks.map(|layer| blockwise.of_matrix(layer.dims).bytes() as u64);
        Some((blockwise.format.name(), bytes.sum()))
    } else {
        spec.shape.ternary.map(|_| ("packed trits", in_blocks / 4))
    };
    match codes {
        None => term(
            "weights",
            product([4, p]),
            format!("4 bytes x {}", grouped(p)),
        ),
        Some((name, bytes)) => {
            let rest = p - in_blocks;
            let formula = format!(
                "{} as {name}, 4 bytes x {}",
                grouped(in_blocks),
                grouped(rest)
            );
            term("weights", bytes + product([4, rest]), formula)
        }
    }
}

/// Bytes of the reference model (task = "dpo") that it does not share with the trained model. In f32
/// the two share the weights that are not trained, if the trained model is the base model with an
/// adapter. In half precision the reference is rounded once, and the rounded copy is kept.
pub(super) fn reference(
    of: OfPhase,
    spec: &DecoderSpec,
    counts: Counts,
    (element, is_cpu): (u64, bool),
) -> u64 {
    if of.phase.dpo.is_none() {
        return 0;
    }
    let shape = &spec.shape;
    let (all, in_blocks) = (shape.parameters(spec.vocab_size), shape.block_parameters());
    let dense = all - in_blocks;
    let leaves_base = |adapter: &AdapterPlan| adapter.init == AdapterInit::Default;
    let is_adapted = of.shares_base && of.adapter.is_some_and(leaves_base);
    if is_adapted && element == 4 {
        let adapters = counts.parameters - all;
        return product([4, counts.trainable.saturating_sub(adapters)]);
    }
    let shares_blocks = is_adapted && (shape.ternary.is_some() || shape.blockwise.is_some());
    let blocks = if shares_blocks {
        0
    } else if is_cpu && shape.ternary.is_some() {
        in_blocks / 4
    } else {
        product([element, in_blocks])
    };
    product([element, dense]).saturating_add(blocks)
}

/// What is rounded once a step: all weights in half precision, ternary ones in f32 (their masters and the others are used
/// as they are). Codes are not rounded.
pub(super) fn rounded(of: OfPhase, shape: &ModelShape, counts: Counts, element: u64) -> Term {
    let is_packed = of.adapter.is_some() && (shape.ternary.is_some() || shape.blockwise.is_some());
    let count = match (element, shape.ternary) {
        (4, Some(_)) if !is_packed => shape.block_parameters(),
        (4, _) => 0,
        _ if is_packed => counts.parameters - shape.block_parameters(),
        _ => counts.parameters,
    };
    term(
        "rounded weights",
        product([element, count]),
        format!("{element} bytes x {}", grouped(count)),
    )
}
