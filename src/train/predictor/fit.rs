//! A straight line through the last gradients, by weighted least squares.

use crate::gradient::Gradient;

/// The weight of a gradient in the fit by least squares, relative to the gradient after it.
pub(super) const AGE: f64 = 0.95;

/// Sums of a weighted fit of a straight line g(t) = a + b t to the gradients, by normal equations.
/// t is 0 at the last gradient.
#[derive(Debug, Default)]
pub(super) struct Fit {
    /// Σ w, Σ w t, Σ w t².
    pub(super) sums: [f64; 3],
    /// Σ w g and Σ w t g.
    pub(super) gradients: Option<[Gradient; 2]>,
}

impl Fit {
    /// Takes the gradient of the next step: the earlier ones are a step older, and weigh less.
    pub(super) fn take(&mut self, gradient: &Gradient) {
        let [ones, times, squares] = self.sums;
        self.sums = [
            AGE * ones + 1.0,
            AGE * (times - ones),
            AGE * (squares - 2.0 * times + ones),
        ];
        self.gradients = Some(match self.gradients.take() {
            Some([value, slope]) => {
                let older = slope.add(value.clone().scale(-1.0)).scale(AGE);
                [value.scale(AGE).add(gradient.clone()), older]
            }
            None => [gradient.clone(), gradient.clone().scale(0.0)],
        });
    }

    /// a + b of the line: its value a step after the last gradient. With one gradient the line is
    /// flat.
    pub(super) fn next(&self) -> Option<Gradient> {
        let [value, slope] = self.gradients.as_ref()?;
        let [ones, times, squares] = self.sums;
        let determinant = ones * squares - times * times;
        if determinant < 1e-9 {
            return Some(value.clone().scale(1.0 / ones));
        }
        let value = value.clone().scale((squares - times) / determinant);
        let slope = slope.clone().scale((ones - times) / determinant);
        Some(value.add(slope))
    }
}
