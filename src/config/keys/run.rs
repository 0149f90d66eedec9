//! `[eval]`, `[checkpoint]`, `[logging]` and `[device]`: what does not change the model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::delta::Method;

/// `[eval]`: validation and sample completions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Validate on the whole split every this many steps, and at the end. 0 = only at the end.
    #[schemars(extend("x-aliases" = ["nanoGPT: eval_interval", "mlx-lm: steps_per_eval", "axolotl: evals_per_epoch"]))]
    pub eval_steps: u64,
    /// Tokens per sequence of text when validating. Default: sequence_len in `[data]`, whatever the
    /// phases have, so that all losses of the run can be compared. Rows are validated as they are
    /// trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16777216), extend("examples" = [256], "x-aliases" = ["axolotl: eval_sequence_len", "eval_max_seq_len"]))]
    pub sequence_len: Option<usize>,
    /// End the run when this many evaluations in a row have not lowered the validation loss. 0 = off.
    #[schemars(range(max = 1000000), extend("x-aliases" = ["HF: early_stopping_patience", "keras: patience", "patience"]))]
    pub early_stopping_patience: u64,
    /// Prompts to complete at every evaluation, to see what the model has learned.
    pub sample_prompts: Vec<String>,
    /// Tokens per sample completion.
    #[schemars(range(max = 65536), extend("x-aliases" = ["max_new_tokens"]))]
    pub sample_tokens: usize,
    /// Temperature of the sample completions; 0 = greedy.
    #[schemars(range(min = 0.0, max = 100.0))]
    pub sample_temperature: f64,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            eval_steps: 100,
            sequence_len: None,
            early_stopping_patience: 0,
            sample_prompts: Vec::new(),
            sample_tokens: 64,
            sample_temperature: 0.8,
        }
    }
}

/// `[checkpoint]`: when to save and what to keep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Save a resumable checkpoint every this many steps, and at the end. 0 = only at the end.
    #[schemars(extend("x-aliases" = ["nanoGPT: always_save_checkpoint", "mlx-lm: save_every", "litgpt: save_interval", "saves_per_epoch"]))]
    pub save_steps: u64,
    /// Checkpoints to keep; the best and the last are kept on top of these. 0 = all.
    #[schemars(range(max = 1000000))]
    pub save_total_limit: usize,
    /// Number format of the exported model or adapter at the run folder's root; checkpoints have their own.
    #[schemars(extend("x-aliases" = ["HF: torch_dtype", "mlx-lm: dtype"]))]
    pub save_dtype: SaveDtype,
    /// How checkpoints are stored. Either way they are exact, unless `lossy` is set.
    pub format: CheckpointFormat,
    /// With `format = "delta"`: one checkpoint in so many stands alone, the others are differences from the one before.
    #[schemars(range(min = 1, max = 1000))]
    pub keyframe_every: u64,
    /// With `format = "delta"`: write checkpoints while training goes on, from a copy of the state.
    pub background: bool,
    /// With `format = "delta"`: store the weights of difference checkpoints approximately, which makes them smaller.
    /// A run that is resumed from such a checkpoint does not continue bit for bit. The best checkpoint, the last one, and one saved on interruption are always exact.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lossy: Option<Method>,
    /// With `lossy`: Adam's and AdamW's moments, too.
    pub lossy_moments: bool,
}

/// How checkpoints are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointFormat {
    /// What differs from the checkpoint before, bit for bit: smaller.
    #[default]
    Delta,
    /// Weights under Hugging Face's names and the optimizer's tensors, each in a safetensors file.
    Full,
}

/// Number format of weights in a model folder. Rounding is to the nearest, ties to even.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum SaveDtype {
    /// 4 bytes, exact.
    #[default]
    F32,
    /// 2 bytes: the range of f32 with 8 bits of precision.
    Bf16,
    /// 2 bytes: 11 bits of precision up to 65,504.
    F16,
}

impl SaveDtype {
    /// Its name in `config.json`.
    pub fn torch_name(self) -> &'static str {
        match self {
            SaveDtype::F32 => "float32",
            SaveDtype::Bf16 => "bfloat16",
            SaveDtype::F16 => "float16",
        }
    }
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            save_steps: 500,
            save_total_limit: 3,
            save_dtype: SaveDtype::F32,
            format: CheckpointFormat::Delta,
            keyframe_every: 10,
            background: true,
            lossy: None,
            lossy_moments: false,
        }
    }
}

/// `[logging]`: what is written while training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoggingConfig {
    /// Write metrics every this many steps.
    #[schemars(range(min = 1), extend("x-aliases" = ["nanoGPT: log_interval", "mlx-lm: steps_per_report", "torchtune: log_every_n_steps", "log_steps"]))]
    pub logging_steps: u64,
    /// Which files the metrics go to.
    #[schemars(extend("x-aliases" = ["HF: report_to", "axolotl: use_tensorboard", "torchtune: metric_logger", "litgpt: logger_name"]))]
    pub report_to: Vec<Report>,
}

impl Default for LoggingConfig {
    fn default() -> Self {
        Self {
            logging_steps: 10,
            report_to: vec![
                Report::Jsonl,
                Report::Csv,
                Report::Tensorboard,
                Report::Html,
            ],
        }
    }
}

/// A form of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    /// metrics.jsonl: one object a line.
    Jsonl,
    /// metrics.csv.
    Csv,
    /// tb/: events for TensorBoard.
    Tensorboard,
    /// report.html: charts, samples, config and events on one page.
    Html,
}

/// `[device]`: where the computation runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceConfig {
    /// `auto` takes the best that is compiled in and present and says which; a name takes that one
    /// or is an error.
    #[schemars(extend("x-aliases" = ["torchtune: device", "accelerator"]))]
    pub backend: Backend,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
        }
    }
}

/// A compute backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The best that is compiled in and present.
    Auto,
    /// All cores of this machine (burn's flex backend).
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
    /// GPUs through Vulkan, Metal or DirectX.
    Wgpu,
}

impl Backend {
    /// Its name in a configuration, and that of the Cargo feature that builds it in.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Auto => "auto",
            Backend::Cpu => "cpu",
            Backend::Cuda => "cuda",
            Backend::Wgpu => "wgpu",
        }
    }
}

impl std::str::FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Backend::Auto, Backend::Cpu, Backend::Cuda, Backend::Wgpu]
            .into_iter()
            .find(|backend| backend.name() == text)
            .ok_or_else(|| format!("`{text}` is not auto, cpu, cuda or wgpu"))
    }
}
