//! Gradients that travel between ranks in fewer bytes.
//!
//! Every rank keeps a residual e for each matrix: what it has not sent yet. A step sends a code of
//! the residual and the new gradient, and keeps the error (Seide et al., 2014; Karimireddy et al.,
//! 2019, "Error feedback fixes SignSGD"):
//!
//! ```text
//! e <- decay · e + g          each rank, its own gradient
//! c  = C(e)                   what the rank sends
//! e <- e - D(c)               the error stays for the next step
//! ĝ  = Σ D(c)                 over all ranks, in their order: the gradient of the step
//! ```
//!
//! With a decay of 1 nothing is lost in the long run. With a decay below 1 the residual is a
//! momentum, of which each step takes the largest part away (Peng et al., 2024, "DeMo", which uses
//! .999 and updates by the sign of ĝ; Sarfi et al., 2025, "SparseLoCo", .95).
//!
//! A [`Compressor`] is C and D. Vectors (norms, biases) are few numbers and travel as they are. All
//! codes of a step are one message, so that a step has one exchange however many matrices there
//! are.

mod message;
mod sign;
mod sparse;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Debug;

use burn::tensor::TensorData;
use firebrick_kernels::vsa::Seed;
use rayon::prelude::*;

use super::{Exchange, ExchangeReport, Gradient, NamedParameter, PipelineError, StepContext};
use crate::extra::ExtraState;
use message::{Reader, Writer};

pub use sign::Sign;
pub use sparse::Sparse;

/// A code of matrices that loses something: it has to leave less error than there was,
/// |x - D(C(x))|² <= (1 - δ) |x|² with δ > 0, or error feedback does not converge.
pub trait Compressor: Debug + Send + Sync {
    /// Appends the code of `values` to `bytes`, and subtracts from `values` what it decodes to.
    ///
    /// # Errors
    /// [`CompressError`] for values that have no code.
    fn encode(
        &self,
        tensor: &TensorContext,
        values: &mut [f32],
        bytes: &mut Vec<u8>,
    ) -> Result<(), CompressError>;

    /// Adds what another rank's `bytes` decode to.
    ///
    /// # Errors
    /// [`CompressError`] for bytes that no rank can have sent.
    fn add_decoded(
        &self,
        tensor: &TensorContext,
        bytes: &[u8],
        sum: &mut [f32],
    ) -> Result<(), CompressError>;

    /// Called once when the codes of all ranks have been added: turns the sum of codes into a sum of
    /// matrices, where codes are added in another basis.
    fn finish(&self, _tensor: &TensorContext, _sum: &mut [f32]) {}
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
    fn new(parameter: &'a NamedParameter, of_step: Seed) -> Self {
        let seed = of_step.with_name(&parameter.path);
        Self { parameter, seed }
    }
}

/// Why a matrix cannot be coded, or bytes cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CompressError {
    /// An element that is not finite.
    #[error("element {0} is not finite")]
    NotFinite(usize),
    /// Bytes that no rank can have sent.
    #[error("the bytes received are damaged: {0}")]
    Damaged(String),
}

/// Error feedback around a [`Compressor`].
///
/// If a step is skipped after its exchange, because its gradient norm is above the limit of the
/// settings or the sum is not finite, the part that was sent is lost and the rest stays in the
/// residual.
#[derive(Debug)]
pub struct Compression {
    compressor: Box<dyn Compressor>,
    settings: CompressionSettings,
    /// By path; the residual of this rank.
    residuals: BTreeMap<String, Vec<f32>>,
    /// The rank whose residuals these are, once it is known.
    rank: usize,
    report: Option<ExchangeReport>,
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
}

impl Default for CompressionSettings {
    /// A decay of 1, no warm-up, error feedback.
    fn default() -> Self {
        Self {
            residual_decay: 1.0,
            warmup_steps: 0,
            error_feedback: true,
        }
    }
}

impl Compression {
    /// Error feedback around `compressor`.
    ///
    /// # Errors
    /// [`PipelineError::Stage`] for a decay that is not above 0 and at most 1.
    pub fn new(
        compressor: Box<dyn Compressor>,
        settings: CompressionSettings,
    ) -> Result<Self, PipelineError> {
        let decay = settings.residual_decay;
        if !(decay > 0.0 && decay <= 1.0) {
            return Err(failure(format!(
                "a residual decay of {decay}: it has to be above 0 and at most 1"
            )));
        }
        Ok(Self {
            compressor,
            settings,
            residuals: BTreeMap::new(),
            rank: 0,
            report: None,
        })
    }

    /// The residual of the matrix at a path, `[rows · cols]`; None before the first step.
    pub fn residual(&self, path: &str) -> Option<&[f32]> {
        self.residuals.get(path).map(Vec::as_slice)
    }

    /// Adds the gradient to the residuals. Returns what is to be sent, in order, and its squared
    /// norm.
    fn take_in(&mut self, gradient: &mut Gradient) -> Result<(Vec<Sent>, f64), PipelineError> {
        let (mut all, mut energy) = (Vec::new(), 0.0);
        gradient.try_update(|parameter, values| {
            let mut sent = Sent {
                parameter: parameter.clone(),
                values: Vec::new(),
                code: Vec::new(),
            };
            if is_matrix(parameter) {
                let (decay, len) = (self.settings.residual_decay, values.len());
                let path = &parameter.path;
                let mut residual = self.residuals.remove(path).unwrap_or(vec![0.0; len]);
                if residual.len() != len {
                    let found = residual.len();
                    return Err(failure(format!(
                        "`{path}` has {len} elements, and its residual {found}"
                    )));
                }
                for (residual, value) in residual.iter_mut().zip(values.iter()) {
                    *residual = decay * *residual + value;
                }
                energy += squares(&residual);
                sent.values = residual;
            } else {
                sent.values = values.to_vec();
            }
            all.push(sent);
            Ok(())
        })?;
        Ok((all, energy))
    }
}

/// A tensor on its way.
struct Sent {
    parameter: NamedParameter,
    /// A matrix: its residual. A vector: its gradient.
    values: Vec<f32>,
    code: Vec<u8>,
}

impl Compression {
    /// The sum of whole gradients.
    fn reduce_whole(
        &mut self,
        mut gradient: Gradient,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError> {
        let mut bytes = 0;
        gradient.try_update(|parameter, values| {
            bytes += 4 * values.len() as u64;
            context.collective.sum_gradient(&parameter.path, values)
        })?;
        self.report = Some(ExchangeReport {
            sent_bytes: bytes,
            received_bytes: bytes * (context.collective.ranks() as u64 - 1),
            gradient_bytes: bytes,
            sent_energy: 1.0,
            residual_norm: 0.0,
        });
        Ok(gradient)
    }

    /// Codes every tensor; the errors stay in their values.
    fn encode(&self, all: &mut [Sent], of_step: Seed) -> Result<(), PipelineError> {
        all.par_iter_mut().try_for_each(|sent| {
            let Sent {
                parameter,
                values,
                code,
            } = sent;
            if !is_matrix(parameter) {
                code.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                return Ok(());
            }
            let tensor = TensorContext::new(parameter, of_step);
            let coded = self.compressor.encode(&tensor, values, code);
            coded.map_err(|error| failure(format!("`{}`: {error}", parameter.path)))
        })
    }

    /// Adds up the codes of all ranks, in their order.
    fn decode(
        &self,
        all: &[Sent],
        messages: &[Vec<u8>],
        of_step: Seed,
    ) -> Result<Vec<Vec<f32>>, PipelineError> {
        let of_rank = |(rank, message)| {
            Reader::new(message, all.len())
                .ok_or_else(|| failure(format!("rank {rank} sent a message of another form")))
        };
        let messages = messages.iter().map(Vec::as_slice).enumerate();
        let messages: Vec<Reader> = messages.map(of_rank).collect::<Result<_, _>>()?;
        let sum_of = |(place, sent): (usize, &Sent)| {
            let parameter = &sent.parameter;
            let tensor = TensorContext::new(parameter, of_step);
            let mut sum = vec![0.0; sent.values.len()];
            for (rank, message) in messages.iter().enumerate() {
                let code = message.part(place);
                let added = match is_matrix(parameter) {
                    true => self.compressor.add_decoded(&tensor, code, &mut sum),
                    false => add_vector(code, &mut sum),
                };
                let path = &parameter.path;
                added.map_err(|error| failure(format!("`{path}` of rank {rank}: {error}")))?;
            }
            if is_matrix(parameter) {
                self.compressor.finish(&tensor, &mut sum);
            }
            Ok(sum)
        };
        all.par_iter().enumerate().map(sum_of).collect()
    }
}

impl Exchange for Compression {
    fn reduce(
        &mut self,
        mut gradient: Gradient,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError> {
        let rank = context.collective.rank();
        if !self.residuals.is_empty() && self.rank != rank {
            let of = self.rank;
            return Err(failure(format!(
                "the residuals are those of rank {of}, and this is rank {rank}"
            )));
        }
        self.rank = rank;
        if context.step < self.settings.warmup_steps {
            return self.reduce_whole(gradient, context);
        }
        let of_step = Seed::new(context.seed).with(context.step);
        let (mut all, energy) = self.take_in(&mut gradient)?;
        self.encode(&mut all, of_step)?;
        let message = message_of(&all);
        let sent_bytes = message.len() as u64;
        let messages = context.collective.gather(message)?;
        let gathered: u64 = messages.iter().map(|message| message.len() as u64).sum();
        let sums = self.decode(&all, &messages, of_step)?;

        let elements: usize = all.iter().map(|sent| sent.values.len()).sum();
        let mut left = 0.0;
        for sent in all.into_iter().filter(|sent| is_matrix(&sent.parameter)) {
            left += squares(&sent.values);
            if self.settings.error_feedback {
                self.residuals.insert(sent.parameter.path, sent.values);
            }
        }
        let is_kept = self.settings.error_feedback;
        self.report = Some(ExchangeReport {
            sent_bytes,
            received_bytes: gathered - sent_bytes,
            gradient_bytes: 4 * elements as u64,
            sent_energy: if energy > 0.0 {
                1.0 - left / energy
            } else {
                1.0
            },
            residual_norm: if is_kept { left.sqrt() } else { 0.0 },
        });
        let mut sums = sums.into_iter();
        gradient.update(|_, values| {
            if let Some(sum) = sums.next() {
                values.copy_from_slice(&sum);
            }
        });
        Ok(gradient)
    }

    fn report(&self) -> Option<ExchangeReport> {
        self.report
    }

    fn state(&self) -> ExtraState {
        let rank = self.rank;
        let residuals = self.residuals.iter().map(|(path, values)| {
            let data = TensorData::new(values.clone(), [values.len()]);
            (format!("rank{rank}.{path}"), data)
        });
        ExtraState {
            tensors: residuals.collect(),
            ..ExtraState::default()
        }
    }

    fn load(&mut self, state: ExtraState) -> Result<(), PipelineError> {
        let wrong = |reason: String| PipelineError::State {
            owner: super::exchange::OWNER.to_string(),
            reason,
        };
        self.residuals.clear();
        let mut of_rank = None;
        for (name, data) in state.tensors {
            let rank_and_path = name
                .strip_prefix("rank")
                .and_then(|rest| rest.split_once('.'))
                .and_then(|(rank, path)| Some((rank.parse::<usize>().ok()?, path)));
            let Some((rank, path)) = rank_and_path else {
                return Err(wrong(format!("`{name}` is no residual")));
            };
            let values = data
                .try_into_vec::<f32>()
                .map_err(|_| wrong(format!("`{name}` is not in f32")))?;
            if values.iter().any(|value| !value.is_finite()) {
                return Err(wrong(format!("`{name}` is not finite")));
            }
            if of_rank.is_some_and(|other| other != rank) {
                return Err(wrong("it has the residuals of several ranks".to_string()));
            }
            of_rank = Some(rank);
            self.residuals.insert(path.to_string(), values);
        }
        self.rank = of_rank.unwrap_or(self.rank);
        Ok(())
    }
}

/// All codes in one message.
fn message_of(all: &[Sent]) -> Vec<u8> {
    let mut message = Writer::default();
    all.iter().for_each(|sent| message.push(&sent.code));
    message.finish()
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

/// Adds a vector that traveled in f32.
fn add_vector(bytes: &[u8], sum: &mut [f32]) -> Result<(), CompressError> {
    let (values, rest) = bytes.as_chunks::<4>();
    if values.len() != sum.len() || !rest.is_empty() {
        let (found, expected) = (bytes.len(), 4 * sum.len());
        return Err(CompressError::Damaged(format!(
            "{found} bytes for a vector of {expected}"
        )));
    }
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += f32::from_le_bytes(*value);
    }
    Ok(())
}

fn failure(reason: String) -> PipelineError {
    PipelineError::Stage {
        owner: super::exchange::OWNER.to_string(),
        reason,
    }
}
