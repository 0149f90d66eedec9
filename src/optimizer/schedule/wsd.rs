//! Warm-up, stable, decay (Hu et al., 2024): the peak, then a decay at the end of the run.

use super::Span;
use super::cosine::half_cosine;
use crate::config::DecayShape;

/// Share of the peak after warm-up; the decay takes `ratio` of the run.
pub(super) fn share(span: &Span, step: u64, ratio: f64, shape: DecayShape) -> f64 {
    let decay_steps = (ratio * span.steps as f64).round() as u64;
    let last_at_peak = span.last().saturating_sub(decay_steps).max(span.warmup);
    let x = span.progress(step, last_at_peak);
    span.floored(match shape {
        DecayShape::Linear => 1.0 - x,
        DecayShape::Sqrt => 1.0 - x.sqrt(),
        DecayShape::Cosine => half_cosine(x),
    })
}
