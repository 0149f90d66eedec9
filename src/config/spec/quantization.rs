//! `quantization_config` of a config.json: which kind of weights, and ternary ones.
//!
//! What transformers can compute is written as its `bitnet` method with online rounding: the weights
//! in the files are those that training changes, and are rounded when they are used. Anything else
//! is written under a method of our own, so that no other tool takes the weights for dense ones.

use firebrick_kernels::ternary::Granularity;
use serde_json::{Value, json};

use super::fields::Fields;
use super::{SpecError, blockwise};
use crate::config::keys::Architecture;
use crate::config::shape::{Blockwise, ModelShape, PackedLayout, Ternary};

const FIELD: &str = "quantization_config";
const WITHIN: &str = "quantization_config.";

/// Its method for ternary weights that transformers does not have.
pub(super) const OWN: &str = "firebrick";

const OWN_FIELDS: [&str; 5] = [
    "quant_method",
    "weights",
    "granularity",
    "activation_bits",
    "layout",
];

/// Ternary weights, or blockwise ones.
type Quantization = (Option<Ternary>, Option<Blockwise>);

impl Fields<'_> {
    pub(super) fn quantization(&self, family: Architecture) -> Result<Quantization, SpecError> {
        let Some(quantization) = self.inner(FIELD, WITHIN)? else {
            return Ok((None, None));
        };
        let is_ternary = quantization.get("weights") == Some(&json!("ternary"));
        let ternary = |ternary| (Some(ternary), None);
        let blockwise = |blockwise| (None, Some(blockwise));
        match quantization.text("quant_method")? {
            "bitsandbytes" => quantization.bitsandbytes(family).map(blockwise),
            OWN if !is_ternary => quantization.own_blockwise(family).map(blockwise),
            _ if family == Architecture::Gpt2 => Err(self.unsupported(FIELD)),
            "bitnet" if family != Architecture::Phi3 => quantization.online_bitnet().map(ternary),
            OWN => quantization.own().map(ternary),
            _ => Err(quantization.unsupported("quant_method")),
        }
    }

    /// Transformers' own. Its defaults are packed weights, which this build does not read.
    fn online_bitnet(&self) -> Result<Ternary, SpecError> {
        let needed = [
            ("linear_class", "autobitlinear"),
            ("quantization_mode", "online"),
        ];
        for (field, supported) in needed {
            if self.get(field) != Some(&json!(supported)) {
                return Err(self.unsupported(field));
            }
        }
        self.require("use_rms_norm", &json!(false))?;
        // Where it is silent, transformers leaves the head as it is.
        self.require("modules_to_not_convert", &json!(["lm_head"]))?;
        Ok(Ternary {
            granularity: Granularity::Tensor,
            rounds_activations: true,
            packed: None,
        })
    }

    fn own(&self) -> Result<Ternary, SpecError> {
        if let Some(unknown) = self.names().find(|name| !OWN_FIELDS.contains(name)) {
            return Err(self.unsupported(unknown));
        }
        let granularity = match self.get("granularity") {
            Some(Value::String(name)) if name == "tensor" => Granularity::Tensor,
            Some(Value::String(name)) if name == "row" => Granularity::Row,
            Some(Value::Number(_)) => Granularity::Group(self.count("granularity")?),
            _ => return Err(self.invalid("granularity", "\"tensor\", \"row\" or a number")),
        };
        let rounds_activations = match self.get("activation_bits").and_then(Value::as_u64) {
            Some(0) => false,
            Some(8) => true,
            _ => return Err(self.invalid("activation_bits", "0 or 8")),
        };
        let packed = match self.get("layout") {
            None => None,
            Some(_) => match PackedLayout::named(self.text("layout")?) {
                None => return Err(self.unsupported("layout")),
                layout => layout,
            },
        };
        Ok(Ternary {
            granularity,
            rounds_activations,
            packed,
        })
    }
}

/// The object in a config.json; none for dense weights.
pub(super) fn write(shape: &ModelShape) -> Option<Value> {
    if let Some(quantised) = shape.blockwise {
        return Some(blockwise::write(shape, quantised));
    }
    let ternary = shape.ternary?;
    // Transformers rounds phi3's fused matrices with one scale for all parts.
    let is_theirs = ternary.granularity == Granularity::Tensor
        && ternary.rounds_activations
        && ternary.packed.is_none()
        && shape.architecture != Architecture::Phi3;
    if is_theirs {
        return Some(json!({
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
            "use_rms_norm": false,
            "modules_to_not_convert": ["lm_head"],
        }));
    }
    let granularity = match ternary.granularity {
        Granularity::Tensor => json!("tensor"),
        Granularity::Row => json!("row"),
        Granularity::Group(size) => json!(size),
    };
    let mut own = json!({
        "quant_method": OWN,
        "weights": "ternary",
        "granularity": granularity,
        "activation_bits": if ternary.rounds_activations { 8 } else { 0 },
    });
    if let Some(layout) = ternary.packed {
        own["layout"] = json!(layout.name());
    }
    Some(own)
}
