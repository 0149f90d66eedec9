//! The inputs of a run, and everything that follows from the plan once the data is counted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::json;

use super::TrainError;
use super::average::AverageSettings;
use super::estimate::Summary;
use super::folder::RunRecord;
use super::resume::StartingPoint;
use super::team::Team;
use crate::checkpoint::Cost;
use crate::config::{DecoderSpec, PhasePlan, Plan, Sampling, Task};
use crate::data::{
    DataView, EpochSize, FileRecord, SpecialToken, TokenCache, TrainingData, ViewSpec,
    load_training_data,
};
use crate::device::{ComputeDevice, is_cpu, lanes};
use crate::environment::{Environment, resident_memory_bytes};
use crate::forecast::{
    Conditions, Flops, Forecast, Shortage, available_bytes, fit, flops_of_phase, outline,
};
use crate::generate::{GenerateError, check_prompt};
use crate::gradient::compress::Method;
use crate::gradient::trained_parameters;
use crate::model::{ModelError, check_vocabulary, folder as model_folder};
use crate::phase::{self, Timeline};

/// The inputs of a run.
pub(super) struct RunInputs {
    /// The data of each phase, in order.
    pub(super) data: Vec<PhaseData>,
    pub(super) spec: DecoderSpec,
    pub(super) timeline: Timeline,
    /// How the weights are averaged; None if they are not.
    pub(super) average: Option<AverageSettings>,
    /// Number of parameters of the first phase's model.
    pub(super) parameters: u64,
    /// Number of parameters that the first phase trains.
    pub(super) trainable: u64,
    /// What a step of the first phase sends, in words; None without compression.
    traffic: Option<String>,
    /// Multiplications and additions for one token of each phase, forward and backward.
    pub(super) flops_per_token: Vec<Flops>,
    /// The base model's files; empty without a base model.
    pub(super) base: Vec<FileRecord>,
    /// Bytes of the process before the data was loaded.
    program_bytes: u64,
}

/// The data of a phase: the data that was read, which phases may share, and its order.
#[derive(Clone)]
pub(super) struct PhaseData {
    pub(super) source: Arc<dyn TrainingData>,
    pub(super) view: Arc<dyn DataView>,
    /// The view that the phase is validated on.
    pub(super) eval_view: Arc<dyn DataView>,
}

impl RunInputs {
    /// `started` is the start time of the run, which chat templates may write.
    pub(super) fn load(plan: &Plan, started: SystemTime) -> Result<Self, TrainError> {
        // Measured before the data is read: memory for reading is free again when training begins.
        let program_bytes = resident_memory_bytes().unwrap_or_default();
        phase::check(plan)?;
        let data = load_phases(plan, started)?;
        let epochs: Vec<EpochSize> = data.iter().map(|data| data.view.epoch()).collect();
        let timeline = Timeline::new(plan, &epochs)?;
        let spec = decoder_spec(plan, exported_data(&data))?;
        let (mut parameters, mut trainable, mut traffic) = (0, 0, None);
        for phase in timeline.phases().iter().rev() {
            // Checks the selectors of every phase before the first step: each has to match a
            // parameter.
            let model = outline(plan, phase.model, &spec)?.with_frozen(&phase.plan.freeze)?;
            if model.trained_params() == 0 {
                let phase = phase.plan.name.clone();
                return Err(TrainError::NothingTrained { phase });
            }
            if let Some(compression) = &plan.compression {
                let (trained, workers) = (trained_parameters(&model), phase.plan.workers);
                let method = Method::new(compression, &trained, workers)?;
                traffic = Some(method.describe(compression, workers * phase.plan.ranks));
            }
            // The loop runs from the last phase to the first, so the first phase's numbers remain.
            (parameters, trainable) = (model.params(), model.trained_params() as u64);
        }
        let flops_per_token = flops_per_token(plan, &timeline, &data, &spec)?;
        check_length(plan, timeline.steps())?;
        let average = plan.config.average.as_ref();
        let average = average.map(|config| AverageSettings::new(config, timeline.steps()));
        check_prompts(plan, &spec, exported_data(&data))?;
        Ok(Self {
            data,
            spec,
            timeline,
            average: average.transpose()?,
            parameters,
            trainable,
            traffic,
            flops_per_token,
            base: base_files(plan)?,
            program_bytes,
        })
    }

    /// The passes and FLOPs of the first `steps` steps of a timeline. No time was measured.
    pub(super) fn planned_cost(&self, timeline: &Timeline, steps: u64) -> Cost {
        let mut cost = Cost::default();
        for (phase, flops) in timeline.phases().iter().zip(&self.flops_per_token) {
            let steps = steps.saturating_sub(phase.first_step).min(phase.steps);
            cost.backward_passes += steps * phase.plan.micro_batches_per_step();
            let view = &self.data[phase.number].view;
            let tokens = steps * phase.sequences_per_step() * view.rows_per_sequence() as u64;
            cost.flops += tokens as f64 * view.widest() as f64 * flops.step;
        }
        cost
    }

    /// The data files of all phases, each once.
    pub(super) fn files(&self) -> Vec<FileRecord> {
        files_of(&self.data)
    }

    /// Everything besides the data files that decides the tokens of each phase, as run.json records
    /// it: the tokenizer, its special tokens, and the chat template.
    pub(super) fn token_inputs(&self) -> serde_json::Value {
        let of_phase = |data: &PhaseData| {
            let tokenizer = data.source.tokenizer();
            let text = |token: Option<&SpecialToken>| token.map(|token| token.text.clone());
            let hash = |text: &str| blake3::hash(text.as_bytes()).to_hex().to_string();
            json!({
                "tokenizer": hash(tokenizer.to_json()),
                "bos token": text(tokenizer.bos()),
                "eos token": text(tokenizer.eos()),
                "end of a turn": data.source.turn_end(),
                "chat template": data.source.chat_template().map(|template| hash(template.source())),
            })
        };
        self.data.iter().map(of_phase).collect()
    }

    /// What has to be the same on all ranks.
    pub(super) fn fingerprint(&self) -> BTreeMap<String, String> {
        let files = self.data.iter().flat_map(|data| data.source.files());
        let mut all: BTreeMap<String, String> = files
            .chain(&self.base)
            .map(|file| (file.path.display().to_string(), file.blake3.clone()))
            .collect();
        for (phase, inputs) in self
            .token_inputs()
            .as_array()
            .into_iter()
            .flatten()
            .enumerate()
        {
            for (what, value) in inputs.as_object().into_iter().flatten() {
                all.insert(format!("{what} of phase {phase}"), value.to_string());
            }
        }
        all
    }

    /// Whether the run in the folder has nothing left to do: it has reached its last step or
    /// stopped early, and its model is exported. A crash may have come between the last step and
    /// the export.
    pub(super) fn is_complete(
        &self,
        plan: &Plan,
        start: StartingPoint,
        record: Option<&RunRecord>,
    ) -> bool {
        let end = record.and_then(|record| record.end.as_ref());
        let (step, end) = match (start, end) {
            (StartingPoint::Checkpoint(step) | StartingPoint::FinishedAt(step), Some(end)) => {
                (step, end)
            }
            _ => return false,
        };
        let steps = self.timeline.steps();
        let patience = plan.config.eval.early_stopping_patience;
        step >= steps || (step == end.step && end.stays_stopped(steps, patience))
    }

    /// Notes for the user before the first step.
    pub(super) fn notes(
        &self,
        plan: &Plan,
        device: &ComputeDevice,
        environment: &Environment,
        team: &Team,
    ) -> Vec<String> {
        let dtype = plan
            .phases
            .first()
            .map_or("f32", |phase| phase.dtype.name());
        let threads = environment.threads;
        let threads = match team.ranks() {
            1 => format!("{threads} threads"),
            ranks if threads == 1 => format!("{ranks} ranks, one thread each"),
            ranks => format!("{ranks} ranks, {threads} threads each"),
        };
        let device_name = device.describe();
        let mut notes = vec![format!(
            "device {device_name}, {threads}, computing in {dtype}"
        )];
        if team.on_host() > 1 && !is_cpu(&device.device) {
            notes.push(format!(
                "warning: the {} ranks of this host compute on the same GPU",
                team.on_host()
            ));
        }
        if let Some(what) = self.spec.shape.of_its_own() {
            notes.push(format!(
                "warning: only Firebrick can load a model with {what}; transformers cannot"
            ));
        }
        let era = self.spec.shape.output_activation;
        if let Some(least) = era.and_then(|era| era.least_loss(self.spec.vocab_size)) {
            notes.push(format!(
                "warning: with this output_activation the loss cannot fall below {least:.3} nats per token"
            ));
        }
        notes.extend(self.traffic.clone());
        let mut said: Vec<&Arc<dyn TrainingData>> = Vec::new();
        for data in &self.data {
            if !said.iter().any(|other| Arc::ptr_eq(other, &data.source)) {
                notes.extend(data.source.notes().iter().cloned());
                notes.extend(data.view.note());
                said.push(&data.source);
            }
        }
        if self.timeline.phases().len() > 1 {
            let phases = self.timeline.phases().iter();
            notes.extend(phases.map(|phase| {
                let again = match self.share_seen_before(phase.number) {
                    0.0 => String::new(),
                    share if share < 0.005 => {
                        "; less than 1 % of its tokens are seen again, after an earlier phase"
                            .to_string()
                    }
                    share => format!(
                        "; about {:.0} % of its tokens are seen again, after an earlier phase",
                        100.0 * share
                    ),
                };
                format!(
                    "phase {}: steps {} to {}, {} x {} tokens each{again}",
                    phase.plan.name,
                    phase.first_step + 1,
                    phase.end(),
                    phase.sequences_per_step(),
                    phase.plan.data.sequence_len,
                )
            }));
        }
        notes
    }

    /// The share of a phase's training tokens that earlier phases have trained on, as expected from
    /// orders that do not depend on each other. Phases share tokens if they read the same files in
    /// the same way.
    fn share_seen_before(&self, number: usize) -> f64 {
        let source = &self.data[number].source;
        let earlier = self.timeline.phases()[..number].iter().zip(&self.data);
        let same = earlier.filter(|(_, data)| Arc::ptr_eq(&data.source, source));
        let unseen = same.map(|(phase, data)| {
            let sequences = (phase.steps * phase.sequences_per_step()) as f64;
            let epochs = sequences / data.view.epoch().sequences as f64;
            match phase.plan.data.sampling {
                // Windows at random offsets overlap within a phase, too.
                Sampling::Random => (-epochs).exp(),
                Sampling::Epoch => (1.0 - epochs).max(0.0),
            }
        });
        1.0 - unseen.product::<f64>()
    }

    pub(super) fn summary(&self) -> Summary {
        let first = self.data.first();
        let phases = self.timeline.phases();
        let epochs = phases.iter().zip(&self.data).map(|(phase, data)| {
            let sequences = phase.steps as f64 * phase.sequences_per_step() as f64;
            sequences / data.view.epoch().sequences as f64
        });
        Summary {
            vocab_size: self.spec.vocab_size as u64,
            train_tokens: first.map_or(0, |data| data.source.train_tokens()),
            val_tokens: first.and_then(|data| data.source.val_tokens()).unwrap_or(0),
            steps: self.timeline.steps(),
            tokens_per_step: phases.first().map_or(0, |phase| phase.tokens_per_step()),
            epochs: epochs.sum(),
        }
    }

    /// Forecasts the memory of a rank; a shortage if there is too little for the `ranks` of this host.
    /// The free memory of a GPU is not known.
    pub(super) fn forecast(
        &self,
        plan: &Plan,
        device: &ComputeDevice,
        ranks: usize,
    ) -> Result<Result<Forecast, Shortage>, TrainError> {
        let available = available_bytes().filter(|_| is_cpu(&device.device));
        let available = available.map_or(u64::MAX, |bytes| bytes / ranks as u64);
        self.forecast_in(plan, device, available)
    }

    /// The same, whether or not there is memory for it.
    pub(super) fn forecast_anyway(
        &self,
        plan: &Plan,
        device: &ComputeDevice,
    ) -> Result<Forecast, TrainError> {
        Ok(self.forecast_in(plan, device, u64::MAX)??)
    }

    fn forecast_in(
        &self,
        plan: &Plan,
        device: &ComputeDevice,
        available: u64,
    ) -> Result<Result<Forecast, Shortage>, TrainError> {
        let is_cpu = is_cpu(&device.device);
        let mut counted: Vec<&Arc<dyn TrainingData>> = Vec::new();
        for data in &self.data {
            if !counted.iter().any(|other| Arc::ptr_eq(other, &data.source)) {
                counted.push(&data.source);
            }
        }
        let token_bytes: u64 = counted.iter().map(|source| source.token_bytes()).sum();
        let conditions = Conditions {
            lanes: lanes(&device.device),
            is_cpu,
            process_bytes: self.program_bytes + token_bytes,
        };
        // Rows that are not packed may all be shorter than `sequence_len`.
        let mut plan = plan.clone();
        for (phase, data) in plan.phases.iter_mut().zip(&self.data) {
            phase.data.sequence_len = data.view.widest();
            phase.micro_batch_size *= data.view.rows_per_sequence();
        }
        Ok(fit(&plan, &self.spec, conditions, available)?)
    }
}

/// The arithmetic for one token of each phase. Rows may be wider than `sequence_len`.
fn flops_per_token(
    plan: &Plan,
    timeline: &Timeline,
    data: &[PhaseData],
    spec: &DecoderSpec,
) -> Result<Vec<Flops>, TrainError> {
    let phases = timeline.phases().iter().zip(data);
    let flops = phases.map(|(phase, data)| {
        let mut of = phase.plan.clone();
        of.data.sequence_len = data.view.widest();
        Ok(flops_of_phase((plan, &of, phase.model), spec)?)
    });
    flops.collect()
}

/// The files of all phases, each once.
pub(super) fn files_of(data: &[PhaseData]) -> Vec<FileRecord> {
    let mut files: Vec<FileRecord> = Vec::new();
    for file in data.iter().flat_map(|data| data.source.files()) {
        if !files.iter().any(|known| known.path == file.path) {
            files.push(file.clone());
        }
    }
    files
}

fn exported_data(data: &[PhaseData]) -> &dyn TrainingData {
    // A timeline without phases has already been refused.
    data.last().expect("a run has a phase").source.as_ref()
}

/// Reads the data of every phase. Data that several phases use is read once.
fn load_phases(plan: &Plan, started: SystemTime) -> Result<Vec<PhaseData>, TrainError> {
    let cache = TokenCache::from_environment();
    let mut phases: Vec<PhaseData> = Vec::with_capacity(plan.phases.len());
    for (number, phase) in plan.phases.iter().enumerate() {
        let same = plan.phases[..number]
            .iter()
            .position(|earlier| reads_the_same(earlier, phase));
        let source: Arc<dyn TrainingData> = match same {
            Some(earlier) => phases[earlier].source.clone(),
            None => {
                let tokenizer = &plan.config.tokenizer;
                load_training_data(phase.task, &phase.data, tokenizer, &cache, started)?.into()
            }
        };
        if let Some(first) = phases.first()
            && first.source.tokenizer().to_json() != source.tokenizer().to_json()
        {
            return Err(TrainError::OtherTokenizer {
                phase: phase.name.clone(),
            });
        }
        let spec = ViewSpec::of_phase(phase, number, plan.config.seed);
        let view: Arc<dyn DataView> = source.view(&spec)?.into();
        let eval_view = match phase.eval_sequence_len {
            Some(sequence_len) if sequence_len != spec.sequence_len => {
                let spec = ViewSpec {
                    sequence_len,
                    ..spec
                };
                source.view(&spec)?.into()
            }
            _ => view.clone(),
        };
        phases.push(PhaseData {
            source,
            view,
            eval_view,
        });
    }
    Ok(phases)
}

/// Whether two phases differ at most in the order of their data. Rows are read for sequences of one
/// length; text is not.
fn reads_the_same(a: &PhasePlan, b: &PhasePlan) -> bool {
    let read = |phase: &PhasePlan| {
        let mut data = phase.data.clone();
        if phase.task == Task::Pretrain {
            data.sequence_len = 0;
        }
        data.sampling = a.data.sampling;
        data.sample_packing = None;
        for dataset in &mut data.datasets {
            dataset.weight = 1.0;
        }
        (phase.task, data)
    };
    read(a) == read(b)
}

/// Checks the schedule against the number of steps, which is known only now that the data is
/// counted. The checks are the same as for `max_steps`. The timeline has checked the schedules of
/// several phases.
fn check_length(plan: &Plan, steps: u64) -> Result<(), TrainError> {
    if !plan.config.phase.is_empty() {
        return Ok(());
    }
    let mut config = plan.config.clone();
    config.train.max_steps = Some(steps);
    config.train.num_epochs = None;
    config.train.max_tokens = None;
    Plan::from_config(config)?;
    Ok(())
}

/// Checks before the first step that the sample prompts can be completed.
fn check_prompts(
    plan: &Plan,
    spec: &DecoderSpec,
    data: &dyn TrainingData,
) -> Result<(), TrainError> {
    for prompt in &plan.config.eval.sample_prompts {
        let text = data.prompt(prompt);
        let tokens = text.and_then(|text| data.tokenizer().encode(&text));
        let tokens = tokens.map_err(GenerateError::from);
        let checked = tokens.and_then(|tokens| check_prompt(spec, &tokens));
        checked.map_err(|source| TrainError::Sample {
            prompt: prompt.clone(),
            source,
        })?;
    }
    Ok(())
}

/// A spec with the tokenizer's vocabulary size, or the base model's, which has to be at least as
/// large.
fn decoder_spec(plan: &Plan, data: &dyn TrainingData) -> Result<DecoderSpec, TrainError> {
    let tokenizer = data.tokenizer();
    let base = plan.base.as_ref();
    base.map_or(Ok(()), |base| check_vocabulary(base, tokenizer))?;
    // Generation ends at the token that ends an answer.
    let eos = data.end_token();
    let bos = tokenizer.bos().map(|token| token.id);
    let spec = DecoderSpec {
        shape: plan.shape.clone(),
        vocab_size: base.map_or(tokenizer.vocab_size(), |base| base.vocab_size),
        eos_token_id: eos.or(base.and_then(|base| base.eos_token_id)),
        bos_token_id: bos.or(base.and_then(|base| base.bos_token_id)),
    };
    spec.check().map_err(ModelError::from)?;
    Ok(spec)
}

/// The base model's config.json and weight files, with their hashes.
pub(super) fn base_files(plan: &Plan) -> Result<Vec<FileRecord>, TrainError> {
    let Some(base) = &plan.config.model.base_model else {
        return Ok(Vec::new());
    };
    let files = model_folder::files(base)?;
    let surveyed = files.iter().map(|path| FileRecord::survey(path));
    Ok(surveyed.collect::<Result<_, _>>()?)
}
