//! `[lr_scheduler]`: everything that the configuration knows about the learning-rate schedules. A
//! new schedule needs a variant of [`SchedulerName`], its entry in [`SchedulerName::ALL`] and its
//! name, a variant of [`Decay`], and an arm of [`SchedulerName::plan`], which lists its keys and
//! their defaults. The curve itself is a file of the module `optimizer::schedule`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::Checks;
use super::length::Length;

/// `[lr_scheduler]`: the learning rate over the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LrSchedulerConfig {
    /// Shape of the decay after warm-up.
    #[schemars(extend("x-aliases" = ["HF: lr_scheduler_type", "axolotl: lr_scheduler", "scheduler"]))]
    pub name: SchedulerName,
    /// Steps of linear warm-up from 0 to the peak. Default: 0. Not together with warmup_ratio.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["nanoGPT: warmup_iters", "torchtune: num_warmup_steps", "litgpt: lr_warmup_steps", "warmup"]))]
    pub warmup_steps: Option<u64>,
    /// Warm-up as a share of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0), extend("examples" = [0.1], "x-aliases" = ["litgpt: lr_warmup_fraction"]))]
    pub warmup_ratio: Option<f64>,
    /// Learning rate at the last step, as a share of the peak.
    /// Ignored by constant, linear_to_zero and inverse_sqrt, which therefore refuse it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0), extend("x-aliases" = ["axolotl: cosine_min_lr_ratio", "nanoGPT: min_lr", "lr_end"]))]
    pub min_lr_ratio: Option<f64>,
    /// Share of the run spent decaying (wsd). Default: 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0), extend("examples" = [0.2], "x-aliases" = ["HF: num_decay_steps", "cooldown_ratio"]))]
    pub decay_ratio: Option<f64>,
    /// Shape of that decay (wsd). Default: linear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_shape: Option<DecayShape>,
    /// Exponent of the decay (polynomial). Default: 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100.0), extend("examples" = [2.0], "exclusiveMinimum" = 0.0))]
    pub power: Option<f64>,
}

impl Default for LrSchedulerConfig {
    fn default() -> Self {
        Self {
            name: SchedulerName::Cosine,
            warmup_steps: None,
            warmup_ratio: None,
            min_lr_ratio: None,
            decay_ratio: None,
            decay_shape: None,
            power: None,
        }
    }
}

/// Shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerName {
    /// The peak all the way.
    Constant,
    /// A straight line to min_lr_ratio.
    Linear,
    /// A straight line that reaches 0 after the last step, so that the last step still learns (Bergsma et al.,
    /// 2025).
    LinearToZero,
    /// Half a cosine to min_lr_ratio.
    Cosine,
    /// Warm-up, stable, decay: the peak, then a decay over the last decay_ratio of the run.
    Wsd,
    /// (1 - progress)^power to min_lr_ratio.
    Polynomial,
    /// peak x sqrt(warm-up / step).
    InverseSqrt,
}

/// Shape of the decay of wsd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DecayShape {
    /// 1 - x.
    Linear,
    /// 1 - sqrt(x) (Hägele et al., 2024).
    Sqrt,
    /// Half a cosine.
    Cosine,
}

/// The learning rate over the run, in multiples of the peak (`optimizer.learning_rate`): linear
/// warm-up to 1, then the decay.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SchedulePlan {
    /// What follows the warm-up.
    pub decay: Decay,
    /// Length of the warm-up.
    pub warmup: Warmup,
    /// Share of the peak at the last step; 0 for schedules that do not decay to a share.
    pub min_lr_ratio: f64,
}

/// Length of the warm-up.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// Optimizer steps; 0 = none.
    Steps(u64),
    /// Share of the run.
    Ratio(f64),
}

/// The learning rate after warm-up.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// The peak for the whole run.
    Constant,
    /// A straight line.
    Linear,
    /// A straight line that reaches 0 after the last step.
    LinearToZero,
    /// Half a cosine.
    Cosine,
    /// The peak, then a decay at the end.
    Wsd {
        /// Share of the run spent decaying.
        ratio: f64,
        /// Shape of that decay.
        shape: DecayShape,
    },
    /// (1 - progress)^power.
    Polynomial {
        /// The exponent.
        power: f64,
    },
    /// peak x sqrt(warm-up / step).
    InverseSqrt,
}

/// The keys that some schedules use and others ignore, each with a test for whether it is set.
const KEYS: [(&str, IsSet); 4] = [
    (MIN_LR_RATIO, |keys| keys.min_lr_ratio.is_some()),
    ("decay_ratio", |keys| keys.decay_ratio.is_some()),
    ("decay_shape", |keys| keys.decay_shape.is_some()),
    ("power", |keys| keys.power.is_some()),
];

const MIN_LR_RATIO: &str = "min_lr_ratio";

type IsSet = fn(&LrSchedulerConfig) -> bool;

impl SchedulerName {
    /// Every schedule, in the order in which error messages list them.
    const ALL: [Self; 7] = [
        Self::Constant,
        Self::Linear,
        Self::LinearToZero,
        Self::Cosine,
        Self::Wsd,
        Self::Polynomial,
        Self::InverseSqrt,
    ];

    /// The schedule's name in the file.
    fn key(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Linear => "linear",
            Self::LinearToZero => "linear_to_zero",
            Self::Cosine => "cosine",
            Self::Wsd => "wsd",
            Self::Polynomial => "polynomial",
            Self::InverseSqrt => "inverse_sqrt",
        }
    }

    /// The decay, and the share of the peak at its end. Keys that the schedule uses get their
    /// defaults if they are absent; the other keys are left unchanged.
    fn plan(self, keys: &mut LrSchedulerConfig) -> (Decay, f64) {
        let mut min_lr_ratio = || *keys.min_lr_ratio.get_or_insert(0.0);
        match self {
            Self::Constant => (Decay::Constant, 0.0),
            Self::InverseSqrt => (Decay::InverseSqrt, 0.0),
            Self::LinearToZero => (Decay::LinearToZero, 0.0),
            Self::Linear => (Decay::Linear, min_lr_ratio()),
            Self::Cosine => (Decay::Cosine, min_lr_ratio()),
            Self::Wsd => {
                let ratio = *keys.decay_ratio.get_or_insert(0.2);
                let shape = *keys.decay_shape.get_or_insert(DecayShape::Linear);
                (Decay::Wsd { ratio, shape }, min_lr_ratio())
            }
            Self::Polynomial => {
                let power = *keys.power.get_or_insert(2.0);
                (Decay::Polynomial { power }, min_lr_ratio())
            }
        }
    }

    /// Whether the schedule uses a key. If it does, its plan gives the key a default.
    fn takes(self, is_set: IsSet) -> bool {
        let mut keys = LrSchedulerConfig::default();
        self.plan(&mut keys);
        is_set(&keys)
    }
}

impl Checks<'_> {
    pub(super) fn schedule(
        &mut self,
        scheduler: &mut LrSchedulerConfig,
        length: Option<Length>,
    ) -> SchedulePlan {
        let warmup = self.warmup(scheduler, length);
        self.schedule_keys(scheduler);
        if scheduler.name == SchedulerName::InverseSqrt && warmup.is_none() {
            self.refuse(
                &[
                    "lr_scheduler.name",
                    "lr_scheduler.warmup_steps",
                    "lr_scheduler.warmup_ratio",
                ],
                "inverse_sqrt is peak x sqrt(warm-up / step): it needs a warm-up".to_string(),
                "set warmup_steps or warmup_ratio above 0",
            );
        }
        let (decay, min_lr_ratio) = scheduler.name.plan(scheduler);
        if let Decay::Wsd { ratio, .. } = decay {
            self.wsd_fits(&warmup, ratio, length);
        }
        SchedulePlan {
            decay,
            warmup,
            min_lr_ratio,
        }
    }

    /// Refuses keys that the chosen schedule would ignore.
    fn schedule_keys(&mut self, scheduler: &LrSchedulerConfig) {
        let (name, decider) = (scheduler.name, "lr_scheduler.name");
        for (key, is_set) in KEYS {
            if !is_set(scheduler) || name.takes(is_set) {
                continue;
            }
            let takers = SchedulerName::ALL.iter().filter(|rule| rule.takes(is_set));
            let takers = takers.map(|rule| rule.key().to_string());
            let path = format!("lr_scheduler.{key}");
            if key == MIN_LR_RATIO {
                let help = format!("remove it, or choose {}", alternatives(takers.collect()));
                let message = format!("{} ignores {}", name.key(), self.describe(&path));
                self.refuse(&[&path, decider], message, &help);
            } else {
                let takers = takers.map(|taker| format!("\"{taker}\""));
                self.only_with(true, &path, decider, &alternatives(takers.collect()));
            }
        }
    }

    fn warmup(&mut self, scheduler: &mut LrSchedulerConfig, length: Option<Length>) -> Warmup {
        match (scheduler.warmup_steps, scheduler.warmup_ratio) {
            (Some(_), Some(_)) => self.refuse(
                &["lr_scheduler.warmup_ratio", "lr_scheduler.warmup_steps"],
                format!(
                    "`warmup_ratio` together with {}",
                    self.describe("lr_scheduler.warmup_steps")
                ),
                "keep one of them",
            ),
            (Some(warmup), None) => {
                if let Some(Length::Steps(steps)) = length
                    && warmup > steps
                {
                    self.refuse(
                        &["lr_scheduler.warmup_steps", "train.max_steps"],
                        format!("a warm-up of {warmup} steps in a run of {steps}"),
                        "lower warmup_steps, or raise train.max_steps",
                    );
                }
            }
            _ => {}
        }
        match (scheduler.warmup_steps, scheduler.warmup_ratio) {
            (None, Some(ratio)) => Warmup::Ratio(ratio),
            (steps, _) => {
                let steps = steps.unwrap_or(0);
                scheduler.warmup_steps = Some(steps);
                Warmup::Steps(steps)
            }
        }
    }

    fn wsd_fits(&mut self, warmup: &Warmup, decay_ratio: f64, length: Option<Length>) {
        let warmup_ratio = match (warmup, length) {
            (Warmup::Ratio(ratio), _) => *ratio,
            (Warmup::Steps(warmup), Some(Length::Steps(steps))) => *warmup as f64 / steps as f64,
            // The number of steps is known only after the data has been counted.
            (Warmup::Steps(_), _) => return,
        };
        // Tolerates the rounding of a sum such as 0.8 + 0.2.
        if warmup_ratio <= 1.0 && warmup_ratio + decay_ratio > 1.0 + 1e-9 {
            self.refuse(
                &[
                    "lr_scheduler.decay_ratio",
                    "lr_scheduler.warmup_ratio",
                    "lr_scheduler.warmup_steps",
                    "train.max_steps",
                    "lr_scheduler.name",
                ],
                format!(
                    "warm-up and decay take {:.0} % of the run",
                    100.0 * (warmup_ratio + decay_ratio)
                ),
                "lower the warm-up or decay_ratio",
            );
        }
    }
}

impl Warmup {
    fn is_none(&self) -> bool {
        match self {
            Warmup::Steps(steps) => *steps == 0,
            Warmup::Ratio(ratio) => *ratio == 0.0,
        }
    }
}

/// Lists the names as in "linear, cosine or wsd".
fn alternatives(names: Vec<String>) -> String {
    match names.as_slice() {
        [others @ .., last] if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => names.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_the_schema_is_listed_under_that_name() {
        let schema = schemars::schema_for!(SchedulerName).to_value();
        let variants = schema["oneOf"].as_array().unwrap();
        let names = variants.iter().map(|variant| variant["const"].as_str());
        let names: Vec<&str> = names.map(Option::unwrap).collect();
        assert_eq!(SchedulerName::ALL.map(SchedulerName::key).to_vec(), names);
    }
}
