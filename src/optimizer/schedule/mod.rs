//! The learning rate as a function of the step. Each schedule is one file;
//! [`Schedule::learning_rate`] has the table of them.

mod constant;
mod cosine;
mod inverse_sqrt;
mod linear;
mod linear_to_zero;
mod polynomial;
mod wsd;

use crate::config::{Decay, Warmup};

/// Learning rate over a run of known length. Steps count from 0; the schedule is stepped once per
/// optimizer step.
///
/// Warm-up rises in equal steps and reaches the peak at step `warmup`; decay ends exactly at the
/// last step, or one step after it if it ends at 0 ([`Decay::LinearToZero`]).
///
/// ```
/// use firebrick::config::{Decay, Warmup};
/// use firebrick::optimizer::Schedule;
///
/// let schedule = Schedule::new(1e-3, &Decay::Cosine, &Warmup::Steps(10), 0.1, 100);
/// assert_eq!(schedule.learning_rate(10), 1e-3);
/// assert!((schedule.learning_rate(99) - 1e-4).abs() < 1e-12);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    peak: f64,
    decay: Decay,
    span: Span,
}

impl Schedule {
    /// A schedule over `steps` optimizer steps with the given peak; `min_ratio` is the share of the
    /// peak left at the last step.
    pub fn new(peak: f64, decay: &Decay, warmup: &Warmup, min_ratio: f64, steps: u64) -> Self {
        let warmup = match *warmup {
            Warmup::Steps(warmup) => warmup,
            Warmup::Ratio(ratio) => (ratio * steps as f64).round() as u64,
        };
        Self {
            peak,
            decay: decay.clone(),
            span: Span {
                warmup,
                floor: min_ratio,
                steps,
            },
        }
    }

    /// Steps before the peak.
    pub fn warmup_steps(&self) -> u64 {
        self.span.warmup
    }

    /// The learning rate of the given step, counted from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let span = &self.span;
        if step < span.warmup {
            return self.peak * (step + 1) as f64 / (span.warmup + 1) as f64;
        }
        let share = match self.decay {
            Decay::Constant => constant::share(),
            Decay::Linear => linear::share(span, step),
            Decay::LinearToZero => linear_to_zero::share(span, step),
            Decay::Cosine => cosine::share(span, step),
            Decay::Wsd { ratio, shape } => wsd::share(span, step, ratio, shape),
            Decay::Polynomial { power } => polynomial::share(span, step, power),
            Decay::InverseSqrt => inverse_sqrt::share(span, step),
        };
        self.peak * share
    }
}

/// The length, warm-up and floor that all schedules share.
#[derive(Debug, Clone, PartialEq)]
struct Span {
    /// Steps before the peak.
    warmup: u64,
    /// Share of the peak that is left at the last step.
    floor: f64,
    /// Steps of the run.
    steps: u64,
}

impl Span {
    /// 0 up to step `from`, 1 from the last step on, a straight line between.
    fn progress(&self, step: u64, from: u64) -> f64 {
        if step <= from {
            return 0.0;
        }
        let span = self.last().saturating_sub(from).max(1);
        ((step - from) as f64 / span as f64).min(1.0)
    }

    fn last(&self) -> u64 {
        self.steps.saturating_sub(1)
    }

    /// Maps a share that falls from 1 to 0 to one that falls from 1 to the floor.
    fn floored(&self, share: f64) -> f64 {
        self.floor + (1.0 - self.floor) * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DecayShape;

    fn schedule(decay: Decay, warmup: u64, floor: f64) -> Schedule {
        Schedule::new(2.0, &decay, &Warmup::Steps(warmup), floor, 101)
    }

    #[test]
    fn r8_step_0_end_of_warmup_and_last_step() {
        let wsd = |shape| Decay::Wsd { ratio: 0.2, shape };
        // decay, learning rate at the last step with a floor of 0.1
        let table = [
            (Decay::Constant, 2.0),
            (Decay::Linear, 0.2),
            (Decay::LinearToZero, 2.0 / 91.0),
            (Decay::Cosine, 0.2),
            (Decay::Polynomial { power: 2.0 }, 0.2),
            (Decay::InverseSqrt, 2.0 * (11.0f64 / 101.0).sqrt()),
            (wsd(DecayShape::Linear), 0.2),
            (wsd(DecayShape::Sqrt), 0.2),
            (wsd(DecayShape::Cosine), 0.2),
        ];
        for (decay, last) in table {
            let schedule = schedule(decay.clone(), 10, 0.1);
            assert!(
                (schedule.learning_rate(0) - 2.0 / 11.0).abs() < 1e-12,
                "{decay:?}"
            );
            assert!(
                (schedule.learning_rate(9) - 20.0 / 11.0).abs() < 1e-12,
                "{decay:?}"
            );
            assert_eq!(schedule.learning_rate(10), 2.0, "{decay:?}");
            assert!(
                (schedule.learning_rate(100) - last).abs() < 1e-12,
                "{decay:?}"
            );
        }
    }

    #[test]
    fn r8_midpoints() {
        assert!((schedule(Decay::Linear, 0, 0.0).learning_rate(50) - 1.0).abs() < 1e-12);
        assert!(
            (schedule(Decay::Cosine, 0, 0.0).learning_rate(25) - (1.0 + 0.5f64.sqrt())).abs()
                < 1e-12
        );
        let polynomial = schedule(Decay::Polynomial { power: 2.0 }, 0, 0.0);
        assert!((polynomial.learning_rate(50) - 0.5).abs() < 1e-12);
        let wsd = schedule(
            Decay::Wsd {
                ratio: 0.2,
                shape: DecayShape::Linear,
            },
            0,
            0.0,
        );
        assert_eq!(wsd.learning_rate(80), 2.0);
        assert!((wsd.learning_rate(90) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn r8_no_warmup_starts_at_the_peak_and_never_rises_after_it() {
        for decay in [Decay::Linear, Decay::Cosine, Decay::InverseSqrt] {
            let schedule = schedule(decay, 0, 0.0);
            assert_eq!(schedule.learning_rate(0), 2.0);
            let rates: Vec<f64> = (0..101).map(|step| schedule.learning_rate(step)).collect();
            assert!(rates.windows(2).all(|pair| pair[1] <= pair[0]));
        }
    }

    #[test]
    fn r8_linear_to_zero_is_zero_after_the_last_step() {
        for warmup in [0, 10, 101] {
            let schedule = schedule(Decay::LinearToZero, warmup, 0.1);
            assert_eq!(schedule.learning_rate(101), 0.0);
            assert!(schedule.learning_rate(100) > 0.0);
            let falls = warmup..102;
            let rates: Vec<f64> = falls.map(|step| schedule.learning_rate(step)).collect();
            let steps: Vec<f64> = rates.windows(2).map(|pair| pair[0] - pair[1]).collect();
            assert!(steps.iter().all(|step| (step - steps[0]).abs() < 1e-12));
        }
    }

    #[test]
    fn r8_a_run_of_one_step_has_a_learning_rate() {
        let schedule = Schedule::new(1.0, &Decay::Cosine, &Warmup::Ratio(0.1), 0.0, 1);
        assert_eq!(schedule.learning_rate(0), 1.0);
    }
}
