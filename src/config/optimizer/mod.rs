//! `[optimizer]`: everything that the configuration knows about the optimizers. A new optimizer
//! needs a variant of [`OptimizerName`], an entry in [`OptimizerName::ALL`], a variant of
//! [`OptimizerPlan`], and an arm each of [`OptimizerName::keys`], which lists its keys, and of
//! [`OptimizerName::plan`], which has their defaults. The update rule itself is a file of the module `optimizer`.
//!
//! A key that the chosen rule would ignore is refused: a user who sets `momentum` for AdamW expects
//! it to have an effect.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::Checks;

mod plan;

pub use plan::{AdamWPlan, LionPlan, MuonPlan, OptimizerPlan, Ramp, SoapPlan, VelvetPlan};

/// `[optimizer]`: the update rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The update rule.
    #[schemars(extend("x-aliases" = ["HF: optim", "axolotl: optimizer", "optimizer_type", "adamw_bnb_8bit", "adamw_8bit"]))]
    pub name: OptimizerName,
    /// Peak learning rate.
    #[schemars(extend("exclusiveMinimum" = 0.0, "x-aliases" = ["lr", "max_lr", "peak_lr"]))]
    pub learning_rate: f64,
    /// Decay of the moment estimates (adamw, adamw8bit, adam, lion, soap, velvet, the adamw half of muon and
    /// normuon, the lion half of sign). Default: [0.9, 0.95]; lion and sign: [0.9, 0.99]; soap: [0.95, 0.95].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(inner(range(min = 0.0, max = 0.999999)), extend("x-aliases" = ["HF: adam_beta1", "HF: adam_beta2", "beta1", "beta2"]))]
    pub betas: Option<[f64; 2]>,
    /// Updates over which the second of the betas rises in a straight line from beta2_start to its
    /// value (the same rules as betas, except adam, lion and sign). Each parameter counts its own updates. Default: 0, no
    /// warm-up.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000000))]
    pub beta2_warmup_steps: Option<u64>,
    /// The second of the betas in the first update; below its value. Only with beta2_warmup_steps, and then
    /// required.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.999999), extend("examples" = [0.9]))]
    pub beta2_start: Option<f64>,
    /// Added to the denominator (the same rules as betas, except lion and sign). Default: 1e-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0.0, "x-aliases" = ["HF: adam_epsilon", "epsilon"]))]
    pub eps: Option<f64>,
    /// Decay of matrices and embeddings; norms and biases are never decayed. Added to the gradient for
    /// adam and sgd; decoupled for all other rules.
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Decays a weight only if its update has the same sign as the weight, or is 0 (Chen et al., 2025,
    /// arXiv 2510.12402). For the rules with decoupled decay, except adafactor. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cautious_weight_decay: Option<bool>,
    /// Momentum (sgd, muon, normuon). Default: 0.9 for sgd, 0.95 for the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0), extend("examples" = [0.9], "exclusiveMaximum" = 1.0))]
    pub momentum: Option<f64>,
    /// Updates over which the momentum rises in a straight line from momentum_start to its value
    /// (muon, normuon). Each matrix counts its own updates. Default: 0, no warm-up.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000000))]
    pub momentum_warmup_steps: Option<u64>,
    /// The learning rate of the adamw half as a multiple of learning_rate (muon, normuon). Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000.0), extend("exclusiveMinimum" = 0.0, "x-aliases" = ["adam_lr", "muon: adamw_lr"]))]
    pub adamw_lr_ratio: Option<f64>,
    /// The momentum of the first update; below its value. Only with momentum_warmup_steps, and then
    /// required.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0), extend("examples" = [0.85], "exclusiveMaximum" = 1.0))]
    pub momentum_start: Option<f64>,
    /// Nesterov momentum (sgd, muon, normuon). Default: false for sgd, true for the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nesterov: Option<bool>,
    /// The polynomials that make the momentum orthogonal (muon, normuon). Default: quintic.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub newton_schulz: Option<NewtonSchulz>,
    /// Decay of the mean square of each output neuron's update (normuon). Default: 0.95.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.999999), extend("examples" = [0.95]))]
    pub neuron_beta: Option<f64>,
    /// Decay of the means of G Gᵀ and Gᵀ G (soap). Default: the second of the betas.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.999999), extend("examples" = [0.95]))]
    pub shampoo_beta: Option<f64>,
    /// Updates from one change of a matrix's bases to the next (soap). Default: 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1), extend("examples" = [10]))]
    pub precondition_frequency: Option<u64>,
    /// A longer side of a matrix is not turned into an eigenbasis and keeps no matrices for it (soap).
    /// Default: 10000.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1), extend("examples" = [10000]))]
    pub max_precondition_dim: Option<usize>,
    /// The signals that move the learning rate (velvet); with none it is AdamW. Default: ["loss",
    /// "gradient_norm"].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub velvet_signals: Option<Vec<VelvetSignal>>,
    /// The learning rate stays between 1 / velvet_bound and velvet_bound times the schedule's (velvet).
    /// Default: 1.25.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0, max = 10.0), extend("examples" = [1.25]))]
    pub velvet_bound: Option<f64>,
    /// Decay of the running means of the signals (velvet). Default: 0.95.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.999999), extend("examples" = [0.95]))]
    pub velvet_smoothing: Option<f64>,
    /// Leave weights and moments alone where the gradient is exactly zero, as in the embeddings of tokens
    /// that a batch does not have, if the output head is not tied to them (velvet). Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["torch: SparseAdam", "lazy_adam"]))]
    pub velvet_sparse: Option<bool>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            name: OptimizerName::Adamw,
            learning_rate: 1e-3,
            betas: None,
            beta2_warmup_steps: None,
            beta2_start: None,
            eps: None,
            weight_decay: 0.1,
            cautious_weight_decay: None,
            momentum: None,
            adamw_lr_ratio: None,
            momentum_warmup_steps: None,
            momentum_start: None,
            nesterov: None,
            newton_schulz: None,
            neuron_beta: None,
            shampoo_beta: None,
            precondition_frequency: None,
            max_precondition_dim: None,
            velvet_signals: None,
            velvet_bound: None,
            velvet_smoothing: None,
            velvet_sparse: None,
        }
    }
}

/// The update rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// Adam with decoupled weight decay (Loshchilov and Hutter, 2019).
    Adamw,
    /// AdamW with both moments in eight bits, in this process's memory whatever the device (Dettmers et
    /// al., 2022): two bytes a weight where AdamW keeps eight.
    #[serde(rename = "adamw8bit")]
    Adamw8bit,
    /// Adam (Kingma and Ba, 2015).
    Adam,
    /// Stochastic gradient descent with momentum.
    Sgd,
    /// Sign of what compressed gradients bring, whose residual is the momentum (Peng et al., 2024), for
    /// matrices; lion for norms and biases, which travel whole. Goes with [gradient.compression] and
    /// residual_decay below 1.
    Sign,
    /// Sign of the momentum (Chen et al., 2023). Wants about a tenth of AdamW's learning rate.
    Lion,
    /// Factored second moments (Shazeer and Stern, 2018).
    Adafactor,
    /// Orthogonalised momentum for the blocks' matrices (Jordan et al., 2024), scaled to AdamW's update size
    /// (Liu et al., 2025); AdamW for embeddings, head, norms and biases.
    Muon,
    /// Muon with a second moment for each output neuron (Li et al., 2025); AdamW for embeddings, head,
    /// norms and biases.
    #[serde(rename = "normuon")]
    NorMuon,
    /// Adam in the eigenbasis of Shampoo's matrices for the blocks' matrices (Vyas et al., 2024); AdamW for
    /// embeddings, head, norms and biases.
    Soap,
    /// AdamW with a learning rate that goes down while the loss or the norm of the gradient is above
    /// its own trend, and up while it is below.
    Velvet,
}

/// A signal of Velvet.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum VelvetSignal {
    /// The loss of the step.
    Loss,
    /// The norm of the whole gradient before clipping.
    GradientNorm,
}

/// The polynomials of Muon's Newton-Schulz iteration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NewtonSchulz {
    /// The same quintic five times (Jordan et al., 2024). Singular values end up between about 0.7 and
    /// 1.2.
    #[default]
    Quintic,
    /// Five different quintics (Amsel et al., 2025, "The Polar Express"). Singular values end up closer
    /// to 1, at the same cost.
    PolarExpress,
}

/// The keys that some rules use and others ignore, each with a test for whether it is set.
const KEYS: [(&str, IsSet); 19] = [
    ("betas", |keys| keys.betas.is_some()),
    ("beta2_warmup_steps", |keys| {
        keys.beta2_warmup_steps.is_some()
    }),
    ("beta2_start", |keys| keys.beta2_start.is_some()),
    ("eps", |keys| keys.eps.is_some()),
    ("cautious_weight_decay", |keys| {
        keys.cautious_weight_decay.is_some()
    }),
    ("momentum", |keys| keys.momentum.is_some()),
    ("momentum_warmup_steps", |keys| {
        keys.momentum_warmup_steps.is_some()
    }),
    ("momentum_start", |keys| keys.momentum_start.is_some()),
    ("adamw_lr_ratio", |keys| keys.adamw_lr_ratio.is_some()),
    ("nesterov", |keys| keys.nesterov.is_some()),
    ("newton_schulz", |keys| keys.newton_schulz.is_some()),
    ("neuron_beta", |keys| keys.neuron_beta.is_some()),
    ("shampoo_beta", |keys| keys.shampoo_beta.is_some()),
    ("precondition_frequency", |keys| {
        keys.precondition_frequency.is_some()
    }),
    ("max_precondition_dim", |keys| {
        keys.max_precondition_dim.is_some()
    }),
    ("velvet_signals", |keys| keys.velvet_signals.is_some()),
    ("velvet_bound", |keys| keys.velvet_bound.is_some()),
    ("velvet_smoothing", |keys| keys.velvet_smoothing.is_some()),
    ("velvet_sparse", |keys| keys.velvet_sparse.is_some()),
];

type IsSet = fn(&OptimizerConfig) -> bool;

/// The keys of AdamW.
const ADAMW: &[&str] = &[
    "betas",
    "beta2_warmup_steps",
    "beta2_start",
    "eps",
    "cautious_weight_decay",
];

/// The keys of Muon's own half.
const MUON: &[&str] = &[
    "momentum",
    "momentum_warmup_steps",
    "momentum_start",
    "adamw_lr_ratio",
    "nesterov",
    "newton_schulz",
];

/// The keys of SOAP's own half.
const SOAP: &[&str] = &[
    "shampoo_beta",
    "precondition_frequency",
    "max_precondition_dim",
];

/// The keys of Velvet's signals.
const VELVET: &[&str] = &[
    "velvet_signals",
    "velvet_bound",
    "velvet_smoothing",
    "velvet_sparse",
];

impl OptimizerName {
    /// Every rule, in the order in which error messages list them.
    const ALL: [Self; 11] = [
        Self::Adamw,
        Self::Adamw8bit,
        Self::Adam,
        Self::Sgd,
        Self::Sign,
        Self::Lion,
        Self::Adafactor,
        Self::Muon,
        Self::NorMuon,
        Self::Soap,
        Self::Velvet,
    ];

    /// The keys that the rule uses, in groups.
    fn keys(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Adamw | Self::Adamw8bit => &[ADAMW],
            Self::Adam => &[&["betas", "eps"]],
            Self::Sgd => &[&["momentum", "nesterov"]],
            Self::Sign | Self::Lion => &[&["betas", "cautious_weight_decay"]],
            Self::Adafactor => &[],
            Self::Muon => &[ADAMW, MUON],
            Self::NorMuon => &[ADAMW, MUON, &["neuron_beta"]],
            Self::Soap => &[ADAMW, SOAP],
            Self::Velvet => &[ADAMW, VELVET],
        }
    }

    /// The rule with its parameters. Keys that the rule uses get their defaults if they are absent;
    /// the other keys are left unchanged.
    fn plan(self, keys: &mut OptimizerConfig) -> OptimizerPlan {
        let weight_decay = keys.weight_decay;
        match self {
            Self::Adamw => OptimizerPlan::AdamW(keys.adamw([0.9, 0.95])),
            Self::Adamw8bit => OptimizerPlan::AdamW8bit(keys.adamw([0.9, 0.95])),
            Self::Adam => OptimizerPlan::Adam {
                betas: *keys.betas.get_or_insert([0.9, 0.95]),
                eps: *keys.eps.get_or_insert(1e-8),
                weight_decay,
            },
            Self::Sgd => OptimizerPlan::Sgd {
                momentum: *keys.momentum.get_or_insert(0.9),
                nesterov: *keys.nesterov.get_or_insert(false),
                weight_decay,
            },
            Self::Sign => OptimizerPlan::Sign(keys.lion()),
            Self::Lion => OptimizerPlan::Lion(keys.lion()),
            Self::Adafactor => OptimizerPlan::Adafactor { weight_decay },
            Self::Muon => OptimizerPlan::Muon(keys.muon()),
            Self::NorMuon => OptimizerPlan::NorMuon {
                neuron_beta: *keys.neuron_beta.get_or_insert(0.95),
                muon: keys.muon(),
            },
            Self::Soap => OptimizerPlan::Soap(keys.soap()),
            Self::Velvet => OptimizerPlan::Velvet {
                velvet: keys.velvet(),
                adamw: keys.adamw([0.9, 0.95]),
            },
        }
    }

    fn takes(self, key: &str) -> bool {
        self.keys().iter().any(|group| group.contains(&key))
    }

    /// Whether `key` has a meaning for the rule.
    pub(super) fn has_key(self, key: &str) -> bool {
        let known = KEYS.iter().find(|(name, _)| *name == key);
        known.is_none_or(|(name, _)| self.takes(name))
    }

    /// The rule's name in the file.
    fn key(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

impl OptimizerConfig {
    fn adamw(&mut self, betas: [f64; 2]) -> AdamWPlan {
        let steps = *self.beta2_warmup_steps.get_or_insert(0);
        AdamWPlan {
            betas: *self.betas.get_or_insert(betas),
            eps: *self.eps.get_or_insert(1e-8),
            weight_decay: self.weight_decay,
            cautious_weight_decay: *self.cautious_weight_decay.get_or_insert(false),
            beta2_warmup: Ramp::new(self.beta2_start, steps),
        }
    }

    fn lion(&mut self) -> LionPlan {
        LionPlan {
            betas: *self.betas.get_or_insert([0.9, 0.99]),
            weight_decay: self.weight_decay,
            cautious_weight_decay: *self.cautious_weight_decay.get_or_insert(false),
        }
    }

    fn muon(&mut self) -> MuonPlan {
        let steps = *self.momentum_warmup_steps.get_or_insert(0);
        MuonPlan {
            momentum: *self.momentum.get_or_insert(0.95),
            nesterov: *self.nesterov.get_or_insert(true),
            momentum_warmup: Ramp::new(self.momentum_start, steps),
            adamw_lr_ratio: *self.adamw_lr_ratio.get_or_insert(1.0),
            newton_schulz: *self.newton_schulz.get_or_insert_default(),
            adamw: self.adamw([0.9, 0.95]),
        }
    }

    fn soap(&mut self) -> SoapPlan {
        let default = SoapPlan::new(self.adamw([0.95, 0.95]));
        SoapPlan {
            shampoo_beta: *self.shampoo_beta.get_or_insert(default.shampoo_beta),
            precondition_frequency: *self
                .precondition_frequency
                .get_or_insert(default.precondition_frequency),
            max_precondition_dim: *self
                .max_precondition_dim
                .get_or_insert(default.max_precondition_dim),
            ..default
        }
    }

    fn velvet(&mut self) -> VelvetPlan {
        let default = VelvetPlan::default();
        VelvetPlan {
            signals: self.velvet_signals.get_or_insert(default.signals).clone(),
            bound: *self.velvet_bound.get_or_insert(default.bound),
            smoothing: *self.velvet_smoothing.get_or_insert(default.smoothing),
            sparse: *self.velvet_sparse.get_or_insert(default.sparse),
        }
    }
}

impl Ramp {
    /// None without steps. A start that is missing is refused beforehand.
    fn new(start: Option<f64>, steps: u64) -> Option<Self> {
        let start = start.filter(|_| steps > 0)?;
        Some(Self { start, steps })
    }
}

impl Checks<'_> {
    pub(super) fn optimizer(&mut self, optimizer: &mut OptimizerConfig) -> OptimizerPlan {
        let name = optimizer.name;
        for (key, is_set) in KEYS {
            if is_set(optimizer) && !name.takes(key) {
                let takers = OptimizerName::ALL.iter().filter(|rule| rule.takes(key));
                let takers: Vec<String> = takers.map(|rule| rule.key()).collect();
                let path = format!("optimizer.{key}");
                self.refuse(
                    &[&path, "optimizer.name"],
                    format!("{} ignores {}", name.key(), self.describe(&path)),
                    &format!("remove it; {key} is for {}", takers.join(", ")),
                );
            }
        }
        let plan = name.plan(optimizer);
        self.nesterov(&plan);
        self.velvet_signals(&plan);
        if name.takes("momentum_start") {
            let [steps, start] = [
                "optimizer.momentum_warmup_steps",
                "optimizer.momentum_start",
            ];
            let end = ("optimizer.momentum", optimizer.momentum);
            let ramp = (optimizer.momentum_warmup_steps, optimizer.momentum_start);
            self.ramp([steps, start], ramp, end);
        }
        if name.takes("beta2_start") {
            let [steps, start] = ["optimizer.beta2_warmup_steps", "optimizer.beta2_start"];
            let end = ("optimizer.betas", optimizer.betas.map(|betas| betas[1]));
            let ramp = (optimizer.beta2_warmup_steps, optimizer.beta2_start);
            self.ramp([steps, start], ramp, end);
        }
        plan
    }

    /// Checks a number's warm-up: steps and start belong together, and the start is below the end.
    fn ramp(
        &mut self,
        [steps_key, start_key]: [&str; 2],
        (steps, start): (Option<u64>, Option<f64>),
        (end_key, end): (&str, Option<f64>),
    ) {
        let name = |key: &str| key.trim_start_matches("optimizer.").to_string();
        match (steps.unwrap_or(0), start, end) {
            (0, Some(_), _) => self.refuse(
                &[start_key, steps_key],
                format!("{} without steps to rise in", self.describe(start_key)),
                &format!("set {} above 0, or remove it", name(steps_key)),
            ),
            (1.., None, _) => self.refuse(
                &[steps_key],
                format!("{} without a value to start from", self.describe(steps_key)),
                &format!("set {}", name(start_key)),
            ),
            (1.., Some(start), Some(end)) if start >= end => self.refuse(
                &[start_key, end_key],
                format!(
                    "{} is {start}, and the value it rises to is {end}",
                    self.describe(start_key)
                ),
                &format!("a {} below {end}", name(start_key)),
            ),
            _ => {}
        }
    }

    fn velvet_signals(&mut self, plan: &OptimizerPlan) {
        let OptimizerPlan::Velvet { velvet, .. } = plan else {
            return;
        };
        let mut signals = velvet.signals.clone();
        signals.sort();
        signals.dedup();
        if signals.len() < velvet.signals.len() {
            self.refuse(
                &["optimizer.velvet_signals"],
                format!(
                    "{} has a signal twice",
                    self.describe("optimizer.velvet_signals")
                ),
                "list each signal once",
            );
        }
    }

    fn nesterov(&mut self, plan: &OptimizerPlan) {
        let (OptimizerPlan::Sgd {
            momentum, nesterov, ..
        }
        | OptimizerPlan::Muon(MuonPlan {
            momentum, nesterov, ..
        })
        | OptimizerPlan::NorMuon {
            muon: MuonPlan {
                momentum, nesterov, ..
            },
            ..
        }) = plan
        else {
            return;
        };
        if *nesterov && *momentum == 0.0 {
            self.refuse(
                &["optimizer.nesterov", "optimizer.momentum", "optimizer.name"],
                format!(
                    "{} is a form of momentum, and momentum is 0",
                    self.describe("optimizer.nesterov")
                ),
                "nesterov = false, or a momentum above 0",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_the_schema_is_listed_under_that_name() {
        let schema = schemars::schema_for!(OptimizerName).to_value();
        let variants = schema["oneOf"].as_array().unwrap();
        let names = variants.iter().map(|variant| variant["const"].as_str());
        let names: Vec<&str> = names.map(Option::unwrap).collect();
        assert_eq!(OptimizerName::ALL.map(OptimizerName::key).to_vec(), names);
    }

    #[test]
    fn a_plan_gives_defaults_to_keys_of_its_rule_alone() {
        for name in OptimizerName::ALL {
            let mut keys = OptimizerConfig::default();
            let plan = name.plan(&mut keys);
            assert_eq!(plan.name(), name.key());
            for (key, is_set) in KEYS {
                // The start of a warm-up has no default.
                let is_expected = name.takes(key) && !key.ends_with("_start");
                assert_eq!(is_set(&keys), is_expected, "{name:?} {key}");
            }
        }
    }
}
