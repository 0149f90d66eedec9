//! `[data]` and `[[data.datasets]]`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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

/// The chat templates that come with the program, as `data.chat_template` names them.
pub const CHAT_TEMPLATES: [&str; 8] = [
    "chatml", "llama3", "mistral", "zephyr", "gemma", "phi3", "vicuna", "alpaca",
];

/// Whether `data.chat_template` means a file.
pub fn is_chat_template_path(choice: &str) -> bool {
    choice.contains(['/', '\\']) || choice.ends_with(".jinja") || choice.ends_with(".jinja2")
}
