//! What a step of Adam leads to, predicted from what it leaves: g from both first moments, v' from g, p' from m' and v'.
//!
//! m' = b1 m + (1 - b1) g is kept exactly; from it g comes back to within the rounding of m', and with it v' = b2 v +
//! (1 - b2) g² almost always to the last bit. The parameter's update is a function of m' and v' alone. All of it is
//! computed in f32, operation by operation as the optimizer does it, so that where it runs on the same kind of processor
//! nothing is left to be said of p'; what differs elsewhere is told as a difference from the prediction.

use crate::panel::Path;
use crate::vector::vectorised;

/// How an optimizer orders its operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// p (1 - lr wd) - lr (m' / c1) / (√(v' / c2) + eps): burn 0.22's AdamW.
    AdamW,
    /// p - lr (m' √c2 / c1) / (√v' + eps √c2): burn 0.22's Adam.
    Adam,
}

/// One step of one group of parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// How it is computed.
    pub arithmetic: Arithmetic,
    /// Decay of the mean of gradients.
    pub beta_1: f32,
    /// Decay of the mean of their squares.
    pub beta_2: f32,
    /// 1 - b1^t, as the optimizer computed it.
    pub correction_1: f32,
    /// 1 - b2^t, as the optimizer computed it.
    pub correction_2: f32,
    /// Added to the denominator.
    pub epsilon: f32,
    /// Of this step.
    pub learning_rate: f32,
    /// 1 - lr wd.
    pub decay: f32,
}

impl AdamStep {
    /// b1 m: where m' would be without a gradient.
    pub fn first(&self, first: &[u8]) -> Vec<u8> {
        let mut out = vec![0; first.len()];
        scaled(Path::detect(), self.beta_1, first, &mut out);
        out
    }

    /// v', from m, m' and v.
    pub fn second(&self, [first, new_first, second]: [&[u8]; 3]) -> Vec<u8> {
        let mut out = vec![0; second.len()];
        seconds(Path::detect(), *self, [first, new_first, second], &mut out);
        out
    }

    /// p', from p, m' and v'.
    pub fn parameter(&self, [parameter, new_first, new_second]: [&[u8]; 3]) -> Vec<u8> {
        let mut out = vec![0; parameter.len()];
        parameters(
            Path::detect(),
            *self,
            [parameter, new_first, new_second],
            &mut out,
        );
        out
    }
}

#[inline(always)]
fn floats(bytes: &[u8]) -> &[[u8; 4]] {
    bytes.as_chunks().0
}

vectorised! {
    fn scaled(factor: f32, values: &[u8], out: &mut [u8]) {
        for (out, value) in out.as_chunks_mut().0.iter_mut().zip(floats(values)) {
            *out = (f32::from_le_bytes(*value) * factor).to_le_bytes();
        }
    }

    fn seconds(step: AdamStep, of: [&[u8]; 3], out: &mut [u8]) {
        let [first, new_first, second] = of.map(floats);
        let (share_1, share_2) = (1.0 - step.beta_1, 1.0 - step.beta_2);
        let moments = first.iter().zip(new_first).zip(second);
        for (out, ((first, new_first), second)) in out.as_chunks_mut().0.iter_mut().zip(moments) {
            let kept = f32::from_le_bytes(*first) * step.beta_1;
            let gradient = (f32::from_le_bytes(*new_first) - kept) / share_1;
            let square = gradient * gradient;
            let new_second = f32::from_le_bytes(*second) * step.beta_2 + square * share_2;
            *out = new_second.to_le_bytes();
        }
    }

    fn parameters(step: AdamStep, of: [&[u8]; 3], out: &mut [u8]) {
        let [parameter, first, second] = of.map(floats);
        let root = step.correction_2.sqrt();
        let factor = root / step.correction_1;
        let small = step.epsilon * root;
        let values = parameter.iter().zip(first).zip(second);
        for (out, ((parameter, first), second)) in out.as_chunks_mut().0.iter_mut().zip(values) {
            let [parameter, first, second] = [parameter, first, second].map(|bytes| f32::from_le_bytes(*bytes));
            let change = match step.arithmetic {
                Arithmetic::AdamW => {
                    let root = (second / step.correction_2).sqrt();
                    (first / step.correction_1) / (root + step.epsilon)
                }
                Arithmetic::Adam => (first * factor) / (second.sqrt() + small),
            };
            *out = (parameter * step.decay - change * step.learning_rate).to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
        values.into_iter().flat_map(f32::to_le_bytes).collect()
    }

    /// Against the textbook in f64.
    #[test]
    fn d4_predictions_are_what_adam_does() {
        let count = 1003;
        let wave = |i: usize, by: f64| ((i as f64 + 0.5) * by).sin();
        for arithmetic in [Arithmetic::AdamW, Arithmetic::Adam] {
            let (b1, b2, t, lr, eps) = (0.9f64, 0.99f64, 7, 1e-3, 1e-8);
            let wd = if arithmetic == Arithmetic::AdamW {
                0.1
            } else {
                0.0
            };
            let step = AdamStep {
                arithmetic,
                beta_1: b1 as f32,
                beta_2: b2 as f32,
                correction_1: (1.0 - b1.powi(t)) as f32,
                correction_2: (1.0 - b2.powi(t)) as f32,
                epsilon: eps as f32,
                learning_rate: lr as f32,
                decay: (1.0 - lr * wd) as f32,
            };
            let p = |i| 0.02 * wave(i, 12.9898);
            let (m, v) = (|i| 1e-3 * wave(i, 78.233), |i| 1e-6 * (1.1 + wave(i, 3.7)));
            let g = |i| 2e-3 * wave(i, 0.77);
            let new_m = |i| b1 * m(i) + (1.0 - b1) * g(i);
            let new_v = |i| b2 * v(i) + (1.0 - b2) * g(i) * g(i);
            let of = |f: &dyn Fn(usize) -> f64| bytes((0..count).map(|i| f(i) as f32));
            let (first, new_first) = (of(&m), of(&new_m));
            let near = |found: &[u8], expected: &dyn Fn(usize) -> f64, within: f64| {
                for (i, found) in floats(found).iter().enumerate() {
                    let (found, expected) = (f64::from(f32::from_le_bytes(*found)), expected(i));
                    assert!(
                        (found - expected).abs() <= within,
                        "{i}: {found} {expected}"
                    );
                }
            };
            near(&step.first(&first), &|i| b1 * m(i), 1e-10);
            let second = step.second([&first, &new_first, &of(&v)]);
            near(&second, &new_v, 1e-11);
            let change = |i| {
                let (m, v) = (new_m(i) / (1.0 - b1.powi(t)), new_v(i) / (1.0 - b2.powi(t)));
                p(i) - lr * (m / (v.sqrt() + eps) + wd * p(i))
            };
            near(
                &step.parameter([&of(&p), &new_first, &of(&new_v)]),
                &change,
                1e-8,
            );
        }
    }
}
