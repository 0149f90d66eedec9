//! `[gradient]`: what a worker sends, and which update goes with it.

use crate::config::checks::Checks;
use crate::config::gradient::CompressionPlan;
use crate::config::keys::{CompressionMethod, Config};
use crate::config::optimizer::OptimizerPlan;
use crate::config::phase::PhasePlan;

const DEFAULT_RATIO: f64 = 32.0;

impl Checks<'_> {
    /// The compression of the run, with its defaults filled in.
    pub(super) fn compression(
        &mut self,
        config: &mut Config,
        phases: &[PhasePlan],
    ) -> Option<CompressionPlan> {
        let keys = config
            .gradient
            .as_mut()
            .and_then(|gradient| gradient.compression.as_mut());
        let plan = keys.and_then(|keys| {
            let method = keys.method;
            if method == CompressionMethod::None {
                let ignored = [
                    ("ratio", keys.ratio.is_some()),
                    ("warmup_steps", keys.warmup_steps > 0),
                    ("error_feedback", !keys.error_feedback),
                    ("residual_decay", keys.residual_decay.is_some()),
                ];
                for (key, is_set) in ignored {
                    let path = format!("gradient.compression.{key}");
                    if is_set {
                        let message = format!("method \"none\" ignores {}", self.describe(&path));
                        let keys = [path.as_str(), "gradient.compression.method"];
                        self.refuse(&keys, message, "remove it, or choose another method");
                    }
                }
                return None;
            }
            if keys.residual_decay.is_some() && !keys.error_feedback {
                self.refuse(
                    &[
                        "gradient.compression.residual_decay",
                        "gradient.compression.error_feedback",
                    ],
                    format!(
                        "{} without error_feedback: there is no residual",
                        self.describe("gradient.compression.residual_decay")
                    ),
                    "remove it, or set error_feedback = true",
                );
            }
            if method == CompressionMethod::Sign && keys.ratio.is_some() {
                self.refuse(
                    &["gradient.compression.ratio", "gradient.compression.method"],
                    format!(
                        "{} with method \"sign\", whose ratio is about 28",
                        self.describe("gradient.compression.ratio")
                    ),
                    "remove it, or choose another method",
                );
            } else if method != CompressionMethod::Sign {
                keys.ratio.get_or_insert(DEFAULT_RATIO);
            }
            if keys.error_feedback {
                keys.residual_decay.get_or_insert(method.default_decay());
            }
            // The momentum of a frequency counts as much if one worker sends it as if all do.
            if method == CompressionMethod::Demo && keys.residual_decay == Some(1.0) {
                self.refuse(
                    &[
                        "gradient.compression.residual_decay",
                        "gradient.compression.method",
                    ],
                    "method \"demo\" with residual_decay = 1.0: demo takes the mean of those workers that \
                     sent a frequency, and errors of earlier steps would come back with another weight"
                        .to_string(),
                    "set residual_decay below 1 (0.999 is the published value), or choose another method",
                );
            }
            Some(CompressionPlan {
                method,
                ratio: keys.ratio,
                warmup_steps: keys.warmup_steps,
                error_feedback: keys.error_feedback,
                residual_decay: keys.residual_decay.unwrap_or(1.0),
            })
        });
        for (number, phase) in phases.iter().enumerate() {
            self.update_of(
                phase,
                plan.as_ref(),
                (!config.phase.is_empty()).then_some(number),
            );
        }
        plan
    }

    /// Checks that a residual that is a momentum goes with the update by its sign, and that this
    /// update has such a momentum. `number` is that of the phase in the file.
    fn update_of(
        &mut self,
        phase: &PhasePlan,
        plan: Option<&CompressionPlan>,
        number: Option<usize>,
    ) {
        let momentum = plan.filter(|plan| plan.residual_decay < 1.0);
        let is_sign = matches!(phase.optimizer, OptimizerPlan::Sign(_));
        let (keys, message, help) = match (momentum, is_sign) {
            (Some(plan), false) => (
                [
                    "optimizer.name",
                    "gradient.compression.residual_decay",
                    "gradient.compression.method",
                ],
                format!(
                    "method \"{}\" with residual_decay = {} keeps the momentum in the residual, and \
                     {} would update by another rule than its sign",
                    plan.method.name(),
                    plan.residual_decay,
                    phase.optimizer.name(),
                ),
                match plan.method {
                    CompressionMethod::Demo => {
                        "set optimizer.name = \"sign\" (and tune its learning rate: a few times that of lion)"
                    }
                    _ => {
                        "set optimizer.name = \"sign\" (and tune its learning rate: a few times that of lion), \
                         or residual_decay = 1.0, which adds the error of earlier steps to any rule's gradient"
                    }
                },
            ),
            (None, true) => (
                [
                    "optimizer.name",
                    "gradient.compression.residual_decay",
                    "gradient.compression",
                ],
                "optimizer.name = \"sign\" takes the sign of a momentum that compressed gradients bring, \
                 and here nothing keeps one"
                    .to_string(),
                "use \"lion\", or [gradient.compression] with residual_decay below 1",
            ),
            _ => return,
        };
        match number {
            Some(number) => {
                self.in_phase(number, |checks| checks.refuse(&keys, message, help));
            }
            None => self.refuse(&keys, message, help),
        }
    }
}
