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
    /// How training windows are drawn. Rows of `task = "sft"` come once per epoch: "epoch".
    pub sampling: Sampling,
    /// Put several rows into one sequence, each attending to itself alone (sft). Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["axolotl: sample_packing", "HF: packing", "LLaMA-Factory: neat_packing", "torchtune: packed"]))]
    pub sample_packing: Option<bool>,
    /// What to do with rows that are longer than a sequence (sft). Default: error.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["axolotl: excess_length_strategy", "HF: truncation_mode", "truncation"]))]
    pub overlong: Option<Overlong>,
    /// How conversations become text (sft): "tokenizer", the template that the tokenizer brings
    /// ("tokenizer:NAME" for one of several); "chatml", "llama3", "mistral", "zephyr", "gemma",
    /// "phi3", "vicuna", "alpaca"; or the path of a .jinja file. Default: "tokenizer" for messages
    /// and sharegpt; alpaca and completion rows are then written without a template.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["tokenizer"], "x-aliases" = ["LLaMA-Factory: template", "axolotl: chat_template_jinja", "HF: chat_template_path", "torchtune: prompt_template"]))]
    pub chat_template: Option<String>,
    /// Which tokens of a row are trained (sft). Default: assistant.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["axolotl: train_on_inputs", "axolotl: roles_to_train", "HF: assistant_only_loss", "HF: completion_only_loss", "LLaMA-Factory: mask_history", "torchtune: train_on_input", "torchtune: masking_strategy", "mlx-lm: mask_prompt"]))]
    pub train_on: Option<TrainOn>,
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
            sample_packing: None,
            overlong: None,
            chat_template: None,
            train_on: None,
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

/// What to do with rows that are longer than a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// Stop, and say how many there are and where the first one is.
    #[default]
    Error,
    /// Leave them out, and say how many.
    Drop,
    /// Keep what fits, from the beginning, and say how many were cut.
    Truncate,
}

impl Overlong {
    /// The name in the TOML.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Drop => "drop",
            Self::Truncate => "truncate",
        }
    }
}

/// Which tokens of a row are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// What the assistant says, the end of each turn included; of a completion, the completion.
    #[default]
    Assistant,
    /// The last turn of the assistant only.
    Last,
    /// Every token.
    All,
}

impl TrainOn {
    /// The name in the TOML.
    pub fn name(self) -> &'static str {
        match self {
            Self::Assistant => "assistant",
            Self::Last => "last",
            Self::All => "all",
        }
    }
}

/// `[[data.datasets]]`: one source of text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DatasetConfig {
    /// Files: a path, a glob like "docs/**/*.md", or a list of them. Sorted by name, each file once.
    #[schemars(extend("x-aliases" = ["HF: data_files", "axolotl: data_files", "LLaMA-Factory: file_name"]))]
    pub path: OneOrMany,
    /// What the files hold. `auto` goes by the file name's ending and the first record's fields,
    /// and says what it found.
    #[serde(rename = "type", default)]
    #[schemars(extend("x-aliases" = ["LLaMA-Factory: formatting", "axolotl: type", "kind", "format"]))]
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
    /// `.jsonl`, `.json` and `.parquet`: records; everything else: plain text. Records of
    /// `task = "pretrain"` are texts, those of `task = "sft"` what their fields say.
    #[default]
    Auto,
    /// Plain text files whole, or the text field of records.
    Text,
    /// Records with a prompt and its completion (sft).
    Completion,
    /// Records with instruction, input and output; perhaps system and history (sft).
    Alpaca,
    /// Records with conversations of from and value; perhaps system and tools (sft).
    Sharegpt,
    /// Records with messages of role and content; perhaps tools (sft).
    Messages,
    /// Records with a chosen and a rejected answer to a prompt or a conversation (dpo).
    Preference,
}

impl DatasetKind {
    /// The name in the TOML.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Text => "text",
            Self::Completion => "completion",
            Self::Alpaca => "alpaca",
            Self::Sharegpt => "sharegpt",
            Self::Messages => "messages",
            Self::Preference => "preference",
        }
    }
}

/// `fields`: what the records call things.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FieldNames {
    /// The field that holds the text of a record.
    #[schemars(extend("x-aliases" = ["axolotl: field", "mlx-lm: text_feature", "content"]))]
    pub text: String,
    /// What a completion follows.
    #[schemars(extend("x-aliases" = ["mlx-lm: prompt_feature", "question", "query"]))]
    pub prompt: String,
    /// The completion.
    #[schemars(extend("x-aliases" = ["mlx-lm: completion_feature", "answer"]))]
    pub completion: String,
    /// What alpaca rows ask for.
    #[schemars(extend("x-aliases" = ["axolotl: field_instruction"]))]
    pub instruction: String,
    /// What they ask it of; may be absent.
    #[schemars(extend("x-aliases" = ["axolotl: field_input"]))]
    pub input: String,
    /// The answer.
    #[schemars(extend("x-aliases" = ["axolotl: field_output", "response"]))]
    pub output: String,
    /// Earlier pairs of instruction and answer; may be absent.
    pub history: String,
    /// The list of messages.
    #[schemars(extend("x-aliases" = ["axolotl: field_messages", "mlx-lm: chat_feature"]))]
    pub messages: String,
    /// Who says a message.
    #[schemars(extend("x-aliases" = ["axolotl: message_field_role", "LLaMA-Factory: role_tag"]))]
    pub role: String,
    /// What a message says.
    #[schemars(extend("x-aliases" = ["axolotl: message_field_content", "LLaMA-Factory: content_tag"]))]
    pub content: String,
    /// The list of turns of sharegpt rows.
    pub conversations: String,
    /// Who says a turn.
    pub from: String,
    /// What a turn says.
    pub value: String,
    /// A system message beside alpaca and sharegpt rows; may be absent.
    #[schemars(extend("x-aliases" = ["axolotl: field_system"]))]
    pub system: String,
    /// The functions that the assistant can call; may be absent.
    #[schemars(extend("x-aliases" = ["axolotl: field_tools"]))]
    pub tools: String,
    /// The better answer of a preference pair.
    #[schemars(extend("x-aliases" = ["axolotl: field_chosen"]))]
    pub chosen: String,
    /// The worse answer.
    #[schemars(extend("x-aliases" = ["axolotl: field_rejected"]))]
    pub rejected: String,
}

impl FieldNames {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Every name with the key that sets it.
    pub fn all(&self) -> [(&'static str, &str); 17] {
        [
            ("text", &self.text),
            ("prompt", &self.prompt),
            ("completion", &self.completion),
            ("instruction", &self.instruction),
            ("input", &self.input),
            ("output", &self.output),
            ("history", &self.history),
            ("messages", &self.messages),
            ("role", &self.role),
            ("content", &self.content),
            ("conversations", &self.conversations),
            ("from", &self.from),
            ("value", &self.value),
            ("system", &self.system),
            ("tools", &self.tools),
            ("chosen", &self.chosen),
            ("rejected", &self.rejected),
        ]
    }
}

impl Default for FieldNames {
    fn default() -> Self {
        let name = |name: &str| name.to_string();
        Self {
            text: name("text"),
            prompt: name("prompt"),
            completion: name("completion"),
            instruction: name("instruction"),
            input: name("input"),
            output: name("output"),
            history: name("history"),
            messages: name("messages"),
            role: name("role"),
            content: name("content"),
            conversations: name("conversations"),
            from: name("from"),
            value: name("value"),
            system: name("system"),
            tools: name("tools"),
            chosen: name("chosen"),
            rejected: name("rejected"),
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
