//! From a plan to a run that only has to be started: threads, folder, data, model, resume.

use burn::tensor::FloatDType;

use super::clock::Clock;
use super::folder::{RunRecord, data_record, device_record};
use super::journal::Journal;
use super::parts::Parts;
use super::report::HtmlReport;
use super::resume::starting_point;
use super::run::Trainer;
use super::saver::Saver;
use super::start::Start;
use super::{
    CsvMetrics, Event, Interrupt, JsonlMetrics, Observer, Resume, Run, RunFolder,
    TensorboardEvents, TrainError,
};
use crate::config::{Plan, Report};
use crate::device::ComputeDevice;
use crate::environment::Environment;
use crate::forecast::{Forecast, Shortage};

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
        if let Some(step) = checkpoint
            && let Some(method) = folder.checkpoints().lossy(step)?
        {
            notes.push(format!(
                "warning: the checkpoint of step {step} is lossy ({}): the run goes on from near where it was, \
                 not bit for bit",
                method.name()
            ));
        }
        let start = Start {
            plan,
            spec: &parts.spec,
            device: &device.device,
            dtype,
        };
        let state = match checkpoint {
            None => start.fresh()?,
            Some(step) => start.resumed(&folder, step, old.as_ref())?,
        };

        // The future goes before its metrics: a crash in between leaves no hole in them.
        let (store, progress) = (folder.checkpoints(), state.progress);
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
            spec: parts.spec,
            timeline: parts.timeline,
            dtype,
            feed: parts.feed,
            reference: state.reference,
            beginning: state.beginning,
            optimizer: state.optimizer,
            clock: Clock::new(progress.seconds, plan.config.logging.logging_steps),
            progress,
            store,
            saver: Saver::default(),
            folder,
            observers,
            interrupt,
            free_space: super::room::free_space,
            _log: log,
        };
        let notes = notes.into_iter().map(|text| Event::Note { text });
        let resumed = checkpoint.map(|step| Event::Resumed { step });
        let discarded = discarded.into_iter().map(|step| Event::Deleted { step });
        for event in notes.chain(resumed).chain(discarded) {
            trainer.tell(&event)?;
        }
        // A crash can come between a save and what is deleted after it.
        trainer.rotate()?;
        let model = state.model;
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
    match changed(&record.data, &data_record(parts.feed.files())) {
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
        [parts.parameters, parts.trainable],
        tokens,
        parts.feed.files(),
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
    let file = |name| folder.file(name);
    let asked = &plan.config.logging.report_to;
    // What an earlier session wrote and this one does not goes no further than the run either.
    if !asked.contains(&Report::Jsonl) && file("metrics.jsonl").exists() {
        JsonlMetrics::open(&file("metrics.jsonl"), every, at)?;
    }
    if !asked.contains(&Report::Csv) && file("metrics.csv").exists() {
        CsvMetrics::open(&file("metrics.csv"), every, at)?;
    }
    for report in asked {
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
