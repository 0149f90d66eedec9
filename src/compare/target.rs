//! Time to a target: where a validation curve first comes down to a loss.

use serde::{Deserialize, Serialize};

use crate::train::CoursePoint;

/// Where a run reached a target.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reached", rename_all = "snake_case")]
pub enum Reach {
    /// Between two evaluations, or at one.
    At(Costs),
    /// Before the first evaluation, which is given: the run was at the target by then. A ratio is
    /// not computed from it.
    ByFirstEvaluation(Costs),
    /// Never.
    Not,
}

/// What a run had used by some moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Seconds of training steps.
    pub seconds: f64,
    /// Optimizer steps.
    pub steps: f64,
    /// Trained tokens.
    pub tokens: f64,
    /// Forward-backward passes.
    pub backward_passes: f64,
    /// Multiplications and additions, by the forecast.
    pub flops: f64,
}

impl From<&CoursePoint> for Costs {
    fn from(point: &CoursePoint) -> Self {
        Self {
            seconds: point.cost.train_seconds,
            steps: point.step as f64,
            tokens: point.tokens as f64,
            backward_passes: point.cost.backward_passes as f64,
            flops: point.cost.flops,
        }
    }
}

impl Costs {
    /// The costs at a share of the way to later ones.
    fn towards(self, later: Self, share: f64) -> Self {
        let between = |a: f64, b: f64| a + share * (b - a);
        Self {
            seconds: between(self.seconds, later.seconds),
            steps: between(self.steps, later.steps),
            tokens: between(self.tokens, later.tokens),
            backward_passes: between(self.backward_passes, later.backward_passes),
            flops: between(self.flops, later.flops),
        }
    }
}

impl Reach {
    /// The costs, if a ratio can be computed from them.
    pub fn exact(&self) -> Option<Costs> {
        match self {
            Self::At(costs) => Some(*costs),
            Self::ByFirstEvaluation(_) | Self::Not => None,
        }
    }
}

/// Where evaluations in order first come down to a target, linearly between two of them. An
/// evaluation that is not a number is passed over.
///
/// ```
/// use firebrick::checkpoint::Cost;
/// use firebrick::compare::{Reach, reach};
/// use firebrick::train::CoursePoint;
///
/// let point = |step: u64, loss: f64| CoursePoint {
///     step,
///     tokens: 64 * step,
///     cost: Cost { train_seconds: 0.5 * step as f64, ..Cost::default() },
///     val_loss: Some(loss),
/// };
/// let curve = [point(10, 4.0), point(20, 3.0), point(30, 3.5), point(40, 2.0)];
/// let Reach::At(costs) = reach(&curve, 3.25) else { panic!() };
/// assert_eq!((costs.steps, costs.seconds), (17.5, 8.75));
/// assert_eq!(reach(&curve, 1.0), Reach::Not);
/// ```
pub fn reach(evaluations: &[CoursePoint], target: f64) -> Reach {
    let mut before: Option<(Costs, f64)> = None;
    for point in evaluations {
        let Some(loss) = point.val_loss.filter(|loss| loss.is_finite()) else {
            continue;
        };
        let costs = Costs::from(point);
        if loss <= target {
            return match before {
                None if loss == target => Reach::At(costs),
                None => Reach::ByFirstEvaluation(costs),
                Some((earlier, above)) => {
                    Reach::At(earlier.towards(costs, (above - target) / (above - loss)))
                }
            };
        }
        before = Some((costs, loss));
    }
    Reach::Not
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Cost;

    fn curve(losses: &[Option<f64>]) -> Vec<CoursePoint> {
        let points = losses.iter().enumerate().map(|(index, &val_loss)| {
            let step = 10 * (index as u64 + 1);
            CoursePoint {
                step,
                tokens: 100 * step,
                cost: Cost {
                    backward_passes: 2 * step,
                    flops: 1e3 * step as f64,
                    train_seconds: (step * step) as f64,
                    ..Cost::default()
                },
                val_loss,
            }
        });
        points.collect()
    }

    #[test]
    fn p3_the_time_to_a_target_is_interpolated_and_never_clamped() {
        let falling = curve(&[Some(4.0), Some(3.0), Some(2.0)]);
        let expected = Costs {
            seconds: 250.0,
            steps: 15.0,
            tokens: 1500.0,
            backward_passes: 30.0,
            flops: 15e3,
        };
        assert_eq!(reach(&falling, 3.5), Reach::At(expected));
        let Reach::At(last) = reach(&falling, 2.0) else {
            panic!()
        };
        assert_eq!(last, Costs::from(&falling[2]));
        assert_eq!(reach(&falling, 1.999), Reach::Not);
        let first = Costs::from(&falling[0]);
        assert_eq!(reach(&falling, 4.0), Reach::At(first));
        assert_eq!(reach(&falling, 4.5), Reach::ByFirstEvaluation(first));
        assert_eq!(reach(&[], 4.5), Reach::Not);
    }

    #[test]
    fn p3_the_first_crossing_counts_and_what_is_no_number_does_not() {
        let back = curve(&[Some(4.0), Some(2.0), Some(5.0), Some(1.0)]);
        let Reach::At(costs) = reach(&back, 3.0) else {
            panic!()
        };
        assert_eq!(costs.steps, 15.0);
        let gap = curve(&[Some(4.0), None, Some(2.0)]);
        let Reach::At(costs) = reach(&gap, 3.0) else {
            panic!()
        };
        assert_eq!(costs.steps, 20.0);
    }
}
