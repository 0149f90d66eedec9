//! What the limit of integer products is on this processor, for benchmarks to be held against.

use std::time::Instant;

use super::{Path, kernel};

/// Operations a second that one core reaches in nothing but multiplying bytes and adding fours, in registers: two for
/// each weight and activation. The best of some short runs. `None` where a path has no such instruction.
pub fn peak_operations(path: Path) -> Option<f64> {
    let probe = kernel::probe(path)?;
    const ROUNDS: usize = 200_000;
    let run = |_| {
        let started = Instant::now();
        let operations = probe(ROUNDS);
        operations as f64 / started.elapsed().as_secs_f64()
    };
    (0..20).map(run).max_by(f64::total_cmp)
}
