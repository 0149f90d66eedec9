//! A straight line that reaches 0 after the last step (Bergsma et al., 2025, "Straight to Zero"). Every step of
//! the run has a learning rate above 0.

use super::Span;

/// Share of the peak after warm-up.
pub(super) fn share(span: &Span, step: u64) -> f64 {
    let left = span.steps.saturating_sub(step);
    let all = span.steps.saturating_sub(span.warmup).max(1);
    left as f64 / all as f64
}
