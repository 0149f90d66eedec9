//! An adapter on the host: taken from a model, put onto one, mixed with others.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};

use super::AdapterError;
use crate::config::{AdapterInit, AdapterPlan, LoraShape};
use crate::device::read_now;
use crate::model::{Decoder, Tensors, VisitParameters, with_some_parameters};

/// What a run with an adapter has learned.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Adapter {
    /// Low-rank updates by the path of the layer: `layers.0.self_attn.q_proj`.
    pub layers: BTreeMap<String, LayerUpdate>,
    /// Parameters of modules that were trained whole, by path.
    pub saved: Tensors,
    /// Weights of adapted layers that came with the adapter, by the path of the parameter: they take
    /// the place of the base model's. PEFT saves those of the output head.
    pub replaced: Tensors,
    /// Share of the inputs that was dropped in training.
    pub dropout: f64,
}

/// The low-rank update of one layer: scale x A B is added to its weights `[in, out]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerUpdate {
    /// A, `[in, r]` f32.
    pub a: TensorData,
    /// B, `[r, out]` f32.
    pub b: TensorData,
    /// DoRA's length of each output's weights, `[out]` f32.
    pub magnitude: Option<TensorData>,
    /// What A B is multiplied by.
    pub scale: f64,
}

impl LayerUpdate {
    /// r.
    pub fn rank(&self) -> usize {
        self.a.shape().as_slice()[1]
    }

    /// `[in, out]` of the layer that it is for.
    fn outside(&self) -> [usize; 2] {
        [self.a.shape().as_slice()[0], self.b.shape().as_slice()[1]]
    }

    fn shape(&self, dropout: f64) -> LoraShape {
        LoraShape {
            rank: self.rank(),
            scale: self.scale,
            dropout,
            magnitude: self.magnitude.is_some(),
        }
    }
}

impl Adapter {
    /// What `model` has in the way of adapters and modules that are trained whole.
    pub fn of(model: &Decoder) -> Self {
        let tensors = saved_tensors(model);
        let shapes = model.adapter_shapes();
        Self::from_tensors(&shapes, tensors)
    }

    /// Makes an adapter from the tensors that [`saved_tensors`] returned and the shapes of its
    /// layers.
    pub(crate) fn from_tensors(shapes: &BTreeMap<String, LoraShape>, mut tensors: Tensors) -> Self {
        let mut layers = BTreeMap::new();
        for (path, shape) in shapes {
            let mut part = |name: &str| tensors.remove(&format!("{path}.adapter.{name}"));
            if let (Some(a), Some(b)) = (part("lora_a"), part("lora_b")) {
                let update = LayerUpdate {
                    a,
                    b,
                    magnitude: part("magnitude"),
                    scale: shape.scale,
                };
                layers.insert(path.clone(), update);
            }
        }
        Self {
            layers,
            saved: tensors,
            replaced: Tensors::new(),
            dropout: shapes.values().next().map_or(0.0, |shape| shape.dropout),
        }
    }

    /// Puts this adapter onto a base model, in the place of any it has; it can go on being trained.
    ///
    /// # Errors
    /// A layer or module that the model does not have, or that has another shape.
    pub fn attach(&self, model: Decoder) -> Result<Decoder, AdapterError> {
        let shape =
            |(path, update): (&String, &LayerUpdate)| (path.clone(), update.shape(self.dropout));
        let module = |path: &String| {
            path.rsplit_once('.')
                .map_or(path.as_str(), |(m, _)| m)
                .to_string()
        };
        let mut saved: Vec<String> = self.saved.keys().map(module).collect();
        saved.dedup();
        let plan = AdapterPlan {
            layers: self.layers.iter().map(shape).collect(),
            saved,
            init: AdapterInit::Default,
            loftq_iterations: 1,
            lora_plus_ratio: 1.0,
        };
        let device = model.device();
        // What is drawn is replaced at once.
        let model = model.adapted(&plan, 0)?;
        self.load(model, &device)
    }

    /// Puts these weights in the place of the adapters of a model that has the same.
    pub(crate) fn load(&self, model: Decoder, device: &Device) -> Result<Decoder, AdapterError> {
        Ok(with_some_parameters(model, self.tensors(), device)?)
    }

    /// By the paths of the parameters.
    pub(crate) fn tensors(&self) -> Tensors {
        let mut tensors = self.saved.clone();
        tensors.extend(self.replaced.clone());
        for (path, update) in &self.layers {
            let mut put = |name: &str, data: &TensorData| {
                tensors.insert(format!("{path}.adapter.{name}"), data.clone());
            };
            put("lora_a", &update.a);
            put("lora_b", &update.b);
            if let Some(magnitude) = &update.magnitude {
                put("magnitude", magnitude);
            }
        }
        tensors
    }

    /// Whether it changes nothing: no B has a value other than zero, and nothing was trained whole.
    pub fn is_untrained(&self) -> bool {
        let zero = |data: &TensorData| data.iter::<f32>().all(|value| value == 0.0);
        self.saved.is_empty() && self.layers.values().all(|update| zero(&update.b))
    }

    /// The adapter whose update is the weighted sum of those of others: their A side by side, and
    /// their B one under the other, each times its weight. Its rank is the sum of their ranks.
    ///
    /// # Errors
    /// [`AdapterError::NotMixable`] for none at all, for a weight that is not finite, for DoRA, whose
    /// lengths do not add up, for modules that were trained whole in one of several, and for adapters
    /// of different base models.
    pub fn mix(parts: &[(&Adapter, f64)]) -> Result<Self, AdapterError> {
        if parts.is_empty() {
            return not_mixable("there is none".to_string());
        }
        let mut mixed = Self::default();
        for (adapter, weight) in parts {
            adapter.check_mixable(*weight)?;
            for (path, data) in &adapter.replaced {
                let other = mixed.replaced.insert(path.clone(), data.clone());
                if other.is_some_and(|other| other != *data) {
                    return not_mixable(format!("two of them have {path}, and not the same"));
                }
            }
            for (path, update) in &adapter.layers {
                let scaled = weighted(update, *weight);
                let sum = match mixed.layers.remove(path) {
                    Some(sum) if sum.outside() != scaled.outside() => {
                        return not_mixable(format!(
                            "{path} is {:?} in one and {:?} in another",
                            sum.outside(),
                            scaled.outside()
                        ));
                    }
                    Some(sum) => beside(&sum, &scaled),
                    None => scaled,
                };
                mixed.layers.insert(path.clone(), sum);
            }
        }
        Ok(mixed)
    }

    /// Whether it has a share in a sum by itself.
    fn check_mixable(&self, weight: f64) -> Result<(), AdapterError> {
        if !weight.is_finite() {
            return not_mixable(format!("a weight of {weight}"));
        }
        if !self.saved.is_empty() {
            let reason = "a module that was trained whole (modules_to_save) is not an update";
            return not_mixable(reason.to_string());
        }
        for (path, update) in &self.layers {
            if update.magnitude.is_some() {
                return not_mixable("DoRA's lengths of weights do not add up".to_string());
            }
            let (a, b) = (update.a.shape().as_slice(), update.b.shape().as_slice());
            let fits = matches!((a, b), ([_, inner], [outer, _]) if inner == outer);
            if !fits {
                return not_mixable(format!("{path} has A {a:?} and B {b:?}"));
            }
        }
        Ok(())
    }
}

fn not_mixable<T>(reason: String) -> Result<T, AdapterError> {
    Err(AdapterError::NotMixable { reason })
}

/// Collects the tensors that a checkpoint stores of an adapted model: the parameters of the
/// adapters and of the modules that are trained in full, by parameter path.
pub(crate) fn saved_tensors(model: &Decoder) -> Tensors {
    struct Collect(Tensors);
    impl VisitParameters for Collect {
        fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            let value = read_now(param.val().into_data());
            self.0.insert(path.to_string(), value);
        }
    }
    let mut collect = Collect(Tensors::new());
    model.visit_saved(&mut collect);
    collect.0
}

/// The same update times `weight`, with the scale in B.
fn weighted(update: &LayerUpdate, weight: f64) -> LayerUpdate {
    let factor = (update.scale * weight) as f32;
    let b: Vec<f32> = update.b.iter::<f32>().map(|value| value * factor).collect();
    LayerUpdate {
        a: update.a.clone(),
        b: TensorData::new(b, update.b.shape().clone()),
        magnitude: None,
        scale: 1.0,
    }
}

/// The update whose product is the sum of those of `left` and `right`, both of scale 1.
fn beside(left: &LayerUpdate, right: &LayerUpdate) -> LayerUpdate {
    let dims = |data: &TensorData| [data.shape().as_slice()[0], data.shape().as_slice()[1]];
    let ([inputs, r1], [_, r2]) = (dims(&left.a), dims(&right.a));
    let values = |data: &TensorData| data.iter::<f32>().collect::<Vec<_>>();
    let (la, ra) = (values(&left.a), values(&right.a));
    let rows = la.chunks(r1.max(1)).zip(ra.chunks(r2.max(1)));
    let a: Vec<f32> = rows.flat_map(|(l, r)| [l, r].concat()).collect();
    let b = [values(&left.b), values(&right.b)].concat();
    LayerUpdate {
        a: TensorData::new(a, [inputs, r1 + r2]),
        b: TensorData::new(b, [r1 + r2, dims(&left.b)[1]]),
        magnitude: None,
        scale: 1.0,
    }
}
