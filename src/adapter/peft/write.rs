//! Writing an adapter folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::TensorData;
use serde_json::{Map, Value, json};

use super::{CONFIG, PREFIX, WEIGHTS, dims, leaf};
use crate::adapter::{Adapter, AdapterError, LayerUpdate};
use crate::config::{AdapterPlan, Architecture, DecoderSpec, SaveDtype, lora_scale};
use crate::durable;
use crate::model::Tensors;
use crate::model::folder::{
    FileLinear, file_linears, some_file_tensors, transpose, write_tensors_as,
};

/// How an adapter folder is written.
#[derive(Debug, Clone, Copy)]
pub struct PeftOptions<'a> {
    /// Where the base model is.
    pub base: &'a Path,
    /// Whether scales are written as lora_alpha / sqrt(r).
    pub use_rslora: bool,
    /// Number format of the weights.
    pub dtype: SaveDtype,
}

impl<'a> PeftOptions<'a> {
    /// In f32, with scales as lora_alpha / r.
    pub fn new(base: &'a Path) -> Self {
        Self {
            base,
            use_rslora: false,
            dtype: SaveDtype::F32,
        }
    }
}

impl Adapter {
    /// Writes an adapter folder: weights, then config, each file replaced atomically.
    ///
    /// # Errors
    /// [`AdapterError::NotWritable`] for what this form has no place for;
    /// [`OutOfRange`](crate::model::ModelError::OutOfRange) for a weight that the format cannot hold;
    /// the file system's.
    pub fn write(
        &self,
        folder: &Path,
        spec: &DecoderSpec,
        options: &PeftOptions,
    ) -> Result<(), AdapterError> {
        let mut tensors = Tensors::new();
        let mut modules = Vec::new();
        let mut own = self.replaced.clone();
        let mut of_layers = some_file_tensors(spec, &mut own);
        for module in file_linears(spec) {
            let Some(update) = self.fused(&module)? else {
                continue;
            };
            let name = |leaf: &str| format!("{PREFIX}{}.{leaf}", module.name);
            tensors.insert(name("lora_A.weight"), turned(&update.a));
            tensors.insert(name("lora_B.weight"), turned(&update.b));
            if let Some(magnitude) = &update.magnitude {
                tensors.insert(name("lora_magnitude_vector"), magnitude.clone());
            }
            if let Some(weight) = of_layers.remove(&format!("{}.weight", module.name)) {
                tensors.insert(name("base_layer.weight"), weight);
            }
            modules.push((module.name, update));
        }
        let mut saved = self.saved.clone();
        let whole = some_file_tensors(spec, &mut saved);
        own.extend(saved);
        own.extend(of_layers);
        self.check_all_has_a_place(spec, &modules, &own)?;
        let names: BTreeSet<String> = whole
            .keys()
            .filter_map(|name| Some(name.rsplit_once('.')?.0.to_string()))
            .collect();
        let whole = whole.into_iter();
        tensors.extend(whole.map(|(name, data)| (format!("{PREFIX}{name}"), data)));
        let config = self.config(spec, options, (&modules, &names));
        write_tensors_as(&folder.join(WEIGHTS), &tensors, options.dtype)?;
        let path = folder.join(CONFIG);
        durable::replace_with(&path, format!("{config:#}\n")).map_err(AdapterError::io(&path))
    }

    /// `left` are the parameters of whole modules that no tensor of the files holds.
    fn check_all_has_a_place(
        &self,
        spec: &DecoderSpec,
        modules: &[(String, LayerUpdate)],
        left: &Tensors,
    ) -> Result<(), AdapterError> {
        let layers: BTreeSet<String> = file_linears(spec)
            .into_iter()
            .flat_map(|module| module.parts.into_iter().map(|(path, _)| path))
            .collect();
        let foreign = self.layers.keys().find(|path| !layers.contains(*path));
        if let Some(path) = foreign.or(left.keys().next()) {
            return Err(not_writable(format!(
                "the base model's files have no place for {path}"
            )));
        }
        let mut kinds = modules.iter().map(|(_, update)| update.magnitude.is_some());
        let first = kinds.next();
        match kinds.all(|kind| Some(kind) == first) {
            true => Ok(()),
            false => Err(not_writable(
                "some layers have lengths (DoRA) and others have none (LoRA)".to_string(),
            )),
        }
    }

    /// The update of a module of files; none where no layer in it has one.
    fn fused(&self, module: &FileLinear) -> Result<Option<LayerUpdate>, AdapterError> {
        let parts: Vec<(Option<&LayerUpdate>, usize)> = module
            .parts
            .iter()
            .map(|(path, width)| (self.layers.get(path), *width))
            .collect();
        let Some(first) = parts.iter().find_map(|(update, _)| *update) else {
            return Ok(None);
        };
        if let [(Some(update), _)] = parts.as_slice() {
            return Ok(Some((*update).clone()));
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
        Ok(Some(LayerUpdate {
            a: TensorData::new(a, [inputs, rank]),
            b: TensorData::new(b, [rank, outputs]),
            magnitude: lengths(&module.name, &parts, outputs)?,
            scale: first.scale,
        }))
    }

    fn config(
        &self,
        spec: &DecoderSpec,
        options: &PeftOptions,
        (modules, saved): (&[(String, LayerUpdate)], &BTreeSet<String>),
    ) -> Value {
        let use_rslora = options.use_rslora;
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
        let has_embedding = saved
            .iter()
            .any(|name| matches!(leaf(name), "embed_tokens" | "wte"));
        let saved: Vec<&str> = saved.iter().map(String::as_str).collect();
        json!({
            "alpha_pattern": alphas,
            "auto_mapping": null,
            "base_model_name_or_path": options.base,
            "bias": "none",
            // A tied head goes with the embedding.
            "ensure_weight_tying": spec.shape.tie_word_embeddings && has_embedding,
            "fan_in_fan_out": spec.shape.architecture == Architecture::Gpt2,
            "inference_mode": true,
            // The base model is the one that is named: nothing has to be taken out of its weights.
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

/// DoRA's lengths of a module of files, which has one for every output; none without DoRA.
fn lengths(
    name: &str,
    parts: &[(Option<&LayerUpdate>, usize)],
    outputs: usize,
) -> Result<Option<TensorData>, AdapterError> {
    let own = parts
        .iter()
        .map(|(update, _)| update.and_then(|update| update.magnitude.as_ref()));
    let known: Vec<&TensorData> = own.flatten().collect();
    if known.is_empty() {
        return Ok(None);
    }
    if known.len() < parts.len() {
        return Err(not_writable(format!(
            "{name} is one module in the base model's files, and only a part of it has lengths (DoRA)"
        )));
    }
    let values: Vec<f32> = known.iter().flat_map(|data| data.iter::<f32>()).collect();
    Ok(Some(TensorData::new(values, [outputs])))
}

/// Numbers in the file that [`Adapter::write`] makes of the updates of a plan, whose rank is twice as
/// large where `doubled`. Where files fuse layers it has more of them than the updates have.
pub(crate) fn written_numbers(plan: &AdapterPlan, spec: &DecoderSpec, doubled: bool) -> u64 {
    let of_module = |module: FileLinear| {
        let parts = module.parts.iter();
        let shapes = parts.filter_map(|(path, _)| plan.layers.get(path));
        let rank: usize = shapes.clone().map(|shape| shape.rank).sum();
        let rank = if doubled { 2 * rank } else { rank };
        let outputs: usize = module.parts.iter().map(|(_, width)| width).sum();
        let lengths = shapes.clone().any(|shape| shape.magnitude);
        let lengths = if lengths { outputs } else { 0 };
        let any = rank > 0;
        if any {
            (rank * (module.inputs + outputs) + lengths) as u64
        } else {
            0
        }
    };
    file_linears(spec).into_iter().map(of_module).sum()
}

fn not_writable(reason: String) -> AdapterError {
    AdapterError::NotWritable { reason }
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

/// Whole numbers are written without a point, as PEFT does.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

/// `[rows, cols]` -> `[cols, rows]`.
fn turned(data: &TensorData) -> TensorData {
    let dims = dims(data);
    let values: Vec<f32> = data.iter::<f32>().collect();
    TensorData::new(transpose(&values, dims[0], dims[1]), [dims[1], dims[0]])
}
