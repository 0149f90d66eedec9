//! A vector symbolic architecture on bit-planes: long vectors of trits that stand for symbols, and
//! the operations that combine them.
//!
//! A [`Hypervector`] is a vector of -1, 0 and 1. Two random ones of some thousand elements are
//! nearly orthogonal, so that a sum of a few of them can be told apart again:
//!
//! | operation | what it does | source |
//! |---|---|---|
//! | [`Hypervector::bind`] | multiplies element by element; the result resembles neither | Gayler, 1998 (MAP) |
//! | [`Hypervector::unbind`] | the same product; undoes `bind` where the key has no zero | |
//! | [`Hypervector::add_mod3`], [`Hypervector::sub_mod3`] | add and subtract element by element, modulo 3; exact inverses for all pairs | |
//! | [`Bundle`] | the sums of many vectors; [`Bundle::majority`] is their superposition, which resembles each of them | Kanerva, 2009 |
//! | [`Hypervector::permute`] | rotates the elements; marks a place in a sequence | Kanerva, 2009 |
//! | [`Hypervector::dot`], [`Hypervector::similarity`] | how much two vectors have in common | |
//!
//! Each vector is two planes of bits, one for the ones and one for the minus ones, so that one
//! machine word is 64 elements and a dot product is a count of set bits.
//!
//! Random vectors are a function of a [`Seed`] alone: the same in every process and on every
//! machine.
//!
//! ```
//! use firebrick_kernels::vsa::{Bundle, Hypervector, Seed};
//!
//! let random = |name: &str| Hypervector::bipolar(10_000, Seed::new(1).with_name(name));
//! let (country, capital) = (random("country"), random("capital"));
//! let (france, paris) = (random("france"), random("paris"));
//!
//! // A record of two fields is one vector.
//! let mut record = Bundle::new(10_000);
//! record.add(&country.bind(&france));
//! record.add(&capital.bind(&paris));
//!
//! // What the record has under `capital` resembles Paris, and nothing else.
//! let found = record.majority().unbind(&capital);
//! assert!(found.similarity(&paris) > 0.6);
//! assert!(found.similarity(&france).abs() < 0.1);
//! ```

mod bundle;
mod hypervector;
mod loops;
pub mod reference;
mod seed;
#[cfg(test)]
mod tests;

pub use bundle::Bundle;
pub use hypervector::{Hypervector, HypervectorError};
pub use seed::Seed;
