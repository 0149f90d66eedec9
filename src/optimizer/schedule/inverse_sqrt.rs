//! The inverse square root of the step, scaled so that it starts at the peak (Vaswani et al.,
//! 2017). It has no floor, and its value at the last step depends on the length of the run.

use super::Span;

/// Share of the peak after warm-up.
pub(super) fn share(span: &Span, step: u64) -> f64 {
    ((span.warmup + 1) as f64 / (step + 1) as f64).sqrt()
}
