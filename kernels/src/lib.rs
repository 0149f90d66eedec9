//! Firebrick's own tensor operations: what its training needs and burn does not have, or does slowly.
//!
//! One folder is one family of operations. Each has of these parts what it needs:
//!
//! | file | what it holds |
//! |---|---|
//! | `mod.rs` | the mathematics, and what a user calls |
//! | `reference.rs` | the same in plain scalar Rust, which every other path is tested against |
//! | `layout/` | the bytes, in memory and in files |
//! | `cpu/`, `cpu.rs` | SIMD and threads, chosen by what the processor has |
//! | `op.rs` | the burn extension: one trait, its gradient, and which device runs what |
//! | `cube.rs` | one CubeCL kernel for wgpu and CUDA |
//! | `ways.rs` | which operation runs how on a device |
//!
//! `panel` multiplies f32 with whatever is unpacked on the way; `vector` compiles plain Rust for each set of
//! instructions.

pub mod attention;
pub mod blockwise;
pub mod difference;
pub mod dynamic;
mod flex;
pub mod layers;
pub mod lossy;
mod panel;
#[cfg(test)]
mod samples;
pub mod sketch;
pub mod ternary;
mod vector;
pub mod vsa;
mod ways;

pub use ways::Way;
