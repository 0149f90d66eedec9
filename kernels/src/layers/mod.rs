//! Layers of a transformer whose work is to read and write memory, as one operation each, on the CPU.
//!
//! As graphs of burn's operations each takes a handful of passes, on one core. Here threads take rows in turn, in place
//! where nothing else holds what comes in and in a copy where something does; the backward pass computes again what the
//! forward pass could have kept. Sums are f32; results depend on no number of threads.
//!
//! | layer | forward | keeps |
//! |---|---|---|
//! | [`rms_norm`] | y = x w / rms(x) (Zhang and Sennrich, 2019) | x, w |
//! | [`gated`] | y = f(gate) up (Shazeer, 2020), f one of [`Activation`] | gate, up |
//! | [`token_nats`] | log Σ exp(z) - z of the target | z, and the first term |
//! | [`add_product`] | y + x w | x, w |

mod activation;
mod cpu;
mod op;
pub mod reference;
#[cfg(test)]
mod tests;
mod ways;

pub use activation::Activation;
pub use op::{LayerOps, add_product, gated, rms_norm, token_nats};
pub use ways::ways;
