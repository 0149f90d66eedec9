//! Firebrick: a training framework on burn with a declarative runner.
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod durable;
pub mod environment;
pub mod generate;
pub mod gradient;
pub mod model;
pub mod optimizer;
pub mod phase;
pub mod train;
