//! Merges the adapters of a decoder into its weights.

use burn::module::Param;
use burn::tensor::Tensor;

use super::Decoder;
use super::adapted::Trained;
use super::linear::Linear;
use super::parameters::{MapParameters, map_parameters};

impl Decoder {
    /// A decoder with dense weights that computes the same as this one with its adapters, up to
    /// rounding. Layers without an adapter are unchanged, unless they are packed. The merged
    /// weights are off the autodiff device.
    pub fn merged(mut self) -> Self {
        let shape = &self.spec().shape;
        let packed = shape.ternary.is_some() || shape.blockwise.is_some();
        let layers = self.linears_mut();
        layers
            .filter(|layer| packed || layer.adapter.is_some())
            .for_each(Linear::merge);
        self.become_dense();
        self.trained = Trained::default();
        self
    }

    /// As [`merged`](Self::merged), for training: all parameters are on the autodiff device, and
    /// none is frozen.
    pub(crate) fn merged_to_train(self) -> Self {
        struct Track;
        impl MapParameters for Track {
            fn map<const D: usize>(
                &mut self,
                _path: &str,
                param: Param<Tensor<D>>,
            ) -> Param<Tensor<D>> {
                let value = param.val();
                let value = if value.is_autodiff() {
                    value.inner()
                } else {
                    value
                };
                Param::initialized(param.id, Tensor::from_inner(value).require_grad())
            }
        }
        map_parameters(self.merged(), &mut Track)
    }
}
