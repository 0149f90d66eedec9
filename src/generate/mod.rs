//! Text from a model: prefill the prompt, then decode token by token from a key/value cache.
//!
//! ```
//! use std::ops::ControlFlow;
//! use burn::tensor::Device;
//! use firebrick::config::Preset;
//! use firebrick::generate::{Request, Sampling, generate};
//! use firebrick::model::{Decoder, DecoderSpec};
//!
//! let spec = DecoderSpec {
//!     shape: Preset::Stories260K.shape(),
//!     vocab_size: 512,
//!     eos_token_id: None,
//!     bos_token_id: None,
//! };
//! let model = Decoder::new(&spec, 42, &Device::flex())?;
//! let request = Request {
//!     prompt: vec![7, 8, 9],
//!     max_new_tokens: 4,
//!     sampling: Sampling { temperature: 0.7, top_k: 40, ..Sampling::default() },
//!     seed: 1,
//!     vocabulary: None,
//! };
//! let completion = generate(&model, &request, |_token| ControlFlow::Continue(()))?;
//! assert_eq!(completion.tokens.len(), 4);
//! # Ok::<(), firebrick::generate::GenerateError>(())
//! ```

mod sampling;
mod text;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::Tensor;

pub use sampling::Sampling;
pub use text::{TextRequest, complete};

use crate::data::DataError;
use crate::model::{Decoder, DecoderSpec, KvCache, ModelError};
use sampling::Sampler;

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids to continue. Empty: begin with the model's bos or eos token.
    pub prompt: Vec<u32>,
    /// Most tokens to add.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Seed of the choice.
    pub seed: u64,
    /// Ids to choose among: those below this number. A model may have rows for more than its
    /// tokenizer has tokens, to round up the matrix. None: all.
    pub vocabulary: Option<usize>,
}

/// What was generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// New token ids, without the prompt and without the token that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Time to read the prompt.
    pub prefill: Duration,
    /// Time to write the new tokens.
    pub decode: Duration,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model wrote its end token.
    Eos,
    /// `max_new_tokens` were written.
    Length,
    /// The caller had enough: a stop string was written.
    Stop,
    /// The model has no position for another token.
    ContextFull,
}

/// A completion that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] DataError),
    /// A prompt without a single token, and no token to begin with.
    #[error("the prompt is empty, and this model has no token that begins a text")]
    EmptyPrompt,
    /// A token id the model does not know.
    #[error("token {id} is outside the model's vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Rows of the embedding matrix.
        vocab_size: usize,
    },
    /// The model's output is not a number.
    #[error("the model's logits are not finite; its weights are damaged or it has diverged")]
    NotFinite,
}

impl GenerateError {
    /// The process exit code: a prompt that does not fit the model is the caller's, 2; damaged
    /// files are 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::EmptyPrompt | Self::UnknownToken { .. } => 2,
            Self::Model(error) => error.exit_code(),
            Self::NotFinite => 1,
            Self::Tokenizer(error) => error.exit_code(),
        }
    }

    /// What to do about it, where there is something to say.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Model(error) => error.help(),
            Self::Tokenizer(error) => error.help(),
            Self::EmptyPrompt => Some("give it at least one character".to_string()),
            Self::UnknownToken { .. } => {
                Some("tokenizer.json belongs to another model than model.safetensors".to_string())
            }
            Self::NotFinite => None,
        }
    }
}

/// Tokens of a prompt that are read at once.
const PREFILL: usize = 512;

/// Continues a prompt. `on_token` is called with every new token as soon as it is known, and ends
/// the completion by breaking.
///
/// The model must be on a plain device (`model.valid()`).
///
/// # Errors
/// A prompt that is empty, too long or outside the vocabulary; logits that are not finite.
pub fn generate(
    model: &Decoder,
    request: &Request,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Completion, GenerateError> {
    // Once, not for every token.
    let model = &model.clone().for_inference();
    let prompt = check_prompt(model.spec(), &request.prompt)?;
    let limit = model.spec().position_limit().unwrap_or(usize::MAX);
    let wanted = prompt.len().saturating_add(request.max_new_tokens);
    let mut cache = KvCache::new(model, wanted.min(limit));
    let mut sampler = Sampler::new(&request.sampling, request.seed);

    let started = Instant::now();
    let mut logits = None;
    // Piece by piece: the scores of a piece are [piece, prompt so far], not [prompt, prompt].
    for piece in prompt.chunks(PREFILL) {
        logits = Some(model.decode(piece, &mut cache)?);
    }
    let mut logits = logits.ok_or(GenerateError::EmptyPrompt)?;
    let prefill = started.elapsed();

    let started = Instant::now();
    let mut text = prompt.clone();
    let finish = loop {
        if text.len() == wanted {
            break Finish::Length;
        }
        if text.len() > limit {
            break Finish::ContextFull;
        }
        if text.len() > prompt.len() {
            logits = model.decode(&text[text.len() - 1..], &mut cache)?;
        }
        let mut scores = host(logits.clone());
        scores.truncate(request.vocabulary.unwrap_or(usize::MAX));
        let token = sampler
            .next(&scores, &text)
            .ok_or(GenerateError::NotFinite)?;
        if ends_text(model, token) {
            break Finish::Eos;
        }
        text.push(token);
        if on_token(token).is_break() {
            break Finish::Stop;
        }
    };
    let tokens = text.split_off(prompt.len());
    Ok(Completion {
        tokens,
        finish,
        prefill,
        decode: started.elapsed(),
    })
}

/// The tokens a completion of `prompt` begins from: the prompt itself, or the model's first token
/// for an empty one.
///
/// # Errors
/// An empty prompt for a model without such a token; a token outside the vocabulary; more tokens
/// than the model has positions.
pub fn check_prompt(spec: &DecoderSpec, prompt: &[u32]) -> Result<Vec<u32>, GenerateError> {
    let vocab_size = spec.vocab_size;
    let prompt = match prompt {
        [] => {
            let first = spec.bos_token_id.or(spec.eos_token_id);
            vec![first.ok_or(GenerateError::EmptyPrompt)?]
        }
        tokens => tokens.to_vec(),
    };
    if let Some(&id) = prompt.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(GenerateError::UnknownToken { id, vocab_size });
    }
    match spec.position_limit() {
        Some(limit) if prompt.len() > limit => Err(GenerateError::Model(ModelError::TooLong {
            length: prompt.len(),
            limit,
        })),
        _ => Ok(prompt),
    }
}

/// Models that use bos as a separator (llama2.c's) write it where others write eos.
fn ends_text(model: &Decoder, token: u32) -> bool {
    let spec = model.spec();
    [spec.eos_token_id, spec.bos_token_id].contains(&Some(token))
}

/// `[1, vocab]` logits on the host.
fn host(logits: Tensor<2>) -> Vec<f32> {
    logits.into_data().iter::<f32>().collect()
}
