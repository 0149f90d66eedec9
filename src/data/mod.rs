//! Files -> documents -> token ids -> batches.
mod batch;
pub use batch::Batch;
