//! The sum of a step's memory.
//!
//! For each token, burn keeps these of a block for its backward pass (d hidden size, q and k widths
//! of all query and key heads, f width of the feed-forward layer, h heads, s sequence length, e
//! bytes of an element of the compute dtype):
//!
//! | kept | bytes |
//! |---|---|
//! | per norm: its input and what it is scaled from in f32, its output | d (4 + 2 e) |
//! | queries, keys, values, and what attention gives | (2 q + 2 k) e |
//! | scores before and after the exponential, in f32, and the attention weights | h s (8 + e) |
//! | SwiGLU: gate, its sigmoid, their product, up, what goes down (GELU: before and after) | 5 f e (2 f e) |
//! | BitNet's norms in front of the two projections back: input in f32, what is scaled | (q + f) (4 + e) |
//!
//! Rounding to ternary weights and 8-bit activations adds nothing: x' takes the place of x. BitNet's ReLU² keeps as
//! many tensors as SwiGLU.
//!
//! With gradient checkpointing that is kept for one block at a time, and of the others their input,
//! d e.

use serde::Serialize;

use super::{Conditions, element_bytes};
use crate::config::{DecoderSpec, ModelShape, Plan};
use crate::model::logit_chunk;
use crate::readable::grouped;

/// Bytes held at the moment at which most are held, term by term.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Memory {
    /// That moment.
    pub moment: Moment,
    /// What is held then, largest parts of the model first.
    pub terms: Vec<Term>,
}

/// A moment of a run at which much is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// The forward pass is over, the loss is being computed.
    Loss,
    /// The first of the backward pass with gradient checkpointing: the last block is computed again.
    LastBlock,
    /// The end of the backward pass: all gradients are there.
    FirstBlock,
    /// A checkpoint is being written.
    Saving,
}

/// A term of the sum.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Term {
    /// What is held.
    pub name: &'static str,
    /// How many bytes.
    pub bytes: u64,
    /// How they come about.
    pub formula: String,
}

impl Moment {
    /// As in "at the end of the backward pass".
    pub fn describe(self) -> &'static str {
        match self {
            Moment::Loss => "when the loss is computed",
            Moment::LastBlock => "when the last block is recomputed",
            Moment::FirstBlock => "at the end of the backward pass",
            Moment::Saving => "while a checkpoint is written",
        }
    }
}

impl Memory {
    pub(super) fn new(
        plan: &Plan,
        spec: &DecoderSpec,
        parameters: u64,
        optimizer_state: u64,
        conditions: Conditions,
    ) -> Self {
        let sizes = Sizes::new(plan, spec, parameters, optimizer_state, conditions);
        let moments = if plan.config.train.gradient_checkpointing {
            vec![
                (Moment::Loss, sizes.loss_with_inputs()),
                (Moment::LastBlock, sizes.last_block()),
                (Moment::FirstBlock, sizes.first_block()),
                (Moment::Saving, sizes.saving()),
            ]
        } else {
            vec![
                (Moment::Loss, sizes.loss_with_activations()),
                (Moment::FirstBlock, sizes.first_block()),
                (Moment::Saving, sizes.saving()),
            ]
        };
        let always = sizes.always();
        let sums = moments.into_iter().map(|(moment, own)| {
            let mut terms = always.clone();
            terms.extend(own);
            terms.retain(|term| term.bytes > 0);
            Self { moment, terms }
        });
        // There is at least one moment.
        let mut peak = sums
            .max_by_key(Self::peak_bytes)
            .expect("a step has a moment");
        if conditions.is_cpu {
            peak.terms.extend(sizes.outside(peak.peak_bytes()));
        }
        peak
    }

    /// The sum.
    pub fn peak_bytes(&self) -> u64 {
        let bytes = self.terms.iter().map(|term| term.bytes);
        bytes.fold(0, u64::saturating_add)
    }
}

/// What the terms are made of.
struct Sizes {
    parameters: u64,
    optimizer_state: u64,
    optimizer: String,
    /// Bytes of the weights that are rounded once a step, to the compute dtype or to trits.
    rounded: Term,
    /// Bytes of an element of the compute dtype.
    element: u64,
    lanes: u64,
    /// Tokens of a micro-batch.
    tokens: u64,
    hidden: u64,
    ffn: u64,
    layers: u64,
    vocab: u64,
    /// Bytes that one block keeps for a token.
    kept: u64,
    /// Tokens whose logits are there at the same time, in all lanes.
    logit_tokens: u64,
    accumulates: bool,
    process: u64,
}

impl Sizes {
    fn new(
        plan: &Plan,
        spec: &DecoderSpec,
        parameters: u64,
        optimizer_state: u64,
        conditions: Conditions,
    ) -> Self {
        let (config, shape) = (&plan.config, &spec.shape);
        let rows = config.train.micro_batch_size as u64;
        let lanes = (conditions.lanes as u64).min(rows);
        let tokens = rows * config.data.sequence_len as u64;
        let element = element_bytes(config.model.dtype);
        let chunk = logit_chunk(spec.vocab_size) as u64;
        Self {
            parameters,
            optimizer_state,
            optimizer: format!("{:?}", config.optimizer.name).to_lowercase(),
            rounded: rounded(shape, parameters, element),
            element,
            lanes,
            tokens,
            hidden: shape.hidden_size as u64,
            ffn: shape.intermediate_size as u64,
            layers: shape.num_hidden_layers as u64,
            vocab: spec.vocab_size as u64,
            kept: kept_by_block(spec, config.data.sequence_len as u64, element),
            logit_tokens: tokens.min(lanes * chunk),
            accumulates: config.train.gradient_accumulation_steps > 1,
            process: conditions.process_bytes,
        }
    }

    /// Weights, moments, and what stays from one micro-batch to the next.
    fn always(&self) -> Vec<Term> {
        let p = self.parameters;
        vec![
            term(
                "weights",
                product([4, p]),
                format!("4 bytes x {}", grouped(p)),
            ),
            self.rounded.clone(),
            term(
                "optimizer",
                self.optimizer_state,
                format!(
                    "{}, {:.1} bytes a weight",
                    self.optimizer,
                    self.optimizer_state as f64 / p as f64
                ),
            ),
            term(
                "summed gradient",
                if self.accumulates { product([4, p]) } else { 0 },
                format!("4 bytes x {}, of the micro-batches before", grouped(p)),
            ),
        ]
    }

    fn loss_with_activations(&self) -> Vec<Term> {
        let activations = term(
            "activations",
            product([self.layers, self.tokens, self.kept]),
            format!(
                "{} blocks x {} tokens x {} bytes",
                self.layers,
                grouped(self.tokens),
                grouped(self.kept)
            ),
        );
        [vec![activations], self.loss()].concat()
    }

    fn loss_with_inputs(&self) -> Vec<Term> {
        [vec![self.inputs(self.layers)], self.loss()].concat()
    }

    fn loss(&self) -> Vec<Term> {
        vec![
            term(
                "logits",
                product([3, 4, self.logit_tokens, self.vocab]),
                format!(
                    "logits, softmax, gradient: 3 x 4 bytes x {} tokens x {}",
                    grouped(self.logit_tokens),
                    grouped(self.vocab)
                ),
            ),
            self.head_gradient(),
        ]
    }

    fn last_block(&self) -> Vec<Term> {
        vec![
            self.inputs(self.layers),
            self.one_block(),
            self.head_gradient(),
            self.passing(),
        ]
    }

    fn first_block(&self) -> Vec<Term> {
        vec![
            term(
                "gradients",
                product([4, self.parameters, self.lanes]),
                format!(
                    "4 bytes x {}{}",
                    grouped(self.parameters),
                    of_lanes(self.lanes)
                ),
            ),
            self.one_block(),
            self.passing(),
        ]
    }

    fn saving(&self) -> Vec<Term> {
        let copied = product([4, self.parameters]).max(self.optimizer_state);
        vec![term(
            "copy to write",
            copied,
            "the larger of weights and optimizer".to_string(),
        )]
    }

    /// What goes into each block.
    fn inputs(&self, blocks: u64) -> Term {
        let width = self.hidden * self.element;
        term(
            "block inputs",
            product([blocks, self.tokens, width]),
            format!(
                "{blocks} blocks x {} tokens x {} bytes",
                grouped(self.tokens),
                grouped(width)
            ),
        )
    }

    fn one_block(&self) -> Term {
        term(
            "activations",
            product([self.tokens, self.kept]),
            format!(
                "1 block x {} tokens x {} bytes",
                grouped(self.tokens),
                grouped(self.kept)
            ),
        )
    }

    fn head_gradient(&self) -> Term {
        term(
            "head gradient",
            product([self.element, self.vocab, self.hidden, self.lanes]),
            format!(
                "{} bytes x {} x {}{}",
                self.element,
                grouped(self.vocab),
                grouped(self.hidden),
                of_lanes(self.lanes)
            ),
        )
    }

    /// Gradients of activations on their way through a block: about one and a half of the
    /// feed-forward layer's width and two of the hidden size at the same time.
    fn passing(&self) -> Term {
        let width = (3 * self.ffn / 2 + 2 * self.hidden) * self.element;
        term(
            "passing gradients",
            product([self.tokens, width]),
            format!("{} tokens x {} bytes", grouped(self.tokens), grouped(width)),
        )
    }

    /// What else the process holds, and what its allocator keeps for reuse, besides `live` bytes.
    fn outside(&self, live: u64) -> Vec<Term> {
        vec![
            term("process", self.process, "program and tokens".to_string()),
            term(
                "allocator",
                ALLOCATOR_BASE + ALLOCATOR_PER_LANE * self.lanes + live / ALLOCATOR_SHARE,
                "kept for reuse: measured, see docs/performance.md".to_string(),
            ),
        ]
    }
}

/// What mimalloc keeps beside what is in use, with what no term counts: so many bytes, so many for
/// each thread that computes, and one in so many of the bytes in use. Fitted to the runs that
/// benches/memory.rs makes.
const ALLOCATOR_BASE: u64 = 9_000_000;
const ALLOCATOR_PER_LANE: u64 = 17_000_000;
const ALLOCATOR_SHARE: u64 = 33;

/// All weights in half precision, ternary ones in f32 (their masters and the others are used as they are).
fn rounded(shape: &ModelShape, parameters: u64, element: u64) -> Term {
    let count = match (element, shape.ternary) {
        (4, Some(_)) => shape.block_parameters(),
        (4, None) => 0,
        _ => parameters,
    };
    term(
        "rounded weights",
        product([element, count]),
        format!("{element} bytes x {}", grouped(count)),
    )
}

/// Bytes that a block keeps of each token for the backward pass: the table above.
fn kept_by_block(spec: &DecoderSpec, sequence_len: u64, element: u64) -> u64 {
    let shape = &spec.shape;
    let hidden = shape.hidden_size as u64;
    let heads = shape.num_attention_heads as u64;
    let queries = heads * shape.head_dim as u64;
    let keys = (shape.num_key_value_heads * shape.head_dim) as u64;
    let ffn = shape.intermediate_size as u64;
    let per_norm = 4 + 2 * element;
    let norms = 2 * hidden * per_norm;
    let head_norms = if shape.qk_norm {
        (queries + keys) * per_norm
    } else {
        0
    };
    let projections = (2 * queries + 2 * keys) * element;
    let scores = product([heads, sequence_len, 8 + element]);
    let feed_forward = if shape.is_gpt2_form() { 2 } else { 5 } * ffn * element;
    let sub_norms = if shape.is_bitnet_form() {
        (queries + ffn) * (4 + element)
    } else {
        0
    };
    scores.saturating_add(norms + head_norms + sub_norms + projections + feed_forward)
}

/// More than any machine has is as good as infinite.
fn product<const N: usize>(factors: [u64; N]) -> u64 {
    factors.into_iter().fold(1, u64::saturating_mul)
}

fn of_lanes(lanes: u64) -> String {
    if lanes == 1 {
        String::new()
    } else {
        format!(" x {lanes} cores")
    }
}

fn term(name: &'static str, bytes: u64, formula: String) -> Term {
    Term {
        name,
        bytes,
        formula,
    }
}
