//! Firebrick: a training framework on burn with a declarative runner.
pub mod cli;
pub mod config;
pub mod durable;
pub mod data;
pub mod model;
pub mod gradient;
pub mod optimizer;
