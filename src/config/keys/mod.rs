//! What a TOML file may say: every section and key, its type, default and documentation.
//!
//! These structs are the single source of truth. The strict checker, the JSON Schema
//! (`runner schema`), the templates (`runner init`) and the reference page in the book are all
//! generated from them, doc comments included, so a key is documented here or nowhere. `[optimizer]`
//! and `[lr_scheduler]`, whose keys depend on the chosen rule or schedule, are files one folder up,
//! together with their checks and plans.
//!
//! `x-aliases` lists the names other trainers use for the same thing; the checker offers ours when
//! it meets one of them. Keys that are absent from the file take the default shown in the schema.

mod adapter;
mod average;
mod data;
mod dpo;
mod gradient;
mod model;
mod phase;
mod predict;
mod quantization;
mod regulator;
mod run;
mod train;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use adapter::*;
pub use average::*;
pub use data::*;
pub use dpo::*;
pub use gradient::*;
pub use model::*;
pub use phase::*;
pub use predict::*;
pub use quantization::*;
pub use regulator::*;
pub use run::*;
pub use train::*;

use super::optimizer::OptimizerConfig;
use super::schedule::LrSchedulerConfig;

/// One training experiment. `runner train FILE` runs it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Version of this file format.
    #[schemars(range(min = 1, max = 1))]
    pub version: u32,
    /// What to train.
    pub task: Task,
    /// Run folder: metrics, logs, checkpoints and the exported model go here.
    #[schemars(extend("x-aliases" = ["HF: output_dir", "nanoGPT: out_dir", "litgpt: out_dir"]))]
    pub output_dir: PathBuf,
    /// Seed of everything random: initial weights, data order, sample completions.
    #[schemars(range(max = 9007199254740991u64), extend("x-aliases" = ["HF: random_seed", "HF: data_seed"]))]
    pub seed: u64,
    /// The model's architecture and shape.
    #[schemars(extend("x-aliases" = ["model_args"]))]
    pub model: ModelConfig,
    /// Train a few new weights beside those of a base model.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["lora", "peft"]))]
    pub adapter: Option<AdapterConfig>,
    /// What is learned from pairs of answers (task = "dpo").
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["rl", "preference"]))]
    pub dpo: Option<DpoConfig>,
    /// Linear layers of the blocks in few bits.
    #[schemars(extend("x-aliases" = ["quant", "quantize"]))]
    pub quantization: QuantizationConfig,
    /// How text becomes token ids.
    pub tokenizer: TokenizerConfig,
    /// What to train on.
    #[schemars(extend("x-aliases" = ["dataset"]))]
    pub data: DataConfig,
    /// Batch size, length of the run, clipping.
    #[schemars(extend("x-aliases" = ["training", "trainer"]))]
    pub train: TrainConfig,
    /// The update rule.
    #[schemars(extend("x-aliases" = ["optim"]))]
    pub optimizer: OptimizerConfig,
    /// The learning rate over the run.
    #[schemars(extend("x-aliases" = ["scheduler", "lr_schedule"]))]
    pub lr_scheduler: LrSchedulerConfig,
    /// The gradients of several workers, and how they become one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["distributed", "ddp", "parallel"]))]
    pub gradient: Option<GradientConfig>,
    /// What to do with a step whose loss or gradient norm leaps.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["watchdog", "loss_watchdog"]))]
    pub regulator: Option<RegulatorConfig>,
    /// An average of the weights over the run, for evaluation and export.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["timm: model_ema", "HF: use_ema", "ema", "swa", "weight_averaging", "model_averaging"]))]
    pub average: Option<AverageConfig>,
    /// Validation and sample completions.
    #[schemars(extend("x-aliases" = ["evaluation", "validation"]))]
    pub eval: EvalConfig,
    /// When to save and what to keep.
    #[schemars(extend("x-aliases" = ["save"]))]
    pub checkpoint: CheckpointConfig,
    /// What is written while training.
    pub logging: LoggingConfig,
    /// Where the computation runs.
    pub device: DeviceConfig,
    /// The phases of the run, one `[[phase]]` each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-aliases" = ["phases", "stages", "curriculum"]))]
    pub phase: Vec<PhaseConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            version: 1,
            task: Task::Pretrain,
            output_dir: PathBuf::from("outputs/run"),
            seed: 42,
            model: ModelConfig::default(),
            adapter: None,
            dpo: None,
            quantization: QuantizationConfig::default(),
            tokenizer: TokenizerConfig::default(),
            data: DataConfig::default(),
            train: TrainConfig::default(),
            optimizer: OptimizerConfig::default(),
            lr_scheduler: LrSchedulerConfig::default(),
            gradient: None,
            regulator: None,
            average: None,
            eval: EvalConfig::default(),
            checkpoint: CheckpointConfig::default(),
            logging: LoggingConfig::default(),
            device: DeviceConfig::default(),
            phase: Vec::new(),
        }
    }
}

/// What to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// A language model, from random weights or a base model's: predict every next token.
    Pretrain,
    /// Supervised fine-tuning: predict the answers in conversations, instructions and completions.
    Sft,
    /// Direct preference optimisation: prefer the chosen of two answers to the rejected one. The
    /// base model, without adapter, is the reference.
    Dpo,
}
