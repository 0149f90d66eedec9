//! What the TOML says ([`Config`]) and what will run (`Plan`).
mod keys;
mod plan;
mod shape;
pub use keys::*;
pub use plan::*;
pub use shape::ModelShape;
