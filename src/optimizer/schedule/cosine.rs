//! Half a cosine from the peak to the floor (Loshchilov and Hutter, 2017, without restarts).

use std::f64::consts::PI;

use super::Span;

/// Share of the peak after warm-up.
pub(super) fn share(span: &Span, step: u64) -> f64 {
    span.floored(half_cosine(span.progress(step, span.warmup)))
}

/// Falls from 1 at 0 to 0 at 1.
pub(super) fn half_cosine(x: f64) -> f64 {
    0.5 * (1.0 + (PI * x).cos())
}
