//! Velvet: one factor on the learning rate of all parameters, from how the loss and the norm of the gradient
//! stand to their own trends. The rule below it is AdamW's.
//!
//! Each signal has a trend, a level and a slope (Holt, 1957: double exponential smoothing), that foretells the
//! next value. The share by which a value exceeds what was foretold, at most 1 either way, goes into a running
//! mean. A run that goes on as it did has a mean of about 0, whether its loss falls or not. With
//! e the mean of all signals' means, the factor is bound^(-tanh(10 e)): below 1 while the loss or the
//! norm is above its trend, above 1 while it is below, and never outside [1 / bound, bound].
//!
//! The entropy of the output is no signal: the loss is computed in chunks that keep no probabilities, so that it
//! would take another pass over the logits.

use std::collections::BTreeMap;

use super::{OptimizerError, OptimizerState, StateScalar, StepFacts};
use crate::config::{OptimizerPlan, VelvetPlan, VelvetSignal};

/// The family of the state, and its path among those of the parameters.
pub(super) const VELVET: &str = "velvet";

/// How much of the bound an excess takes: tanh(1) of it at a tenth.
const GAIN: f64 = 10.0;

/// The names of a trend's numbers.
const PARTS: [&str; 3] = ["level", "slope", "excess"];
const FACTOR: &str = "factor";

/// The signals and their state.
#[derive(Debug, Clone)]
pub(super) struct Velvet {
    plan: VelvetPlan,
    /// None before the first value of the signal.
    trends: BTreeMap<VelvetSignal, Trend>,
    /// The factor of the last step.
    factor: f64,
}

/// What a signal is expected to be next, and by which share it exceeded that lately.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Trend {
    level: f64,
    slope: f64,
    excess: f64,
}

impl Trend {
    fn new(value: f64) -> Self {
        Self {
            level: value,
            slope: 0.0,
            excess: 0.0,
        }
    }

    fn with(self, value: f64, smoothing: f64) -> Self {
        let foretold = self.level + self.slope;
        let more = value - foretold;
        let share = (more / foretold.abs().max(f64::MIN_POSITIVE)).clamp(-1.0, 1.0);
        let new = 1.0 - smoothing;
        let level = foretold + new * more;
        Self {
            level,
            slope: smoothing * self.slope + new * (level - self.level),
            excess: smoothing * self.excess + new * share,
        }
    }
}

fn name(signal: VelvetSignal, part: &str) -> String {
    let signal = match signal {
        VelvetSignal::Loss => "loss",
        VelvetSignal::GradientNorm => "gradient_norm",
    };
    format!("{VELVET}.{signal}.{part}")
}

impl Velvet {
    /// None for a plan of another rule.
    pub(super) fn of(plan: &OptimizerPlan) -> Option<Self> {
        let OptimizerPlan::Velvet { velvet, .. } = plan else {
            return None;
        };
        Some(Self {
            plan: velvet.clone(),
            trends: BTreeMap::new(),
            factor: 1.0,
        })
    }

    /// The factor of the last step.
    pub(super) fn factor(&self) -> f64 {
        self.factor
    }

    /// Takes a step's values in, and returns the factor of its learning rate. A signal whose value is not known
    /// has no say in it.
    pub(super) fn next(&mut self, facts: &StepFacts) -> f64 {
        let mut excesses = Vec::new();
        for &signal in &self.plan.signals {
            let value = match signal {
                VelvetSignal::Loss => facts.loss,
                VelvetSignal::GradientNorm => facts.grad_norm,
            };
            let Some(value) = value else { continue };
            let trend = match self.trends.get(&signal) {
                Some(trend) => trend.with(value, self.plan.smoothing),
                None => Trend::new(value),
            };
            self.trends.insert(signal, trend);
            excesses.push(trend.excess);
        }
        self.factor = if excesses.is_empty() {
            1.0
        } else {
            let mean = excesses.iter().sum::<f64>() / excesses.len() as f64;
            self.plan.bound.powf(-(GAIN * mean).tanh())
        };
        self.factor
    }

    /// Adds the state of the signals that have had a value.
    pub(super) fn save(&self, saved: &mut OptimizerState) {
        for (&signal, trend) in &self.trends {
            let numbers = [trend.level, trend.slope, trend.excess];
            for (part, number) in PARTS.iter().zip(numbers) {
                let number = StateScalar::Float(number);
                saved.scalars.insert(name(signal, part), number);
            }
        }
        if !self.trends.is_empty() {
            let factor = StateScalar::Float(self.factor);
            saved.scalars.insert(format!("{VELVET}.{FACTOR}"), factor);
            saved
                .families
                .insert(VELVET.to_string(), VELVET.to_string());
        }
    }

    /// The same signals with the state that `save` has saved, taken out of `saved`. Without any the signals begin
    /// anew.
    pub(super) fn loaded(&self, saved: &mut OptimizerState) -> Result<Self, OptimizerError> {
        let mut loaded = Self {
            trends: BTreeMap::new(),
            factor: 1.0,
            ..self.clone()
        };
        let is_own = |name: &String| name.starts_with("velvet.");
        let is_named = saved.families.remove(VELVET).is_some();
        if !is_named && !saved.scalars.keys().any(is_own) {
            return Ok(loaded);
        }
        let mut take = |name: String| match saved.scalars.remove(&name) {
            Some(StateScalar::Float(number)) if number.is_finite() => Ok(number),
            Some(_) => Err(OptimizerError::Unfit { name }),
            None => Err(OptimizerError::Incomplete {
                path: VELVET.to_string(),
                name,
            }),
        };
        for &signal in &self.plan.signals {
            let trend = Trend {
                level: take(name(signal, PARTS[0]))?,
                slope: take(name(signal, PARTS[1]))?,
                excess: take(name(signal, PARTS[2]))?,
            };
            loaded.trends.insert(signal, trend);
        }
        loaded.factor = take(format!("{VELVET}.{FACTOR}"))?;
        Ok(loaded)
    }

    /// The same rule that goes on with another's trends, as far as it has the same signals.
    pub(super) fn going_on(&self, before: &Self) -> Self {
        let mut trends = before.trends.clone();
        trends.retain(|signal, _| self.plan.signals.contains(signal));
        Self {
            trends,
            factor: before.factor,
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AdamWPlan;

    fn velvet(signals: &[VelvetSignal]) -> Velvet {
        let velvet = VelvetPlan {
            signals: signals.to_vec(),
            bound: 1.5,
            smoothing: 0.9,
            sparse: false,
        };
        let adamw = AdamWPlan::new([0.9, 0.95], 1e-8, 0.1);
        Velvet::of(&OptimizerPlan::Velvet { velvet, adamw }).unwrap()
    }

    fn facts(loss: f64, grad_norm: f64) -> StepFacts {
        StepFacts {
            learning_rate: 1e-3,
            loss: Some(loss),
            grad_norm: Some(grad_norm),
        }
    }

    #[test]
    fn o2_without_signals_the_factor_is_one() {
        let mut velvet = velvet(&[]);
        for step in 0..20 {
            assert_eq!(velvet.next(&facts(f64::from(step), 1.0)), 1.0);
        }
    }

    #[test]
    fn o2_a_steady_fall_is_no_signal_and_a_rise_lowers_the_rate() {
        let mut velvet = velvet(&[VelvetSignal::Loss]);
        for step in 0..400 {
            velvet.next(&facts(4.0 - 0.005 * f64::from(step), 1.0));
        }
        assert!((velvet.factor() - 1.0).abs() < 1e-3, "{}", velvet.factor());
        for _ in 0..5 {
            velvet.next(&facts(4.0, 1.0));
        }
        assert!(velvet.factor() < 0.75, "{}", velvet.factor());
    }

    #[test]
    fn o2_the_factor_stays_within_its_bound() {
        let signals = [VelvetSignal::Loss, VelvetSignal::GradientNorm];
        let mut velvet = velvet(&signals);
        let mut extremes = [f64::INFINITY, 0.0f64];
        for step in 0..2000u32 {
            // Phases of rising and of falling values, with jumps of many orders of magnitude.
            let exponent = f64::from(step % 90) / 3.0;
            let value = if step / 90 % 2 == 0 {
                exponent
            } else {
                -exponent
            };
            let factor = velvet.next(&facts(value.exp(), (-value).exp()));
            extremes = [extremes[0].min(factor), extremes[1].max(factor)];
        }
        let [least, most] = extremes;
        assert!((1.0 / 1.5..1.0).contains(&least), "{least}");
        assert!(most <= 1.5, "{most}");
    }
}
