//! With registers of 512 bits: 16 elements, or coders, at a time.

mod rans;
mod tokens;

pub(super) use rans::{decode, encode};
pub(super) use tokens::{contextualise, restore, tokenise};

fn available() -> bool {
    super::Path::Avx512.available()
}
