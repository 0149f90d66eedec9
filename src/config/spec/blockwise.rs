//! `quantization_config` of a config.json: weights in four or eight bits.
//!
//! What bitsandbytes can hold is written as its own 4-bit form, which transformers loads; the rest under
//! the method of our own.

use serde_json::{Value, json};

use super::SpecError;
use super::fields::Fields;
use crate::config::keys::Architecture;
use crate::config::shape::{BlockSize, Blockwise, ModelShape};
use firebrick_kernels::blockwise::Format;

/// Weights that share a scale in all that transformers writes.
const THEIR_BLOCK: usize = 64;

/// The layers that transformers leaves as they are where nothing is said.
const SKIPPED: &str = "lm_head";

const OWN_FIELDS: [&str; 5] = [
    "quant_method",
    "weights",
    "block_size",
    "double_quant",
    "symmetric",
];

impl ModelShape {
    /// Whether its quantised weights lie in files as those of bitsandbytes: the families whose files
    /// have a matrix for each layer, `[out, in]`.
    pub(crate) fn is_bitsandbytes(&self) -> bool {
        let theirs = |blockwise: Blockwise| {
            matches!(blockwise.format, Format::Nf4 | Format::Fp4)
                && blockwise.block == BlockSize::Weights(THEIR_BLOCK)
        };
        has_plain_files(self.architecture) && self.blockwise.is_some_and(theirs)
    }
}

fn has_plain_files(family: Architecture) -> bool {
    use Architecture::{Llama, Mistral, Qwen2, Qwen3};
    matches!(family, Llama | Mistral | Qwen2 | Qwen3)
}

impl Fields<'_> {
    /// bitsandbytes' 4-bit weights.
    pub(super) fn bitsandbytes(&self, family: Architecture) -> Result<Blockwise, SpecError> {
        if !has_plain_files(family) {
            return Err(self.unsupported("quant_method"));
        }
        if !self.flag_or("load_in_4bit", false)? {
            return Err(self.unsupported("load_in_4bit"));
        }
        self.require("bnb_4bit_quant_storage", &json!("uint8"))?;
        self.require("llm_int8_skip_modules", &json!([SKIPPED]))?;
        let format = match self.get("bnb_4bit_quant_type").and_then(Value::as_str) {
            Some("nf4") => Format::Nf4,
            Some("fp4") => Format::Fp4,
            _ => return Err(self.unsupported("bnb_4bit_quant_type")),
        };
        Ok(Blockwise {
            format,
            block: BlockSize::Weights(THEIR_BLOCK),
            double: self.flag_or("bnb_4bit_use_double_quant", false)?,
        })
    }

    /// Our own form; `family` only for what has to be in another form.
    pub(super) fn own_blockwise(&self, family: Architecture) -> Result<Blockwise, SpecError> {
        if let Some(unknown) = self.names().find(|name| !OWN_FIELDS.contains(name)) {
            return Err(self.unsupported(unknown));
        }
        let symmetric = self.flag_or("symmetric", true)?;
        let format = match (self.text("weights")?, symmetric) {
            ("nf4", _) => Format::Nf4,
            ("fp4", _) => Format::Fp4,
            ("int4", true) => Format::Int4Symmetric,
            ("int4", false) => Format::Int4Affine,
            ("int8", _) => Format::Int8,
            _ => return Err(self.unsupported("weights")),
        };
        let block = match self.get("block_size") {
            Some(Value::String(name)) if name == "row" => BlockSize::Row,
            _ => BlockSize::Weights(self.count("block_size")?),
        };
        let blockwise = Blockwise {
            format,
            block,
            double: self.flag_or("double_quant", false)?,
        };
        let theirs =
            matches!(format, Format::Nf4 | Format::Fp4) && block == BlockSize::Weights(THEIR_BLOCK);
        if theirs && has_plain_files(family) {
            return Err(self.unsupported("quant_method"));
        }
        Ok(blockwise)
    }
}

/// The object in a config.json.
pub(super) fn write(shape: &ModelShape, blockwise: Blockwise) -> Value {
    if shape.is_bitsandbytes() {
        return json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": true,
            "load_in_8bit": false,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": blockwise.format.name(),
            "bnb_4bit_use_double_quant": blockwise.double,
        });
    }
    let mut own = json!({
        "quant_method": super::quantization::OWN,
        "weights": match blockwise.format {
            Format::Int4Affine => Format::Int4Symmetric.name(),
            format => format.name(),
        },
        "block_size": match blockwise.block {
            BlockSize::Row => json!("row"),
            BlockSize::Weights(size) => json!(size),
        },
        "double_quant": blockwise.double,
    });
    if blockwise.format == Format::Int4Affine {
        own["symmetric"] = json!(false);
    }
    own
}
