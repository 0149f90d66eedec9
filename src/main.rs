//! `runner`: see [`firebrick::cli`].
fn main() {}
