//! A power of the remaining share of the run.

use super::Span;

/// Share of the peak after warm-up.
pub(super) fn share(span: &Span, step: u64, power: f64) -> f64 {
    span.floored((1.0 - span.progress(step, span.warmup)).powf(power))
}
