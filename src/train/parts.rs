//! Data, and what follows from data and plan together.

use burn::tensor::Device;

use super::TrainError;
use super::estimate::Summary;
use super::folder::RunRecord;
use crate::config::{DecoderSpec, Plan};
use crate::data::{Feed, FileRecord, TokenCache};
use crate::device::{ComputeDevice, is_cpu, lanes};
use crate::environment::{Environment, resident_memory_bytes};
use crate::forecast::{Conditions, Forecast, Shortage, available_bytes, fit};
use crate::generate::{GenerateError, check_prompt};
use crate::model::{Decoder, check_vocabulary, folder as model_folder};
use crate::phase::Timeline;

/// Data, and what follows from data and plan together.
pub(super) struct Parts {
    pub(super) feed: Feed,
    pub(super) spec: DecoderSpec,
    pub(super) timeline: Timeline,
    pub(super) parameters: u64,
    /// Of them, those that are trained.
    pub(super) trainable: u64,
    /// The base model's files; none without one.
    pub(super) base: Vec<FileRecord>,
    /// What the process held before it loaded the data.
    program_bytes: u64,
}

impl Parts {
    pub(super) fn load(plan: &Plan) -> Result<Self, TrainError> {
        let config = &plan.config;
        // Before the data: what reading it takes is free again when training begins.
        let program_bytes = resident_memory_bytes().unwrap_or_default();
        let feed = Feed::load(config, &TokenCache::from_environment())?;
        let spec = decoder_spec(plan, &feed)?;
        let timeline = Timeline::new(plan, feed.pass());
        // Parameters are drawn when first used: counting those of a built module is free.
        let model = Decoder::new(&spec, config.seed, &Device::flex())?;
        let model = match &plan.adapter {
            Some(adapter) => model.outlined(adapter, config.seed)?,
            None => model,
        };
        let (parameters, trainable) = (model.params(), model.trained_params() as u64);
        check_length(plan, timeline.steps())?;
        for prompt in &config.eval.sample_prompts {
            let text = feed.prompt(prompt);
            let tokens = text.and_then(|text| feed.tokenizer().encode(&text));
            let tokens = tokens.map_err(GenerateError::from);
            let checked = tokens.and_then(|tokens| check_prompt(&spec, &tokens));
            checked.map_err(|source| TrainError::Sample {
                prompt: prompt.clone(),
                source,
            })?;
        }
        Ok(Self {
            feed,
            spec,
            timeline,
            parameters,
            trainable,
            base: base_files(plan)?,
            program_bytes,
        })
    }

    /// Whether the run with this last checkpoint has nothing left to do: its last step is
    /// done, or it stopped early, and its model is exported. A crash can come in between.
    pub(super) fn is_complete(
        &self,
        plan: &Plan,
        step: Option<u64>,
        record: Option<&RunRecord>,
    ) -> bool {
        let end = record.and_then(|record| record.end.as_ref());
        let (Some(step), Some(end)) = (step, end) else {
            return false;
        };
        let steps = self.timeline.steps();
        let patience = plan.config.eval.early_stopping_patience;
        step >= steps || (step == end.step && end.stays_stopped(steps, patience))
    }

    /// What a person should know before the first step.
    pub(super) fn notes(
        &self,
        plan: &Plan,
        device: &ComputeDevice,
        environment: &Environment,
    ) -> Vec<String> {
        let mut notes = vec![format!(
            "device {}, {} threads, computing in {}",
            device.describe(),
            environment.threads,
            plan.config.model.dtype.name(),
        )];
        notes.extend(self.feed.notes().iter().cloned());
        notes
    }

    pub(super) fn summary(&self) -> Summary {
        let train_tokens = self.feed.train_tokens();
        let steps = self.timeline.steps();
        let first = self.timeline.at(0);
        let tokens_per_step = first.map_or(0, |phase| phase.tokens_per_step());
        let sequences_per_step = first.map_or(0, |phase| phase.sequences_per_step());
        Summary {
            vocab_size: self.spec.vocab_size as u64,
            train_tokens,
            val_tokens: self.feed.val_tokens().unwrap_or(0),
            steps,
            tokens_per_step,
            epochs: steps as f64 * sequences_per_step as f64 / self.feed.pass().sequences as f64,
        }
    }

    /// What the run will need: its memory as a shortage where there is too little. On a GPU there
    /// is no telling how much is free.
    pub(super) fn forecast(
        &self,
        plan: &Plan,
        device: &ComputeDevice,
    ) -> Result<Result<Forecast, Shortage>, TrainError> {
        let is_cpu = is_cpu(&device.device);
        let conditions = Conditions {
            lanes: lanes(&device.device),
            is_cpu,
            process_bytes: self.program_bytes + self.feed.token_bytes(),
        };
        // Rows that are not packed may all be shorter than a sequence can be.
        let mut plan = plan.clone();
        let sequence_len = &mut plan.config.data.sequence_len;
        *sequence_len = self.feed.widest(*sequence_len);
        plan.config.train.micro_batch_size *= self.feed.rows_per_sequence();
        let available = available_bytes().filter(|_| is_cpu).unwrap_or(u64::MAX);
        Ok(fit(&plan, &self.spec, conditions, available)?)
    }
}

/// What could not be checked before the data was counted: the schedule against the steps. The same
/// checks as for `max_steps`, since that is what the length has become.
fn check_length(plan: &Plan, steps: u64) -> Result<(), TrainError> {
    let mut config = plan.config.clone();
    config.train.max_steps = Some(steps);
    config.train.num_epochs = None;
    config.train.max_tokens = None;
    Plan::from_config(config)?;
    Ok(())
}

/// The tokenizer's vocabulary, or the base model's, which has to have room for it.
fn decoder_spec(plan: &Plan, feed: &Feed) -> Result<DecoderSpec, TrainError> {
    let tokenizer = feed.tokenizer();
    let base = plan.base.as_ref();
    base.map_or(Ok(()), |base| check_vocabulary(base, tokenizer))?;
    // What ends an answer ends a generation.
    let eos = feed.end_token();
    let bos = tokenizer.bos().map(|token| token.id);
    Ok(DecoderSpec {
        shape: plan.shape.clone(),
        vocab_size: base.map_or(tokenizer.vocab_size(), |base| base.vocab_size),
        eos_token_id: eos.or(base.and_then(|base| base.eos_token_id)),
        bos_token_id: bos.or(base.and_then(|base| base.bos_token_id)),
    })
}

/// The base model's config.json and weights, hashed.
fn base_files(plan: &Plan) -> Result<Vec<FileRecord>, TrainError> {
    let Some(base) = &plan.config.model.base_model else {
        return Ok(Vec::new());
    };
    let files = model_folder::files(base)?;
    let surveyed = files.iter().map(|path| FileRecord::survey(path));
    Ok(surveyed.collect::<Result<_, _>>()?)
}
