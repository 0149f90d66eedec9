//! A term of the sum, and arithmetic that does not overflow.

use serde::Serialize;

/// A term of the sum.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Term {
    /// What is held.
    pub name: &'static str,
    /// How many bytes.
    pub bytes: u64,
    /// How they come about.
    pub formula: String,
}

/// More than any machine has is as good as infinite.
pub(super) fn product<const N: usize>(factors: [u64; N]) -> u64 {
    factors.into_iter().fold(1, u64::saturating_mul)
}

/// "x 2 cores", if there are several.
pub(super) fn of_lanes(lanes: u64) -> String {
    if lanes == 1 {
        String::new()
    } else {
        format!(" x {lanes} cores")
    }
}

/// A term of this name.
pub(super) fn term(name: &'static str, bytes: u64, formula: String) -> Term {
    Term {
        name,
        bytes,
        formula,
    }
}
