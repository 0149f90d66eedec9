//! The largest singular directions of a matrix.
//!
//! Subspace iteration from a random start (Halko, Martinsson and Tropp, 2011, algorithm 4.4): a few
//! more columns than are wanted, multiplied by W and Wᵀ in turn and made orthogonal in between; then
//! the small matrix that W is on that subspace is decomposed exactly. The cost is that of some
//! products with a narrow matrix, where an exact decomposition takes minutes for a large model.

use burn::linalg::svd;
use burn::tensor::{Device, Tensor, TensorData};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// Columns beyond those that are wanted.
const MORE: usize = 10;
/// Times W and Wᵀ are applied; PEFT's fast form of PiSSA takes four to sixteen.
const ROUNDS: usize = 16;
/// Sweeps that the exact decomposition may take for each singular value.
const SWEEPS: usize = 60;

/// U √S `[in, rank]` and √S Vᵀ `[rank, out]` of the `rank` largest singular values of W `[in, out]`,
/// f32 on a plain device: their product is the best approximation of W of that rank. Directions that
/// W does not have are zero. A function of W, `rank` and `seed`.
pub(crate) fn largest_factors(w: &Tensor<2>, rank: usize, seed: u64) -> [Tensor<2>; 2] {
    let ([inputs, outputs], device) = (w.dims(), w.device());
    let width = (rank + MORE).min(inputs).min(outputs);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let start: Vec<f32> = StandardNormal
        .sample_iter(&mut rng)
        .take(outputs * width)
        .collect();
    let start = Tensor::from_data(TensorData::new(start, [outputs, width]), &device);
    let mut basis = orthonormal(w.clone().matmul(start), &device);
    for _ in 0..ROUNDS {
        let back = orthonormal(w.clone().transpose().matmul(basis), &device);
        basis = orthonormal(w.clone().matmul(back), &device);
    }
    // W ≈ Q Qᵀ W.
    let small = basis.clone().transpose().matmul(w.clone());
    let (u, s, vt) = svd::<2, 1>(small, SWEEPS);
    let root = s.clamp_min(0.0).sqrt();
    let left = basis.matmul(u) * root.clone().unsqueeze_dim(0);
    let right = vt * root.unsqueeze_dim(1);
    let kept = rank.min(width);
    let (left, right) = (left.narrow(1, 0, kept), right.narrow(0, 0, kept));
    if kept == rank {
        return [left, right];
    }
    // More directions were asked for than a matrix of this size has.
    [
        Tensor::cat(vec![left, Tensor::zeros([inputs, rank - kept], &device)], 1),
        Tensor::cat(
            vec![right, Tensor::zeros([rank - kept, outputs], &device)],
            0,
        ),
    ]
}

/// The columns of `y` `[n, k]` made orthonormal, twice, in f64: once loses what rounding leaves of
/// the columns before. A column that depends on those before it becomes zero.
fn orthonormal(y: Tensor<2>, device: &Device) -> Tensor<2> {
    let [n, k] = y.dims();
    let values = y.transpose().into_data();
    let mut columns: Vec<Vec<f64>> = values
        .iter::<f32>()
        .map(f64::from)
        .collect::<Vec<f64>>()
        .chunks(n.max(1))
        .map(<[f64]>::to_vec)
        .collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for i in 0..columns.len() {
        let (before, rest) = columns.split_at_mut(i);
        let column = &mut rest[0];
        let length = dot(column, column).sqrt();
        for _ in 0..2 {
            for other in before.iter() {
                let along = dot(other, column);
                column
                    .iter_mut()
                    .zip(other)
                    .for_each(|(c, o)| *c -= along * o);
            }
        }
        let left = dot(column, column).sqrt();
        let factor = if left > 1e-7 * length {
            1.0 / left
        } else {
            0.0
        };
        column.iter_mut().for_each(|value| *value *= factor);
    }
    let flat: Vec<f32> = columns
        .iter()
        .flatten()
        .map(|&value| value as f32)
        .collect();
    Tensor::<2>::from_data(TensorData::new(flat, [k, n]), device).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, cols: usize, seed: u64) -> Tensor<2> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values: Vec<f32> = StandardNormal
            .sample_iter(&mut rng)
            .take(rows * cols)
            .collect();
        Tensor::from_data(TensorData::new(values, [rows, cols]), &Device::flex())
    }

    fn norm(x: Tensor<2>) -> f64 {
        let data = x.into_data();
        data.iter::<f32>()
            .map(|value| f64::from(value).powi(2))
            .sum::<f64>()
            .sqrt()
    }

    #[test]
    fn a3_the_approximation_is_the_best_of_its_rank() {
        for (rows, cols, rank) in [(40, 70, 5), (90, 30, 8), (33, 33, 1), (7, 50, 7), (5, 6, 9)] {
            let w = random(rows, cols, 3);
            let (_, s, _) = svd::<2, 1>(w.clone(), SWEEPS);
            let s: Vec<f32> = s.into_data().iter::<f32>().collect();
            let beyond = s.iter().skip(rank);
            let best = beyond
                .map(|&value| f64::from(value).powi(2))
                .sum::<f64>()
                .sqrt();
            let [a, b] = largest_factors(&w, rank, 1);
            assert_eq!((a.dims(), b.dims()), ([rows, rank], [rank, cols]));
            let found = norm(w.clone() - a.matmul(b));
            // A random matrix is the hardest: its singular values are all alike.
            assert!(found < best * 1.002 + 1e-4, "{rows}x{cols}: {found} {best}");
        }
    }

    #[test]
    fn a3_directions_that_are_not_there_are_zero() {
        let w = random(30, 2, 1).matmul(random(2, 20, 2));
        let [a, b] = largest_factors(&w, 4, 1);
        assert!(norm(w.clone() - a.clone().matmul(b)) < 1e-4);
        assert!(norm(a.narrow(1, 2, 2)) < 1e-2);
        let zero = Tensor::zeros([6, 5], &Device::flex());
        let [a, b] = largest_factors(&zero, 2, 1);
        assert_eq!((norm(a), norm(b)), (0.0, 0.0));
    }
}
