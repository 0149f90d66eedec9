//! What the TOML says ([`Config`]) and what will run (`Plan`).
mod keys;
mod shape;
mod plan;
pub use plan::*;
pub use keys::*;
pub use shape::ModelShape;
