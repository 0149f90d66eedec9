//! The linear layer: weights, which may be rounded to trits as they are used, and an adapter beside
//! them.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Tensor};
use firebrick_kernels::ternary::{fake_quantize_activations, fake_quantize_weight, int8_matmul};

use super::init::Init;
use super::lora::{Dropout, Lora, ratio};
use super::weight::{PackedWeight, QuantisedWeight, Weight};
use crate::config::{LoraShape, ModelShape, Ternary};

/// y = x W + b.
///
/// With ternary weights (BitNet b1.58) it is y = x' W' + b of what x and W are rounded to.
#[derive(Module, Debug)]
pub struct Linear {
    /// W.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// What is trained beside them, where they stay as they are.
    pub adapter: Option<Lora>,
    #[module(skip)]
    ternary: Option<Ternary>,
    /// Whether `weight` is W' already: what it was rounded from is elsewhere then.
    #[module(skip)]
    is_rounded: bool,
    #[module(skip)]
    multiplies_integers: bool,
    /// The share of the rounded values in weights and inputs; 1 for ternary weights as such.
    #[module(skip)]
    ternary_blend: f64,
}

impl Linear {
    /// A dense layer.
    pub(super) fn new(init: &Init, path: &str, dims: [usize; 2], bias: bool, std: f64) -> Self {
        Self {
            weight: Weight::Dense(init.normal(&format!("{path}.weight"), dims, std)),
            bias: bias.then(|| init.full([dims[1]], 0.0)),
            adapter: None,
            ternary: None,
            is_rounded: false,
            multiplies_integers: false,
            ternary_blend: 1.0,
        }
    }

    /// One of a block's layers: ternary or quantised where the shape says so.
    pub(super) fn of_block(
        init: &Init,
        path: &str,
        shape: &ModelShape,
        (dims, bias, std): ([usize; 2], bool, f64),
    ) -> Self {
        let mut linear = Self::new(init, path, dims, bias, std);
        linear.ternary = shape.ternary;
        if let Some(ternary) = shape.ternary.filter(|ternary| ternary.packed.is_some()) {
            linear.weight = Weight::Packed(PackedWeight::empty(init, dims, ternary));
        }
        if let Some(blockwise) = shape.blockwise {
            linear.weight = Weight::Quantised(QuantisedWeight::empty(init, dims, blockwise));
        }
        linear
    }

    /// `[rows, in]` -> `[rows, out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.forward_dropping(x, None)
    }

    /// As [`forward`](Self::forward), in training.
    pub(super) fn forward_dropping(&self, x: Tensor<2>, dropout: Option<&Dropout>) -> Tensor<2> {
        let [y] = Self::forward_shared([self], x, dropout);
        y
    }

    /// What layers that read the same x `[rows, in]` make of it, `[rows, out]` each. It is rounded
    /// once for all, and goes into their adapters in one product.
    pub(super) fn forward_shared<const N: usize>(
        layers: [&Self; N],
        x: Tensor<2>,
        dropout: Option<&Dropout>,
    ) -> [Tensor<2>; N] {
        let adapters = layers.map(|layer| layer.adapter.as_ref());
        let (dropped, low) = Lora::narrow(adapters, &x, dropout);
        let mut low = low.into_iter();
        let rounded = layers.first().map(|layer| layer.round_input(x));
        layers.map(|layer| {
            // One for each layer, and there is a first layer where there is any.
            let low = low.next().flatten();
            let rounded = rounded.clone().expect("a layer has an input");
            layer.with_adapter(rounded, low, dropped.as_ref())
        })
    }

    /// x' of x `[rows, in]`; x where it is not rounded, or where the product rounds it.
    fn round_input(&self, x: Tensor<2>) -> Tensor<2> {
        match (&self.weight, self.ternary) {
            (Weight::Dense(_), Some(ternary)) if ternary.rounds_activations => {
                self.blended(x, fake_quantize_activations)
            }
            _ => x,
        }
    }

    /// The layer's output from what x was rounded to, the product of x with A, and what dropout has
    /// left of x, where there was any.
    fn with_adapter(
        &self,
        rounded: Tensor<2>,
        low: Option<Tensor<2>>,
        dropped: Option<&Tensor<2>>,
    ) -> Tensor<2> {
        let product = self.product(rounded);
        let y = match (&self.adapter, low) {
            (Some(adapter), Some(low)) => {
                match adapter.stretch(|a| self.plain_product(a)) {
                    None => adapter.add(product, low),
                    Some(stretch) => {
                        let stretch = stretch.cast(product.dtype());
                        match dropped {
                            None => adapter.add(product, low) * stretch,
                            // As in PEFT, what is dropped is dropped for the whole change.
                            Some(x) => {
                                let dropped = self.product(self.round_input(x.clone()));
                                product + adapter.add(dropped.clone(), low) * stretch - dropped
                            }
                        }
                    }
                }
            }
            _ => product,
        };
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }

    /// x W of [`round_input`](Self::round_input)'s `[rows, in]`.
    fn product(&self, x: Tensor<2>) -> Tensor<2> {
        match (&self.weight, self.ternary) {
            (Weight::Packed(weight), _) => weight.product(x),
            (Weight::Quantised(weight), _) => weight.product(x),
            (Weight::Dense(weight), Some(ternary)) => {
                let weight = if self.is_rounded {
                    weight.val()
                } else {
                    let round = |weight| fake_quantize_weight(weight, ternary.granularity);
                    self.blended(weight.val(), round)
                };
                if self.multiplies_integers && self.ternary_blend == 1.0 {
                    int8_matmul(x, weight, ternary.granularity)
                } else {
                    x.matmul(weight)
                }
            }
            (Weight::Dense(weight), None) => x.matmul(weight.val()),
        }
    }

    /// x W with x `[rows, in]` f32 as it is, off the autodiff device.
    fn plain_product(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.weight {
            Weight::Packed(weight) => weight.plain_product(x),
            Weight::Quantised(weight) => weight.plain_product(x),
            Weight::Dense(_) => x.matmul(self.dense_weight()),
        }
    }

    /// Puts a new adapter beside the weights, which are not looked at yet.
    pub(super) fn attach(&mut self, init: &Init, path: &str, shape: LoraShape) {
        self.adapter = Some(Lora::new(init, path, self.weight.dims(), shape));
    }

    /// Makes an adapter that was just attached one that changes nothing.
    pub(super) fn measure(&mut self) {
        if let Some(mut adapter) = self.adapter.take() {
            if adapter.magnitude.is_some() {
                adapter.set_squares(self.column_squares());
                adapter.measure(|a| self.plain_product(a));
            }
            self.adapter = Some(adapter);
        }
    }

    /// Computes what its adapter needs to know of weights and adapter together, once for all passes
    /// until the adapter changes.
    pub(super) fn fix_norms(&mut self) {
        if let Some(mut adapter) = self.adapter.take() {
            adapter.fix_norms(|a| self.plain_product(a));
            self.adapter = Some(adapter);
        }
    }

    /// The dense weights that stand for weights and adapter together, in f32: y is the same but for
    /// rounding, and for the rounding of x where packed trits had it.
    pub(super) fn merge(&mut self) {
        let mut merged = self.dense_weight();
        if let Some(adapter) = self.adapter.take() {
            let plain = |x: Tensor<2>| x.inner().cast(DType::F32);
            let (a, b) = (plain(adapter.lora_a.val()), plain(adapter.lora_b.val()));
            merged = merged + a.matmul(b).mul_scalar(adapter.scale);
            if let Some(magnitude) = &adapter.magnitude {
                let lengths = merged.clone().square().sum_dim(0).sqrt().squeeze_dim(0);
                let wanted = magnitude.val().inner().cast(DType::F32);
                merged = merged * ratio(wanted, lengths).unsqueeze();
            }
        }
        self.weight = Weight::Dense(Param::initialized(ParamId::new(), merged));
        self.ternary = None;
        self.is_rounded = false;
    }

    /// The weights as they are multiplied with, `[in, out]` f32, off the autodiff device.
    pub(crate) fn dense_weight(&self) -> Tensor<2> {
        let weight = match &self.weight {
            Weight::Packed(weight) => return weight.dense(),
            Weight::Quantised(weight) => return weight.dense(),
            Weight::Dense(weight) => weight.val().inner().cast(DType::F32),
        };
        match self.ternary {
            Some(ternary) if !self.is_rounded => fake_quantize_weight(weight, ternary.granularity),
            _ => weight,
        }
    }

    /// Puts `weight` `[in, out]` in the place of dense weights, which are not trained.
    pub(crate) fn set_weight(&mut self, weight: Tensor<2>) {
        if let Weight::Dense(old) = &self.weight {
            let value = on_tape(weight, old.lazy_device().is_autodiff());
            self.weight = Weight::Dense(Param::initialized(old.id, value));
        }
    }

    /// Puts A `[in, r]` and B `[r, out]` in the place of its adapter's.
    pub(crate) fn set_factors(&mut self, factors: [Tensor<2>; 2]) {
        if let Some(adapter) = &mut self.adapter {
            let [a, b] = factors;
            for (param, value) in [(&mut adapter.lora_a, a), (&mut adapter.lora_b, b)] {
                let tracked = param.lazy_device().is_autodiff();
                let value = on_tape(value, tracked);
                let value = if tracked { value.require_grad() } else { value };
                *param = Param::initialized(param.id, value);
            }
        }
    }

    /// Σ W² of each output, `[out]` f32, off the autodiff device.
    fn column_squares(&self) -> Tensor<1> {
        self.dense_weight().square().sum_dim(0).squeeze_dim(0)
    }

    /// Blends the rounded values with the values as they are: (1 - share) W + share W', and the same
    /// of the inputs if they are rounded. The gradient of the blend is that of W.
    pub(super) fn blend_ternary(&mut self, share: f64) {
        self.ternary_blend = share;
    }

    /// `values` blended with what `round` makes of them.
    fn blended(&self, values: Tensor<2>, round: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
        let share = self.ternary_blend;
        if share == 1.0 {
            round(values)
        } else if share == 0.0 {
            values
        } else {
            values.clone().mul_scalar(1.0 - share) + round(values).mul_scalar(share)
        }
    }

    pub(super) fn multiply_integers(&mut self) {
        self.multiplies_integers = self.ternary.is_some_and(|t| t.rounds_activations);
    }

    /// Puts W' in the place of W: rounded once and not in every forward pass. The gradient of W' is
    /// that of W.
    pub(super) fn round(&mut self) {
        let (Weight::Dense(weight), Some(ternary), false) =
            (&self.weight, self.ternary, self.is_rounded)
        else {
            return;
        };
        let (id, latent) = (weight.id, weight.val());
        let tracked = latent.is_autodiff();
        let round = |weight| fake_quantize_weight(weight, ternary.granularity);
        let rounded = self.blended(latent.inner(), round);
        let rounded = if tracked {
            Tensor::from_inner(rounded).require_grad()
        } else {
            rounded
        };
        self.weight = Weight::Dense(Param::initialized(id, rounded));
        self.is_rounded = true;
    }

    /// Puts packed trits in the place of W.
    pub(super) fn pack(&mut self) {
        self.round();
        if self.ternary_blend != 1.0 {
            // Blended weights are not trits.
            return;
        }
        if let (Weight::Dense(weight), Some(ternary)) = (&self.weight, self.ternary) {
            self.weight = Weight::Packed(PackedWeight::new(weight.val().inner(), ternary));
            self.is_rounded = false;
        }
    }
}

/// A plain tensor on the autodiff device, where that is asked for.
fn on_tape(value: Tensor<2>, on_tape: bool) -> Tensor<2> {
    if on_tape {
        Tensor::from_inner(value)
    } else {
        value
    }
}

#[cfg(test)]
mod tests;
