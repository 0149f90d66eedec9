//! From a plan to a run that only has to be started: threads, folder, data, model, resume.

use std::sync::Arc;
use std::time::SystemTime;

use super::average::Average;
use super::clock::Clock;
use super::folder::{RunRecord, data_record, device_record};
use super::inputs::RunInputs;
use super::model_init::ModelInit;
use super::observers::{
    EXCHANGE, Journal, LogEvents, PHASE, PREDICTION, REGULATED, TRAFFIC, WEIGHTS,
};
use super::predictor::Predictor;
use super::regulator::Regulator;
use super::report::HtmlReport;
use super::resume::{StartingPoint, flat_config, starting_point};
use super::same_run::{check_phase, phases_in_code, same_inputs, same_phases, same_starts};
use super::saving::{Saver, free_space};
use super::session::{ActivePhase, Session, objective_specs};
use super::team::Team;
use super::{
    CsvMetrics, Event, Interrupt, JsonlMetrics, Observer, Resume, Run, RunFolder,
    TensorboardEvents, TrainError,
};
use crate::checkpoint::{Cost, Progress};
use crate::collective::Collective;
use crate::config::{Plan, Report};
use crate::device::ComputeDevice;
use crate::environment::Environment;
use crate::forecast::{Forecast, Shortage};
use crate::gradient::compress::Method;
use crate::gradient::{Gradient, ParameterOrder, Pipeline, Stage, trained_parameters};
use crate::phase;

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
    /// The stages that each gradient passes between backward pass and update.
    pub stages: Vec<Box<dyn Stage>>,
    /// The ranks that take part in the run; None for a run with a single one. Every rank prepares and
    /// trains the same plan. Rank 0 owns the run folder, saves, and writes the reports; the others
    /// have to be able to read the folder.
    pub collective: Option<Arc<dyn Collective>>,
}

impl Run {
    /// Builds everything a run needs: takes the run folder, loads the data, builds or restores the
    /// model and the optimizer. Returns none when the run in the folder is already complete.
    ///
    /// # Errors
    /// Whatever is wrong with folder, data, model or checkpoint; ranks that do not have the same
    /// version, plan and data.
    pub fn prepare(plan: &Plan, options: Options) -> Result<Option<Self>, TrainError> {
        let mut options = options;
        let team = match options.collective.take() {
            Some(collective) => Team::meet(collective)?,
            None => Team::alone(),
        };
        start_threads(plan.config.train.threads, team.on_cores())?;
        let (mut plan, device) = on_device(plan)?;
        for phase in &mut plan.phases {
            phase.ranks = team.ranks();
        }
        check_writable(&plan)?;
        if team.ranks() > 1 {
            // What cannot be is no configuration to compare.
            phase::check(&plan)?;
            let mut keys = flat_config(&plan.config);
            keys.insert("--resume".to_string(), format!("{:?}", options.resume));
            keys.insert("phases".to_string(), phases_in_code(&plan)?.to_string());
            team.agree("configuration", &keys)?;
        }
        let TakenRun {
            folder,
            inputs,
            forecast,
            start,
        } = TakenRun::take(&plan, &device, options.resume, &team)?;
        team.agree("data", &inputs.fingerprint())?;
        let checkpoint = start.checkpoint();
        let log = match team.is_lead() {
            true => folder.log()?,
            false => tracing::Dispatch::none(),
        };
        let _log = tracing::dispatcher::set_default(&log);
        if team.is_lead() {
            options.observers.push(Box::new(LogEvents));
        }

        let environment = Environment::detect();
        let old = folder.read_record()?;
        if !matches!(start, StartingPoint::New | StartingPoint::Again) {
            same_phases(&folder, old.as_ref(), &plan)?;
        }
        if let StartingPoint::Checkpoint(step) | StartingPoint::FinishedAt(step) = start {
            same_starts(old.as_ref(), &inputs.timeline, step)?;
        }
        if options.resume == Resume::Auto && inputs.is_complete(&plan, start, old.as_ref()) {
            return Ok(None);
        }
        if let StartingPoint::FinishedAt(step) = start {
            let (folder, steps) = (folder.path().to_path_buf(), inputs.timeline.steps());
            return Err(TrainError::CheckpointsGone {
                folder,
                step,
                steps,
            });
        }
        let old = old.filter(|_| checkpoint.is_some());
        let forecast = forecast?;
        let mut notes = inputs.notes(&plan, &device, &environment, &team);
        if start == StartingPoint::Again {
            notes.push(
                "no checkpoint is left of the run in this folder: it starts over".to_string(),
            );
        }
        notes.extend(forecast.describe(&inputs.summary(), &plan));
        if let Some(step) = checkpoint {
            same_inputs(&folder, old.as_ref(), &inputs)?;
            notes.extend(rounding_warning(old.as_ref(), &environment, &device));
            notes.extend(other_workers(old.as_ref(), &plan));
            notes.extend(lossy_warning(&folder, step)?);
        }
        let init = ModelInit {
            plan: &plan,
            spec: &inputs.spec,
            device: &device.device,
        };
        let phase = inputs
            .timeline
            .of_completed(checkpoint.unwrap_or(0))
            .clone();
        let mut initial = match checkpoint {
            None => init.fresh(&phase)?,
            Some(step) => init.resumed(&folder, (step, &phase), old.as_ref())?,
        };
        let state = &mut initial.state;
        check_phase(&state.progress, phase.number)?;
        notes.extend(count_older_cost(&mut state.progress, &inputs));
        state.pipeline = Pipeline::new(options.stages)?;
        if let Some(compression) = &plan.compression {
            let (trained, workers) = (trained_parameters(state.model()), phase.plan.workers);
            let fresh = || Method::new(compression, &trained, 1);
            let method = Method::new(compression, &trained, workers)?;
            let all = workers * team.ranks();
            if all > 1 && team.is_lead() {
                let order = Arc::new(ParameterOrder::of(state.model()));
                let weights = Gradient::of_weights(state.model(), &order);
                notes.push(method.pays(&weights, all, fresh)?.describe(all));
            }
            state.pipeline =
                std::mem::take(&mut state.pipeline).with_exchange(Box::new(method.compression));
        }
        state.regulator = plan.config.regulator.map(Regulator::new);
        state.average = inputs.average.map(Average::new);
        state.predictor = phase.plan.predict.map(Predictor::new);
        let restored = state.restore_extras(initial.extras, &device.device, team.collective())?;
        if checkpoint.is_some() {
            let new = |owner| format!("{owner} is new to this run: it begins anew");
            notes.extend(restored.new.into_iter().map(new));
            notes.extend(restored.note);
        }

        // All ranks have read what rank 0 changes now.
        team.wait_for_all()?;
        let store = folder.checkpoints();
        let mut discarded = Vec::new();
        if team.is_lead() {
            // The future goes before its metrics: a crash in between leaves no hole in them.
            discarded = store.discard_after(state.progress.step)?;
            if checkpoint.is_some() {
                store.repoint(&state.progress)?;
            }
            let text = options.config_text;
            record(&folder, &plan, text, (&environment, &device), &inputs, old)?;
            options
                .observers
                .extend(reports(&folder, &plan, checkpoint)?);
        }

        let mut session = Session {
            active: ActivePhase::new(&phase, &inputs.data, initial.reference),
            spec: inputs.spec,
            flops_per_token: inputs.flops_per_token,
            device,
            timeline: inputs.timeline,
            data: inputs.data,
            initial_adapter: initial.initial_adapter,
            average: inputs.average,
            last_learning_rate: 0.0,
            clock: Clock::new(
                initial.state.progress.seconds,
                plan.config.logging.logging_steps,
            ),
            store,
            saver: Saver::default(),
            folder,
            observers: options.observers,
            interrupt: options.interrupt,
            free_space,
            log: log.clone(),
            cut: None,
            is_suspended: false,
            plan,
            team,
        };
        let notes = notes.into_iter().map(|text| Event::Note { text });
        let resumed = checkpoint.map(|step| Event::Resumed { step });
        let discarded = discarded.into_iter().map(|step| Event::Deleted { step });
        for event in notes.chain(resumed).chain(discarded) {
            session.emit(&event)?;
        }
        session.note_fresh_state(&initial.without_state)?;
        // A crash can come between a save and what is deleted after it.
        session.rotate()?;
        // A run counts its own time only, and it may wait before it starts.
        session.clock.pause();
        Ok(Some(Run {
            state: initial.state,
            session,
            first: None,
            evaluation: None,
        }))
    }
}

/// The run folder, under its lock on rank 0; the data, what it will take, and the checkpoint to go on
/// from.
struct TakenRun {
    folder: RunFolder,
    inputs: RunInputs,
    forecast: Result<Forecast, Shortage>,
    start: StartingPoint,
}

impl TakenRun {
    /// Rank 0 takes the folder and reads the data; then the first rank of every other host reads it;
    /// then the others, which find the tokens in the cache.
    fn take(
        plan: &Plan,
        device: &ComputeDevice,
        resume: Resume,
        team: &Team,
    ) -> Result<Self, TrainError> {
        let of_lead = match team.is_lead() {
            true => Some(Self::take_folder(plan, device, resume, team)?),
            false => None,
        };
        let (start, started) = team
            .tell(|| of_lead.as_ref().map(|(run, at)| (run.start, *at)))?
            .unwrap_or((StartingPoint::New, SystemTime::now()));
        if let Some((run, _)) = of_lead {
            team.wait_for_all()?;
            return Ok(run);
        }
        let is_first = team.is_first_of_host();
        if !is_first {
            team.wait_for_all()?;
        }
        let inputs = RunInputs::load(plan, started)?;
        // Memory that the ranks of this host have taken since would count twice.
        let forecast = match is_first {
            true => inputs.forecast(plan, device, team.on_host())??,
            false => inputs.forecast_anyway(plan, device)?,
        };
        if is_first {
            team.wait_for_all()?;
        }
        Ok(Self {
            folder: RunFolder::of_lead(&plan.config.output_dir),
            inputs,
            forecast: Ok(forecast),
            start,
        })
    }

    /// Also returns when the run began.
    fn take_folder(
        plan: &Plan,
        device: &ComputeDevice,
        resume: Resume,
        team: &Team,
    ) -> Result<(Self, SystemTime), TrainError> {
        let path = &plan.config.output_dir;
        let start = starting_point(path, plan, resume)?;
        // A resumed run writes its start date in chat templates.
        let old = match start {
            StartingPoint::Checkpoint(_) => RunRecord::read(path)?,
            _ => None,
        };
        let started = old.map_or_else(SystemTime::now, |old| old.start_time());
        // A folder that is there is taken before the data is read, so that a live run is noticed at
        // once; a new one is made after, so that bad data leaves nothing behind.
        let existing = path.exists().then(|| RunFolder::open(path)).transpose()?;
        let inputs = RunInputs::load(plan, started)?;
        let mut forecast = inputs.forecast(plan, device, team.on_host())?;
        let folder = match existing {
            Some(folder) => folder,
            None => {
                forecast = Ok(forecast?);
                RunFolder::open(path)?
            }
        };
        // Again, now that it is ours: another run may have come and gone in the meantime.
        let start = starting_point(path, plan, resume)?;
        let run = Self {
            folder,
            inputs,
            forecast,
            start,
        };
        Ok((run, started))
    }
}

/// Checks that the plan can be written as TOML, because code may have changed it.
fn check_writable(plan: &Plan) -> Result<(), TrainError> {
    toml::to_string(&plan.config)
        .map(drop)
        .map_err(|error| TrainError::Unwritable {
            what: "the configuration",
            message: error.to_string(),
        })
}

/// Opens the device and writes what `auto` has turned out to be into the plan, so that resolved.toml
/// repeats the run.
pub(super) fn on_device(plan: &Plan) -> Result<(Plan, ComputeDevice), TrainError> {
    let mut plan = plan.clone();
    let device = ComputeDevice::open(plan.config.device.backend)?;
    plan.config.device.backend = device.backend;
    plan.config.model.dtype = device.dtype(plan.config.model.dtype)?.0;
    for phase in &mut plan.phases {
        phase.dtype = device.dtype(phase.dtype)?.0;
    }
    for (keys, phase) in plan.config.phase.iter_mut().zip(&plan.phases) {
        keys.dtype = Some(phase.dtype);
    }
    Ok((plan, device))
}

/// Counts the steps of a run that an older version began without counting them, and says so.
fn count_older_cost(progress: &mut Progress, inputs: &RunInputs) -> Option<String> {
    if progress.step == 0 || progress.cost != Cost::default() {
        return None;
    }
    progress.cost = Cost {
        train_seconds: progress.seconds,
        ..inputs.planned_cost(&inputs.timeline, progress.step)
    };
    Some(format!(
        "an older version took the first {} steps and counted no cost: their backward passes and FLOPs are \
         taken from the plan, and their seconds of training steps include evaluation and saving",
        progress.step
    ))
}

fn lossy_warning(folder: &RunFolder, step: u64) -> Result<Option<String>, TrainError> {
    let lossy = folder.checkpoints().lossy(step)?;
    Ok(lossy.map(|method| {
        format!(
            "warning: the checkpoint of step {step} is lossy ({}): the run goes on from near where it was, \
             not bit for bit",
            method.name()
        )
    }))
}

/// Sizes the global pool that all tensor operations share; without a number it has a part of the cores
/// that `ranks` ranks share. A pool that exists already is kept: in a program that trains twice, or
/// that brings its own.
pub(super) fn start_threads(threads: usize, ranks: usize) -> Result<(), TrainError> {
    let threads = match threads {
        0 => (num_cores() / ranks.max(1)).max(1),
        threads => threads,
    };
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

/// What another number of ranks or logical workers means for a run that goes on.
fn other_workers(record: Option<&RunRecord>, plan: &Plan) -> Option<String> {
    let (record, phase) = (record?, plan.phases.first()?);
    let counts = [
        ("ranks", record.ranks, phase.ranks),
        ("logical workers", record.logical_workers, phase.workers),
    ];
    let changed = counts.iter().filter(|(_, before, now)| before != now);
    let changed: Vec<String> = changed
        .map(|(what, before, now)| format!("{now} {what} in place of {before}"))
        .collect();
    if changed.is_empty() {
        return None;
    }
    let of_worker = phase.sequences_per_step() / (phase.ranks * phase.workers) as u64;
    let mut text = format!(
        "warning: the run goes on with {}: a step has {} sequences in place of {}, and results are not \
         those of an uninterrupted run",
        changed.join(" and "),
        phase.sequences_per_step(),
        of_worker * (record.ranks * record.logical_workers) as u64,
    );
    if plan.config.train.max_steps.is_none() {
        text.push_str(
            ". The length of the run is in tokens or epochs, so that it has another number of steps now: \
             the learning rate goes on at another place of its schedule, and the last step comes after \
             another number of tokens",
        );
    }
    Some(text)
}

fn record(
    folder: &RunFolder,
    plan: &Plan,
    config_text: Option<String>,
    (environment, device): (&Environment, &ComputeDevice),
    inputs: &RunInputs,
    old: Option<RunRecord>,
) -> Result<(), TrainError> {
    let summary = inputs.summary();
    let tokens = [summary.train_tokens, summary.val_tokens];
    let mut record = RunRecord::new(
        plan,
        environment,
        device,
        [inputs.parameters, inputs.trainable],
        tokens,
        &inputs.files(),
    );
    record.token_inputs = inputs.token_inputs();
    record.phases = phases_in_code(plan)?;
    if plan.phases.len() > 1 {
        record.phase_starts = inputs.timeline.starts();
    }
    if !inputs.base.is_empty() {
        record.base_model = data_record(&inputs.base);
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
    let specs = objective_specs(plan);
    let mut optional = Vec::new();
    if plan.config.regulator.is_some() {
        optional.push(REGULATED);
    }
    if plan.config.average.is_some() {
        optional.push(WEIGHTS);
    }
    if plan.phases.len() > 1 {
        optional.push(PHASE);
    }
    if plan.phases.iter().any(|phase| phase.predict.is_some()) {
        optional.extend(PREDICTION);
    }
    if plan.compression.is_some() {
        optional.extend(EXCHANGE);
        optional.extend(TRAFFIC);
    }
    let asked = &plan.config.logging.report_to;
    // What an earlier session wrote and this one does not goes no further than the run either.
    if !asked.contains(&Report::Jsonl) && file("metrics.jsonl").exists() {
        JsonlMetrics::open(&file("metrics.jsonl"), every, at)?;
    }
    if !asked.contains(&Report::Csv) && file("metrics.csv").exists() {
        CsvMetrics::open(&file("metrics.csv"), every, at, &specs, &optional)?;
    }
    for report in asked {
        observers.push(match report {
            Report::Jsonl => Box::new(JsonlMetrics::open(&file("metrics.jsonl"), every, at)?),
            Report::Csv => Box::new(CsvMetrics::open(
                &file("metrics.csv"),
                every,
                at,
                &specs,
                &optional,
            )?),
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
