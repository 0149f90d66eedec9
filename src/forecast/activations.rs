//! What a block keeps of each token for the backward pass.
//!
//! d is the hidden size, q and k the widths of all query and key heads, f that of the feed-forward
//! layer, h the heads, s the sequence length, e the bytes of an element of the compute dtype. On the
//! CPU norms, attention and gated products are one operation each, which keep what goes in and no more:
//!
//! | kept | bytes |
//! |---|---|
//! | per norm: its input, its output | 2 d e |
//! | queries, keys, values, and what attention gives | (2 q + 2 k) e |
//! | a gated product: gate, up, what goes down | 3 f e |
//! | norms of heads, and BitNet's two in front of the projections back: their input | (q + k) e, (q + f) e |
//!
//! On a GPU, and on both for GPT-2's norms and GELU, by burn's graph:
//!
//! | kept | bytes |
//! |---|---|
//! | per norm: its input and what it is scaled from in f32, its output | d (4 + 2 e) |
//! | queries, keys, values, and what attention gives | (2 q + 2 k) e |
//! | scores before and after the exponential, in f32, and the attention weights | h s (8 + e) |
//! | SwiGLU: gate, its sigmoid, their product, up, what goes down (GELU: before and after) | 5 f e (2 f e) |
//! | gated by ReLU²: the same with its root for the sigmoid; by ERA-GELU: with eight for the sigmoid | 5 f e, 12 f e |
//! | BitNet's norms in front of the two projections back: input in f32, what is scaled | (q + f) (4 + e) |
//!
//! With adapters the base model's weights have no gradient, and a norm of burn's keeps no scaled input, d e less. An
//! adapter keeps x A, r e; DoRA the layer's output before it is stretched. With dropout, layers that read the same x
//! keep what it is multiplied with and what is left of it, 2 e for each number of x.
//!
//! Rounding to ternary weights and 8-bit activations adds nothing: x' takes the place of x.
//!
//! With gradient checkpointing that is kept for one block at a time, and of the others their input,
//! d e.

use std::collections::BTreeMap;

use super::OfPhase;
use super::term::product;
use crate::config::{DecoderSpec, HiddenAct};

/// Bytes that a block keeps of each token for the backward pass: the tables above.
pub(super) fn kept_by_block(
    of: OfPhase,
    spec: &DecoderSpec,
    (element, is_cpu): (u64, bool),
) -> u64 {
    let (phase, shape) = (of.phase, &spec.shape);
    let sequence_len = phase.data.sequence_len as u64;
    let hidden = shape.hidden_size as u64;
    let heads = shape.num_attention_heads as u64;
    let queries = heads * shape.head_dim as u64;
    let keys = (shape.num_key_value_heads * shape.head_dim) as u64;
    let ffn = shape.intermediate_size as u64;
    let (is_gpt2, is_bitnet) = (shape.is_gpt2_form(), shape.is_bitnet_form());
    // What a norm keeps of each number besides its output, and what its output is scaled from.
    let (input, scaled) = match (is_cpu && !is_gpt2, of.adapter.is_some()) {
        (true, _) => (element, 0),
        (false, true) => (4, 0),
        (false, false) => (4, element),
    };
    let norms = 2 * hidden * (input + scaled + element);
    let head_norms = if !shape.qk_norm {
        0
    } else if is_cpu {
        (queries + keys) * input
    } else {
        (queries + keys) * (input + scaled + element)
    };
    let projections = (2 * queries + 2 * keys) * element;
    let scores = if is_cpu {
        0
    } else {
        product([heads, sequence_len, 8 + element])
    };
    let feed_forward = match (shape.hidden_act, is_cpu) {
        (None, _) => 2,
        (Some(_), true) => 3,
        (Some(HiddenAct::Silu | HiddenAct::Relu2), false) => 5,
        (Some(HiddenAct::GeluEra), false) => 12,
    } * ffn
        * element;
    let sub_norms = match (is_bitnet, is_cpu) {
        (false, _) => 0,
        (true, true) => (queries + ffn) * element,
        (true, false) => (queries + ffn) * (4 + element),
    };
    let adapters = kept_by_adapters(of, spec) * element;
    let rest = norms + head_norms + sub_norms + projections + feed_forward + adapters;
    scores.saturating_add(rest)
}

/// Numbers that the adapters of a block keep of each token; on average, where blocks differ.
fn kept_by_adapters(of: OfPhase, spec: &DecoderSpec) -> u64 {
    let Some(adapter) = of.adapter else {
        return 0;
    };
    let layers = spec.shape.linear_layers(spec.vocab_size).into_iter();
    let mut reads = BTreeMap::new();
    let mut kept = 0;
    for layer in layers {
        let Some(shape) = adapter.layers.get(&layer.path) else {
            continue;
        };
        let [inputs, outputs] = layer.dims;
        kept += shape.rank + if shape.magnitude { outputs } else { 0 };
        if shape.dropout > 0.0 {
            reads.insert((layer.block, input_of(&layer.path)), 2 * inputs);
        }
    }
    let dropped: usize = reads.values().sum();
    ((kept + dropped) as u64).div_ceil(spec.shape.num_hidden_layers as u64)
}

/// Which of a block's tensors a layer reads, by one name for those that read the same.
fn input_of(path: &str) -> &'static str {
    match path.rsplit('.').next() {
        Some("q_proj" | "k_proj" | "v_proj") => "attention",
        Some("gate_proj" | "up_proj") => "feed-forward",
        Some("o_proj") => "what attention gives",
        Some("down_proj") => "what the feed-forward layer gives",
        _ => "the last norm",
    }
}
