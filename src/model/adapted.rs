//! Adapters of a whole decoder: attached, taken off, told apart from what they adapt.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};

use super::decoder::Block;
use super::init::Init;
use super::linear::Linear;
use super::parameters::{MapParameters, VisitParameters, map_parameters, visit_parameters};
use super::{Decoder, ModelError};
use crate::config::{AdapterPlan, LoraShape, PackedLayout, PathSelector, Ternary};

/// Which parameters of a decoder are trained.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Trained {
    /// None if all parameters are trained. Otherwise only those of adapters and of the modules with
    /// these paths are trained.
    adapters: Option<Vec<String>>,
    /// Selectors of parameters that a phase freezes, whatever `adapters` says.
    frozen: Vec<PathSelector>,
}

impl Trained {
    pub(crate) fn contains(&self, path: &str) -> bool {
        self.is_saved(path) && !self.frozen.iter().any(|selector| selector.matches(path))
    }

    /// Whether a checkpoint holds the parameter, frozen or not.
    fn is_saved(&self, path: &str) -> bool {
        self.adapters.as_ref().is_none_or(|saved| {
            is_of_adapter(path) || saved.iter().any(|module| is_within(path, module))
        })
    }
}

/// Whether a parameter belongs to an adapter.
pub(crate) fn is_of_adapter(path: &str) -> bool {
    path.contains(".adapter.")
}

fn is_within(path: &str, module: &str) -> bool {
    let rest = path.strip_prefix(module);
    rest.is_some_and(|rest| rest.starts_with('.'))
}

impl Decoder {
    /// The same decoder with new adapters, a function of (plan, seed), in the place of any it has.
    /// They change nothing before they are trained, and only they and the modules that the plan
    /// saves are trained from now on. Ternary weights that were latent are packed.
    ///
    /// # Errors
    /// [`ModelError::NoLayer`] for a path of the plan that is no linear layer of this decoder.
    pub fn adapted(mut self, plan: &AdapterPlan, seed: u64) -> Result<Self, ModelError> {
        if let Some(Ternary { packed: None, .. }) = self.spec().shape.ternary {
            self = self.in_bits(PackedLayout::default());
        }
        // Freezing a parameter that is still to be drawn would freeze it in every clone.
        visit_parameters(&self, &mut Draw);
        let mut model = self.outlined(plan, seed)?;
        model.linears_mut().for_each(Linear::measure);
        Ok(model)
    }

    /// The same decoder with the adapters' parameters, whose shapes are right and whose values may
    /// not be: no weight is looked at. Clones of `self` whose weights are still to be drawn are frozen
    /// with it.
    ///
    /// # Errors
    /// As [`adapted`](Self::adapted).
    pub(crate) fn outlined(mut self, plan: &AdapterPlan, seed: u64) -> Result<Self, ModelError> {
        let init = Init::new(seed, &self.lazy_device());
        self.trained.adapters = Some(plan.saved.clone());
        let mut model = self.without_adapters().frozen();
        for (path, &shape) in &plan.layers {
            match model.linear_mut(path) {
                Some(layer) => layer.attach(&init, path, shape),
                None => return Err(ModelError::NoLayer { path: path.clone() }),
            }
        }
        Ok(model)
    }

    /// The base model alone: the same decoder without its adapters. Modules that were trained whole
    /// stay as they have become.
    pub fn without_adapters(mut self) -> Self {
        self.linears_mut().for_each(|layer| layer.adapter = None);
        self
    }

    /// The shapes of its adapters, by the path of the layer.
    pub(crate) fn adapter_shapes(&self) -> BTreeMap<String, LoraShape> {
        let mut shapes = BTreeMap::new();
        for layer in self.spec().shape.linear_layers(self.spec().vocab_size) {
            if let Some(adapter) = self.linear(&layer.path).and_then(|l| l.adapter.as_ref()) {
                shapes.insert(layer.path, adapter.shape());
            }
        }
        shapes
    }

    /// Whether any layer has an adapter.
    pub fn is_adapted(&self) -> bool {
        self.linears().any(|layer| layer.adapter.is_some())
    }

    /// Shows the parameters that are trained to `visitor`.
    pub(crate) fn visit_trained(&self, visitor: &mut impl VisitParameters) {
        self.visit_where(|path| self.trained.contains(path), visitor);
    }

    /// Shows `visitor` the parameters that a checkpoint holds: all of them, or, for a model with
    /// adapters, those that the base model does not have. They include the parameters that a phase
    /// freezes.
    pub(crate) fn visit_saved(&self, visitor: &mut impl VisitParameters) {
        self.visit_where(|path| self.trained.is_saved(path), visitor);
    }

    fn visit_where(&self, wanted: impl Fn(&str) -> bool, visitor: &mut impl VisitParameters) {
        struct Filter<'a, F, V> {
            wanted: F,
            inner: &'a mut V,
        }
        impl<F: Fn(&str) -> bool, V: VisitParameters> VisitParameters for Filter<'_, F, V> {
            fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
                if (self.wanted)(path) {
                    self.inner.visit(path, param);
                }
            }
        }
        let inner = visitor;
        visit_parameters(self, &mut Filter { wanted, inner });
    }

    /// How many weights it has, adapters included; a tied head counts once, and codes count as the
    /// weights they stand for.
    pub fn params(&self) -> u64 {
        let layers = self.linears().filter_map(|layer| layer.adapter.as_ref());
        let adapters: usize = layers.map(Module::num_params).sum();
        self.spec().shape.parameters(self.spec().vocab_size) + adapters as u64
    }

    /// How many numbers are trained.
    pub fn trained_params(&self) -> usize {
        let mut count = Count(0);
        self.visit_trained(&mut count);
        count.0
    }

    /// The number of values in a checkpoint of this model.
    pub(crate) fn saved_params(&self) -> usize {
        let mut count = Count(0);
        self.visit_saved(&mut count);
        count.0
    }

    /// The first block in which something is trained; none if nothing is.
    pub(crate) fn first_trained_block(&self) -> Option<usize> {
        struct Blocks(Option<usize>);
        impl VisitParameters for Blocks {
            fn visit<const D: usize>(&mut self, path: &str, _param: &Param<Tensor<D>>) {
                let number = path
                    .strip_prefix("layers.")
                    .and_then(|rest| rest.split('.').next());
                let block = number.and_then(|number| number.parse::<usize>().ok());
                let earlier = |block: &usize| self.0.is_none_or(|first| *block < first);
                self.0 = block.filter(earlier).or(self.0);
            }
        }
        let mut blocks = Blocks(None);
        self.visit_trained(&mut blocks);
        blocks.0
    }

    /// Whether the embedding is trained: if not, nothing below the first trained block needs a
    /// gradient.
    pub(crate) fn trains_embedding(&self) -> bool {
        let has_positions = self.embed_positions.is_some();
        self.trained.contains("embed_tokens.weight")
            || has_positions && self.trained.contains("embed_positions.weight")
    }

    /// The same decoder with the parameters that `selectors` name frozen. All other parameters are
    /// trained as they would be without selectors. On an autodiff device nothing below the first
    /// trained parameter has a backward pass.
    ///
    /// # Errors
    /// [`ModelError::NoParameter`] for a selector that matches no parameter.
    pub fn with_frozen(mut self, selectors: &[PathSelector]) -> Result<Self, ModelError> {
        if self.trained.frozen == selectors {
            return Ok(self);
        }
        let order = ParameterPaths::of(&self);
        for selector in selectors {
            if !order.0.iter().any(|path| selector.matches(path)) {
                return Err(ModelError::NoParameter {
                    selector: selector.to_string(),
                });
            }
        }
        // If a parameter without a value yet were frozen here, it would be frozen in every clone
        // too.
        if self.lazy_device().is_autodiff() {
            visit_parameters(&self, &mut Draw);
        }
        self.trained.frozen = selectors.to_vec();
        Ok(self.frozen())
    }

    /// What adapters need to know of the weights beside them, computed once for all passes until
    /// they change.
    pub(crate) fn with_fixed_norms(mut self) -> Self {
        self.linears_mut().for_each(Linear::fix_norms);
        self
    }

    /// Only what [`Trained`] says has gradients.
    fn frozen(self) -> Self {
        struct Freeze<'a>(&'a Trained);
        impl MapParameters for Freeze<'_> {
            fn map<const D: usize>(
                &mut self,
                path: &str,
                param: Param<Tensor<D>>,
            ) -> Param<Tensor<D>> {
                let trained = self.0.contains(path);
                param.set_require_grad(trained)
            }

            fn map_packed<const D: usize>(
                &mut self,
                _path: &str,
                param: Param<Tensor<D, Int>>,
            ) -> Param<Tensor<D, Int>> {
                param
            }
        }
        let trained = self.trained.clone();
        map_parameters(self, &mut Freeze(&trained))
    }

    /// The linear layer at a path, as `layers.0.self_attn.q_proj`.
    pub(crate) fn linear(&self, path: &str) -> Option<&Linear> {
        if path == "lm_head" {
            return self.lm_head.as_ref();
        }
        let (block, name) = in_block(path)?;
        self.layers.get(block)?.linear(name)
    }

    /// The same, to be changed.
    pub(crate) fn linear_mut(&mut self, path: &str) -> Option<&mut Linear> {
        if path == "lm_head" {
            return self.lm_head.as_mut();
        }
        let (block, name) = in_block(path)?;
        self.layers.get_mut(block)?.linear_mut(name)
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let blocks = self.layers.iter();
        let in_blocks =
            blocks.flat_map(|block| LAYERS.iter().filter_map(|name| block.linear(name)));
        in_blocks.chain(&self.lm_head)
    }

    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let blocks = self.layers.iter_mut().flat_map(Block::linears);
        blocks.chain(&mut self.lm_head)
    }
}

/// Counts the values of parameters.
struct Count(usize);

impl VisitParameters for Count {
    fn visit<const D: usize>(&mut self, _path: &str, param: &Param<Tensor<D>>) {
        self.0 += param.lazy_shape().num_elements();
    }
}

/// Collects the paths of all parameters.
struct ParameterPaths(Vec<String>);

impl ParameterPaths {
    fn of(model: &Decoder) -> Self {
        let mut paths = Self(Vec::new());
        visit_parameters(model, &mut paths);
        paths
    }
}

impl VisitParameters for ParameterPaths {
    fn visit<const D: usize>(&mut self, path: &str, _param: &Param<Tensor<D>>) {
        self.0.push(path.to_string());
    }
}

/// Gives parameters their values.
struct Draw;

impl VisitParameters for Draw {
    fn visit<const D: usize>(&mut self, _path: &str, param: &Param<Tensor<D>>) {
        param.val();
    }
}

/// The paths of linear layers within a block.
const LAYERS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// `layers.3.mlp.up_proj` -> 3 and `mlp.up_proj`.
fn in_block(path: &str) -> Option<(usize, &str)> {
    let (block, name) = path.strip_prefix("layers.")?.split_once('.')?;
    Some((block.parse().ok()?, name))
}

impl Block {
    fn linear(&self, name: &str) -> Option<&Linear> {
        let (attention, mlp) = (&self.self_attn, &self.mlp);
        match name {
            "self_attn.q_proj" => Some(&attention.q_proj),
            "self_attn.k_proj" => Some(&attention.k_proj),
            "self_attn.v_proj" => Some(&attention.v_proj),
            "self_attn.o_proj" => Some(&attention.o_proj),
            "mlp.gate_proj" => mlp.gate_proj.as_ref(),
            "mlp.up_proj" => Some(&mlp.up_proj),
            "mlp.down_proj" => Some(&mlp.down_proj),
            _ => None,
        }
    }

    fn linear_mut(&mut self, name: &str) -> Option<&mut Linear> {
        let (attention, mlp) = (&mut self.self_attn, &mut self.mlp);
        match name {
            "self_attn.q_proj" => Some(&mut attention.q_proj),
            "self_attn.k_proj" => Some(&mut attention.k_proj),
            "self_attn.v_proj" => Some(&mut attention.v_proj),
            "self_attn.o_proj" => Some(&mut attention.o_proj),
            "mlp.gate_proj" => mlp.gate_proj.as_mut(),
            "mlp.up_proj" => Some(&mut mlp.up_proj),
            "mlp.down_proj" => Some(&mut mlp.down_proj),
            _ => None,
        }
    }
}
