//! Files -> documents -> token ids -> batches.
//!
//! [`Corpus::load`] finds the files (`files`), reads their documents (`documents`), holds out the
//! validation part (`split`), and tokenises (`tokenizer`, `encode`) unless the tokens are in the
//! cache (`cache`). What it gives are streams of token ids ([`TokenStream`]): one per dataset to
//! train on, one to validate on.
//!
//! [`Sampler`] draws training batches from them, [`eval_batches`] walks through the validation
//! stream once, and [`Bigram`] is the model to beat. A batch is a function of the seed and its
//! number, not of earlier batches, so there is no reader state to save or to lose. For every task, a
//! run asks [`TrainingData`] for a [`DataView`] in each of its phases.

mod batch;
mod bigram;
mod cache;
mod chat;
mod corpus;
mod documents;
mod encode;
mod error;
mod eval;
mod files;
mod notes;
mod parquet;
mod permutation;
mod pieces;
mod records;
mod rows;
mod sampler;
mod source;
mod split;
mod token_stream;
mod tokenizer;
mod training_data;
mod windows;

pub use batch::Batch;
pub use bigram::Bigram;
pub use cache::{Lookup, TokenCache, TokenFile};
pub use chat::{Chat, ChatTemplate, Rendered, SpecialTexts, TemplateError};
pub use corpus::{Corpus, TrainStream};
pub use documents::Format;
pub use encode::encode_documents;
pub use error::DataError;
pub use eval::{EvalText, eval_batches};
pub use files::{FileRecord, expand};
pub use rows::{
    PairBatch, PairData, Pairs, Place, RowCorpus, RowError, RowFormat, RowSampler, RowSet,
    TrainRows,
};
pub use sampler::Sampler;
pub use token_stream::{TokenStream, Width};
pub use tokenizer::{END_OF_TEXT, SpecialToken, StreamDecoder, Tokenizer, Unknown};
pub use training_data::{DataView, EpochSize, Segment, TrainingData, ViewSpec, load_training_data};
