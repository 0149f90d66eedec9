//! The decoder-only transformer: one module tree for every supported family.
//!
//! [`DecoderSpec`] says what to build, [`Decoder`] is the built module, [`TokenLoss`] what training
//! minimises, [`folder`] reads and writes Hugging Face model folders.

mod adapted;
mod attention;
mod decoder;
mod error;
pub mod folder;
mod init;
mod layers;
mod linear;
mod lora;
mod loss;
mod merged;
mod output;
mod parameters;
mod vocabulary;
mod weight;

pub use vocabulary::check_vocabulary;

pub use crate::config::DecoderSpec;
pub use crate::config::LoraShape;
pub(crate) use adapted::is_of_adapter;
pub use attention::Attention;
pub(crate) use attention::Context;
pub(crate) use decoder::logit_chunk;
pub use decoder::{Block, Decoder, KvCache};
pub use error::ModelError;
pub use layers::{Embedding, Mlp, Norm};
pub use linear::Linear;
pub(crate) use lora::Dropout;
pub use lora::Lora;
pub use loss::{TokenLoss, cross_entropy, cross_entropy_sum};
pub(crate) use parameters::with_some_parameters;
pub use parameters::{
    MapParameters, Tensors, VisitParameters, map_parameters, parameters, visit_parameters,
    with_parameters,
};
pub(crate) use parameters::{copied_from, moved_into, parameters_into};
pub use weight::{PackedWeight, QuantisedWeight, Weight};
