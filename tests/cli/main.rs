//! The runner as a user meets it: exit codes, files, resume, bad input.
#![allow(missing_docs)]

mod activations;
mod adapters;
mod averaging;
mod bad_input;
mod bench;
mod checkpoints;
mod comparisons;
mod damage;
mod early_stopping;
mod estimate;
mod export;
#[cfg(unix)]
mod kills;
mod learning;
mod models;
mod phases;
mod precision;
mod recipes;
mod reports;
mod resume;
mod runs;
mod saving;
mod tuning;
