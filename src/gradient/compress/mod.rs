//! Gradients that travel between workers in fewer bytes.
//!
//! Every worker keeps a residual e for each matrix: what it has not sent yet. A step sends a code of
//! the residual and the new gradient, and keeps the error (Seide et al., 2014; Karimireddy et al.,
//! 2019, "Error feedback fixes SignSGD"):
//!
//! ```text
//! e <- decay · e + g          each worker, its own gradient
//! c  = C(e)                   what the worker sends
//! e <- e - D(c)               the error stays for the next step
//! ĝ  = Σ D(c)                 over all workers, in their order: the gradient of the step
//! ```
//!
//! With a decay of 1 nothing is lost in the long run. With a decay below 1 the residual is a
//! momentum, of which each step takes the largest part away (Peng et al., 2024, "DeMo", which uses
//! .999 and updates by the sign of ĝ; Sarfi et al., 2025, "SparseLoCo", .95).
//!
//! A [`Compressor`] is C and D. The codes of all workers are gathered, and every rank decodes them.
//! A [`LinearCompressor`] sends numbers that may be added on their way, so that a rank receives as
//! many bytes however many ranks there are; it may take several rounds. Vectors (norms, biases) are
//! few numbers and travel as they are, or seldom: [`Vectors`]. All codes of a round are one message,
//! so that a round has one exchange however many matrices there are.

mod demo;
mod linear;
mod message;
mod method;
mod pays;
mod powersgd;
mod random;
mod residuals;
mod sign;
mod sketch;
mod sparse;
#[cfg(test)]
mod tests;
mod vectors;

use std::fmt::Debug;

use firebrick_kernels::vsa::Seed;
use rayon::prelude::*;

use super::{Exchange, ExchangeReport, Gradient, NamedParameter, PipelineError, StepContext};
use crate::collective::Collective;
use crate::config::CompressionPlan;
use crate::extra::ExtraState;
use message::{Reader, Writer};
use residuals::Residuals;

pub use demo::Demo;
pub use linear::{LinearCompressor, Round};
pub use method::{Method, RatioError, Reach};
pub use pays::Pays;
pub use powersgd::PowerSgd;
pub use random::RandomK;
pub use sign::Sign;
pub use sketch::Sketch;
pub use sparse::Sparse;
pub use vectors::Vectors;

/// A code of matrices that loses something: it has to leave less error than there was,
/// |x - D(C(x))|² <= (1 - δ) |x|² with δ > 0, or error feedback does not converge.
pub trait Compressor: Debug + Send + Sync {
    /// Appends the code of `values`, which are finite, to `bytes`, and subtracts from `values` what it
    /// decodes to.
    ///
    /// # Errors
    /// [`CompressError`] for values that have no code.
    fn encode(
        &self,
        tensor: &TensorContext,
        values: &mut [f32],
        bytes: &mut Vec<u8>,
    ) -> Result<(), CompressError>;

    /// Adds what another worker's `bytes` decode to.
    ///
    /// # Errors
    /// [`CompressError`] for bytes that no worker can have sent.
    fn add_decoded(
        &self,
        tensor: &TensorContext,
        bytes: &[u8],
        sum: &mut [f32],
    ) -> Result<(), CompressError>;

    /// Called once when the codes of all workers have been added: turns the sum of codes into a sum
    /// of matrices, where codes are added in another basis.
    fn finish(&self, _tensor: &TensorContext, _sum: &mut [f32]) {}

    /// Replaces `sum`, which is zero, by what the codes of all workers stand for together: their sum,
    /// unless the method has another rule. `place` is that of the worker in `codes`.
    ///
    /// # Errors
    /// The place of the first worker whose bytes no worker can have sent, and what is wrong.
    fn decode(
        &self,
        tensor: &TensorContext,
        codes: &[&[u8]],
        sum: &mut [f32],
    ) -> Result<(), (usize, CompressError)> {
        for (worker, code) in codes.iter().enumerate() {
            let added = self.add_decoded(tensor, code, sum);
            added.map_err(|error| (worker, error))?;
        }
        self.finish(tensor, sum);
        Ok(())
    }
}

/// The matrix that is coded.
#[derive(Debug, Clone, Copy)]
pub struct TensorContext<'a> {
    /// Path and dimensions of the parameter.
    pub parameter: &'a NamedParameter,
    /// Follows from the run, the step and the path: the same on every rank, another one in every
    /// step.
    pub seed: Seed,
}

impl<'a> TensorContext<'a> {
    pub(super) fn new(parameter: &'a NamedParameter, of_step: Seed) -> Self {
        let seed = of_step.with_name(&parameter.path);
        Self { parameter, seed }
    }

    /// The dimensions of the matrix, [rows, cols].
    fn dims(&self) -> [usize; 2] {
        let dims = &self.parameter.dims;
        let cols = dims.last().copied().unwrap_or(1);
        [dims[..dims.len().saturating_sub(1)].iter().product(), cols]
    }
}

/// Why a matrix cannot be coded, or bytes cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CompressError {
    /// An element that is not finite.
    #[error("element {0} is not finite")]
    NotFinite(usize),
    /// Bytes that no worker can have sent.
    #[error("the bytes received are damaged: {0}")]
    Damaged(String),
}

/// Error feedback around a [`Compressor`] or a [`LinearCompressor`].
///
/// If a step is skipped after its exchange, because its gradient norm is above the limit of the
/// settings or the sum is not finite, the part that was sent is lost and the rest stays in the
/// residual.
#[derive(Debug)]
pub struct Compression {
    code: Code,
    settings: CompressionSettings,
    /// What the code and the settings follow from, together with the trained parameters; None for a
    /// code that was given.
    plan: Option<CompressionPlan>,
    residuals: Residuals,
    report: Option<ExchangeReport>,
}

/// How codes travel.
#[derive(Debug)]
enum Code {
    /// Every rank gets the codes of all workers.
    Gathered(Box<dyn Compressor>),
    /// Codes are added on their way.
    Added(Box<dyn LinearCompressor>),
}

/// The settings of [`Compression`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CompressionSettings {
    /// What a residual is multiplied by in each step, above 0 and at most 1.
    pub residual_decay: f32,
    /// Steps at the beginning whose gradients travel whole.
    pub warmup_steps: u64,
    /// Whether the error is kept. Without it, what a step does not send is lost.
    pub error_feedback: bool,
    /// How vectors travel.
    pub vectors: Vectors,
    /// Logical workers of this rank, at least 1.
    pub workers: usize,
}

impl Default for CompressionSettings {
    /// A decay of 1, no warm-up, error feedback, vectors in f32 in every step, one worker.
    fn default() -> Self {
        Self {
            residual_decay: 1.0,
            warmup_steps: 0,
            error_feedback: true,
            vectors: Vectors::Whole,
            workers: 1,
        }
    }
}

impl Compression {
    /// Error feedback around a code that every rank decodes.
    ///
    /// # Errors
    /// [`PipelineError::Stage`] for a decay that is not above 0 and at most 1.
    pub fn new(
        compressor: Box<dyn Compressor>,
        settings: CompressionSettings,
    ) -> Result<Self, PipelineError> {
        Self::of(Code::Gathered(compressor), settings)
    }

    /// Error feedback around a code that is added on its way.
    ///
    /// # Errors
    /// As [`new`](Self::new); and for vectors that travel seldom, which such a code cannot.
    pub fn linear(
        compressor: Box<dyn LinearCompressor>,
        settings: CompressionSettings,
    ) -> Result<Self, PipelineError> {
        if settings.vectors != Vectors::Whole {
            return Err(failure(
                "vectors travel whole beside numbers that are added".to_string(),
            ));
        }
        Self::of(Code::Added(compressor), settings)
    }

    fn of(code: Code, settings: CompressionSettings) -> Result<Self, PipelineError> {
        let decay = settings.residual_decay;
        if !(decay > 0.0 && decay <= 1.0) {
            return Err(failure(format!(
                "a residual decay of {decay}: it has to be above 0 and at most 1"
            )));
        }
        Ok(Self {
            code,
            settings,
            plan: None,
            residuals: Residuals::new(settings.workers.max(1)),
            report: None,
        })
    }

    /// The residual of the parameter at a path, of a worker of this rank; None before the first step.
    pub fn residual(&self, worker: usize, path: &str) -> Option<&[f32]> {
        self.residuals.of(worker, path)
    }
}

/// A tensor of one worker on its way.
struct Sent {
    parameter: NamedParameter,
    /// A matrix: its residual. A vector: what it has not sent, the new gradient included.
    values: Vec<f32>,
    code: Vec<u8>,
}

impl Sent {
    fn is_matrix(&self) -> bool {
        is_matrix(&self.parameter)
    }
}

/// What came of the codes of a step.
struct Received {
    /// The sum over all workers, by tensor.
    sums: Vec<Vec<f32>>,
    /// Bytes that this rank's workers sent.
    sent: u64,
    /// Bytes that a worker of this rank received from the others.
    received: u64,
}

impl Compression {
    /// The sum of whole gradients.
    fn reduce_whole(
        &mut self,
        gradients: Vec<Gradient>,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError> {
        let workers = (gradients.len() * context.collective.ranks()) as u64;
        let own = summed(gradients);
        let (mut sum, mut bytes) = (own.clone(), 0);
        sum.try_update(|parameter, values| {
            bytes += 4 * values.len() as u64;
            context.collective.sum_gradient(&parameter.path, values)
        })?;
        self.report = Some(ExchangeReport {
            sent_bytes: bytes,
            received_bytes: if workers > 1 { bytes } else { 0 },
            gradient_bytes: bytes,
            sent_energy: 1.0,
            cosine: sum.cosine(&own),
            residual_norm: self.residuals.squares().sqrt(),
        });
        Ok(sum)
    }

    /// Adds the gradients of this rank's workers to their residuals. Returns what is to be sent, by
    /// worker, and its squared norm.
    fn take_in(
        &mut self,
        gradients: &mut [Gradient],
    ) -> Result<(Vec<Vec<Sent>>, f64), PipelineError> {
        let (mut workers, mut energy) = (Vec::new(), 0.0);
        for (worker, gradient) in gradients.iter_mut().enumerate() {
            let mut all = Vec::new();
            gradient.try_update(|parameter, values| {
                let kept = match is_matrix(parameter) {
                    true => self.settings.residual_decay,
                    // A vector that is sent seldom is added up until then.
                    false => 1.0,
                };
                let residual = self.residuals.take(worker, parameter, values.len());
                let mut residual = residual.map_err(failure)?;
                for (residual, value) in residual.iter_mut().zip(values.iter()) {
                    *residual = kept * *residual + value;
                }
                if let Some(bad) = residual.iter().position(|value| !value.is_finite()) {
                    let (path, error) = (&parameter.path, CompressError::NotFinite(bad));
                    return Err(failure(format!("`{path}`: {error}")));
                }
                if is_matrix(parameter) {
                    energy += squares(&residual);
                }
                all.push(Sent {
                    parameter: parameter.clone(),
                    values: residual,
                    code: Vec::new(),
                });
                Ok::<(), PipelineError>(())
            })?;
            workers.push(all);
        }
        Ok((workers, energy))
    }
}

/// Codes every tensor, gathers the codes of all workers and adds up what they decode to. The errors
/// stay in the values.
fn gathered(
    compressor: &dyn Compressor,
    vectors: Vectors,
    workers: &mut [Vec<Sent>],
    context: &StepContext,
) -> Result<Received, PipelineError> {
    let of_step = Seed::new(context.seed).with(context.step);
    let (own_workers, tensors) = (workers.len(), workers[0].len());
    let all: Vec<&mut Sent> = workers.iter_mut().flatten().collect();
    all.into_par_iter().try_for_each(|sent| {
        let Sent {
            parameter,
            values,
            code,
        } = sent;
        let coded = match is_matrix(parameter) {
            true => compressor.encode(&TensorContext::new(parameter, of_step), values, code),
            false => {
                vectors.encode(context.step, values, code);
                Ok(())
            }
        };
        coded.map_err(|error| failure(format!("`{}`: {error}", parameter.path)))
    })?;
    let mut message = Writer::default();
    for sent in workers.iter() {
        let mut of_worker = Writer::default();
        sent.iter().for_each(|sent| of_worker.push(&sent.code));
        message.push(&of_worker.finish());
    }
    let message = message.finish();
    let sent = message.len() as u64;
    let messages = context.collective.gather(message)?;
    let all_bytes: u64 = messages.iter().map(|message| message.len() as u64).sum();

    // The codes of every worker, those of rank 0 first.
    let mut codes: Vec<Reader> = Vec::new();
    for (rank, message) in messages.iter().enumerate() {
        let wrong = || failure(format!("rank {rank} sent a message of another form"));
        let of_rank = Reader::new(message, own_workers).ok_or_else(wrong)?;
        for part in of_rank.parts() {
            codes.push(Reader::new(part, tensors).ok_or_else(wrong)?);
        }
    }
    let sum_of = |(place, sent): (usize, &Sent)| {
        let tensor = TensorContext::new(&sent.parameter, of_step);
        let codes: Vec<&[u8]> = codes.iter().map(|worker| worker.part(place)).collect();
        let mut sum = vec![0.0; sent.values.len()];
        let decoded = match sent.is_matrix() {
            true => compressor.decode(&tensor, &codes, &mut sum),
            false => vectors.decode(context.step, &codes, &mut sum),
        };
        let path = &sent.parameter.path;
        decoded
            .map_err(|(worker, error)| failure(format!("`{path}` of worker {worker}: {error}")))?;
        Ok(sum)
    };
    let sums = workers[0].par_iter().enumerate().map(sum_of);
    Ok(Received {
        sums: sums.collect::<Result<_, PipelineError>>()?,
        sent,
        received: all_bytes - sent / own_workers as u64,
    })
}

impl Exchange for Compression {
    fn reduce(
        &mut self,
        gradients: Vec<Gradient>,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError> {
        let mut gradients = gradients;
        let own_workers = gradients.len();
        if own_workers != self.residuals.workers() {
            let made_for = self.residuals.workers();
            return Err(failure(format!(
                "gradients of {own_workers} workers, where {made_for} were to come"
            )));
        }
        if context.step < self.settings.warmup_steps {
            return self.reduce_whole(gradients, context);
        }
        let (mut workers, energy) = self.take_in(&mut gradients)?;
        let received = match &self.code {
            Code::Gathered(compressor) => {
                let vectors = self.settings.vectors;
                gathered(compressor.as_ref(), vectors, &mut workers, context)?
            }
            Code::Added(compressor) => {
                let memory = &mut self.residuals.shared;
                linear::added(compressor.as_ref(), memory, &mut workers, context)?
            }
        };
        let Received {
            sums,
            sent,
            received,
        } = received;

        let elements: usize = workers[0].iter().map(|sent| sent.values.len()).sum();
        let mut left = 0.0;
        for (worker, sent) in workers.into_iter().enumerate() {
            for sent in sent {
                if sent.is_matrix() {
                    left += squares(&sent.values);
                }
                let is_kept = match sent.is_matrix() {
                    true => self.settings.error_feedback,
                    false => self.settings.vectors.leave_something(),
                };
                if is_kept {
                    self.residuals.put(worker, sent.parameter.path, sent.values);
                }
            }
        }
        let own = summed(gradients);
        let mut sum = own.clone();
        let mut sums = sums.into_iter();
        sum.update(|_, values| {
            if let Some(sum) = sums.next() {
                values.copy_from_slice(&sum);
            }
        });
        let share_sent = match energy > 0.0 {
            true => 1.0 - left / energy,
            false => 1.0,
        };
        self.report = Some(ExchangeReport {
            sent_bytes: sent / own_workers as u64,
            received_bytes: received,
            gradient_bytes: 4 * elements as u64,
            sent_energy: share_sent,
            cosine: sum.cosine(&own),
            residual_norm: self.residuals.squares().sqrt(),
        });
        Ok(sum)
    }

    fn report(&self) -> Option<ExchangeReport> {
        self.report
    }

    fn state(&self, collective: &dyn Collective) -> Result<ExtraState, PipelineError> {
        Ok(self.residuals.state(collective)?)
    }

    fn load(
        &mut self,
        state: ExtraState,
        collective: &dyn Collective,
    ) -> Result<Option<String>, PipelineError> {
        let wrong = |reason: String| PipelineError::State {
            owner: super::exchange::OWNER.to_string(),
            reason,
        };
        self.residuals.load(state, collective).map_err(wrong)
    }

    fn enter_phase(
        &mut self,
        trained: &[NamedParameter],
        is_new: &dyn Fn(&str) -> bool,
    ) -> Result<(), PipelineError> {
        let is_trained = |path: &str| trained.iter().any(|parameter| parameter.path == path);
        self.residuals
            .forget(&|path| !is_trained(path) || is_new(path));
        if let Some(plan) = &self.plan {
            let other = Method::new(plan, trained, self.settings.workers)?.compression;
            (self.code, self.settings) = (other.code, other.settings);
        }
        Ok(())
    }
}

/// The sum of the gradients of this rank's workers, in their order.
fn summed(gradients: Vec<Gradient>) -> Gradient {
    let mut gradients = gradients.into_iter();
    let first = gradients.next().unwrap_or_default();
    gradients.fold(first, Gradient::add)
}

fn is_matrix(parameter: &NamedParameter) -> bool {
    parameter.dims.len() > 1
}

fn squares(values: &[f32]) -> f64 {
    let chunks = values.par_chunks(1 << 14);
    // Squares of large f32 are finite in f64.
    let of_chunk = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    // Collected first: the order of the sum must not depend on the threads.
    let sums: Vec<f64> = chunks.map(of_chunk).collect();
    sums.into_iter().sum()
}

fn failure(reason: String) -> PipelineError {
    PipelineError::Stage {
        owner: super::exchange::OWNER.to_string(),
        reason,
    }
}
