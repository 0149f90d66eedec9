//! What the TOML says ([`Config`]) and what will run (`Plan`).
mod keys;
mod shape;
pub use keys::*;
pub use shape::ModelShape;
