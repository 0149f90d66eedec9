//! Firebrick: a training framework on burn with a declarative runner.
pub mod cli;
pub mod config;
pub mod data;
