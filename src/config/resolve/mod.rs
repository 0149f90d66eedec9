//! From what the TOML says to what will run: every check that involves more than one key.
//!
//! Each section fills in its defaults and refuses its contradictions; [`Checks`] collects what they
//! find. A check names the keys it read, so that it points at the first of them and keeps silent
//! when one was rejected already (with a misspelled `max_step`, "max_steps is missing" is noise).

mod adapter;
mod average;
mod gradient;
mod model;
mod phases;
mod quantization;

use super::checks::Checks;
use super::document::Document;
use super::error::Issue;
use super::keys::{
    AdapterInit, CHAT_TEMPLATES, CheckpointFormat, Config, DatasetKind, Sampling, Task,
    TokenizerConfig, TokenizerKind, is_chat_template_path,
};
use super::length::Length;
use super::optimizer::OptimizerPlan;
use super::phase::PhaseLength;
use super::plan::Plan;
use super::schedule::SchedulePlan;

/// No machine holds more at once, and sums of tokens over a run stay within 64 bits.
const MOST_TOKENS_PER_STEP: f64 = 1e9;

/// Resolves a configuration. `rejected` are the paths that the strict check cut out.
pub(super) fn resolve(
    mut config: Config,
    document: &Document,
    rejected: &[String],
) -> Result<Plan, Vec<Issue>> {
    let mut checks = Checks::new(document, rejected);
    checks.places(&config);
    let lengths = checks.phase_lengths(&config);
    let length = checks.length(&config, &lengths);
    checks.base_tokenizer(&mut config);
    checks.tokenizer(&mut config);
    checks.evaluation(&config);
    checks.eval_sequences(&config);
    checks.saving(&config);
    checks.regulator(&config);
    checks.average(&config, length);
    let mut shape = checks.model(&mut config);
    if let Some((shape, base)) = &mut shape {
        checks.quantization(&mut config, shape, base.is_some());
    }
    let adapter = checks.adapter(&mut config, shape.as_ref());
    let phases = checks.phases(&mut config, &lengths, length);
    let compression = checks.compression(&mut config, &phases);
    let plan = match (length, shape) {
        (Some(length), Some((shape, base))) if checks.is_empty() => Plan {
            phases,
            config,
            shape,
            base,
            adapter,
            length,
            compression,
        },
        _ => return Err(checks.into_issues()),
    };
    checks.problems_of_phases(&plan);
    match checks.is_empty() {
        true => Ok(plan),
        false => Err(checks.into_issues()),
    }
}

impl Checks<'_> {
    /// The run folder.
    fn places(&mut self, config: &Config) {
        if config.output_dir.as_os_str().is_empty() {
            self.refuse(
                &["output_dir"],
                "`output_dir` is empty".to_string(),
                "name a folder, as in \"outputs/run\"",
            );
        }
    }

    /// Everything that may differ between phases.
    fn phase_settings(
        &mut self,
        config: &mut Config,
        span: Option<Length>,
    ) -> (OptimizerPlan, SchedulePlan) {
        self.tokens_per_step(config);
        self.data(config);
        self.early_stopping(config);
        let optimizer = self.optimizer(&mut config.optimizer);
        let schedule = self.schedule(&mut config.lr_scheduler, span);
        (optimizer, schedule)
    }

    pub(super) fn tokens_per_step(&mut self, config: &Config) {
        let train = &config.train;
        let workers = config
            .gradient
            .as_ref()
            .map_or(1, |gradient| gradient.logical_workers);
        let tokens = train.micro_batch_size as f64
            * train.gradient_accumulation_steps as f64
            * workers as f64
            * config.data.sequence_len as f64;
        if tokens > MOST_TOKENS_PER_STEP {
            self.refuse(
                &[
                    "train.micro_batch_size",
                    "train.gradient_accumulation_steps",
                    "gradient.logical_workers",
                ],
                format!("{tokens:.1e} tokens in one optimizer step"),
                "lower micro_batch_size, gradient_accumulation_steps or sequence_len",
            );
        }
    }

    /// The length of the run: the one in `[train]`, or else what the phases add up to.
    fn length(&mut self, config: &Config, phases: &[Option<PhaseLength>]) -> Option<Length> {
        let train = &config.train;
        let given: Vec<(&str, Length)> = [
            ("train.max_steps", train.max_steps.map(Length::Steps)),
            ("train.num_epochs", train.num_epochs.map(Length::Epochs)),
            ("train.max_tokens", train.max_tokens.map(Length::Tokens)),
        ]
        .into_iter()
        .filter_map(|(key, length)| Some((key, length?)))
        .collect();
        match given.as_slice() {
            [(_, length)] => return Some(*length),
            [] if !phases.is_empty() => return self.length_of_phases(phases),
            [] if self.is_rejected("phase") => {}
            [] => self.refuse(
                &["train"],
                "the length of the run is not given".to_string(),
                "set one of max_steps, num_epochs, max_tokens in [train]",
            ),
            [first @ .., (last, _)] => {
                let earlier: Vec<&str> = first.iter().map(|(key, _)| leaf(key)).collect();
                let keys: Vec<&str> = std::iter::once(*last)
                    .chain(first.iter().map(|(key, _)| *key))
                    .collect();
                let earlier = earlier.join(" and ");
                self.refuse(
                    &keys,
                    format!(
                        "{} together with {earlier}: a run has one length",
                        self.describe(last)
                    ),
                    "keep one of max_steps, num_epochs, max_tokens",
                );
            }
        }
        None
    }

    /// A base model brings its tokenizer, where the file does not say anything about one.
    fn base_tokenizer(&mut self, config: &mut Config) {
        let keys = ["type", "path", "vocab_size"].map(|key| format!("tokenizer.{key}"));
        if let Some(base) = &config.model.base_model
            && !keys.iter().any(|key| self.is_mentioned(key))
        {
            config.tokenizer = TokenizerConfig::of_model(base);
        }
    }

    fn tokenizer(&mut self, config: &mut Config) {
        let tokenizer = &mut config.tokenizer;
        let kind = tokenizer.kind;
        let has_path = tokenizer.path.is_some();
        self.only_with(
            has_path && kind != TokenizerKind::File,
            "tokenizer.path",
            "tokenizer.type",
            "\"file\"",
        );
        self.only_with(
            tokenizer.vocab_size.is_some() && kind != TokenizerKind::Bpe,
            "tokenizer.vocab_size",
            "tokenizer.type",
            "\"bpe\"",
        );
        if kind == TokenizerKind::Bpe {
            tokenizer
                .vocab_size
                .get_or_insert(TokenizerConfig::DEFAULT_VOCAB_SIZE);
        }
        let path = tokenizer.path.as_ref();
        let has_path = path.is_some_and(|path| !path.as_os_str().is_empty());
        if kind == TokenizerKind::File && !has_path {
            self.refuse(
                &["tokenizer.path", "tokenizer.type", "tokenizer"],
                "[tokenizer] type = \"file\" needs `path`".to_string(),
                "path = \"some/folder/tokenizer.json\", or type = \"bpe\" to train one",
            );
        }
    }

    /// The defaults of `[data]` that depend on the run's task, where the phases have the data that
    /// is checked.
    fn defaults_of_task(&mut self, config: &mut Config) {
        if config.task != Task::Pretrain && !self.is_written("data.sampling") {
            config.data.sampling = Sampling::Epoch;
        }
        if config.data.val_path.is_some() && !self.is_written("data.val_fraction") {
            config.data.val_fraction = 0.0;
        }
    }

    fn data(&mut self, config: &mut Config) {
        let data = &mut config.data;
        if data.datasets.is_empty() {
            self.refuse(
                &["data"],
                "there is nothing to train on: no [[data.datasets]]".to_string(),
                "add [[data.datasets]] with path = \"some/file.txt\"",
            );
        }
        for (position, dataset) in data.datasets.iter().enumerate() {
            let path = format!("data.datasets.{position}.path");
            let paths = dataset.path.as_slice();
            if paths.is_empty() || paths.iter().any(String::is_empty) {
                self.refuse(
                    &[&path],
                    format!("{} names no file", self.describe(&path)),
                    "path = \"some/file.txt\", a glob, or a list of them",
                );
            }
            for (key, name) in dataset.fields.all() {
                if name.is_empty() {
                    let field = format!("data.datasets.{position}.fields.{key}");
                    self.refuse(
                        &[&field],
                        format!("{} names no field", self.describe(&field)),
                        &format!("the default is \"{key}\""),
                    );
                }
            }
            let kind = format!("data.datasets.{position}.type");
            let (given, needed) = match dataset.kind {
                DatasetKind::Auto | DatasetKind::Text => (false, ""),
                DatasetKind::Preference => (config.task != Task::Dpo, "\"dpo\""),
                _ => (config.task != Task::Sft, "\"sft\""),
            };
            self.only_with(given, &kind, "task", needed);
        }
        self.rows(config);
        self.pairs(config);
        let data = &mut config.data;
        let Some(path) = &data.val_path else {
            return;
        };
        let is_explicit = self.is_written("data.val_fraction");
        if is_explicit && data.val_fraction > 0.0 {
            self.refuse(
                &["data.val_fraction", "data.val_path"],
                format!(
                    "`val_fraction` together with {}",
                    self.describe("data.val_path")
                ),
                "keep one: a share of the datasets, or a file of its own",
            );
        }
        if path.as_os_str().is_empty() {
            self.refuse(
                &["data.val_path"],
                format!("{} names no file", self.describe("data.val_path")),
                "remove it to hold out a share of the datasets",
            );
        }
        data.val_fraction = 0.0;
    }

    /// What rows need and windows of text have no use for.
    fn rows(&mut self, config: &mut Config) {
        let data = &mut config.data;
        if config.task == Task::Pretrain {
            for (given, key) in [
                (data.sample_packing.is_some(), "data.sample_packing"),
                (data.overlong.is_some(), "data.overlong"),
                (data.chat_template.is_some(), "data.chat_template"),
                (data.train_on.is_some(), "data.train_on"),
            ] {
                self.only_with(given, key, "task", "\"sft\" or \"dpo\"");
            }
            return;
        }
        let is_explicit = self.is_written("data.sampling");
        if data.sampling == Sampling::Random && is_explicit {
            self.refuse(
                &["data.sampling"],
                "`sampling` = \"random\" in [data] for rows".to_string(),
                "remove it: rows come once per epoch, in a random order",
            );
        }
        data.sampling = Sampling::Epoch;
        data.sample_packing.get_or_insert(true);
        data.overlong.get_or_insert_default();
        data.train_on.get_or_insert_default();
        if let Some(choice) = &data.chat_template {
            let is_known = choice == "tokenizer"
                || choice.starts_with("tokenizer:")
                || CHAT_TEMPLATES.contains(&choice.as_str())
                || is_chat_template_path(choice);
            if !is_known {
                let known = CHAT_TEMPLATES.join(", ");
                self.refuse(
                    &["data.chat_template"],
                    format!("there is no chat template \"{}\"", choice.escape_debug()),
                    &format!("tokenizer, the path of a .jinja file, or one of: {known}"),
                );
            }
        }
        if matches!(
            config.tokenizer.kind,
            TokenizerKind::Bpe | TokenizerKind::Char
        ) {
            self.refuse(
                &["tokenizer.type", "tokenizer", "task"],
                "fine-tuning needs a tokenizer that is already there".to_string(),
                "set base_model in [model], or type = \"file\" and path in [tokenizer]",
            );
        }
    }

    /// What pairs of answers need, and what has no meaning for them.
    fn pairs(&mut self, config: &mut Config) {
        if config.task != Task::Dpo {
            self.only_with(config.dpo.is_some(), "dpo", "task", "\"dpo\"");
            return;
        }
        config.dpo.get_or_insert_default();
        if config.model.base_model.is_none() {
            self.refuse(
                &["task", "model.base_model"],
                "`task` = \"dpo\" without a base model: there is nothing to prefer its answers to"
                    .to_string(),
                "base_model = \"some/folder\" in [model]",
            );
        }
        if config
            .adapter
            .as_ref()
            .is_some_and(|adapter| adapter.init != AdapterInit::Default)
        {
            self.refuse(
                &["adapter.init", "task"],
                "`init` in [adapter] with `task` = \"dpo\": the reference is the base model as it is"
                    .to_string(),
                "init = \"default\"",
            );
        }
        let data = &mut config.data;
        let is_explicit = self.is_written("data.sample_packing");
        if data.sample_packing == Some(true) && is_explicit {
            self.refuse(
                &["data.sample_packing", "task"],
                format!(
                    "{} with `task` = \"dpo\": the two answers of a pair are two rows of a batch",
                    self.describe("data.sample_packing")
                ),
                "remove it",
            );
        }
        data.sample_packing = Some(false);
        if data.val_path.is_some() {
            self.refuse(
                &["data.val_path", "task"],
                format!("{} with `task` = \"dpo\"", self.describe("data.val_path")),
                "val_fraction holds out a share of the pairs",
            );
        }
        let weighted = data
            .datasets
            .iter()
            .position(|dataset| dataset.weight != 1.0);
        if let Some(position) = weighted {
            self.refuse(
                &[&format!("data.datasets.{position}.weight"), "task"],
                "`weight` in [[data.datasets]] with `task` = \"dpo\": every pair comes once per epoch"
                    .to_string(),
                "remove it",
            );
        }
    }

    fn saving(&mut self, config: &Config) {
        let saving = &config.checkpoint;
        let is_lossy = saving.lossy.is_some();
        let is_whole = is_lossy && saving.format == CheckpointFormat::Full;
        self.only_with(
            is_whole,
            "checkpoint.lossy",
            "checkpoint.format",
            "\"delta\"",
        );
        if saving.lossy_moments && !is_lossy {
            let key = "checkpoint.lossy_moments";
            self.refuse(
                &[key, "checkpoint.lossy"],
                format!("{} takes effect only with `lossy`", self.describe(key)),
                "remove it, or set lossy = \"int8\"",
            );
        }
    }

    fn regulator(&mut self, config: &Config) {
        let Some(regulator) = config.regulator else {
            return;
        };
        if regulator.spike_sigma == 0.0 && regulator.norm_factor == 0.0 {
            self.refuse(
                &[
                    "regulator.spike_sigma",
                    "regulator.norm_factor",
                    "regulator",
                ],
                "[regulator] has nothing to watch: spike_sigma and norm_factor are both 0"
                    .to_string(),
                "raise one of them, or remove the section",
            );
        }
    }

    fn evaluation(&mut self, config: &Config) {
        if !config.eval.sample_prompts.is_empty() && config.eval.sample_tokens == 0 {
            self.refuse(
                &["eval.sample_tokens", "eval.sample_prompts"],
                "`sample_prompts` in [eval] are to be completed by 0 tokens".to_string(),
                "raise sample_tokens, or remove sample_prompts",
            );
        }
        let reports = &config.logging.report_to;
        if (1..reports.len()).any(|i| reports[..i].contains(&reports[i])) {
            self.refuse(
                &["logging.report_to"],
                format!(
                    "{} names a format twice",
                    self.describe("logging.report_to")
                ),
                "name each format once",
            );
        }
    }

    fn early_stopping(&mut self, config: &Config) {
        let patience = "eval.early_stopping_patience";
        if config.eval.early_stopping_patience > 0 {
            if config.data.val_path.is_none() && config.data.val_fraction == 0.0 {
                self.refuse(
                    &[patience, "data.val_fraction"],
                    format!("{} without a validation split", self.describe(patience)),
                    "set val_fraction or val_path in [data], or early_stopping_patience = 0",
                );
            }
            if config.eval.eval_steps == 0 {
                self.refuse(
                    &[patience, "eval.eval_steps"],
                    format!(
                        "{} with one evaluation, at the end",
                        self.describe(patience)
                    ),
                    "set eval_steps, or early_stopping_patience = 0",
                );
            }
        }
    }
}

fn leaf(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}
