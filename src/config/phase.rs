//! The settings of one phase of a run.

use std::fmt;

use serde::{Serialize, Serializer};

use super::keys::{Config, DataConfig, DpoConfig, Dtype, Sampling, Task};
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
    /// Sequences per forward and backward pass.
    pub micro_batch_size: usize,
    /// Passes per optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Largest norm of the whole gradient; 0 = no limit.
    pub max_grad_norm: f64,
    /// Dtype of the forward and backward pass.
    pub dtype: Dtype,
    /// Whether the backward pass recomputes the forward pass of each block.
    pub gradient_checkpointing: bool,
    /// Whether the forward pass multiplies ternary weights as integers.
    pub int8_forward: bool,
    /// The update rule with its parameters.
    pub optimizer: OptimizerPlan,
    /// The peak learning rate.
    pub learning_rate: f64,
    /// The learning rate in multiples of the peak.
    pub schedule: SchedulePlan,
    /// The steps that the schedule runs over.
    pub schedule_span: ScheduleSpan,
    /// Parameters to freeze, in addition to those that the adapter freezes.
    pub freeze: Vec<PathSelector>,
    /// What happens to the plan's adapter. A record leaves the default out, so that it equals the
    /// record of a run from a version without this setting.
    #[serde(skip_serializing_if = "PhaseAdapter::is_on")]
    pub adapter: PhaseAdapter,
}

/// What happens to the plan's adapter in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PhaseAdapter {
    /// The adapter is trained, if the plan has one. After a phase without an adapter a new one
    /// begins, as with [`Restart`](Self::Restart).
    #[default]
    On,
    /// The adapter is merged into the weights in f32 when the phase begins. From then on all
    /// weights are trained, except those that the phase freezes.
    Off,
    /// The adapter is merged into the weights in f32 when the phase begins, and a new adapter of
    /// the same shape begins, with new optimizer state. The first phase has nothing to merge: there
    /// it is the same as [`On`](Self::On).
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
    /// A share of the run's steps, or of its tokens if the run's length is in tokens or epochs.
    Share(f64),
    /// Everything that the other phases leave of the run.
    Rest,
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
            micro_batch_size: train.micro_batch_size,
            gradient_accumulation_steps: train.gradient_accumulation_steps,
            max_grad_norm: train.max_grad_norm,
            dtype: config.model.dtype,
            gradient_checkpointing: train.gradient_checkpointing,
            int8_forward: config.quantization.int8_forward == Some(true),
            optimizer,
            learning_rate: config.optimizer.learning_rate,
            schedule,
            schedule_span: ScheduleSpan::Run,
            freeze: Vec::new(),
            adapter: PhaseAdapter::On,
        }
    }

    /// Sequences per optimizer step.
    pub fn sequences_per_step(&self) -> u64 {
        (self.micro_batch_size * self.gradient_accumulation_steps) as u64
    }

    /// Whether both phases evaluate the same tokens of the same split with the same loss, so that
    /// their validation losses can be compared. Longer sequences have a lower loss, and other rows,
    /// fields or parts of an answer are other tokens.
    pub fn is_evaluated_as(&self, other: &Self) -> bool {
        let evaluated = |phase: &Self| {
            let mut data = phase.data.clone();
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
    /// Whether the selector names the parameter at `path`.
    pub fn matches(&self, path: &str) -> bool {
        let mut names = path.split('.');
        self.parts.iter().all(|part| match (part, names.next()) {
            (Part::Name(own), Some(name)) => own == name,
            (Part::Range(first, last), Some(name)) => name
                .parse::<usize>()
                .is_ok_and(|number| (*first..=*last).contains(&number)),
            (_, None) => false,
        })
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
