#![allow(missing_docs)]
use super::*;
#[derive(Debug, Clone, PartialEq)]
pub enum OptimizerPlan {
    AdamW {
        betas: [f64; 2],
        eps: f64,
        weight_decay: f64,
    },
    Adam {
        betas: [f64; 2],
        eps: f64,
        weight_decay: f64,
    },
    Sgd {
        momentum: f64,
        nesterov: bool,
        weight_decay: f64,
    },
    Lion {
        betas: [f64; 2],
        weight_decay: f64,
    },
    Adafactor {
        weight_decay: f64,
    },
    Muon {
        momentum: f64,
        nesterov: bool,
        betas: [f64; 2],
        eps: f64,
        weight_decay: f64,
    },
}
#[derive(Debug, Clone, PartialEq)]
pub enum Decay {
    Constant,
    Linear,
    Cosine,
    Wsd { ratio: f64, shape: DecayShape },
    Polynomial { power: f64 },
    InverseSqrt,
}
#[derive(Debug, Clone, PartialEq)]
pub enum Warmup {
    Steps(u64),
    Ratio(f64),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Length {
    Steps(u64),
    Epochs(f64),
    Tokens(u64),
}
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulePlan {
    pub decay: Decay,
    pub warmup: Warmup,
    pub min_lr_ratio: f64,
}
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub config: Config,
    pub shape: ModelShape,
    pub length: Length,
    pub optimizer: OptimizerPlan,
    pub schedule: SchedulePlan,
}
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);
impl Plan {
    pub fn to_toml(&self) -> String {
        toml::to_string(&self.config).unwrap()
    }
    pub fn from_config(config: Config) -> Result<Plan, ConfigError> {
        let m = config.model.clone();
        let h = m.hidden_size.unwrap();
        let heads = m.num_attention_heads.unwrap();
        let shape = ModelShape {
            architecture: m.architecture.unwrap(),
            hidden_size: h,
            intermediate_size: m.intermediate_size.unwrap_or(4 * h),
            num_hidden_layers: m.num_hidden_layers.unwrap(),
            num_attention_heads: heads,
            num_key_value_heads: m.num_key_value_heads.unwrap_or(heads),
            head_dim: h / heads,
            max_position_embeddings: config.data.sequence_len,
            tie_word_embeddings: true,
            bias: m.bias.unwrap_or(false),
            norm_eps: 1e-5,
            rope_theta: 1e4,
            initializer_range: 0.02,
        };
        let o = config.optimizer.clone();
        Ok(Plan {
            shape,
            length: Length::Steps(config.train.max_steps.unwrap()),
            optimizer: OptimizerPlan::AdamW {
                betas: o.betas.unwrap_or([0.9, 0.95]),
                eps: 1e-8,
                weight_decay: o.weight_decay,
            },
            schedule: SchedulePlan {
                decay: Decay::Cosine,
                warmup: Warmup::Steps(config.lr_scheduler.warmup_steps.unwrap_or(0)),
                min_lr_ratio: config.lr_scheduler.min_lr_ratio.unwrap_or(0.0),
            },
            config,
        })
    }
}
pub fn load(path: &std::path::Path, _sets: &[String]) -> Result<Plan, ConfigError> {
    Plan::from_config(
        toml::from_str(&std::fs::read_to_string(path).unwrap())
            .map_err(|e| ConfigError(e.to_string()))?,
    )
}
