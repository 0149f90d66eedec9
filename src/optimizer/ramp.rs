//! Warm-up of a rule's number, such as beta2: it rises linearly over the first updates of a parameter.

use crate::config::Ramp;

/// The number as a function of the update.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Ramped {
    end: f32,
    ramp: Option<Ramp>,
    /// The products of the values of the first 0, 1, 2, ... updates, while they rise.
    products: Vec<f64>,
}

impl Ramped {
    pub(super) fn new(end: f64, ramp: Option<Ramp>) -> Self {
        let mut ramped = Self {
            end: end as f32,
            ramp,
            products: Vec::new(),
        };
        if let Some(ramp) = ramp {
            let mut product = 1.0;
            ramped.products.push(product);
            for update in 1..=ramp.steps {
                product *= f64::from(ramped.at(update));
                ramped.products.push(product);
            }
        }
        ramped
    }

    /// Whether there is no warm-up, so that every update has the same value.
    pub(super) fn is_constant(&self) -> bool {
        self.ramp.is_none()
    }

    /// The value in the given update, counted from 1.
    pub(super) fn at(&self, update: u64) -> f32 {
        let done = update.saturating_sub(1);
        match self.ramp {
            Some(Ramp { start, steps }) if done < steps => {
                let share = done as f64 / steps as f64;
                (start + (f64::from(self.end) - start) * share) as f32
            }
            _ => self.end,
        }
    }

    /// Bias correction of a running mean with this decay: 1 minus the product of the values of the
    /// updates up to and including this one. Without a ramp it is computed as burn 0.22 does, in f32.
    pub(super) fn correction(&self, update: u64) -> f32 {
        let power = |updates: u64| i32::try_from(updates).unwrap_or(i32::MAX);
        let Some(rising) = self.products.len().checked_sub(1) else {
            return 1.0 - self.end.powi(power(update));
        };
        let rising = (rising as u64).min(update);
        let rest = f64::from(self.end).powi(power(update - rising));
        (1.0 - self.products[rising as usize] * rest) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_rises_from_its_start_to_its_value() {
        let ramp = Ramp {
            start: 0.8,
            steps: 4,
        };
        let ramped = Ramped::new(0.9, Some(ramp));
        let expected = [0.8, 0.825, 0.85, 0.875, 0.9, 0.9, 0.9];
        for (done, expected) in expected.into_iter().enumerate() {
            let found = ramped.at(done as u64 + 1);
            assert!((f64::from(found) - expected).abs() < 1e-6, "{done}");
        }
        let flat = Ramped::new(0.9, None);
        assert_eq!((flat.at(1), flat.at(9)), (0.9, 0.9));
    }

    #[test]
    fn the_correction_is_one_minus_the_product_of_the_values() {
        let ramps = [
            None,
            Some(Ramp {
                start: 0.5,
                steps: 3,
            }),
        ];
        for ramp in ramps {
            let ramped = Ramped::new(0.95, ramp);
            let mut product = 1.0;
            for update in 1..20 {
                product *= f64::from(ramped.at(update));
                let found = f64::from(ramped.correction(update));
                assert!((found - (1.0 - product)).abs() < 1e-6, "{ramp:?} {update}");
            }
        }
    }
}
