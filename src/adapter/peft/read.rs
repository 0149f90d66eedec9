//! Reading an adapter folder.

use std::path::{Path, PathBuf};

use burn::tensor::TensorData;

use super::fields::Fields;
use super::{OWN_BASE, PREFIX, WEIGHTS, dims};
use crate::adapter::{Adapter, AdapterError, LayerUpdate};
use crate::config::{DecoderSpec, lora_scale};
use crate::model::Tensors;
use crate::model::folder::{
    CONFIG as MODEL_CONFIG, FileLinear, file_linears, read_float_tensors, some_own_tensors,
    transpose,
};

impl Adapter {
    /// Reads an adapter folder for a base model.
    ///
    /// # Errors
    /// A missing or malformed file; a field that cannot be honoured; a tensor that is missing, does
    /// not fit the base model, or holds a value that is not finite.
    pub fn read(folder: &Path, spec: &DecoderSpec) -> Result<Self, AdapterError> {
        let config = Config::read(folder)?;
        let mut tensors = read_weights(folder)?;
        let mut adapter = Self {
            dropout: config.dropout,
            ..Self::default()
        };
        for module in file_linears(spec) {
            config.take_module(&module, &mut tensors, &mut adapter)?;
        }
        // Under the names of files until here.
        adapter.replaced = some_own_tensors(spec, &mut adapter.replaced)?;
        if spec.shape.tie_word_embeddings {
            config.take_tied_head(&mut tensors)?;
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
}

/// The tensors of adapter_model.safetensors, by their names without [`PREFIX`].
fn read_weights(folder: &Path) -> Result<Tensors, AdapterError> {
    let path = folder.join(WEIGHTS);
    if !path.exists() {
        return Err(AdapterError::NotAnAdapter {
            path: folder.to_path_buf(),
            missing: WEIGHTS,
        });
    }
    let mut tensors = Tensors::new();
    for (name, data) in read_float_tensors(&path)? {
        if let Some(value) = data.iter::<f32>().find(|value| !value.is_finite()) {
            return Err(AdapterError::NotFinite { name, value });
        }
        match name.strip_prefix(PREFIX) {
            Some(bare) => tensors.insert(bare.to_string(), data),
            None => return Err(AdapterError::Unexpected { name }),
        };
    }
    Ok(tensors)
}

/// The folder or name of the base model that an adapter says it is for. One that belongs to the
/// adapter alone is found in the adapter's folder, wherever that has been moved or copied to.
///
/// # Errors
/// As [`Adapter::read`], of adapter_config.json.
pub fn base_model(folder: &Path) -> Result<Option<PathBuf>, AdapterError> {
    let Some(base) = Config::read(folder)?.base else {
        return Ok(None);
    };
    let own = folder.join(OWN_BASE);
    let is_own = base.ends_with(OWN_BASE) && own.join(MODEL_CONFIG).is_file();
    Ok(Some(if is_own { own } else { base }))
}

/// What adapter_config.json says.
struct Config {
    base: Option<PathBuf>,
    alpha: f64,
    alphas: Vec<(regex::Regex, f64)>,
    use_rslora: bool,
    use_dora: bool,
    ensures_tying: bool,
    dropout: f64,
}

impl Config {
    fn read(folder: &Path) -> Result<Self, AdapterError> {
        let fields = Fields::read(folder)?;
        fields.check()?;
        Ok(Self {
            base: fields.text("base_model_name_or_path").map(PathBuf::from),
            alpha: fields.number("lora_alpha")?,
            alphas: fields.patterns("alpha_pattern")?,
            use_rslora: fields.truth("use_rslora")?,
            use_dora: fields.truth("use_dora")?,
            ensures_tying: fields.truth("ensure_weight_tying")?,
            dropout: fields.dropout(),
        })
    }

    /// PEFT saves a copy of a tied head where it was asked to keep both alike, and where it was not
    /// it has taken them apart: then the head stays as it was, which one matrix cannot.
    fn take_tied_head(&self, tensors: &mut Tensors) -> Result<(), AdapterError> {
        let embedding = tensors.keys().find(|name| {
            let is_embedding = |leaf| name.ends_with(leaf);
            ["embed_tokens.weight", "wte.weight"]
                .into_iter()
                .any(is_embedding)
        });
        let Some(embedding) = embedding.cloned() else {
            return Ok(());
        };
        let head = tensors.get("lm_head.weight");
        let same = head.is_none_or(|head| *head == tensors[&embedding]);
        if !(self.ensures_tying && same) {
            return Err(AdapterError::Unties {
                name: format!("{PREFIX}{embedding}"),
            });
        }
        tensors.remove("lm_head.weight");
        Ok(())
    }

    /// Takes the tensors of a module, if it has any, and adds the updates of our layers in it.
    fn take_module(
        &self,
        module: &FileLinear,
        tensors: &mut Tensors,
        adapter: &mut Adapter,
    ) -> Result<(), AdapterError> {
        let name = |leaf: &str| format!("{}.{leaf}", module.name);
        let weight = tensors.remove(&name("base_layer.weight"));
        let (a_name, b_name) = (name("lora_A.weight"), name("lora_B.weight"));
        let (a, b) = match (tensors.remove(&a_name), tensors.remove(&b_name)) {
            (None, None) => match weight {
                Some(_) => return Err(missing(&a_name)),
                None => return Ok(()),
            },
            (Some(a), Some(b)) => (a, b),
            (None, _) => return Err(missing(&a_name)),
            (_, None) => return Err(missing(&b_name)),
        };
        let length_name = name("lora_magnitude_vector");
        let magnitude = tensors.remove(&length_name);
        let outputs: usize = module.parts.iter().map(|(_, width)| width).sum();
        let inputs = module.inputs;
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
        if let Some(weight) = weight {
            adapter.replaced.insert(name("weight"), weight);
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
