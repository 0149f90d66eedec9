//! Rows: conversations, instructions, completions and preference pairs, as token ids with a mask.
//!
//! ```text
//! records -> Example        -> Written             -> EncodedRow     -> RowSet -> Batch
//!            (format)          (text, spans)          (ids, mask)       (cache)   (pack)
//! ```
//!
//! [`RowFormat`] says what a record's fields mean (`format`, `example`, `turns`), `write` makes the
//! text that the model sees and knows which parts of it the assistant wrote, `encode` turns that
//! into token ids and a mask. [`RowCorpus::load`] does all of it for a config, or finds the result
//! in the cache, and refuses data in which something is wrong with a row. [`RowSampler`] puts rows
//! into sequences, several into one where they fit (`pack`), and gives batches. [`Pairs`] holds
//! preference data: a chosen and a rejected answer for each prompt.

mod corpus;
mod data;
mod encode;
mod error;
mod example;
mod faults;
mod findings;
mod format;
mod pack;
mod pair_data;
mod pairs;
mod prepare;
mod record;
mod sampler;
mod set;
mod turns;
mod write;

pub use corpus::{RowCorpus, TrainRows};
pub use error::{Place, RowError};
pub use format::RowFormat;
pub use pair_data::PairData;
pub use pairs::{PairBatch, Pairs};
pub use sampler::RowSampler;
use sampler::eval_batches;
pub use set::RowSet;
