//! What comes after the output head.

use burn::tensor::Tensor;
use burn::tensor::activation::softmax;

use crate::config::EraOutput;

/// ERA of logits `[rows, vocab]`, f32, minus the least of each row, which has no gradient. See
/// [`EraOutput`] for the formula.
///
/// # Panics
/// Where the bound on the entropy is outside its limits for this vocabulary; the decoder's
/// specification has been checked for that.
pub(super) fn era(logits: Tensor<2>, era: EraOutput) -> Tensor<2> {
    let vocab = logits.dims()[1];
    let constants = era.constants(vocab).expect("a bound that was checked");
    let shares = softmax(logits, 1) * constants.slope + constants.offset;
    // Rounding can take a share above its largest value, but not to 1/e, where u would be 0.
    let u = -shares.log() - 1.0;
    let logits = -(u.clone() * 2.0).sqrt() - u * 0.75;
    let least = logits.clone().detach().min_dim(1);
    logits - least
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn reference(z: &[f64], min_entropy: f64) -> Vec<f64> {
        let constants = EraOutput { min_entropy }.constants(z.len()).unwrap();
        let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = z.iter().map(|z| (z - most).exp()).sum();
        let all: Vec<f64> = z
            .iter()
            .map(|z| {
                let share = constants.slope * (z - most).exp() / sum + constants.offset;
                let u = -1.0 - share.ln();
                -1.0 - (2.0 * u).sqrt() - 0.75 * u
            })
            .collect();
        let least = all.iter().copied().fold(f64::INFINITY, f64::min);
        all.into_iter().map(|z| z - least).collect()
    }

    fn tensor(values: &[f64], device: &Device) -> Tensor<2> {
        let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        let dims = [1, values.len()];
        Tensor::from_data(TensorData::new(values, dims), device)
    }

    fn floats(tensor: Tensor<2>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    /// Logits that differ, some by much.
    fn samples(scale: f64) -> Vec<f64> {
        (0..37)
            .map(|i| scale * ((i * 29 % 37) as f64 / 18.0 - 1.0))
            .collect()
    }

    #[test]
    fn o3_era_is_the_formula_and_stays_finite() {
        for (scale, min_entropy) in [(0.01, 1.0), (3.0, 0.5), (30.0, 2.0), (1e4, 1.0)] {
            let z = samples(scale);
            let found = floats(era(tensor(&z, &Device::flex()), EraOutput { min_entropy }));
            for (found, expected) in found.iter().zip(reference(&z, min_entropy)) {
                assert!(
                    (found - expected).abs() < 1e-4,
                    "{scale}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn o3_the_gradient_of_era_is_a_difference() {
        let device = Device::flex().autodiff();
        let min_entropy = 1.0;
        for scale in [0.5, 4.0, 1e4] {
            let z = samples(scale);
            // They add up to 0, so what is subtracted from all logits does not count.
            let weights: Vec<f64> = (0..37).map(|i| f64::from(i * 7 % 37 - 18)).collect();
            assert_eq!(weights.iter().sum::<f64>(), 0.0);
            let leaf = tensor(&z, &device).require_grad();
            let sum =
                (era(leaf.clone(), EraOutput { min_entropy }) * tensor(&weights, &device)).sum();
            let gradient = floats(leaf.grad(&sum.backward()).unwrap());
            let value = |i: usize, change: f64| {
                let mut z = z.clone();
                z[i] += change;
                let all = reference(&z, min_entropy);
                all.iter().zip(&weights).map(|(z, w)| z * w).sum::<f64>()
            };
            for (i, found) in gradient.into_iter().enumerate() {
                let expected = (value(i, 1e-5) - value(i, -1e-5)) / 2e-5;
                let error = (found - expected).abs();
                assert!(
                    error < 1e-3 * (1.0 + expected.abs()),
                    "{scale}: {found} {expected}"
                );
            }
        }
    }
}
