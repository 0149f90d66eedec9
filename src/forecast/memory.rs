//! The sum of a step's memory: weights, what is kept of those that are trained, what is kept for the
//! backward pass, and what else a process holds.

use serde::Serialize;

use super::activations::kept_by_block;
use super::term::{Term, of_lanes, product, term};
use super::weights::{reference, rounded, weights};
use super::{Conditions, OfPhase, element_bytes};
use crate::config::{CheckpointFormat, DecoderSpec, ModelShape, PhasePlan, PredictMethod};
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
    /// The gradients of the workers are exchanged.
    Exchange,
    /// A checkpoint is being written.
    Saving,
}

impl Moment {
    /// As in "at the end of the backward pass".
    pub fn describe(self) -> &'static str {
        match self {
            Moment::Loss => "when the loss is computed",
            Moment::LastBlock => "when the last block is recomputed",
            Moment::FirstBlock => "at the end of the backward pass",
            Moment::Exchange => "while gradients are exchanged",
            Moment::Saving => "while a checkpoint is written",
        }
    }
}

impl Memory {
    pub(super) fn new(
        of: OfPhase,
        spec: &DecoderSpec,
        counts: Counts,
        conditions: Conditions,
    ) -> Self {
        let sizes = Sizes::new(of, spec, counts, conditions);
        let moments = if of.phase.gradient_checkpointing {
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
        let moments = moments
            .into_iter()
            .chain([(Moment::Exchange, sizes.exchange())]);
        let always = sizes.always();
        let sums = moments.map(|(moment, own)| {
            let passing = sum(&own);
            let mut terms = always.clone();
            terms.extend(own);
            terms.retain(|term| term.bytes > 0);
            (Self { moment, terms }, passing)
        });
        let peak = sums.max_by_key(|(memory, _)| memory.peak_bytes());
        // There is at least one moment.
        let (mut peak, passing) = peak.expect("a step has a moment");
        if conditions.is_cpu {
            peak.terms.extend(sizes.outside(passing));
        }
        peak
    }

    /// The sum.
    pub fn peak_bytes(&self) -> u64 {
        sum(&self.terms)
    }
}

fn sum(terms: &[Term]) -> u64 {
    let bytes = terms.iter().map(|term| term.bytes);
    bytes.fold(0, u64::saturating_add)
}

/// Weights of the model, and what is kept of those that are trained.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub(super) parameters: u64,
    pub(super) trainable: u64,
    /// Number of model values that are copied for a save.
    pub(super) copied: u64,
    /// Bytes.
    pub(super) optimizer_state: u64,
    /// Number of weights that have an average.
    pub(super) averaged: u64,
    /// Number of weights of trained matrices.
    pub(super) matrices: u64,
    /// Number of weights that a phase up to this one has made anew from a base and an adapter.
    pub(super) merged: u64,
}

/// What the terms are made of.
struct Sizes {
    /// Bytes of the weights.
    weights: Term,
    /// Bytes of a second model, which takes no part in training.
    reference: u64,
    trainable: u64,
    /// Number of model values that are copied for a save.
    copied: u64,
    /// Whether the output head has a gradient.
    trains_head: bool,
    optimizer_state: u64,
    optimizer: String,
    /// Bytes that predictions are made of.
    prediction: u64,
    /// Bytes of the average of the weights.
    average: u64,
    /// Bytes of the weights before an adapter was merged into them.
    before_merging: u64,
    /// Bytes of the residuals of compressed gradients, of all workers of this process.
    residuals: u64,
    /// Bytes of the gradients of this process's workers that are there together.
    exchanged: u64,
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
    /// Bytes of what is there of each logit, and what that is.
    logit: (u64, &'static str),
    /// Gradients that wait while another micro-batch is computed.
    waiting: u64,
    process: u64,
    saves: Saves,
    /// Bytes that attention works in, on all threads.
    attention: u64,
}

/// How checkpoints are written.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Saves {
    /// Weights, then moments, from one copy of each.
    Whole,
    /// From one copy of both.
    AtOnce,
    /// From one copy of both, while training goes on.
    Behind,
}

/// Summands of all columns that the `gemm` crate packs at a time, at most; fewer columns where they are
/// more than the third-level cache holds.
const PACKED_DEPTH: u64 = 512;

/// Bytes that ERA's graph holds of a logit: six numbers, among them its exponential, its share, two
/// terms of the result, and gradients. With 2,048 tokens and a vocabulary of 4,096 a run on the CPU
/// peaked 155 MB above one without ERA, which is 18.5 bytes a logit more than the usual 4.
const ERA_LOGIT: u64 = 24;

impl Sizes {
    fn new(of: OfPhase, spec: &DecoderSpec, counts: Counts, conditions: Conditions) -> Self {
        let (config, phase, shape) = (of.config, of.phase, &spec.shape);
        let rows = phase.micro_batch_size as u64;
        let lanes = (conditions.lanes as u64).min(rows);
        let tokens = rows * phase.data.sequence_len as u64;
        let element = element_bytes(phase.dtype);
        let of_lane = tokens.div_ceil(lanes.max(1)) as usize;
        let chunk = logit_chunk(of_lane, spec.vocab_size) as u64;
        Self {
            weights: weights(of, spec, counts),
            reference: reference(of, spec, counts, (element, conditions.is_cpu)),
            trainable: counts.trainable,
            copied: counts.copied,
            trains_head: of.adapter.is_none_or(|adapter| {
                let head = ["lm_head", "embed_tokens"];
                adapter
                    .saved
                    .iter()
                    .any(|module| head.contains(&module.as_str()))
            }),
            optimizer_state: counts.optimizer_state,
            optimizer: phase.optimizer.name(),
            prediction: match phase.predict.map(|predict| predict.method) {
                None => 0,
                Some(PredictMethod::Momentum | PredictMethod::Weights) => {
                    product([4, counts.trainable])
                }
                Some(PredictMethod::LeastSquares) => product([8, counts.trainable]),
            },
            average: product([4, counts.averaged]),
            before_merging: product([4, counts.merged]),
            residuals: match of.compression {
                Some(plan) if plan.error_feedback => {
                    product([4, counts.matrices, phase.workers as u64])
                }
                _ => 0,
            },
            exchanged: match of.compression {
                // The workers' own, their sum, and the sum over all workers.
                Some(_) => product([4, counts.trainable, phase.workers as u64 + 2]),
                None => 0,
            },
            rounded: rounded(of, shape, counts, element),
            element,
            lanes,
            tokens,
            hidden: shape.hidden_size as u64,
            ffn: shape.intermediate_size as u64,
            layers: shape.num_hidden_layers as u64,
            vocab: spec.vocab_size as u64,
            kept: kept_by_block(of, spec, (element, conditions.is_cpu)),
            logit_tokens: tokens.min(lanes * chunk),
            logit: match (conditions.is_cpu, element) {
                _ if shape.output_activation.is_some() => {
                    (ERA_LOGIT, "logits and what their activation keeps: 24")
                }
                (true, 4) => (4, "logits, their gradient in their place: 4"),
                (true, _) => (8, "logits and their gradient: 8"),
                (false, _) => (12, "logits, softmax, gradient: 12"),
            },
            waiting: match of.compression {
                // Those of the workers before stay apart.
                Some(_) => {
                    let own = u64::from(phase.gradient_accumulation_steps > 1);
                    phase.workers as u64 - 1 + own
                }
                None => u64::from(phase.micro_batches_per_rank() > 1),
            },
            process: conditions.process_bytes,
            saves: match (config.checkpoint.format, config.checkpoint.background) {
                (CheckpointFormat::Full, _) => Saves::Whole,
                (CheckpointFormat::Delta, false) => Saves::AtOnce,
                (CheckpointFormat::Delta, true) => Saves::Behind,
            },
            attention: attention_room(phase, shape, conditions),
        }
    }

    /// Weights, moments, and what stays from one micro-batch to the next.
    fn always(&self) -> Vec<Term> {
        let p = self.trainable;
        vec![
            self.weights.clone(),
            term(
                "reference",
                self.reference,
                "the base model, as it came".to_string(),
            ),
            self.rounded.clone(),
            term(
                "optimizer",
                self.optimizer_state,
                format!(
                    "{}, {:.1} bytes a trained weight",
                    self.optimizer,
                    self.optimizer_state as f64 / p.max(1) as f64
                ),
            ),
            term(
                "prediction",
                self.prediction,
                "earlier gradients or weights, 4 bytes x trained weights each".to_string(),
            ),
            term(
                "average",
                self.average,
                format!("4 bytes x {}", grouped(self.average / 4)),
            ),
            term(
                "residuals",
                self.residuals,
                "what workers have not sent: 4 bytes x weights of matrices x workers".to_string(),
            ),
            term(
                "summed gradient",
                product([4, p, self.waiting]),
                match self.waiting {
                    0 | 1 => format!("4 bytes x {}, of the micro-batches before", grouped(p)),
                    more => format!("4 bytes x {} x {more}, of the workers before", grouped(p)),
                },
            ),
            term(
                "copy being saved",
                match self.saves {
                    Saves::Behind => product([4, self.copied])
                        .saturating_add(self.optimizer_state)
                        .saturating_add(self.residuals)
                        .saturating_add(self.prediction)
                        .saturating_add(self.average),
                    Saves::Whole | Saves::AtOnce => 0,
                },
                match self.average {
                    0 => "weights and optimizer, while training goes on",
                    _ => "weights, optimizer and average, while training goes on",
                }
                .to_string(),
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
        let (bytes, what) = self.logit;
        vec![
            term(
                "logits",
                product([bytes, self.logit_tokens, self.vocab]),
                format!(
                    "{what} bytes x {} tokens x {}",
                    grouped(self.logit_tokens),
                    grouped(self.vocab)
                ),
            ),
            self.head_gradient(),
        ]
    }

    /// The output head's weights as a matrix product of the CPU reads them, some hundred summands at a
    /// time; those of other layers are small beside it.
    fn packed_head(&self) -> Term {
        let depth = self
            .hidden
            .div_ceil(self.hidden.div_ceil(PACKED_DEPTH).max(1));
        term(
            "packed head",
            product([4, self.vocab, depth]),
            format!("4 bytes x {} x {depth}", grouped(self.vocab)),
        )
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
        vec![self.gradients(), self.one_block(), self.passing()]
    }

    /// The gradients that waited are counted already.
    fn exchange(&self) -> Vec<Term> {
        let bytes = self
            .exchanged
            .saturating_sub(product([4, self.trainable, self.waiting]));
        let what = "gradients of the workers, their sum, and that over all workers".to_string();
        vec![term("exchange", bytes, what)]
    }

    fn gradients(&self) -> Term {
        term(
            "gradients",
            product([4, self.trainable, self.lanes]),
            format!(
                "4 bytes x {}{}",
                grouped(self.trainable),
                of_lanes(self.lanes)
            ),
        )
    }

    fn saving(&self) -> Vec<Term> {
        let (weights, moments) = (product([4, self.copied]), self.optimizer_state);
        let (copied, what) = match self.saves {
            Saves::Whole => (weights.max(moments), "the larger of weights and optimizer"),
            Saves::AtOnce => (weights.saturating_add(moments), "weights and optimizer"),
            // It is there all the time.
            Saves::Behind => (0, ""),
        };
        // The average is copied before the others, and kept until they are written.
        let (copied, what) = match (self.average, self.saves) {
            (0, _) | (_, Saves::Behind) => (copied, what.to_string()),
            (average, _) => (
                copied.saturating_add(average),
                format!("{what}, and the average"),
            ),
        };
        vec![term("copy to write", copied, what)]
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
            if self.trains_head {
                product([self.element, self.vocab, self.hidden, self.lanes])
            } else {
                0
            },
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

    /// What else the process holds, and what its allocator keeps for reuse, where so many bytes come and go in
    /// every step.
    fn outside(&self, passing: u64) -> Vec<Term> {
        vec![
            term("process", self.process, "program and tokens".to_string()),
            term(
                "attention",
                self.attention,
                "a head's keys and values, and scores of some queries, for each thread".to_string(),
            ),
            self.packed_head(),
            term(
                "chunks being saved",
                match self.saves {
                    Saves::Whole => 0,
                    Saves::AtOnce | Saves::Behind => {
                        let saved = product([4, self.copied]).saturating_add(self.optimizer_state);
                        let [least, most] = SAVED_PER_LANE;
                        (saved / 6).clamp(least, most) * self.lanes
                    }
                },
                "what a checkpoint is written from, for each thread".to_string(),
            ),
            term(
                "allocator",
                ALLOCATOR_PER_LANE * self.lanes
                    + passing / 4
                    + self.gradients().bytes / 7
                    + product([2, self.trainable, self.waiting.min(1)])
                    + self.before_merging,
                "kept for reuse: measured, see docs/performance.md".to_string(),
            ),
        ]
    }
}

/// What mimalloc keeps beside what is in use, with what no term counts, for each thread that computes. It
/// never gives back what comes and goes in every step: a quarter of it, and a seventh of the gradients
/// of weights, fit nothing that comes later. Half of the gradients that wait for other micro-batches
/// are kept too, and so are the weights into which an adapter has been merged. Fitted to the runs of
/// benches/memory.rs and benches/peers/qlora.py.
const ALLOCATOR_PER_LANE: u64 = 18_000_000;

/// The memory in which each thread codes a checkpoint: chunks of weights and moments, chunks of the
/// checkpoint before, and what is to be written. The allocator keeps a sixth of what is saved, between
/// these bounds. Measured with 3 and with 20 million weights.
const SAVED_PER_LANE: [u64; 2] = [12_000_000, 48_000_000];

/// Bytes that the CPU's attention keeps for its work on each thread: keys and values of a sequence four
/// times, turned and as panels, and the scores of 64 queries and their gradients.
fn attention_room(phase: &PhasePlan, shape: &ModelShape, conditions: Conditions) -> u64 {
    let of_token = 4 * 4 * shape.head_dim as u64 + 2 * 4 * 64;
    let sequence_len = phase.data.sequence_len as u64;
    product([conditions.lanes as u64, sequence_len, of_token])
}
