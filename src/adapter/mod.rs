//! Adapters apart from the model they adapt: on the host, in files, several at a time, merged.
//!
//! [`Adapter`] is what one run has learned: a low-rank update for each of some layers, and modules
//! that were trained whole. It is read and written in the format of Hugging Face's PEFT (`peft`),
//! attached to a [`Decoder`](crate::model::Decoder), mixed with others ([`Adapter::mix`]), or merged
//! into dense weights ([`merge`](fn@merge)). [`Registry`] keeps several by name over one base model.

mod error;
mod init;
mod merge;
mod peft;
mod registry;
mod weights;

pub use error::AdapterError;
pub(crate) use init::{pissa, quantised};
pub use merge::{Merged, merge};
pub(crate) use peft::written_numbers;
pub use peft::{CONFIG, OWN_BASE, PeftOptions, WEIGHTS, base_model};
pub use registry::Registry;
pub(crate) use weights::saved_tensors;
pub use weights::{Adapter, LayerUpdate};
