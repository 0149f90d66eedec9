//! What the limits of products are on this processor, for benchmarks to be held against.

use std::hint::black_box;
use std::time::Instant;

use pulp::Arch;
use rayon::prelude::*;

use super::{Path, kernel};

/// Multiplications and additions by a path's integer instruction, in registers, on every thread of the current rayon
/// pool at once: operations, two for each weight and activation, and seconds from the first start to the last end.
/// About a millisecond. `None` where a path has no such instruction.
pub fn integer_operations(path: Path) -> Option<(f64, f64)> {
    let probe = kernel::probe(path)?;
    const ROUNDS: usize = 400_000;
    let started = Instant::now();
    let operations: usize = rayon::broadcast(|_| probe(ROUNDS)).into_iter().sum();
    Some((operations as f64, started.elapsed().as_secs_f64()))
}

/// Reads every word once, each thread of the current rayon pool a part, by vector loads from four places in turn:
/// the fastest of some twenty orders and prefetch distances that were tried.
pub fn read(words: &[u32]) {
    let share = words.len().div_ceil(rayon::current_num_threads()).max(1);
    words
        .par_chunks(share)
        .for_each(|words| Arch::new().dispatch(|| read_share(words)));
}

#[inline(always)]
fn read_share(words: &[u32]) {
    const LANES: usize = 64;
    let lines = words.as_chunks::<LANES>().0;
    let quarter = lines.len() / 4;
    let (a, rest) = lines.split_at(quarter);
    let (b, rest) = rest.split_at(quarter);
    let (c, d) = rest.split_at(quarter);
    let mut sums = [0u32; LANES];
    let mut add = |line: &[u32; LANES]| (0..LANES).for_each(|i| sums[i] ^= line[i]);
    for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
        [a, b, c, d].into_iter().for_each(&mut add);
    }
    d[quarter..].iter().for_each(&mut add);
    black_box(sums);
}
