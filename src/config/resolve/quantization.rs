//! `[quantization]`: which layers compute in few bits, and whether their widths allow it.

use firebrick_kernels::ternary::Granularity;
use firebrick_kernels::ternary::layout::compute::BLOCK;

use super::Checks;
use crate::config::keys::{
    Architecture, Config, GranularityKey, GranularityName, QuantizationConfig, WeightFormat,
};
use crate::config::shape::{ModelShape, Ternary};

impl Checks<'_> {
    /// Fills in the defaults and puts what applies into `shape`, which is a base model's when
    /// `of_base`.
    pub(super) fn quantization(
        &mut self,
        config: &mut Config,
        shape: &mut ModelShape,
        of_base: bool,
    ) {
        let keys = &mut config.quantization;
        if of_base && let Some(ternary) = shape.ternary {
            self.agrees_with_base(keys, ternary);
        }
        if keys.weights != Some(WeightFormat::Ternary) {
            self.without_ternary(keys);
            return;
        }
        let granularity = *keys
            .granularity
            .get_or_insert(GranularityKey::Named(GranularityName::Tensor));
        let bits = *keys.activation_bits.get_or_insert(8);
        let int8_forward = *keys.int8_forward.get_or_insert(false);
        self.ternary_keys(shape, granularity, bits, int8_forward);
        shape.ternary = Some(Ternary {
            granularity: granularity.into(),
            rounds_activations: bits == 8,
            packed: None,
        });
    }

    fn agrees_with_base(&mut self, keys: &mut QuantizationConfig, ternary: Ternary) {
        let base = QuantizationConfig::of(ternary);
        let key = |name: &str| format!("quantization.{name}");
        if ternary.packed.is_some() {
            self.refuse(
                &["model.base_model"],
                "base_model has packed weights: what they were rounded from is not there to be \
                 trained"
                    .to_string(),
                "name the folder that it was exported from",
            );
            return;
        }
        let differs = [
            (
                "weights",
                keys.weights.is_some() && keys.weights != base.weights,
            ),
            (
                "granularity",
                keys.granularity.is_some() && keys.granularity != base.granularity,
            ),
            (
                "activation_bits",
                keys.activation_bits.is_some() && keys.activation_bits != base.activation_bits,
            ),
        ];
        for (name, _) in differs.iter().filter(|(_, differs)| *differs) {
            self.refuse(
                &[&key(name), "model.base_model"],
                format!("`{name}` in [quantization] is not what the base model was trained with"),
                &format!("remove {name}: a base model brings its number format"),
            );
        }
        *keys = QuantizationConfig {
            int8_forward: keys.int8_forward,
            ..base
        };
    }

    fn without_ternary(&mut self, keys: &QuantizationConfig) {
        let given = [
            ("granularity", keys.granularity.is_some()),
            ("activation_bits", keys.activation_bits.is_some()),
            ("int8_forward", keys.int8_forward.is_some()),
        ];
        for (name, given) in given {
            let key = format!("quantization.{name}");
            self.only_with(given, &key, "quantization.weights", "\"ternary\"");
        }
    }

    fn ternary_keys(
        &mut self,
        shape: &ModelShape,
        granularity: GranularityKey,
        bits: u32,
        int8_forward: bool,
    ) {
        if shape.architecture == Architecture::Gpt2 {
            self.refuse(
                &["quantization.weights", "model.architecture"],
                "gpt2 has no ternary form".to_string(),
                "architecture = \"llama\", or \"bitnet\"",
            );
        }
        if !matches!(bits, 0 | 8) {
            self.refuse(
                &["quantization.activation_bits"],
                format!("activation_bits = {bits}"),
                "8, or 0 to leave activations as they are",
            );
        }
        if int8_forward && bits == 0 {
            self.refuse(
                &["quantization.int8_forward", "quantization.activation_bits"],
                "`int8_forward` in [quantization] without 8-bit activations".to_string(),
                "activation_bits = 8, or int8_forward = false",
            );
        }
        if let GranularityKey::Group(size) = granularity {
            self.group_size(shape, size);
        }
    }

    fn group_size(&mut self, shape: &ModelShape, size: usize) {
        let keys = ["quantization.granularity"];
        // The packed layout keeps so many columns together; a group must not cut through them.
        if size == 0 || !size.is_multiple_of(BLOCK) {
            self.refuse(
                &keys,
                format!("granularity = {size} is not a multiple of {BLOCK}"),
                "granularity = 64, \"row\" or \"tensor\"",
            );
            return;
        }
        let widths = [
            ("hidden_size", shape.hidden_size),
            (
                "num_attention_heads x head_dim",
                shape.num_attention_heads * shape.head_dim,
            ),
            ("intermediate_size", shape.intermediate_size),
        ];
        for (name, width) in widths {
            if !width.is_multiple_of(size) {
                self.refuse(
                    &keys,
                    format!("groups of {size} do not divide {name} = {width}"),
                    "a smaller group, \"row\" or \"tensor\"",
                );
                return;
            }
        }
    }
}

impl QuantizationConfig {
    /// The keys that say `ternary`.
    fn of(ternary: Ternary) -> Self {
        Self {
            weights: Some(WeightFormat::Ternary),
            granularity: Some(match ternary.granularity {
                Granularity::Tensor => GranularityKey::Named(GranularityName::Tensor),
                Granularity::Row => GranularityKey::Named(GranularityName::Row),
                Granularity::Group(size) => GranularityKey::Group(size),
            }),
            activation_bits: Some(if ternary.rounds_activations { 8 } else { 0 }),
            int8_forward: None,
        }
    }
}

impl From<GranularityKey> for Granularity {
    fn from(key: GranularityKey) -> Self {
        match key {
            GranularityKey::Named(GranularityName::Tensor) => Granularity::Tensor,
            GranularityKey::Named(GranularityName::Row) => Granularity::Row,
            GranularityKey::Group(size) => Granularity::Group(size),
        }
    }
}
