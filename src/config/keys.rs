//! What a TOML file may say: every section and key, its type, default and documentation.
//!
//! These structs are the single source of truth. The strict checker, the JSON Schema
//! (`runner schema`), the templates (`runner init`) and the reference page in the book are all
//! generated from them, doc comments included, so a key is documented here or nowhere.
//!
//! `x-aliases` lists the names other trainers use for the same thing; the checker offers ours when
//! it meets one of them. Keys that are absent from the file take the default shown in the schema.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
}

impl Default for Config {
    fn default() -> Self {
        Self {
            version: 1,
            task: Task::Pretrain,
            output_dir: PathBuf::from("outputs/run"),
            seed: 42,
            model: ModelConfig::default(),
            tokenizer: TokenizerConfig::default(),
            data: DataConfig::default(),
            train: TrainConfig::default(),
            optimizer: OptimizerConfig::default(),
            lr_scheduler: LrSchedulerConfig::default(),
            eval: EvalConfig::default(),
            checkpoint: CheckpointConfig::default(),
            logging: LoggingConfig::default(),
            device: DeviceConfig::default(),
        }
    }
}

/// What to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// A language model from random weights: predict every next token.
    Pretrain,
}

/// `[model]`: a preset, a shape in Hugging Face's names, or a preset with some keys overridden.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// A published shape by name; the other keys of this section override it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["litgpt: model_name", "HF: model_type"]))]
    pub preset: Option<Preset>,
    /// Family of the decoder. Required without a preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<Architecture>,
    /// Width of the residual stream. Required without a preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1048576), extend("x-aliases" = ["GPT-2: n_embd", "llama2.c: dim", "torchtune: embed_dim", "d_model"]))]
    pub hidden_size: Option<usize>,
    /// Width of the feed-forward layer. Default: 4 x hidden_size for gpt2; 8/3 x hidden_size
    /// rounded up to a multiple of 32 for llama.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4194304), extend("x-aliases" = ["GPT-2: n_inner", "torchtune: intermediate_dim", "d_ff", "ffn_dim"]))]
    pub intermediate_size: Option<usize>,
    /// Number of decoder blocks. Required without a preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096), extend("x-aliases" = ["GPT-2: n_layer", "llama2.c: n_layers", "num_layers"]))]
    pub num_hidden_layers: Option<usize>,
    /// Number of query heads. Required without a preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096), extend("x-aliases" = ["GPT-2: n_head", "llama2.c: n_heads", "num_heads"]))]
    pub num_attention_heads: Option<usize>,
    /// Number of key/value heads; fewer than query heads is grouped-query attention.
    /// Default: num_attention_heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096), extend("x-aliases" = ["llama2.c: n_kv_heads", "num_kv_heads"]))]
    pub num_key_value_heads: Option<usize>,
    /// Width of one head. Default: hidden_size / num_attention_heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub head_dim: Option<usize>,
    /// Longest sequence the model is made for: the size of gpt2's position table.
    /// Default: data.sequence_len, or the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16777216), extend("x-aliases" = ["GPT-2: n_positions", "nanoGPT: n_ctx", "max_seq_len"]))]
    pub max_position_embeddings: Option<usize>,
    /// Use the embedding matrix as the output head too. Default: true, or the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["weight_tying", "tied_embeddings"]))]
    pub tie_word_embeddings: Option<bool>,
    /// Biases in linear and norm layers (gpt2 only). Default: false, or the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<bool>,
    /// Epsilon of RMSNorm or LayerNorm. Default: 1e-5, or the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "x-aliases" = ["HF: rms_norm_eps", "GPT-2: layer_norm_epsilon"]))]
    pub norm_eps: Option<f64>,
    /// Base of the rotary position frequencies (llama only). Default: 10000, or the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 1.0, "x-aliases" = ["rope_base", "rotary_base"]))]
    pub rope_theta: Option<f64>,
    /// Standard deviation of the initial weights; projections that write to the residual stream
    /// are scaled by 1/sqrt(2 x layers) on top (GPT-2 paper, section 2.3).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "x-aliases" = ["init_std", "init_range"]))]
    pub initializer_range: Option<f64>,
}

/// Family of the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// RMSNorm, rotary positions, grouped-query attention, SwiGLU.
    Llama,
    /// LayerNorm, learned positions, GELU.
    Gpt2,
}

impl Architecture {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Gpt2 => "gpt2",
        }
    }
}

/// Published shapes. The vocabulary size always comes from the tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Preset {
    /// llama2.c's 260 thousand parameters.
    #[serde(rename = "stories-260k")]
    Stories260K,
    /// llama2.c's 15 million parameters.
    #[serde(rename = "stories-15m")]
    Stories15M,
    /// llama2.c's 42 million parameters.
    #[serde(rename = "stories-42m")]
    Stories42M,
    /// llama2.c's 110 million parameters.
    #[serde(rename = "stories-110m")]
    Stories110M,
    /// SmolLM2 135M.
    #[serde(rename = "smollm2-135m")]
    SmolLm2_135M,
    /// SmolLM2 360M.
    #[serde(rename = "smollm2-360m")]
    SmolLm2_360M,
    /// SmolLM2 1.7B.
    #[serde(rename = "smollm2-1.7b")]
    SmolLm2_1_7B,
    /// TinyLlama 1.1B.
    #[serde(rename = "tinyllama-1.1b")]
    TinyLlama1_1B,
    /// GPT-2 small, 124M.
    #[serde(rename = "gpt2")]
    Gpt2,
    /// GPT-2 medium, 355M.
    #[serde(rename = "gpt2-medium")]
    Gpt2Medium,
    /// GPT-2 large, 774M.
    #[serde(rename = "gpt2-large")]
    Gpt2Large,
    /// GPT-2 XL, 1.5B.
    #[serde(rename = "gpt2-xl")]
    Gpt2Xl,
}

/// `[tokenizer]`: an existing tokenizer.json, or one trained on the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerConfig {
    /// Where token ids come from.
    #[serde(rename = "type")]
    pub kind: TokenizerKind,
    /// The tokenizer.json to use (type = "file").
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["tokenizer.json"], "x-aliases" = ["torchtune: tokenizer_path", "axolotl: tokenizer_config", "HF: tokenizer_name_or_path"]))]
    pub path: Option<PathBuf>,
    /// Number of tokens to learn, special tokens and the 256 bytes included (type = "bpe").
    /// Default: 4096.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 257, max = 1048576))]
    pub vocab_size: Option<usize>,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self {
            kind: TokenizerKind::Bpe,
            path: None,
            vocab_size: None,
        }
    }
}

/// Where token ids come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerKind {
    /// A tokenizer.json in Hugging Face's format.
    File,
    /// Byte-level byte-pair encoding learned on the training split.
    Bpe,
    /// One token per byte.
    Byte,
    /// One token per Unicode character that occurs in the data.
    Char,
}

/// `[data]`: the datasets, the validation split, the sequence length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Tokens per training sequence.
    #[schemars(range(min = 1, max = 16777216), extend("x-aliases" = ["LLaMA-Factory: cutoff_len", "HF: max_seq_length", "HF: max_length", "nanoGPT: block_size", "torchtune: max_seq_len", "sequence_length", "seq_len", "context_length"]))]
    pub sequence_len: usize,
    /// Share of each dataset held out for validation: the last characters of text, the last rows
    /// of records. 0 trains on everything and validates on nothing.
    #[schemars(range(min = 0.0, max = 0.9), extend("x-aliases" = ["axolotl: val_set_size", "LLaMA-Factory: val_size", "validation_split"]))]
    pub val_fraction: f64,
    /// A file to validate on instead of holding out a share of the datasets.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["data/val.txt"], "x-aliases" = ["axolotl: test_datasets", "HF: validation_file", "LLaMA-Factory: eval_dataset", "mlx-lm: valid"]))]
    pub val_path: Option<PathBuf>,
    /// How training windows are drawn.
    pub sampling: Sampling,
    /// One `[[data.datasets]]` per source of text; at least one.
    #[schemars(extend("x-aliases" = ["axolotl: datasets", "HF: train_file", "HF: dataset_name", "LLaMA-Factory: dataset"]))]
    pub datasets: Vec<DatasetConfig>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            sequence_len: 256,
            val_fraction: 0.05,
            val_path: None,
            sampling: Sampling::Random,
            datasets: Vec::new(),
        }
    }
}

/// How training windows are drawn. Both are functions of (seed, step) alone, so a resumed run
/// continues exactly where it stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sampling {
    /// Windows at uniformly random offsets, as nanoGPT draws them.
    Random,
    /// Every window of the data once per epoch, in a new order each epoch.
    Epoch,
}

/// `[[data.datasets]]`: one source of text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DatasetConfig {
    /// Files: a path, a glob like "docs/**/*.md", or a list of them. Sorted by name, each file once.
    #[schemars(extend("x-aliases" = ["HF: data_files", "axolotl: data_files", "LLaMA-Factory: file_name"]))]
    pub path: OneOrMany,
    /// What the files hold. `auto` decides by the file name's ending and says what it found.
    #[serde(rename = "type", default)]
    pub kind: DatasetKind,
    /// How often this dataset's tokens are seen relative to those of the others: 2 means twice.
    #[serde(default = "one")]
    #[schemars(range(max = 1000000.0), extend("exclusiveMinimum" = 0.0, "x-aliases" = ["LLaMA-Factory: interleave_probs"]))]
    pub weight: f64,
    /// Names of the fields in records, where they differ from ours.
    #[serde(default, skip_serializing_if = "FieldNames::is_default")]
    pub fields: FieldNames,
}

impl DatasetConfig {
    /// Files at a path or glob, with every other key at its default.
    pub fn new(path: impl Into<String>) -> Self {
        Self {
            path: OneOrMany::One(path.into()),
            kind: DatasetKind::default(),
            weight: one(),
            fields: FieldNames::default(),
        }
    }
}

fn one() -> f64 {
    1.0
}

/// What a dataset's files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DatasetKind {
    /// `.jsonl` and `.json`: records with a text field; everything else: plain text.
    #[default]
    Auto,
    /// Plain text files whole, or the text field of `.jsonl` / `.json` records.
    Text,
}

/// `fields`: what the records call things.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FieldNames {
    /// The field that holds the text of a record.
    #[schemars(extend("x-aliases" = ["axolotl: field", "mlx-lm: text_feature", "content"]))]
    pub text: String,
}

impl FieldNames {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for FieldNames {
    fn default() -> Self {
        Self {
            text: "text".to_string(),
        }
    }
}

/// A string, or a list of strings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    /// A single entry.
    One(String),
    /// Several entries.
    Many(Vec<String>),
}

impl OneOrMany {
    /// The entries, one or many.
    pub fn as_slice(&self) -> &[String] {
        match self {
            OneOrMany::One(entry) => std::slice::from_ref(entry),
            OneOrMany::Many(entries) => entries,
        }
    }
}

/// `[train]`: batch size, length of the run, clipping.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Sequences per forward and backward pass.
    #[schemars(range(min = 1, max = 1048576), extend("x-aliases" = ["HF: per_device_train_batch_size", "torchtune: batch_size", "axolotl: micro_batch_size"]))]
    pub micro_batch_size: usize,
    /// Passes per optimizer step. The loss is averaged over all trained tokens of the step, so
    /// 16 passes of 1 sequence equal 1 pass of 16.
    #[schemars(range(min = 1, max = 1048576), extend("x-aliases" = ["litgpt: accumulate_grad_batches", "grad_accumulation_steps", "grad_accum"]))]
    pub gradient_accumulation_steps: usize,
    /// Length of the run in optimizer steps. One of max_steps, num_epochs, max_tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000000000000u64), extend("x-aliases" = ["nanoGPT: max_iters", "mlx-lm: iters", "num_steps", "train_steps"]))]
    pub max_steps: Option<u64>,
    /// Length of the run in passes over the training data.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000000.0), extend("exclusiveMinimum" = 0.0, "x-aliases" = ["HF: num_train_epochs", "torchtune: epochs"]))]
    pub num_epochs: Option<f64>,
    /// Length of the run in trained tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000000000000000u64), extend("examples" = [10000000], "x-aliases" = ["litgpt: max_tokens", "total_tokens"]))]
    pub max_tokens: Option<u64>,
    /// Largest norm of the whole gradient; a larger one is scaled down to it. 0 = off.
    #[schemars(range(min = 0.0), extend("x-aliases" = ["torchtune: clip_grad_norm", "nanoGPT: grad_clip", "gradient_clipping", "clip_grad"]))]
    pub max_grad_norm: f64,
    /// What to do with a step whose loss or gradient is not finite.
    pub on_nonfinite: OnNonfinite,
    /// Worker threads; 0 = all cores.
    #[schemars(range(max = 4096), extend("x-aliases" = ["num_threads", "num_workers"]))]
    pub threads: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            micro_batch_size: 8,
            gradient_accumulation_steps: 1,
            max_steps: None,
            num_epochs: None,
            max_tokens: None,
            max_grad_norm: 1.0,
            on_nonfinite: OnNonfinite::Skip,
            threads: 0,
        }
    }
}

/// What to do with a step whose loss or gradient is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnNonfinite {
    /// Leave the weights as they are, write down the batch, go on; stop after 3 in a row.
    Skip,
    /// Stop at the first one.
    Stop,
}

/// `[optimizer]`: the update rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The update rule.
    #[schemars(extend("x-aliases" = ["HF: optim", "axolotl: optimizer", "optimizer_type"]))]
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
    /// Ignored by constant and inverse_sqrt, which therefore refuse it.
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

/// `[eval]`: validation and sample completions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Validate on the whole split every this many steps, and at the end. 0 = only at the end.
    #[schemars(extend("x-aliases" = ["nanoGPT: eval_interval", "mlx-lm: steps_per_eval", "axolotl: evals_per_epoch"]))]
    pub eval_steps: u64,
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
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            save_steps: 500,
            save_total_limit: 3,
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
    pub report_to: Vec<Report>,
}

impl Default for LoggingConfig {
    fn default() -> Self {
        Self {
            logging_steps: 10,
            report_to: vec![Report::Jsonl, Report::Csv],
        }
    }
}

/// A file format for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    /// metrics.jsonl: one object a line.
    Jsonl,
    /// metrics.csv.
    Csv,
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
