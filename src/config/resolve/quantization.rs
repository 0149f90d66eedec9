//! `[quantization]`: which layers compute in few bits, and whether their widths allow it.

use firebrick_kernels::blockwise::Format;
use firebrick_kernels::ternary::Granularity;
use firebrick_kernels::ternary::layout::compute::BLOCK;

use crate::config::checks::Checks;
use crate::config::keys::{
    Architecture, BlockSizeKey, BlockSizeName, Config, GranularityKey, GranularityName,
    QuantizationConfig, WeightFormat,
};
use crate::config::shape::{BlockSize, Blockwise, ModelShape, Ternary};

impl Checks<'_> {
    /// Fills in the defaults and puts what applies into `shape`, which is a base model's when
    /// `of_base`.
    pub(super) fn quantization(
        &mut self,
        config: &mut Config,
        shape: &mut ModelShape,
        of_base: bool,
    ) {
        let adapted = config.adapter.is_some();
        let keys = &mut config.quantization;
        if of_base && let Some(ternary) = shape.ternary {
            self.agrees_with_base(keys, ternary, adapted);
        }
        if of_base && let Some(blockwise) = shape.blockwise {
            self.is_of_base(keys, &QuantizationConfig::of_blocks(blockwise));
        }
        let weights = keys.weights.unwrap_or(WeightFormat::None);
        self.keys_of_format(keys, weights);
        match weights {
            WeightFormat::None => {}
            WeightFormat::Ternary => self.ternary(keys, shape, of_base && adapted),
            _ => self.blockwise(keys, shape, weights, adapted),
        }
    }

    fn ternary(&mut self, keys: &mut QuantizationConfig, shape: &mut ModelShape, frozen: bool) {
        let granularity = *keys.granularity.get_or_insert(BY_TENSOR);
        let bits = *keys.activation_bits.get_or_insert(EIGHT_BITS);
        let int8_forward = *keys.int8_forward.get_or_insert(false);
        self.ternary_keys(shape, granularity, bits, int8_forward);
        if frozen && int8_forward {
            self.refuse(
                &["quantization.int8_forward"],
                "`int8_forward` in [quantization] with [adapter]: packed weights are multiplied as \
                 integers anyway"
                    .to_string(),
                "remove int8_forward",
            );
        }
        keys.put_into(shape);
    }

    /// A base model's weights as codes.
    fn blockwise(
        &mut self,
        keys: &mut QuantizationConfig,
        shape: &mut ModelShape,
        weights: WeightFormat,
        adapted: bool,
    ) {
        let name = weights.name();
        if !adapted {
            self.refuse(
                &["quantization.weights"],
                format!("weights = \"{name}\" in [quantization] without [adapter]: codes cannot be trained"),
                "add [adapter], or remove weights",
            );
        }
        if shape.ternary.is_some() {
            self.refuse(
                &["quantization.weights", "model.base_model"],
                format!("weights = \"{name}\" in [quantization], but the base model's are ternary"),
                "remove weights: a base model brings its number format",
            );
        }
        keys.block_size.get_or_insert(default_blocks(weights));
        keys.double_quant.get_or_insert(false);
        if weights == WeightFormat::Int4 {
            keys.symmetric.get_or_insert(true);
        }
        keys.put_into(shape);
    }

    fn agrees_with_base(&mut self, keys: &mut QuantizationConfig, ternary: Ternary, adapted: bool) {
        if ternary.packed.is_some() && !adapted {
            self.refuse(
                &["model.base_model"],
                "base_model has packed weights: what they were rounded from is not there to be \
                 trained"
                    .to_string(),
                "name the folder that it was exported from, or add [adapter]",
            );
            return;
        }
        self.is_of_base(keys, &QuantizationConfig::of(ternary));
    }

    /// What the file says of the base model's weights is what they are.
    fn is_of_base(&mut self, keys: &mut QuantizationConfig, base: &QuantizationConfig) {
        fn differs<T: PartialEq>(said: &Option<T>, has: &Option<T>) -> bool {
            said.is_some() && said != has
        }
        let differing = [
            ("weights", differs(&keys.weights, &base.weights)),
            ("granularity", differs(&keys.granularity, &base.granularity)),
            (
                "activation_bits",
                differs(&keys.activation_bits, &base.activation_bits),
            ),
            ("block_size", differs(&keys.block_size, &base.block_size)),
            (
                "double_quant",
                differs(&keys.double_quant, &base.double_quant),
            ),
            ("symmetric", differs(&keys.symmetric, &base.symmetric)),
        ];
        for (name, _) in differing.iter().filter(|(_, differs)| *differs) {
            self.refuse(
                &[&format!("quantization.{name}"), "model.base_model"],
                format!("`{name}` in [quantization] is not what the base model has"),
                &format!("remove {name}: a base model brings its number format"),
            );
        }
        *keys = QuantizationConfig {
            int8_forward: keys.int8_forward,
            ..base.clone()
        };
    }

    /// A key that the chosen weights would ignore is refused.
    fn keys_of_format(&mut self, keys: &QuantizationConfig, weights: WeightFormat) {
        use WeightFormat::{Fp4, Int4, Int8, Nf4, Ternary};
        let blocks: &[WeightFormat] = &[Nf4, Fp4, Int4, Int8];
        let given = [
            ("granularity", keys.granularity.is_some(), &[Ternary][..]),
            (
                "activation_bits",
                keys.activation_bits.is_some(),
                &[Ternary],
            ),
            ("int8_forward", keys.int8_forward.is_some(), &[Ternary]),
            ("block_size", keys.block_size.is_some(), blocks),
            ("double_quant", keys.double_quant.is_some(), blocks),
            ("symmetric", keys.symmetric.is_some(), &[Int4]),
        ];
        for (name, given, formats) in given {
            let key = format!("quantization.{name}");
            let names: Vec<String> = formats
                .iter()
                .map(|format| format!("\"{}\"", format.name()))
                .collect();
            let useless = given && !formats.contains(&weights);
            self.only_with(useless, &key, "quantization.weights", &names.join(" or "));
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

const BY_TENSOR: GranularityKey = GranularityKey::Named(GranularityName::Tensor);
const EIGHT_BITS: u32 = 8;

fn default_blocks(weights: WeightFormat) -> BlockSizeKey {
    match weights {
        WeightFormat::Int8 => BlockSizeKey::Named(BlockSizeName::Row),
        _ => BlockSizeKey::Weights(64),
    }
}

impl QuantizationConfig {
    /// What these keys make of a model's weights; nothing where they say nothing.
    pub(crate) fn put_into(&self, shape: &mut ModelShape) {
        let weights = self.weights.unwrap_or(WeightFormat::None);
        let format = match weights {
            WeightFormat::None => return,
            WeightFormat::Ternary => {
                shape.ternary = Some(Ternary {
                    granularity: self.granularity.unwrap_or(BY_TENSOR).into(),
                    rounds_activations: self.activation_bits.unwrap_or(EIGHT_BITS) == EIGHT_BITS,
                    packed: shape.ternary.and_then(|ternary| ternary.packed),
                });
                return;
            }
            WeightFormat::Nf4 => Format::Nf4,
            WeightFormat::Fp4 => Format::Fp4,
            WeightFormat::Int8 => Format::Int8,
            WeightFormat::Int4 if self.symmetric == Some(false) => Format::Int4Affine,
            WeightFormat::Int4 => Format::Int4Symmetric,
        };
        shape.blockwise = Some(Blockwise {
            format,
            block: match self.block_size.unwrap_or(default_blocks(weights)) {
                BlockSizeKey::Named(BlockSizeName::Row) => BlockSize::Row,
                BlockSizeKey::Weights(size) => BlockSize::Weights(size),
            },
            double: self.double_quant == Some(true),
        });
    }

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
            ..Self::default()
        }
    }

    /// The keys that say what these weights are.
    fn of_blocks(blockwise: Blockwise) -> Self {
        let is_int4 = matches!(blockwise.format, Format::Int4Symmetric | Format::Int4Affine);
        Self {
            weights: Some(match blockwise.format {
                Format::Nf4 => WeightFormat::Nf4,
                Format::Fp4 => WeightFormat::Fp4,
                Format::Int4Symmetric | Format::Int4Affine => WeightFormat::Int4,
                Format::Int8 => WeightFormat::Int8,
            }),
            block_size: Some(match blockwise.block {
                BlockSize::Row => BlockSizeKey::Named(BlockSizeName::Row),
                BlockSize::Weights(size) => BlockSizeKey::Weights(size),
            }),
            double_quant: Some(blockwise.double),
            symmetric: is_int4.then_some(blockwise.format == Format::Int4Symmetric),
            ..Self::default()
        }
    }
}

impl WeightFormat {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            WeightFormat::None => "none",
            WeightFormat::Ternary => "ternary",
            WeightFormat::Nf4 => "nf4",
            WeightFormat::Fp4 => "fp4",
            WeightFormat::Int4 => "int4",
            WeightFormat::Int8 => "int8",
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
