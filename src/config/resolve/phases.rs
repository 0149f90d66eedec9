//! `[[phase]]`: the settings of each phase, from its own keys and those of the sections.
//!
//! The keys of a phase are put into the sections of a copy of the configuration, and the copy goes
//! through the same checks as the configuration of a run with one phase. The checks look up keys in
//! the scope of the phase, so that a message points at the key that holds there.

use toml::{Table, Value};

use crate::config::checks::Checks;
use crate::config::keys::{Config, PhaseConfig, PhaseLengthKey, PhaseMode, Task};
use crate::config::length::Length;
use crate::config::optimizer::OptimizerConfig;
use crate::config::phase::{PathSelector, PhaseLength, PhasePlan, ScheduleSpan};
use crate::config::phase_check;
use crate::config::plan::Plan;

/// Keys of `[data]` that depend on the task: a phase with another task than the run's does not take
/// them from the section.
const LEFT_OUT: [&str; 5] = [
    "data.sampling",
    "data.sample_packing",
    "data.overlong",
    "data.chat_template",
    "data.train_on",
];

impl Checks<'_> {
    /// The lengths of the phases, where they could be read; empty without `[[phase]]`.
    pub(super) fn phase_lengths(&mut self, config: &Config) -> Vec<Option<PhaseLength>> {
        let phases = config.phase.iter().enumerate();
        let lengths = phases.map(|(number, phase)| match &phase.length {
            PhaseLengthKey::Steps(steps) => Some(PhaseLength::Steps(*steps)),
            PhaseLengthKey::Text(text) => match text.parse() {
                Ok(length) => Some(length),
                Err(message) => self.in_phase(number, |checks| {
                    let message = format!("{} {message}", checks.describe("length"));
                    let help = "1000 (steps), \"2M tokens\", \"30%\" or \"rest\"";
                    checks.refuse(&["length"], message, help);
                    None
                }),
            },
        });
        lengths.collect()
    }

    /// The length of a run whose file has no length in `[train]`, from the lengths of its phases.
    pub(super) fn length_of_phases(&mut self, lengths: &[Option<PhaseLength>]) -> Option<Length> {
        let lengths: Vec<PhaseLength> = lengths.iter().copied().collect::<Option<_>>()?;
        let all = |value: fn(PhaseLength) -> Option<u64>| {
            let values = lengths.iter().map(|&length| value(length));
            values.sum::<Option<u64>>()
        };
        let steps = all(|length| match length {
            PhaseLength::Steps(steps) => Some(steps),
            _ => None,
        });
        let tokens = all(|length| match length {
            PhaseLength::Tokens(tokens) => Some(tokens),
            _ => None,
        });
        let length = steps.map(Length::Steps).or(tokens.map(Length::Tokens));
        if length.is_none() {
            self.refuse(
                &["train"],
                "the length of the run is not given, and the phases do not say it: it follows from \
                 them only if all lengths are in steps, or all in tokens"
                    .to_string(),
                "set one of max_steps, num_epochs, max_tokens in [train]",
            );
        }
        length
    }

    /// The longest sequences of the run, with the phase that has them if it is not the section's
    /// key that says so.
    pub(super) fn longest_sequences(&self, config: &Config) -> (Option<usize>, usize) {
        let lengths = config.phase.iter().enumerate().map(|(number, phase)| {
            let length = sequence_len(phase).unwrap_or(config.data.sequence_len);
            (Some(number), length)
        });
        lengths
            .max_by_key(|(_, length)| *length)
            .unwrap_or((None, config.data.sequence_len))
    }

    /// Checks the key that only text uses.
    pub(super) fn eval_sequences(&mut self, config: &Config) {
        let mut tasks = config
            .phase
            .iter()
            .map(|phase| phase.task.unwrap_or(config.task));
        let has_text = match config.phase.is_empty() {
            true => config.task == Task::Pretrain,
            false => tasks.any(|task| task == Task::Pretrain),
        };
        let given = config.eval.sequence_len.is_some() && !has_text;
        self.only_with(given, "eval.sequence_len", "task", "\"pretrain\"");
    }

    /// The settings of every phase. Resolves the keys of the phases in `config`.
    pub(super) fn phases(
        &mut self,
        config: &mut Config,
        lengths: &[Option<PhaseLength>],
        run: Option<Length>,
    ) -> Vec<PhasePlan> {
        if config.phase.is_empty() && self.is_rejected("phase") {
            // The strict check has cut them out, and has said why.
            return Vec::new();
        }
        if config.phase.is_empty() {
            let schedule = self.phase_settings(config, run);
            return vec![PhasePlan::whole_run(config, schedule.0, schedule.1)];
        }
        self.defaults_of_task(config);
        self.names(config);
        let written = self.written();
        let mut plans = Vec::new();
        for (number, length) in lengths.iter().enumerate() {
            let Some(mut settings) = settings_of(config, &written, number) else {
                // The strict check has cut something out, and has said so.
                continue;
            };
            let keys = config.phase[number].clone();
            let name = keys.name.clone().unwrap_or(format!("phase-{}", number + 1));
            let own_schedule = keys.lr_scheduler.is_some();
            let span = match (own_schedule, length) {
                (false, _) => run,
                (true, Some(PhaseLength::Steps(steps))) => Some(Length::Steps(*steps)),
                (true, _) => None,
            };
            let is_other_task = settings.task != config.task;
            let (optimizer, schedule, freeze) = self.in_phase(number, |checks| {
                if is_other_task {
                    checks.leave_out(&LEFT_OUT);
                }
                checks.sequence_twice(&keys);
                let (optimizer, schedule) = checks.phase_settings(&mut settings, span);
                (optimizer, schedule, checks.selectors(&keys.freeze))
            });
            let predicts = keys.mode == Some(PhaseMode::Predict);
            let given = keys.predict.is_some() && !predicts;
            self.in_phase(number, |checks| {
                checks.only_with(given, "predict", "mode", "\"predict\"");
            });
            let is_text = settings.task == Task::Pretrain;
            let eval_sequence_len = config.eval.sequence_len.unwrap_or(config.data.sequence_len);
            config.phase[number] = resolved(&keys, &name, &settings, config);
            plans.push(PhasePlan {
                name,
                length: length.unwrap_or(PhaseLength::Rest),
                schedule_span: match own_schedule {
                    true => ScheduleSpan::Phase,
                    false => ScheduleSpan::Run,
                },
                freeze,
                eval_sequence_len: is_text.then_some(eval_sequence_len),
                adapter: keys.adapter.unwrap_or_default(),
                predict: predicts.then(|| keys.predict.unwrap_or_default()),
                ternary_blend: keys.ternary_blend.unwrap_or([1.0, 1.0]),
                ..PhasePlan::whole_run(&settings, optimizer, schedule)
            });
        }
        plans
    }

    /// Reports what is wrong with the phases of a finished plan.
    pub(super) fn problems_of_phases(&mut self, plan: &Plan) {
        for problem in phase_check::problems(plan) {
            let name = plan.phases[problem.phase].name.clone();
            self.in_phase(problem.phase, |checks| {
                let message = format!("phase `{name}` {}", problem.reason);
                checks.refuse(&problem.keys, message, &problem.help);
            });
        }
    }

    fn names(&mut self, config: &Config) {
        for (number, phase) in config.phase.iter().enumerate() {
            let Some(name) = &phase.name else { continue };
            let mut earlier = config.phase[..number].iter();
            let problem = if name.trim().is_empty() {
                Some("is empty".to_string())
            } else if earlier.any(|other| other.name.as_ref() == Some(name)) {
                let name = name.escape_debug();
                Some(format!("is \"{name}\", as in an earlier phase"))
            } else {
                None
            };
            if let Some(problem) = problem {
                self.in_phase(number, |checks| {
                    let message = format!("{} {problem}", checks.describe("name"));
                    checks.refuse(&["name"], message, "give each phase a name of its own");
                });
            }
        }
    }

    fn sequence_twice(&mut self, phase: &PhaseConfig) {
        let in_data = phase.data.as_ref().is_some_and(|data| {
            // The other keys of `data` are those of the section.
            data.contains_key("sequence_len")
        });
        if in_data && phase.sequence_len.is_some() {
            self.refuse(
                &["sequence_len"],
                "`sequence_len` in [[phase]] and in its `data`".to_string(),
                "keep one of them",
            );
        }
    }

    fn selectors(&mut self, texts: &[String]) -> Vec<PathSelector> {
        let selectors = texts.iter().map(|text| text.parse::<PathSelector>());
        let mut parsed = Vec::new();
        for selector in selectors {
            match selector {
                Ok(selector) => parsed.push(selector),
                Err(error) => {
                    let message = format!("{}: {error}", self.describe("freeze"));
                    let help = "the beginning of a parameter's path, as in \"layers.0-3.mlp\"";
                    self.refuse(&["freeze"], message, help);
                }
            }
        }
        parsed
    }
}

/// The configuration of a phase: `config` with the keys of phase `number` in its sections. None if
/// the keys that are left cannot be read. `written` is the file without defaults.
fn settings_of(config: &Config, written: &Table, number: usize) -> Option<Config> {
    let mut sections = written.clone();
    let phases = sections.remove("phase")?;
    let Some(Value::Table(phase)) = phases.as_array()?.get(number).cloned() else {
        return None;
    };
    let mut put = |section: &str, key: &str, value: Value| {
        let section = sections
            .entry(section)
            .or_insert(Value::Table(Table::new()));
        if let Value::Table(section) = section {
            section.insert(key.to_string(), value);
        }
    };
    let mut whole = Table::new();
    for (key, value) in phase {
        match key.as_str() {
            "sequence_len" => put("data", &key, value),
            "micro_batch_size"
            | "gradient_accumulation_steps"
            | "max_grad_norm"
            | "gradient_checkpointing" => put("train", &key, value),
            "dtype" => put("model", &key, value),
            "task" | "optimizer" | "lr_scheduler" | "data" | "dpo" => {
                whole.insert(key, value);
            }
            _ => {}
        }
    }
    let mut table_of = |key: &str| match whole.remove(key) {
        Some(Value::Table(table)) => Some(table),
        _ => None,
    };
    let (optimizer, schedule) = (table_of("optimizer"), table_of("lr_scheduler"));
    let (data, dpo) = (table_of("data"), table_of("dpo"));
    if let Some(Value::Table(section)) = sections.get_mut("data")
        && config.phase[number]
            .task
            .is_some_and(|task| task != config.task)
    {
        for path in LEFT_OUT {
            section.remove(path.trim_start_matches("data."));
        }
    }
    if let Some(own) = optimizer {
        let section = sections.remove("optimizer");
        let merged = merged_optimizer(section, own)?;
        sections.insert("optimizer".to_string(), Value::Table(merged));
    }
    if let Some(own) = schedule {
        sections.insert("lr_scheduler".to_string(), Value::Table(own));
    }
    for (name, own) in [("data", data), ("dpo", dpo)] {
        let section = sections.entry(name);
        if let (Some(own), Value::Table(section)) =
            (own, section.or_insert(Value::Table(Table::new())))
        {
            section.extend(own);
        }
    }
    let is_pairs = config.phase[number].task.unwrap_or(config.task) == Task::Dpo;
    let empty = |dpo: &Value| dpo.as_table().is_some_and(Table::is_empty);
    if sections.get("dpo").is_some_and(empty) || !is_pairs && config.phase[number].dpo.is_none() {
        sections.remove("dpo");
    }
    if let Some(task) = whole.remove("task") {
        sections.insert("task".to_string(), task);
    }
    let read: Config = sections.try_into().ok()?;
    let mut settings = config.clone();
    settings.phase = Vec::new();
    settings.task = read.task;
    settings.data = read.data;
    settings.train = read.train;
    settings.model.dtype = read.model.dtype;
    settings.optimizer = read.optimizer;
    settings.lr_scheduler = read.lr_scheduler;
    settings.dpo = read.dpo;
    Some(settings)
}

/// `[optimizer]` with the keys of a phase. If the phase names another rule, the section's keys that
/// this rule does not have are left out: they were written for the section's rule.
fn merged_optimizer(section: Option<Value>, own: Table) -> Option<Table> {
    let mut merged = match section {
        Some(Value::Table(section)) => section,
        _ => Table::new(),
    };
    let read = |table: &Table| -> Option<OptimizerConfig> { table.clone().try_into().ok() };
    let named = own.get("name").is_some();
    let (before, after) = (read(&merged)?.name, read(&own)?.name);
    if named && before != after {
        merged.retain(|key, _| after.has_key(key));
    }
    merged.extend(own);
    Some(merged)
}

/// The keys of a phase with everything filled in, so that they give the same phase wherever the
/// sections' defaults come from.
fn resolved(keys: &PhaseConfig, name: &str, settings: &Config, run: &Config) -> PhaseConfig {
    let table = |value: Result<Table, toml::ser::Error>| value.ok();
    let mut data = settings.data.clone();
    data.sequence_len = run.data.sequence_len;
    let data = (data != run.data).then(|| Table::try_from(&settings.data));
    let data = data.and_then(table).map(|mut data| {
        data.remove("sequence_len");
        data
    });
    let train = &settings.train;
    PhaseConfig {
        name: Some(name.to_string()),
        length: keys.length.clone(),
        task: Some(settings.task),
        sequence_len: Some(settings.data.sequence_len),
        micro_batch_size: Some(train.micro_batch_size),
        gradient_accumulation_steps: Some(train.gradient_accumulation_steps),
        max_grad_norm: Some(train.max_grad_norm),
        dtype: Some(settings.model.dtype),
        gradient_checkpointing: Some(train.gradient_checkpointing),
        optimizer: table(Table::try_from(&settings.optimizer)),
        lr_scheduler: keys
            .lr_scheduler
            .as_ref()
            .map(|_| settings.lr_scheduler.clone()),
        data,
        dpo: settings.dpo.clone().filter(|_| settings.task == Task::Dpo),
        ternary_blend: keys.ternary_blend,
        freeze: keys.freeze.clone(),
        mode: keys.mode,
        predict: keys.predict,
        adapter: keys.adapter,
    }
}

/// The sequence length that a phase has of its own.
fn sequence_len(phase: &PhaseConfig) -> Option<usize> {
    let in_data = || {
        let length = phase.data.as_ref()?.get("sequence_len")?.as_integer()?;
        usize::try_from(length).ok()
    };
    phase.sequence_len.or_else(in_data)
}
