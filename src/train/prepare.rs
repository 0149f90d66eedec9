//! From a plan to a run that only has to be started: threads, folder, data, model, resume.

use burn::module::Module;
use burn::tensor::{Device, FloatDType};

use super::estimate::Summary;
use super::folder::{RunRecord, data_record, device_record};
use super::journal::Journal;
use super::report::HtmlReport;
use super::resume::starting_point;
use super::run::{Clock, Trainer};
use super::{
    CsvMetrics, Event, Interrupt, JsonlMetrics, Observer, Resume, Run, RunFolder,
    TensorboardEvents, TrainError,
};
use crate::checkpoint::Progress;
use crate::config::{Dtype, Plan, Report};
use crate::data::{Corpus, FileRecord, Sampler, TokenCache};
use crate::device::{ComputeDevice, is_cpu, lanes};
use crate::environment::{Environment, resident_memory_bytes};
use crate::forecast::{Conditions, Forecast, Shortage, available_bytes, fit};
use crate::generate::{GenerateError, check_prompt};
use crate::gradient::LossScale;
use crate::model::{Decoder, DecoderSpec, check_vocabulary, folder as model_folder};
use crate::optimizer::Optimizer;
use crate::phase::Timeline;

/// How to run a plan.
#[derive(Default)]
pub struct Options {
    /// What to do with a run that is already in the folder.
    pub resume: Resume,
    /// The TOML as the user wrote it, to be kept beside the resolved one.
    pub config_text: Option<String>,
    /// Asks the loop to save and stop.
    pub interrupt: Interrupt,
    /// Who is told what happens, besides the metrics files of `logging.report_to`.
    pub observers: Vec<Box<dyn Observer>>,
}

impl Run {
    /// Builds everything a run needs: takes the run folder, loads the data, builds or restores the
    /// model and the optimizer. Returns none when the run in the folder is already complete.
    ///
    /// # Errors
    /// Whatever is wrong with folder, data, model or checkpoint.
    pub fn prepare(plan: &Plan, options: Options) -> Result<Option<Self>, TrainError> {
        let Options {
            resume,
            config_text,
            interrupt,
            mut observers,
        } = options;
        start_threads(plan.config.train.threads)?;
        let (plan, device, dtype) = on_device(plan)?;
        let plan = &plan;
        let claim = Claim::new(plan, &device, resume)?;
        let (folder, parts, checkpoint) = (claim.folder, claim.parts, claim.checkpoint);
        let log = folder.log()?;
        observers.push(Box::new(super::terminal::LogEvents));

        let environment = Environment::detect();
        let old = folder.read_record()?.filter(|_| checkpoint.is_some());
        if resume == Resume::Auto && parts.is_complete(plan, checkpoint, old.as_ref()) {
            return Ok(None);
        }
        let forecast = claim.forecast?;
        let mut notes = parts.notes(plan, &device, &environment);
        notes.extend(forecast.describe(&parts.summary(), plan));
        if checkpoint.is_some() {
            same_inputs(&folder, old.as_ref(), &parts)?;
            notes.extend(rounding_warning(old.as_ref(), &environment, &device));
        }
        let start = Start {
            plan,
            spec: &parts.spec,
            device: &device.device,
        };
        let mut start = match checkpoint {
            None => start.fresh()?,
            Some(step) => start.resumed(&folder, step)?,
        };
        // A run that goes on after it stopped early has its patience anew; one that a crash kept
        // from its export has no end on record, and stops again.
        let end = old.as_ref().and_then(|old| old.end.as_ref());
        let counted = &mut start.progress.evaluations_since_best;
        let stopped_here =
            end.is_some_and(|end| end.stopped_early && end.step == start.progress.step);
        if stopped_here && *counted >= plan.config.eval.early_stopping_patience {
            *counted = 0;
        }

        // The future goes before its metrics: a crash in between leaves no hole in them.
        let (store, progress) = (folder.checkpoints(), start.progress);
        let discarded = store.discard_after(progress.step)?;
        if checkpoint.is_some() {
            store.repoint(&progress)?;
        }
        record(
            &folder,
            plan,
            config_text,
            (&environment, &device),
            &parts,
            old,
        )?;
        observers.extend(reports(&folder, plan, checkpoint)?);

        let mut trainer = Trainer {
            plan: plan.clone(),
            sampler: parts.sampler,
            spec: parts.spec,
            timeline: parts.timeline,
            dtype,
            corpus: parts.corpus,
            optimizer: start.optimizer,
            clock: Clock::new(progress.seconds, plan.config.logging.logging_steps),
            progress,
            store,
            folder,
            observers,
            interrupt,
            free_space: super::room::free_space,
            _log: log,
        };
        for text in notes {
            trainer.tell(&Event::Note { text })?;
        }
        if let Some(step) = checkpoint {
            trainer.tell(&Event::Resumed { step })?;
        }
        for step in discarded {
            trainer.tell(&Event::Deleted { step })?;
        }
        // A crash can come between a save and what is deleted after it.
        trainer.rotate()?;
        let model = start.model;
        Ok(Some(Run { model, trainer }))
    }
}

/// The run folder under its lock, the data, what it will take, and the checkpoint to go on from.
struct Claim {
    folder: RunFolder,
    parts: Parts,
    forecast: Result<Forecast, Shortage>,
    checkpoint: Option<u64>,
}

impl Claim {
    fn new(plan: &Plan, device: &ComputeDevice, resume: Resume) -> Result<Self, TrainError> {
        let path = &plan.config.output_dir;
        starting_point(path, plan, resume)?;
        // A folder that is there is taken before the data is read, so that a live run is noticed at
        // once; a new one is made after, so that bad data leaves nothing behind.
        let existing = path.exists().then(|| RunFolder::open(path)).transpose()?;
        let parts = Parts::load(plan)?;
        let mut forecast = parts.forecast(plan, device)?;
        let folder = match existing {
            Some(folder) => folder,
            None => {
                forecast = Ok(forecast?);
                RunFolder::open(path)?
            }
        };
        // Again, now that it is ours: another run may have come and gone in the meantime.
        let checkpoint = starting_point(path, plan, resume)?;
        Ok(Self {
            folder,
            parts,
            forecast,
            checkpoint,
        })
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

/// Opens the device and writes what `auto` has turned out to be into the plan, so that resolved.toml
/// repeats the run.
pub(super) fn on_device(plan: &Plan) -> Result<(Plan, ComputeDevice, FloatDType), TrainError> {
    let mut plan = plan.clone();
    let device = ComputeDevice::open(plan.config.device.backend)?;
    let (name, dtype) = device.dtype(plan.config.model.dtype)?;
    plan.config.device.backend = device.backend;
    plan.config.model.dtype = name;
    Ok((plan, device, dtype))
}

/// Where a run begins.
pub(super) struct Start<'a> {
    pub(super) plan: &'a Plan,
    pub(super) spec: &'a DecoderSpec,
    pub(super) device: &'a Device,
}

/// What changes from step to step.
pub(super) struct State {
    pub(super) model: Decoder,
    pub(super) optimizer: Optimizer,
    progress: Progress,
}

impl Start<'_> {
    pub(super) fn fresh(&self) -> Result<State, TrainError> {
        let config = &self.plan.config;
        let device = self.device.clone().autodiff();
        let model = match &config.model.base_model {
            Some(base) => model_folder::load_as(self.spec, base, &device)?,
            None => Decoder::new(self.spec, config.seed, &device)?,
        };
        let scaled = config.model.dtype == Dtype::F16;
        Ok(State {
            model,
            optimizer: Optimizer::new(&self.plan.optimizer),
            progress: Progress {
                loss_scale: scaled.then(LossScale::default),
                ..Progress::default()
            },
        })
    }

    fn resumed(&self, folder: &RunFolder, step: u64) -> Result<State, TrainError> {
        let snapshot = folder.checkpoints().load(step)?;
        let device = self.device.clone().autodiff();
        let model = model_folder::decoder_from_hf(self.spec, snapshot.model, &device)?;
        let mut optimizer = Optimizer::new(&self.plan.optimizer);
        // A run whose every step was skipped as not finite has no moments yet.
        if !snapshot.optimizer.tensors.is_empty() {
            optimizer.load_state(&model, snapshot.optimizer, self.device)?;
        }
        Ok(State {
            model,
            optimizer,
            progress: snapshot.progress,
        })
    }
}

/// Data, and what follows from data and plan together.
pub(super) struct Parts {
    pub(super) corpus: Corpus,
    pub(super) sampler: Sampler,
    pub(super) spec: DecoderSpec,
    timeline: Timeline,
    parameters: usize,
    /// The base model's files; none without one.
    base: Vec<FileRecord>,
    /// What the process held before it loaded the data.
    program_bytes: u64,
}

impl Parts {
    pub(super) fn load(plan: &Plan) -> Result<Self, TrainError> {
        let config = &plan.config;
        // Before the data: what reading it takes is free again when training begins.
        let program_bytes = resident_memory_bytes().unwrap_or_default();
        let corpus = Corpus::load(
            &config.data,
            &config.tokenizer,
            &TokenCache::from_environment(),
        )?;
        let spec = decoder_spec(plan, &corpus)?;
        let data = &config.data;
        let sampler = Sampler::new(&corpus, data.sampling, data.sequence_len, config.seed)?;
        let timeline = Timeline::new(plan, sampler.tokens_per_epoch());
        // Parameters are drawn when first used: counting those of a built module is free.
        let parameters = Decoder::new(&spec, config.seed, &Device::flex())?.num_params();
        check_length(plan, timeline.steps())?;
        for prompt in &config.eval.sample_prompts {
            let tokens = corpus.tokenizer.encode(prompt).map_err(GenerateError::from);
            let checked = tokens.and_then(|tokens| check_prompt(&spec, &tokens));
            checked.map_err(|source| TrainError::Sample {
                prompt: prompt.clone(),
                source,
            })?;
        }
        Ok(Self {
            corpus,
            sampler,
            spec,
            timeline,
            parameters,
            base: base_files(plan)?,
            program_bytes,
        })
    }

    /// Whether the run with this last checkpoint has nothing left to do: its last step is
    /// done, or it stopped early, and its model is exported. A crash can come in between.
    fn is_complete(&self, plan: &Plan, step: Option<u64>, record: Option<&RunRecord>) -> bool {
        let end = record.and_then(|record| record.end.as_ref());
        let (Some(step), Some(end)) = (step, end) else {
            return false;
        };
        let steps = self.timeline.steps();
        let patience = plan.config.eval.early_stopping_patience;
        step >= steps || (step == end.step && end.stays_stopped(steps, patience))
    }

    /// What a person should know before the first step.
    fn notes(&self, plan: &Plan, device: &ComputeDevice, environment: &Environment) -> Vec<String> {
        let mut notes = vec![format!(
            "device {}, {} threads, computing in {}",
            device.describe(),
            environment.threads,
            plan.config.model.dtype.name(),
        )];
        notes.extend(self.corpus.notes.iter().cloned());
        notes
    }

    pub(super) fn summary(&self) -> Summary {
        let train_tokens = self.corpus.train_tokens();
        let steps = self.timeline.steps();
        let tokens_per_step = self
            .timeline
            .at(0)
            .map_or(0, |phase| phase.tokens_per_step());
        Summary {
            vocab_size: self.spec.vocab_size as u64,
            train_tokens,
            val_tokens: self.corpus.val.as_ref().map_or(0, |val| val.len() as u64),
            steps,
            tokens_per_step,
            epochs: steps as f64 * tokens_per_step as f64 / self.sampler.tokens_per_epoch() as f64,
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
            process_bytes: self.program_bytes + self.corpus.token_bytes(),
        };
        let available = available_bytes().filter(|_| is_cpu).unwrap_or(u64::MAX);
        Ok(fit(plan, &self.spec, conditions, available)?)
    }
}

/// Sizes the global pool that all tensor operations share. A pool that exists already is kept: in
/// a program that trains twice, or that brings its own.
pub(super) fn start_threads(threads: usize) -> Result<(), TrainError> {
    let threads = if threads == 0 { num_cores() } else { threads };
    match rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
    {
        Err(error) if !error.to_string().contains("already") => Err(TrainError::Threads {
            threads,
            source: error,
        }),
        _ => Ok(()),
    }
}

fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Bit-equality holds between runs on the same device, number of threads and CPU features only.
fn rounding_warning(
    record: Option<&RunRecord>,
    environment: &Environment,
    device: &ComputeDevice,
) -> Option<String> {
    let now = serde_json::json!(environment);
    let record = record?;
    let same = ["threads", "cpu_features"]
        .iter()
        .all(|key| record.environment[key] == now[key]);
    let same = same && record.device == device_record(device);
    (!same).then(|| {
        "warning: device, thread count or CPU differs from the last part of this run; \
         results will agree to rounding, not bit for bit"
            .to_string()
    })
}

/// The tokenizer's vocabulary, or the base model's, which has to have room for it.
fn decoder_spec(plan: &Plan, corpus: &Corpus) -> Result<DecoderSpec, TrainError> {
    let tokenizer = &corpus.tokenizer;
    let base = plan.base.as_ref();
    base.map_or(Ok(()), |base| check_vocabulary(base, tokenizer))?;
    let eos = tokenizer.eos().map(|token| token.id);
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

/// Other bytes are another run: the order of the data and a tokenizer learned on it would change,
/// and from another base model it would have come elsewhere.
fn same_inputs(
    folder: &RunFolder,
    record: Option<&RunRecord>,
    parts: &Parts,
) -> Result<(), TrainError> {
    let Some(record) = record else { return Ok(()) };
    let folder = || folder.path().to_path_buf();
    if let Some(file) = changed(&record.base_model, &data_record(&parts.base)) {
        let folder = folder();
        return Err(TrainError::OtherBaseModel { folder, file });
    }
    match changed(&record.data, &data_record(&parts.corpus.files)) {
        Some(file) => Err(TrainError::OtherData {
            folder: folder(),
            file,
        }),
        None => Ok(()),
    }
}

/// The first file that is not the same, or not there, in both records.
fn changed(before: &serde_json::Value, now: &serde_json::Value) -> Option<String> {
    let hashes = |data: &serde_json::Value| -> Vec<(String, String)> {
        let files = data.as_array().map(Vec::as_slice).unwrap_or_default();
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_string();
        let pairs = files
            .iter()
            .map(|file| (text(&file["path"]), text(&file["blake3"])));
        pairs.collect()
    };
    let (before, now) = (hashes(before), hashes(now));
    let mut all = before.iter().chain(&now);
    let changed = all.find(|file| !(before.contains(file) && now.contains(file)));
    changed.map(|(file, _)| file.clone())
}

fn record(
    folder: &RunFolder,
    plan: &Plan,
    config_text: Option<String>,
    (environment, device): (&Environment, &ComputeDevice),
    parts: &Parts,
    old: Option<RunRecord>,
) -> Result<(), TrainError> {
    let summary = parts.summary();
    let tokens = [summary.train_tokens, summary.val_tokens];
    let mut record = RunRecord::new(
        plan,
        environment,
        device,
        parts.parameters,
        tokens,
        &parts.corpus.files,
    );
    if !parts.base.is_empty() {
        record.base_model = data_record(&parts.base);
    }
    if let Some(old) = old {
        record.started = old.started;
    }
    // First the file that makes a folder a run's: after a crash in between it can be started over.
    folder.write("resolved.toml", &plan.to_toml())?;
    if let Some(text) = config_text {
        folder.write("config.toml", &text)?;
    }
    folder.write_record(&record)
}

/// The journal, and what `logging.report_to` asks for.
fn reports(
    folder: &RunFolder,
    plan: &Plan,
    checkpoint: Option<u64>,
) -> Result<Vec<Box<dyn Observer>>, TrainError> {
    let every = plan.config.logging.logging_steps;
    let at = checkpoint.unwrap_or(0);
    let journal = folder.file("logs/events.jsonl");
    let mut observers: Vec<Box<dyn Observer>> =
        vec![Box::new(Journal::open(&journal, every, checkpoint)?)];
    for report in &plan.config.logging.report_to {
        let file = |name| folder.file(name);
        observers.push(match report {
            Report::Jsonl => Box::new(JsonlMetrics::open(&file("metrics.jsonl"), every, at)?),
            Report::Csv => Box::new(CsvMetrics::open(&file("metrics.csv"), every, at)?),
            Report::Tensorboard => Box::new(TensorboardEvents::open(
                &file("tb"),
                every,
                checkpoint,
                &plan.to_toml(),
            )?),
            Report::Html => Box::new(HtmlReport::open(folder.path(), every, at)?),
        });
    }
    Ok(observers)
}
