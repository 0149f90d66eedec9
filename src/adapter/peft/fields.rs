//! The fields of adapter_config.json.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::CONFIG;
use crate::adapter::AdapterError;
use crate::config::whole;

/// No adapter_config.json comes near this.
const MAX_BYTES: u64 = 1 << 20;

/// Fields that are honoured.
const READ: [&str; 10] = [
    "peft_type",
    "bias",
    "lora_bias",
    "base_model_name_or_path",
    "lora_alpha",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "ensure_weight_tying",
];

/// Fields that say which modules have tensors, and of which shapes: the file has them.
const TOLD_BY_TENSORS: [&str; 7] = [
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "r",
    "rank_pattern",
];

/// Fields of how it was trained, and of what it began as where that has left the base model alone.
const BEFORE: [&str; 5] = [
    "lora_dropout",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
];

/// Fields of what reads or wrote the file, and settings of features that other fields turn on.
const OTHERS: [&str; 10] = [
    "task_type",
    "peft_version",
    "revision",
    "inference_mode",
    "auto_mapping",
    "runtime_config",
    // How the base model's files lie, which are read as their family has them.
    "fan_in_fan_out",
    // Parallel layers of a library, where there are any.
    "megatron_config",
    "megatron_core",
    // With `use_qalora`, which is refused.
    "qalora_group_size",
];

/// Values of `init_lora_weights` that leave the base model as it is, besides true, false and null.
const KEEPS_BASE: [&str; 3] = ["gaussian", "orthogonal", "eva"];

/// The fields of adapter_config.json.
pub(super) struct Fields {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Fields {
    /// Those of an adapter folder.
    pub(super) fn read(folder: &Path) -> Result<Self, AdapterError> {
        let path = folder.join(CONFIG);
        if !path.is_file() {
            return Err(AdapterError::NotAnAdapter {
                path: folder.to_path_buf(),
                missing: CONFIG,
            });
        }
        let size = fs::metadata(&path).map_err(AdapterError::io(&path))?.len();
        if size > MAX_BYTES {
            let kind = std::io::ErrorKind::FileTooLarge;
            return Err(AdapterError::io(path)(kind.into()));
        }
        let bytes = fs::read(&path).map_err(AdapterError::io(&path))?;
        match serde_json::from_slice(&bytes) {
            Ok(fields) => Ok(Self { path, fields }),
            Err(source) => Err(AdapterError::Json { path, source }),
        }
    }

    /// That nothing is asked for which would be left out.
    pub(super) fn check(&self) -> Result<(), AdapterError> {
        if self.text("peft_type") != Some("LORA") {
            return Err(self.unsupported("peft_type"));
        }
        if !matches!(self.text("bias"), None | Some("none")) {
            return Err(self.unsupported("bias"));
        }
        if self.truth("lora_bias")? {
            return Err(self.unsupported("lora_bias"));
        }
        self.check_beginning()?;
        let says_nothing = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            _ => false,
        };
        let known = |name: &str| {
            [&READ[..], &TOLD_BY_TENSORS, &BEFORE, &OTHERS]
                .concat()
                .contains(&name)
        };
        let mut fields = self.fields.iter();
        match fields.find(|(name, value)| !known(name) && !says_nothing(value)) {
            Some((name, _)) => Err(self.unsupported(name)),
            None => Ok(()),
        }
    }

    /// What an adapter began as says nothing about what it computes, unless the beginning was taken
    /// out of the base model's weights: then it is one for what was left of them, and PEFT takes it out
    /// again whenever it loads the adapter.
    fn check_beginning(&self) -> Result<(), AdapterError> {
        const NAME: &str = "init_lora_weights";
        let keeps_base = match self.fields.get(NAME) {
            None | Some(Value::Null | Value::Bool(_)) => true,
            Some(Value::String(name)) => KEEPS_BASE.contains(&name.to_lowercase().as_str()),
            Some(_) => false,
        };
        match keeps_base {
            true => Ok(()),
            false => Err(self.unsupported(NAME)),
        }
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.fields.get(name)?.as_str()
    }

    /// False where it is absent.
    pub(super) fn truth(&self, name: &str) -> Result<bool, AdapterError> {
        match self.fields.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(truth)) => Ok(*truth),
            Some(_) => Err(self.unsupported(name)),
        }
    }

    /// In training; what is read is there to be used, or to be trained on with a share of its own.
    pub(super) fn dropout(&self) -> f64 {
        let share = self.fields.get("lora_dropout").and_then(Value::as_f64);
        share.unwrap_or(0.0).clamp(0.0, 0.99)
    }

    pub(super) fn number(&self, name: &str) -> Result<f64, AdapterError> {
        let value = self.fields.get(name).and_then(Value::as_f64);
        value
            .filter(|value| value.is_finite())
            .ok_or_else(|| self.unsupported(name))
    }

    /// The keys of a pattern are regular expressions for the end of a module's name. In the order of
    /// the file: the first that matches counts.
    pub(super) fn patterns(&self, name: &str) -> Result<Vec<(regex::Regex, f64)>, AdapterError> {
        let Some(Value::Object(entries)) = self.fields.get(name) else {
            return Ok(Vec::new());
        };
        let read = entries.iter().map(|(pattern, value)| {
            let pattern = whole(&format!(r"(?:.*\.)?(?:{pattern})")).ok();
            let value = value.as_f64().filter(|value| value.is_finite());
            pattern.zip(value).ok_or_else(|| self.unsupported(name))
        });
        read.collect()
    }

    fn unsupported(&self, name: &str) -> AdapterError {
        let value = self.fields.get(name).unwrap_or(&Value::Null);
        AdapterError::Unsupported {
            path: self.path.clone(),
            field: name.to_string(),
            value: value.to_string().chars().take(80).collect(),
        }
    }
}
