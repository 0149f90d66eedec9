//! `[optimizer]` and `[lr_scheduler]`: which keys each rule takes, and their defaults.
//!
//! A key that the chosen rule would ignore is refused: someone who sets `momentum` for AdamW
//! believes that it does something.

use super::Checks;
use crate::config::hints::describe;
use crate::config::keys::{Config, DecayShape, OptimizerName, SchedulerName};
use crate::config::plan::{Decay, Length, OptimizerPlan, SchedulePlan, Warmup};

impl Checks<'_> {
    pub(super) fn optimizer(&mut self, config: &mut Config) -> OptimizerPlan {
        use OptimizerName::{Adafactor, Adam, Adamw, Adamw8bit, Lion, Muon, Sgd};
        let optimizer = &mut config.optimizer;
        let name = optimizer.name;
        let takes = [
            (
                "betas",
                optimizer.betas.is_some(),
                &[Adamw, Adamw8bit, Adam, Lion, Muon][..],
            ),
            (
                "eps",
                optimizer.eps.is_some(),
                &[Adamw, Adamw8bit, Adam, Muon],
            ),
            ("momentum", optimizer.momentum.is_some(), &[Sgd, Muon]),
            ("nesterov", optimizer.nesterov.is_some(), &[Sgd, Muon]),
        ];
        for (key, is_given, rules) in takes {
            if is_given && !rules.contains(&name) {
                let rules: Vec<String> = rules.iter().map(lower).collect();
                self.refuse(
                    &[&format!("optimizer.{key}"), "optimizer.name"],
                    format!("{} ignores `{key}` in [optimizer]", lower(&name)),
                    &format!("remove it; {key} is for {}", rules.join(", ")),
                );
            }
        }
        let weight_decay = optimizer.weight_decay;
        let beta2 = if name == Lion { 0.99 } else { 0.95 };
        let mut betas = || *optimizer.betas.get_or_insert([0.9, beta2]);
        let mut eps = || *optimizer.eps.get_or_insert(1e-8);
        let mut momentum = |default| *optimizer.momentum.get_or_insert(default);
        let mut nesterov = |default| *optimizer.nesterov.get_or_insert(default);
        let plan = match name {
            Adamw => OptimizerPlan::AdamW {
                betas: betas(),
                eps: eps(),
                weight_decay,
            },
            Adamw8bit => OptimizerPlan::AdamW8bit {
                betas: betas(),
                eps: eps(),
                weight_decay,
            },
            Adam => OptimizerPlan::Adam {
                betas: betas(),
                eps: eps(),
                weight_decay,
            },
            Sgd => OptimizerPlan::Sgd {
                momentum: momentum(0.9),
                nesterov: nesterov(false),
                weight_decay,
            },
            Lion => OptimizerPlan::Lion {
                betas: betas(),
                weight_decay,
            },
            Adafactor => OptimizerPlan::Adafactor { weight_decay },
            Muon => OptimizerPlan::Muon {
                momentum: momentum(0.95),
                nesterov: nesterov(true),
                betas: betas(),
                eps: eps(),
                weight_decay,
            },
        };
        self.nesterov(&plan);
        plan
    }

    fn nesterov(&mut self, plan: &OptimizerPlan) {
        let (OptimizerPlan::Sgd {
            momentum, nesterov, ..
        }
        | OptimizerPlan::Muon {
            momentum, nesterov, ..
        }) = plan
        else {
            return;
        };
        if *nesterov && *momentum == 0.0 {
            self.refuse(
                &["optimizer.nesterov", "optimizer.momentum", "optimizer.name"],
                "`nesterov` in [optimizer] is a form of momentum, and momentum is 0".to_string(),
                "nesterov = false, or a momentum above 0",
            );
        }
    }

    pub(super) fn schedule(&mut self, config: &mut Config, length: Option<Length>) -> SchedulePlan {
        let warmup = self.warmup(config, length);
        self.schedule_keys(config);
        if config.lr_scheduler.name == SchedulerName::InverseSqrt && warmup.is_none() {
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
        let scheduler = &mut config.lr_scheduler;
        let decay = match scheduler.name {
            SchedulerName::Constant => Decay::Constant,
            SchedulerName::InverseSqrt => Decay::InverseSqrt,
            SchedulerName::Linear => Decay::Linear,
            SchedulerName::Cosine => Decay::Cosine,
            SchedulerName::Wsd => Decay::Wsd {
                ratio: *scheduler.decay_ratio.get_or_insert(0.2),
                shape: *scheduler.decay_shape.get_or_insert(DecayShape::Linear),
            },
            SchedulerName::Polynomial => Decay::Polynomial {
                power: *scheduler.power.get_or_insert(2.0),
            },
        };
        let min_lr_ratio = match decay {
            Decay::Constant | Decay::InverseSqrt => 0.0,
            _ => *scheduler.min_lr_ratio.get_or_insert(0.0),
        };
        if let Decay::Wsd { ratio, .. } = decay {
            self.wsd_fits(&warmup, ratio, length);
        }
        SchedulePlan {
            decay,
            warmup,
            min_lr_ratio,
        }
    }

    fn warmup(&mut self, config: &mut Config, length: Option<Length>) -> Warmup {
        let scheduler = &mut config.lr_scheduler;
        match (scheduler.warmup_steps, scheduler.warmup_ratio) {
            (Some(_), Some(_)) => self.refuse(
                &["lr_scheduler.warmup_ratio", "lr_scheduler.warmup_steps"],
                "`warmup_ratio` together with `warmup_steps` in [lr_scheduler]".to_string(),
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

    /// Keys that the chosen schedule would ignore.
    fn schedule_keys(&mut self, config: &Config) {
        let scheduler = &config.lr_scheduler;
        let name = scheduler.name;
        if matches!(name, SchedulerName::Constant | SchedulerName::InverseSqrt)
            && scheduler.min_lr_ratio.is_some()
        {
            let schedule = match name {
                SchedulerName::Constant => "constant",
                _ => "inverse_sqrt",
            };
            self.refuse(
                &["lr_scheduler.min_lr_ratio", "lr_scheduler.name"],
                format!(
                    "{schedule} ignores {}",
                    describe("lr_scheduler.min_lr_ratio")
                ),
                "remove it, or choose linear, cosine, wsd or polynomial",
            );
        }
        let not_wsd = name != SchedulerName::Wsd;
        let decider = "lr_scheduler.name";
        self.only_with(
            not_wsd && scheduler.decay_ratio.is_some(),
            "lr_scheduler.decay_ratio",
            decider,
            "\"wsd\"",
        );
        self.only_with(
            not_wsd && scheduler.decay_shape.is_some(),
            "lr_scheduler.decay_shape",
            decider,
            "\"wsd\"",
        );
        self.only_with(
            name != SchedulerName::Polynomial && scheduler.power.is_some(),
            "lr_scheduler.power",
            decider,
            "\"polynomial\"",
        );
    }

    fn wsd_fits(&mut self, warmup: &Warmup, decay_ratio: f64, length: Option<Length>) {
        let warmup_ratio = match (warmup, length) {
            (Warmup::Ratio(ratio), _) => *ratio,
            (Warmup::Steps(warmup), Some(Length::Steps(steps))) => *warmup as f64 / steps as f64,
            // The number of steps is known once the data is counted.
            (Warmup::Steps(_), _) => return,
        };
        // Room for the rounding of a sum such as 0.8 + 0.2.
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

fn lower(name: &OptimizerName) -> String {
    format!("{name:?}").to_lowercase()
}
