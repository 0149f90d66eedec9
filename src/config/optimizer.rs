//! `[optimizer]`: everything that the configuration knows about the optimizers. A new optimizer
//! needs a variant of [`OptimizerName`], an entry in [`OptimizerName::ALL`], a variant of
//! [`OptimizerPlan`], and an arm of [`OptimizerName::plan`], which lists its keys and their
//! defaults. The update rule itself is a file of the module `optimizer`.
//!
//! A key that the chosen rule would ignore is refused: a user who sets `momentum` for AdamW expects
//! it to have an effect.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::Checks;

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
    /// Decay of the moment estimates (adamw, adam, lion, and the adamw half of muon).
    /// Default: [0.9, 0.95]; lion: [0.9, 0.99].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(inner(range(min = 0.0, max = 0.999999)), extend("x-aliases" = ["HF: adam_beta1", "HF: adam_beta2", "beta1", "beta2"]))]
    pub betas: Option<[f64; 2]>,
    /// Added to the denominator (adamw, adam, and the adamw half of muon). Default: 1e-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0.0, "x-aliases" = ["HF: adam_epsilon", "epsilon"]))]
    pub eps: Option<f64>,
    /// Decay of matrices and embeddings; norms and biases are never decayed. Decoupled for adamw,
    /// lion and muon; added to the gradient for adam and sgd.
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Momentum (sgd, muon). Default: 0.9 for sgd, 0.95 for muon.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0), extend("examples" = [0.9], "exclusiveMaximum" = 1.0))]
    pub momentum: Option<f64>,
    /// Nesterov momentum (sgd, muon). Default: false for sgd, true for muon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nesterov: Option<bool>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            name: OptimizerName::Adamw,
            learning_rate: 1e-3,
            betas: None,
            eps: None,
            weight_decay: 0.1,
            momentum: None,
            nesterov: None,
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
    /// Sign of the momentum (Chen et al., 2023). Wants about a tenth of AdamW's learning rate.
    Lion,
    /// Factored second moments (Shazeer and Stern, 2018).
    Adafactor,
    /// Orthogonalised momentum for the blocks' matrices (Jordan et al., 2024), scaled to AdamW's update size
    /// (Liu et al., 2025); AdamW for embeddings, head, norms and biases.
    Muon,
}

/// The update rule with its parameters.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerPlan {
    /// Adam with decoupled weight decay.
    AdamW {
        /// Decay of the first and second moment estimates.
        betas: [f64; 2],
        /// Added to the denominator.
        eps: f64,
        /// Decay of matrices and embeddings.
        weight_decay: f64,
    },
    /// AdamW with both moments in eight bits.
    AdamW8bit {
        /// Decay of the first and second moment estimates.
        betas: [f64; 2],
        /// Added to the denominator.
        eps: f64,
        /// Decay of matrices and embeddings.
        weight_decay: f64,
    },
    /// Adam; weight decay is added to the gradient.
    Adam {
        /// Decay of the first and second moment estimates.
        betas: [f64; 2],
        /// Added to the denominator.
        eps: f64,
        /// Decay of matrices and embeddings.
        weight_decay: f64,
    },
    /// Stochastic gradient descent; weight decay is added to the gradient.
    Sgd {
        /// Momentum; 0 = none.
        momentum: f64,
        /// Whether the momentum is Nesterov's.
        nesterov: bool,
        /// Decay of matrices and embeddings.
        weight_decay: f64,
    },
    /// Sign of the momentum, decoupled weight decay.
    Lion {
        /// Interpolation of the update and decay of the momentum.
        betas: [f64; 2],
        /// Decay of matrices and embeddings.
        weight_decay: f64,
    },
    /// Factored second moments.
    Adafactor {
        /// Decay of matrices and embeddings.
        weight_decay: f64,
    },
    /// Orthogonalised momentum for the blocks' matrices, AdamW for the rest.
    Muon {
        /// Momentum of the matrices.
        momentum: f64,
        /// Whether the momentum is Nesterov's.
        nesterov: bool,
        /// Decay of AdamW's moment estimates, for all other parameters.
        betas: [f64; 2],
        /// AdamW's epsilon, for all other parameters.
        eps: f64,
        /// Decay of matrices and embeddings.
        weight_decay: f64,
    },
}

impl OptimizerPlan {
    /// The rule's name in a configuration.
    pub fn name(&self) -> String {
        let variant = format!("{self:?}");
        let name = variant.split_whitespace().next();
        name.unwrap_or_default().to_lowercase()
    }
}

/// The keys that some rules use and others ignore, each with a test for whether it is set.
const KEYS: [(&str, IsSet); 4] = [
    ("betas", |keys| keys.betas.is_some()),
    ("eps", |keys| keys.eps.is_some()),
    ("momentum", |keys| keys.momentum.is_some()),
    ("nesterov", |keys| keys.nesterov.is_some()),
];

type IsSet = fn(&OptimizerConfig) -> bool;

impl OptimizerName {
    /// Every rule, in the order in which error messages list them.
    const ALL: [Self; 7] = [
        Self::Adamw,
        Self::Adamw8bit,
        Self::Adam,
        Self::Sgd,
        Self::Lion,
        Self::Adafactor,
        Self::Muon,
    ];

    /// The rule with its parameters. Keys that the rule uses get their defaults if they are absent;
    /// the other keys are left unchanged.
    fn plan(self, keys: &mut OptimizerConfig) -> OptimizerPlan {
        let weight_decay = keys.weight_decay;
        let mut betas = |default| *keys.betas.get_or_insert(default);
        let mut eps = |default| *keys.eps.get_or_insert(default);
        let mut momentum = |default| *keys.momentum.get_or_insert(default);
        let mut nesterov = |default| *keys.nesterov.get_or_insert(default);
        match self {
            Self::Adamw => OptimizerPlan::AdamW {
                betas: betas([0.9, 0.95]),
                eps: eps(1e-8),
                weight_decay,
            },
            Self::Adamw8bit => OptimizerPlan::AdamW8bit {
                betas: betas([0.9, 0.95]),
                eps: eps(1e-8),
                weight_decay,
            },
            Self::Adam => OptimizerPlan::Adam {
                betas: betas([0.9, 0.95]),
                eps: eps(1e-8),
                weight_decay,
            },
            Self::Sgd => OptimizerPlan::Sgd {
                momentum: momentum(0.9),
                nesterov: nesterov(false),
                weight_decay,
            },
            Self::Lion => OptimizerPlan::Lion {
                betas: betas([0.9, 0.99]),
                weight_decay,
            },
            Self::Adafactor => OptimizerPlan::Adafactor { weight_decay },
            Self::Muon => OptimizerPlan::Muon {
                momentum: momentum(0.95),
                nesterov: nesterov(true),
                betas: betas([0.9, 0.95]),
                eps: eps(1e-8),
                weight_decay,
            },
        }
    }

    /// Whether the rule uses a key. If it does, its plan gives the key a default.
    fn takes(self, is_set: IsSet) -> bool {
        let mut keys = OptimizerConfig::default();
        self.plan(&mut keys);
        is_set(&keys)
    }

    /// Whether `key` has a meaning for the rule.
    pub(super) fn has_key(self, key: &str) -> bool {
        let known = KEYS.iter().find(|(name, _)| *name == key);
        known.is_none_or(|(_, is_set)| self.takes(*is_set))
    }

    /// The rule's name in the file.
    fn key(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

impl Checks<'_> {
    pub(super) fn optimizer(&mut self, optimizer: &mut OptimizerConfig) -> OptimizerPlan {
        let name = optimizer.name;
        for (key, is_set) in KEYS {
            if is_set(optimizer) && !name.takes(is_set) {
                let takers = OptimizerName::ALL.iter().filter(|rule| rule.takes(is_set));
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
}
