//! What suits a chunk, judged by a sample of it.

use std::sync::LazyLock;

use super::tokens::{CONTEXTS, ESCAPE, Known, Spec, TOKENS, Tokens};
use super::{Element, Path};

/// Runs of neighbouring elements that a sample consists of: scattered ones would each be waited for.
const RUNS: usize = 32;
/// Elements of a run.
const RUN: usize = 16;
/// Elements of a sample.
const SAMPLE: usize = RUNS * RUN;

/// The exponent and the number of low bits that suit a chunk, and bits an element with them.
pub(super) fn choose(path: Path, element: Element, known: Known, child: &[u8]) -> (Spec, f32) {
    let width = element.width();
    let elements = child.len() / width;
    let sample = |bytes: &[u8], width: usize| -> Vec<u8> {
        if elements <= SAMPLE {
            return bytes.to_vec();
        }
        let start = |run: usize| run * (elements - RUN) / (RUNS - 1) * width;
        let runs = (0..RUNS).map(|run| &bytes[start(run)..][..RUN * width]);
        runs.collect::<Vec<_>>().concat()
    };
    let (parent, child) = (sample(known.parent, width), sample(child, width));
    let roots = if known.roots.is_empty() {
        Vec::new()
    } else {
        sample(known.roots, 4)
    };
    let known = Known {
        parent: &parent,
        roots: &roots,
    };
    let mut spec = Spec {
        element,
        low: 0,
        top: 0,
        last_context: CONTEXTS as u32 - 1,
    };
    spec.top = spec.top_of(path, &parent, &child);
    let lows: &[u32] = match width {
        1 => &[0],
        2 => &[0, 8],
        _ => &[0, 8, 16],
    };
    // Bits stored as they are cost no time, and are preferred where they hardly cost room.
    let mut least = f32::INFINITY;
    for &low in lows {
        let cost = Spec { low, ..spec }.cost(path, known, &child);
        if cost <= least * 1.002 {
            spec.low = low;
        }
        least = least.min(cost);
    }
    (spec, least / (child.len() / width).max(1) as f32)
}

impl Spec {
    /// Bits that the elements of a sample would take. Of contexts four are one: of each there are too few elements.
    fn cost(&self, path: Path, known: Known, child: &[u8]) -> f32 {
        /// n log2 n.
        static LOGS: LazyLock<Vec<f32>> = LazyLock::new(|| {
            let of = |n: f32| n * n.max(1.0).log2();
            (0..=SAMPLE).map(|n| of(n as f32)).collect()
        });
        /// Contexts.
        const TOGETHER: usize = 4;
        let elements = child.len() / self.element.width();
        let (mut symbols, mut lows) = ([0; SAMPLE], [0; 2 * SAMPLE]);
        self.tokenise(
            path,
            known,
            child,
            &mut Tokens {
                seen: 0,
                symbols: &mut symbols[..elements],
                lows: &mut lows[..elements * self.low as usize / 8],
                escaped: &mut Vec::new(),
            },
        );
        let mut counts = [[0usize; TOKENS]; CONTEXTS / TOGETHER];
        for symbol in &symbols[..elements] {
            let (context, token) = (*symbol as u16 as usize / TOKENS, *symbol as usize % TOKENS);
            counts[context / TOGETHER % counts.len()][token] += 1;
        }
        let mut bits = (elements as u32 * self.low) as f32;
        for counts in &counts {
            bits += LOGS[counts.iter().sum::<usize>()];
            for (token, &count) in counts.iter().enumerate() {
                let token = token as u32;
                let stored = if token == ESCAPE {
                    self.element.bits()
                } else {
                    self.raw_bits(token)
                };
                bits += (count as u32 * stored) as f32 - LOGS[count];
            }
        }
        bits
    }
}
