//! Firebrick: a training framework for language models on [burn](https://burn.dev), with a
//! declarative runner. `runner train configs/quickstart.toml` is where a user starts;
//! [`train::Run`] is what it calls.
//!
//! This page is the map. Data flows one way, top to bottom, and a module imports only what stands
//! above it:
//!
//! | module | what it does |
//! |---|---|
//! | [`durable`] | files that are old or new, never half |
//! | [`readable`] | numbers as people read them |
//! | [`environment`] | what this process runs on |
//! | `page` | HTML pages that need no network: charts, tables, safe text |
//! | `svd` | the largest singular directions of a matrix |
//! | [`delta`] | one state as the difference from another, bit for bit, in one file |
//! | [`config`] | what the TOML says ([`config::Config`]) and what will run ([`config::Plan`]) |
//! | [`device`] | the CPU or a GPU, chosen at run time |
//! | [`data`] | files -> documents -> token ids -> batches; a batch is a function of (seed, number) |
//! | [`model`] | the decoder, its loss, Hugging Face model folders |
//! | [`adapter`] | LoRA beside a model: PEFT folders, several at a time, merging |
//! | [`extra`] | state that a run saves in addition to model and optimizer, by owner |
//! | [`collective`] | exchanges between the ranks of a data-parallel run |
//! | [`gradient`] | a gradient by parameter path, and the pipeline between backward and update |
//! | [`objective`] | the losses that training minimises, and the loops that compute them |
//! | [`optimizer`] | update rules by parameter group, learning-rate schedules |
//! | [`forecast`] | parameters, arithmetic and memory of a run before it starts |
//! | [`phase`] | a run as a list of phases: what holds at a step |
//! | [`checkpoint`] | everything a run needs to go on, saved so that a crash cannot lose it |
//! | [`generate`] | text from a model: cache, sampling, stop strings |
//! | [`train`] | the loop (`train/run.rs`), the run folder, resume, metrics, the terminal |
//! | [`compare`] | runs against each other, with the same seeds and one budget |
//! | [`cli`] | one file per verb; `main.rs` only calls it |
//!
//! Operations of our own, and the number formats they compute in, are a crate that knows nothing of
//! the rest: [`firebrick_kernels`], in `kernels/`.
//!
//! Every part works on its own: `examples/custom_loop.rs` is a training loop in one file.

pub mod adapter;
pub mod checkpoint;
pub mod cli;
pub mod collective;
pub mod compare;
pub mod config;
pub mod data;
pub mod delta;
pub mod device;
pub mod durable;
pub mod environment;
pub mod extra;
pub mod forecast;
pub mod generate;
pub mod gradient;
pub mod model;
pub mod objective;
pub mod optimizer;
mod page;
pub mod phase;
pub mod readable;
mod svd;
pub mod train;

/// The examples of the book's chapter on this library are compiled as tests.
#[cfg(doctest)]
#[doc = include_str!("../docs/rust-api.md")]
struct RustApiPage;

/// As above, of the chapter on hypervectors.
#[cfg(doctest)]
#[doc = include_str!("../docs/vsa.md")]
struct VsaPage;
