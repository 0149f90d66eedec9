//! Adapter folders as Hugging Face's PEFT writes and reads them: adapter_config.json and
//! adapter_model.safetensors.
//!
//! Tensors are `base_model.model.<module>.lora_A.weight` `[r, in]`, `.lora_B.weight` `[out, r]` and
//! `.lora_magnitude_vector` `[out]`, where a module is named as the base model's files name it.
//! Where files fuse several of our layers into one module (phi3, gpt2), its update is one as well:
//! the A of the parts one under the other, and the B of each where its outputs are. The update is
//! the same; its rank is the sum of theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use serde_json::{Map, Value, json};

use super::{Adapter, AdapterError, LayerUpdate};
use crate::config::{Architecture, DecoderSpec, lora_scale, whole};
use crate::durable;
use crate::model::Tensors;
use crate::model::folder::{
    FileLinear, file_linears, read_float_tensors, some_file_tensors, some_own_tensors, transpose,
    write_tensors,
};

/// The file name of what an adapter is.
pub const CONFIG: &str = "adapter_config.json";
/// The file name of its weights.
pub const WEIGHTS: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";

/// No adapter_config.json comes near this.
const MAX_BYTES: u64 = 1 << 20;

/// Fields that say nothing about what the adapter computes once it is there: how it began, how it
/// was trained, which tool wrote it.
const HARMLESS: [&str; 32] = [
    "task_type",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "peft_type",
    "bias",
    "lora_bias",
];

impl Adapter {
    /// Reads an adapter folder for a base model.
    ///
    /// # Errors
    /// A missing or malformed file; a field that cannot be honoured; a tensor that is missing, does
    /// not fit the base model, or holds a value that is not finite.
    pub fn read(folder: &Path, spec: &DecoderSpec) -> Result<Self, AdapterError> {
        let config = Config::read(folder)?;
        let weights = folder.join(WEIGHTS);
        if !weights.exists() {
            return Err(AdapterError::NotAnAdapter {
                path: folder.to_path_buf(),
                missing: WEIGHTS,
            });
        }
        let mut tensors = Tensors::new();
        for (name, data) in read_float_tensors(&weights)? {
            if let Some(value) = data.iter::<f32>().find(|value| !value.is_finite()) {
                return Err(AdapterError::NotFinite { name, value });
            }
            match name.strip_prefix(PREFIX) {
                Some(bare) => tensors.insert(bare.to_string(), data),
                None => return Err(AdapterError::Unexpected { name }),
            };
        }
        let mut adapter = Self {
            dropout: config.dropout,
            ..Self::default()
        };
        for module in file_linears(spec) {
            config.take_module(&module, spec, &mut tensors, &mut adapter)?;
        }
        // What is left was trained whole.
        adapter.saved = some_own_tensors(spec, &mut tensors)?;
        match tensors.into_keys().next() {
            Some(name) => Err(AdapterError::Unexpected {
                name: format!("{PREFIX}{name}"),
            }),
            None => Ok(adapter),
        }
    }

    /// Writes an adapter folder: weights, then config, each file replaced atomically. `base` is where
    /// the base model is.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(
        &self,
        folder: &Path,
        spec: &DecoderSpec,
        base: &Path,
        use_rslora: bool,
    ) -> Result<(), AdapterError> {
        let mut tensors = Tensors::new();
        let mut modules = Vec::new();
        for module in file_linears(spec) {
            let Some(update) = self.fused(&module) else {
                continue;
            };
            let name = |leaf: &str| format!("{PREFIX}{}.{leaf}", module.name);
            tensors.insert(name("lora_A.weight"), turned(&update.a));
            tensors.insert(name("lora_B.weight"), turned(&update.b));
            if let Some(magnitude) = &update.magnitude {
                tensors.insert(name("lora_magnitude_vector"), magnitude.clone());
            }
            modules.push((module.name, update));
        }
        let mut saved = self.saved.clone();
        let whole = some_file_tensors(spec, &mut saved);
        let names: BTreeSet<String> = whole
            .keys()
            .filter_map(|name| Some(name.rsplit_once('.')?.0.to_string()))
            .collect();
        tensors.extend(
            whole
                .into_iter()
                .map(|(name, data)| (format!("{PREFIX}{name}"), data)),
        );
        let config = self.config(spec, base, use_rslora, (&modules, &names));
        write_tensors(&folder.join(WEIGHTS), &tensors)?;
        let path = folder.join(CONFIG);
        durable::replace_with(&path, format!("{config:#}\n")).map_err(AdapterError::io(&path))
    }

    /// The update of a module of files; none where no layer in it has one.
    fn fused(&self, module: &FileLinear) -> Option<LayerUpdate> {
        let parts: Vec<(Option<&LayerUpdate>, usize)> = module
            .parts
            .iter()
            .map(|(path, width)| (self.layers.get(path), *width))
            .collect();
        let first = parts.iter().find_map(|(update, _)| *update)?;
        if let [(Some(update), _)] = parts.as_slice() {
            return Some((*update).clone());
        }
        let inputs = first.a.shape().as_slice()[0];
        let rank: usize = parts
            .iter()
            .flat_map(|(update, _)| update.map(LayerUpdate::rank))
            .sum();
        let outputs: usize = parts.iter().map(|(_, width)| width).sum();
        let (mut a, mut b) = (vec![0.0; inputs * rank], vec![0.0; rank * outputs]);
        let (mut at, mut column) = (0, 0);
        for (update, width) in &parts {
            if let Some(update) = update {
                let own = update.rank();
                let factor = (update.scale / first.scale) as f32;
                for (i, value) in update.a.iter::<f32>().enumerate() {
                    a[i / own * rank + at + i % own] = value;
                }
                for (i, value) in update.b.iter::<f32>().enumerate() {
                    b[(at + i / width) * outputs + column + i % width] = value * factor;
                }
                at += own;
            }
            column += width;
        }
        // DoRA needs a length for every output, and the plan gives the parts of a module adapters
        // together.
        let lengths: Option<Vec<&TensorData>> = parts
            .iter()
            .map(|(update, _)| update.and_then(|update| update.magnitude.as_ref()))
            .collect();
        let magnitude = lengths.map(|lengths| {
            let values: Vec<f32> = lengths
                .into_iter()
                .flat_map(|data| data.iter::<f32>())
                .collect();
            TensorData::new(values, [outputs])
        });
        Some(LayerUpdate {
            a: TensorData::new(a, [inputs, rank]),
            b: TensorData::new(b, [rank, outputs]),
            magnitude,
            scale: first.scale,
        })
    }

    fn config(
        &self,
        spec: &DecoderSpec,
        base: &Path,
        use_rslora: bool,
        (modules, saved): (&[(String, LayerUpdate)], &BTreeSet<String>),
    ) -> Value {
        let alpha =
            |update: &LayerUpdate| update.scale / lora_scale(1.0, update.rank(), use_rslora);
        let kinds: Vec<(&str, usize, f64)> = modules
            .iter()
            .map(|(name, update)| (name.as_str(), update.rank(), alpha(update)))
            .collect();
        let (r, lora_alpha) = most_common(&kinds);
        let ranks = patterns(&kinds, |&(_, rank, _)| (rank != r).then(|| json!(rank)));
        let alphas = patterns(&kinds, |&(_, _, a)| (a != lora_alpha).then(|| number(a)));
        let uses_dora = modules.iter().any(|(_, update)| update.magnitude.is_some());
        let saved: Vec<&str> = saved.iter().map(String::as_str).collect();
        json!({
            "alpha_pattern": alphas,
            "auto_mapping": null,
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": spec.shape.architecture == Architecture::Gpt2,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": number(lora_alpha),
            "lora_dropout": self.dropout,
            "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
            "peft_type": "LORA",
            "r": r,
            "rank_pattern": ranks,
            "revision": null,
            "target_modules": targets(spec, &kinds),
            "task_type": "CAUSAL_LM",
            "use_dora": uses_dora,
            "use_rslora": use_rslora,
        })
    }
}

/// The folder or name of the base model that an adapter says it is for.
///
/// # Errors
/// As [`Adapter::read`], of adapter_config.json.
pub fn base_model(folder: &Path) -> Result<Option<PathBuf>, AdapterError> {
    Ok(Config::read(folder)?.base)
}

/// What adapter_config.json says.
struct Config {
    base: Option<PathBuf>,
    alpha: f64,
    alphas: Vec<(regex::Regex, f64)>,
    use_rslora: bool,
    use_dora: bool,
    dropout: f64,
}

impl Config {
    fn read(folder: &Path) -> Result<Self, AdapterError> {
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
        let fields: Map<String, Value> =
            serde_json::from_slice(&bytes).map_err(|source| AdapterError::Json {
                path: path.clone(),
                source,
            })?;
        let fields = Fields { path, fields };
        fields.check()?;
        Ok(Self {
            base: fields.text("base_model_name_or_path").map(PathBuf::from),
            alpha: fields.number("lora_alpha")?,
            alphas: fields.patterns("alpha_pattern")?,
            use_rslora: fields.truth("use_rslora"),
            use_dora: fields.truth("use_dora"),
            dropout: fields
                .fields
                .get("lora_dropout")
                .and_then(Value::as_f64)
                .unwrap_or(0.0)
                .clamp(0.0, 0.99),
        })
    }

    /// Takes the tensors of a module, if it has any, and adds the updates of our layers in it.
    fn take_module(
        &self,
        module: &FileLinear,
        spec: &DecoderSpec,
        tensors: &mut Tensors,
        adapter: &mut Adapter,
    ) -> Result<(), AdapterError> {
        let name = |leaf: &str| format!("{}.{leaf}", module.name);
        let (a_name, b_name) = (name("lora_A.weight"), name("lora_B.weight"));
        let (a, b) = match (tensors.remove(&a_name), tensors.remove(&b_name)) {
            (None, None) => return Ok(()),
            (Some(a), Some(b)) => (a, b),
            (None, _) => return Err(missing(&a_name)),
            (_, None) => return Err(missing(&b_name)),
        };
        let length_name = name("lora_magnitude_vector");
        let magnitude = tensors.remove(&length_name);
        let outputs: usize = module.parts.iter().map(|(_, width)| width).sum();
        let inputs = inputs_of(module, spec);
        let (a_dims, b_dims) = (dims(&a), dims(&b));
        let rank = a_dims.first().copied().unwrap_or(0);
        if a_dims != [rank, inputs] || rank == 0 {
            return Err(shape(&a_name, format!("[r, {inputs}]"), a_dims));
        }
        if b_dims != [outputs, rank] {
            return Err(shape(&b_name, format!("[{outputs}, {rank}]"), b_dims));
        }
        if let Some(found) = magnitude
            .as_ref()
            .map(dims)
            .filter(|dims| *dims != [outputs])
        {
            return Err(shape(&length_name, format!("[{outputs}]"), found));
        }
        if magnitude.is_some() != self.use_dora {
            return Err(if self.use_dora {
                missing(&length_name)
            } else {
                AdapterError::Unexpected {
                    name: format!("{PREFIX}{length_name}"),
                }
            });
        }
        let alpha = self
            .alphas
            .iter()
            .find(|(pattern, _)| pattern.is_match(&module.name));
        let alpha = alpha.map_or(self.alpha, |(_, alpha)| *alpha);
        let scale = lora_scale(alpha, rank, self.use_rslora);
        let (a, b): (Vec<f32>, Vec<f32>) = (a.iter::<f32>().collect(), b.iter::<f32>().collect());
        let lengths: Option<Vec<f32>> = magnitude.map(|data| data.iter::<f32>().collect());
        let a = TensorData::new(transpose(&a, rank, inputs), [inputs, rank]);
        let mut row = 0;
        for (path, width) in &module.parts {
            let own = &b[row * rank..(row + width) * rank];
            let update = LayerUpdate {
                a: a.clone(),
                b: TensorData::new(transpose(own, *width, rank), [rank, *width]),
                magnitude: lengths
                    .as_ref()
                    .map(|lengths| TensorData::new(lengths[row..row + width].to_vec(), [*width])),
                scale,
            };
            adapter.layers.insert(path.clone(), update);
            row += width;
        }
        Ok(())
    }
}

/// The fields of adapter_config.json.
struct Fields {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Fields {
    /// That nothing is asked for which would be left out.
    fn check(&self) -> Result<(), AdapterError> {
        if self.text("peft_type") != Some("LORA") {
            return Err(self.unsupported("peft_type"));
        }
        if !matches!(self.text("bias"), None | Some("none")) {
            return Err(self.unsupported("bias"));
        }
        if self.truth("lora_bias") {
            return Err(self.unsupported("lora_bias"));
        }
        let says_nothing = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            _ => false,
        };
        let mut fields = self.fields.iter();
        let strange =
            fields.find(|(name, value)| !HARMLESS.contains(&name.as_str()) && !says_nothing(value));
        match strange {
            Some((name, _)) => Err(self.unsupported(name)),
            None => Ok(()),
        }
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.fields.get(name)?.as_str()
    }

    fn truth(&self, name: &str) -> bool {
        self.fields
            .get(name)
            .and_then(Value::as_bool)
            .unwrap_or(false)
    }

    fn number(&self, name: &str) -> Result<f64, AdapterError> {
        let value = self.fields.get(name).and_then(Value::as_f64);
        value
            .filter(|value| value.is_finite())
            .ok_or_else(|| self.unsupported(name))
    }

    /// The keys of a pattern are regular expressions for the end of a module's name.
    fn patterns(&self, name: &str) -> Result<Vec<(regex::Regex, f64)>, AdapterError> {
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

/// Rank and lora_alpha of the most modules; the first of several.
fn most_common(kinds: &[(&str, usize, f64)]) -> (usize, f64) {
    let same = |a: &(&str, usize, f64), b: &(&str, usize, f64)| (a.1, a.2) == (b.1, b.2);
    let count = |kind: &(&str, usize, f64)| kinds.iter().filter(|other| same(kind, other)).count();
    let first_of_most = kinds.iter().rev().max_by_key(|kind| count(kind));
    first_of_most.map_or((1, 1.0), |&(_, rank, alpha)| (rank, alpha))
}

/// The exceptions that `value` finds, by the last part of the module's name where all of that name
/// share it, else by the whole name.
fn patterns(
    kinds: &[(&str, usize, f64)],
    value: impl Fn(&(&str, usize, f64)) -> Option<Value>,
) -> Map<String, Value> {
    let mut found = BTreeMap::new();
    for kind in kinds {
        let Some(own) = value(kind) else { continue };
        let mut namesakes = kinds.iter().filter(|other| leaf(other.0) == leaf(kind.0));
        let shared = namesakes.all(|other| value(other).as_ref() == Some(&own));
        let key = if shared {
            leaf(kind.0).to_string()
        } else {
            regex::escape(kind.0)
        };
        found.insert(key, own);
    }
    found.into_iter().collect()
}

/// `target_modules`: the last parts of names where they name these modules and no others, else the
/// whole names.
fn targets(spec: &DecoderSpec, kinds: &[(&str, usize, f64)]) -> Vec<String> {
    let all = file_linears(spec);
    let adapted = |name: &str| kinds.iter().any(|kind| kind.0 == name);
    let mut targets = BTreeSet::new();
    for (name, ..) in kinds {
        let mut namesakes = all.iter().filter(|module| leaf(&module.name) == leaf(name));
        let exact = namesakes.all(|module| adapted(&module.name));
        targets.insert(if exact { leaf(name) } else { name }.to_string());
    }
    targets.into_iter().collect()
}

fn leaf(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Whole numbers are written without a point, as PEFT does.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

fn inputs_of(module: &FileLinear, spec: &DecoderSpec) -> usize {
    let layers = spec.shape.linear_layers(spec.vocab_size);
    let first = module.parts.first();
    let layer = layers
        .into_iter()
        .find(|layer| Some(&layer.path) == first.map(|(path, _)| path));
    layer.map_or(0, |layer| layer.dims[0])
}

fn dims(data: &TensorData) -> Vec<usize> {
    data.shape().as_slice().to_vec()
}

/// `[rows, cols]` -> `[cols, rows]`.
fn turned(data: &TensorData) -> TensorData {
    let dims = dims(data);
    let values: Vec<f32> = data.iter::<f32>().collect();
    TensorData::new(transpose(&values, dims[0], dims[1]), [dims[1], dims[0]])
}

fn missing(name: &str) -> AdapterError {
    AdapterError::Missing {
        name: format!("{PREFIX}{name}"),
    }
}

fn shape(name: &str, expected: String, found: Vec<usize>) -> AdapterError {
    AdapterError::Shape {
        name: format!("{PREFIX}{name}"),
        expected,
        found,
    }
}
