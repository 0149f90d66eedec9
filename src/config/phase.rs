//! The settings of one phase of a run.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

use super::keys::{Config, DataConfig, DpoConfig, Dtype, PredictConfig, Sampling, Task};
use super::optimizer::OptimizerPlan;
use super::schedule::SchedulePlan;

/// The settings of one phase of a run: everything that may differ between phases. A TOML file
/// describes one phase; a plan made in code may have several.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PhasePlan {
    /// The name of the phase in messages.
    pub name: String,
    /// The length of the phase.
    pub length: PhaseLength,
    /// The training task, which decides the objective.
    pub task: Task,
    /// The settings of the preference loss (task = "dpo").
    pub dpo: Option<DpoConfig>,
    /// The datasets, their mix, template and packing, and the sequence length.
    pub data: DataConfig,
    /// Tokens per sequence of text when validating; None for the phase's own sequence length. A
    /// record leaves the default out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_sequence_len: Option<usize>,
    /// Sequences per forward and backward pass.
    pub micro_batch_size: usize,
    /// Passes per optimizer step, of each worker.
    pub gradient_accumulation_steps: usize,
    /// Workers of each rank; each has its own passes. A record leaves the default out.
    #[serde(skip_serializing_if = "is_one")]
    pub workers: usize,
    /// Ranks of the run. The same run may go on with another number of them, so records leave it out.
    #[serde(skip)]
    pub ranks: usize,
    /// Largest norm of the whole gradient; 0 = no limit.
    pub max_grad_norm: f64,
    /// Dtype of the forward and backward pass.
    pub dtype: Dtype,
    /// Whether the backward pass recomputes the forward pass of each block.
    pub gradient_checkpointing: bool,
    /// Whether the forward pass multiplies ternary weights as integers.
    pub int8_forward: bool,
    /// The share of the rounded values in ternary weights and their inputs, at the first step of
    /// the phase and at the last: 0 computes dense, 1 ternary. A record leaves the default out.
    #[serde(skip_serializing_if = "is_ternary")]
    pub ternary_blend: [f64; 2],
    /// The update rule with its parameters.
    pub optimizer: OptimizerPlan,
    /// The peak learning rate.
    pub learning_rate: f64,
    /// The learning rate in multiples of the peak.
    pub schedule: SchedulePlan,
    /// The steps that the schedule runs over.
    pub schedule_span: ScheduleSpan,
    /// How steps are predicted; None computes every step. A record leaves the default out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predict: Option<PredictConfig>,
    /// Parameters to freeze, in addition to those that the adapter freezes.
    pub freeze: Vec<PathSelector>,
    /// What happens to the plan's adapter. A record leaves the default out, so that it equals the
    /// record of a run from a version without this setting.
    #[serde(skip_serializing_if = "PhaseAdapter::is_on")]
    pub adapter: PhaseAdapter,
}

/// A phase that computes with ternary weights as such.
const TERNARY: [f64; 2] = [1.0, 1.0];

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_one(workers: &usize) -> bool {
    *workers == 1
}

fn is_ternary(blend: &[f64; 2]) -> bool {
    *blend == TERNARY
}

/// What happens to the plan's adapter in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PhaseAdapter {
    /// The adapter is trained, if the run has one. After a phase without an adapter a new one
    /// begins, as with "restart".
    #[default]
    On,
    /// The adapter is merged into the weights in f32 when the phase begins. From then on all
    /// weights are trained, except those that the phase freezes.
    Off,
    /// The adapter is merged into the weights in f32 when the phase begins, and a new adapter of
    /// the same shape begins, with new optimizer state. The first phase has nothing to merge: there
    /// it is the same as "on".
    Restart,
}

impl PhaseAdapter {
    fn is_on(&self) -> bool {
        *self == Self::On
    }
}

/// The length of a phase.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PhaseLength {
    /// Optimizer steps.
    Steps(u64),
    /// Trained tokens; the last step may go beyond them.
    Tokens(u64),
    /// A share of the run's steps, or of its tokens if the run's length is in tokens or epochs.
    Share(f64),
    /// Everything that the other phases leave of the run.
    Rest,
}

impl std::str::FromStr for PhaseLength {
    type Err = String;

    /// Reads "30%", "2M tokens", "1000 steps" or "rest".
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let shown = text.escape_debug();
        if text == "rest" {
            return Ok(Self::Rest);
        }
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent
                .trim()
                .parse()
                .map_err(|_| format!("is \"{shown}\", which is not a share such as \"30%\""))?;
            return match percent > 0.0 && percent <= 100.0 {
                true => Ok(Self::Share(percent / 100.0)),
                false => Err(format!(
                    "is \"{shown}\", and a share is above 0 % and at most 100 %"
                )),
            };
        }
        let (count, unit) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let count = count_of(count).filter(|count| (1.0..=1e15).contains(count));
        match (count, unit.trim()) {
            (Some(count), "tokens") => Ok(Self::Tokens(count as u64)),
            (Some(count), "steps" | "") => Ok(Self::Steps(count as u64)),
            (None, "tokens" | "steps") => Err(format!(
                "is \"{shown}\", which is not a number from 1 to 1e15"
            )),
            _ => Err(format!("is \"{shown}\", which is not a length")),
        }
    }
}

/// A whole number such as "500", "500k", "2M", "1.5B" or "1_000".
fn count_of(text: &str) -> Option<f64> {
    let units = [("k", 1e3), ("K", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12)];
    let with_unit = |(unit, factor)| text.strip_suffix(unit).map(|digits| (digits, factor));
    let (digits, factor) = units.into_iter().find_map(with_unit).unwrap_or((text, 1.0));
    let number: f64 = digits.replace('_', "").parse().ok()?;
    let count = number * factor;
    (count.fract() == 0.0).then_some(count)
}

/// The steps that a schedule runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleSpan {
    /// All steps of the run: the phase follows the schedule of the whole run.
    Run,
    /// The steps of the phase: the phase has a schedule of its own.
    Phase,
}

impl PhasePlan {
    /// The only phase of a run without phases.
    pub(super) fn whole_run(
        config: &Config,
        optimizer: OptimizerPlan,
        schedule: SchedulePlan,
    ) -> Self {
        let train = &config.train;
        Self {
            name: "train".to_string(),
            length: PhaseLength::Rest,
            task: config.task,
            dpo: config.dpo.clone().filter(|_| config.task == Task::Dpo),
            data: config.data.clone(),
            eval_sequence_len: config
                .eval
                .sequence_len
                .filter(|_| config.task == Task::Pretrain),
            micro_batch_size: train.micro_batch_size,
            gradient_accumulation_steps: train.gradient_accumulation_steps,
            workers: config
                .gradient
                .as_ref()
                .map_or(1, |gradient| gradient.logical_workers),
            ranks: 1,
            max_grad_norm: train.max_grad_norm,
            dtype: config.model.dtype,
            gradient_checkpointing: train.gradient_checkpointing,
            int8_forward: config.quantization.int8_forward == Some(true),
            ternary_blend: TERNARY,
            optimizer,
            learning_rate: config.optimizer.learning_rate,
            schedule,
            schedule_span: ScheduleSpan::Run,
            predict: None,
            freeze: Vec::new(),
            adapter: PhaseAdapter::On,
        }
    }

    /// Sequences per optimizer step.
    pub fn sequences_per_step(&self) -> u64 {
        self.micro_batch_size as u64 * self.micro_batches_per_step()
    }

    /// Forward and backward passes per optimizer step, of all workers of all ranks.
    pub fn micro_batches_per_step(&self) -> u64 {
        self.ranks as u64 * self.micro_batches_per_rank()
    }

    /// Forward and backward passes of one rank per optimizer step.
    pub fn micro_batches_per_rank(&self) -> u64 {
        (self.gradient_accumulation_steps * self.workers) as u64
    }

    /// Whether both phases evaluate the same tokens of the same split with the same loss, so that
    /// their validation losses can be compared. Longer sequences have a lower loss, and other rows,
    /// fields or parts of an answer are other tokens.
    pub fn is_evaluated_as(&self, other: &Self) -> bool {
        let evaluated = |phase: &Self| {
            let mut data = phase.data.clone();
            data.sequence_len = phase.eval_sequence_len.unwrap_or(data.sequence_len);
            // These settings affect only the order of the training data.
            data.sampling = Sampling::Random;
            data.sample_packing = None;
            for dataset in &mut data.datasets {
                dataset.weight = 1.0;
            }
            (phase.task, phase.dpo.clone(), data)
        };
        evaluated(self) == evaluated(other)
    }
}

/// A place in the model that names parameters: `embed_tokens`, `layers.3`, `layers.0-3.mlp`. A
/// selector matches every parameter whose path begins with it, compared by whole path segments. A
/// number may be a range that includes both ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathSelector {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Name(String),
    Range(usize, usize),
}

impl PathSelector {
    /// Whether the selector may name a parameter of the module at `path`: one of the two is the
    /// beginning of the other.
    pub(super) fn can_match_in(&self, path: &str) -> bool {
        let names = path.split('.');
        self.parts
            .iter()
            .zip(names)
            .all(|(part, name)| part.names(name))
    }

    /// Whether the selector names the parameter at `path`.
    pub fn matches(&self, path: &str) -> bool {
        let mut names = path.split('.');
        let mut parts = self.parts.iter();
        parts.all(|part| names.next().is_some_and(|name| part.names(name)))
    }
}

impl Part {
    fn names(&self, name: &str) -> bool {
        match self {
            Self::Name(own) => own == name,
            Self::Range(first, last) => name
                .parse::<usize>()
                .is_ok_and(|number| (*first..=*last).contains(&number)),
        }
    }
}

impl std::str::FromStr for PathSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let part = |name: &str| match name.split_once('-') {
            _ if name.is_empty() => Err(format!("`{text}` has an empty name in it")),
            None => Ok(Part::Name(name.to_string())),
            Some((first, last)) => match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) if first <= last => Ok(Part::Range(first, last)),
                _ => Err(format!("`{name}` in `{text}` is not a range such as 0-3")),
            },
        };
        let parts = text.split('.').map(part).collect::<Result<_, _>>()?;
        Ok(Self { parts })
    }
}

impl fmt::Display for PathSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, part) in self.parts.iter().enumerate() {
            if place > 0 {
                f.write_str(".")?;
            }
            match part {
                Part::Name(name) => f.write_str(name)?,
                Part::Range(first, last) => write!(f, "{first}-{last}")?,
            }
        }
        Ok(())
    }
}

impl Serialize for PathSelector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p1_a_length_is_steps_tokens_a_share_or_the_rest() {
        let cases = [
            ("30%", Some(PhaseLength::Share(0.3))),
            ("12.5 %", Some(PhaseLength::Share(0.125))),
            ("100%", Some(PhaseLength::Share(1.0))),
            ("2M tokens", Some(PhaseLength::Tokens(2_000_000))),
            ("1.5B tokens", Some(PhaseLength::Tokens(1_500_000_000))),
            ("500k  tokens", Some(PhaseLength::Tokens(500_000))),
            ("1_000 steps", Some(PhaseLength::Steps(1000))),
            ("1000", Some(PhaseLength::Steps(1000))),
            ("rest", Some(PhaseLength::Rest)),
            ("0%", None),
            ("101%", None),
            ("-3%", None),
            ("nan%", None),
            ("0 steps", None),
            ("1.5 steps", None),
            ("2MM tokens", None),
            ("M tokens", None),
            ("1e300 tokens", None),
            ("inf steps", None),
            ("2M token", None),
            ("two epochs", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<PhaseLength>().ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_selector_names_whole_parts_of_a_path() {
        let cases = [
            ("embed_tokens", "embed_tokens.weight", true),
            ("embed", "embed_tokens.weight", false),
            ("layers.0-3", "layers.3.mlp.up_proj.weight", true),
            ("layers.0-3", "layers.4.mlp.up_proj.weight", false),
            ("layers.0-3.mlp", "layers.2.self_attn.q_proj.weight", false),
            ("layers.1", "layers.10.mlp.up_proj.weight", false),
            ("norm.weight", "norm.weight", true),
            ("norm.weight.x", "norm.weight", false),
        ];
        for (text, path, expected) in cases {
            let selector: PathSelector = text.parse().unwrap();
            assert_eq!(selector.matches(path), expected, "{text} {path}");
            assert_eq!(selector.to_string(), text);
        }
        for text in ["", "layers.", "layers.3-1", "layers.a-b", ".norm"] {
            assert!(text.parse::<PathSelector>().is_err(), "{text}");
        }
    }
}
