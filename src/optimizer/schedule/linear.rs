//! A straight line from the peak to the floor.

use super::Span;

/// Share of the peak after warm-up.
pub(super) fn share(span: &Span, step: u64) -> f64 {
    span.floored(1.0 - span.progress(step, span.warmup))
}
