//! The nearest orthogonal matrix, approximately, by Newton-Schulz iterations.
//!
//! An iteration maps every singular value s of X to a s + b s³ + c s⁵ and leaves the singular vectors alone:
//! X <- (a I + b A + c A²) X with A = X Xᵀ. All products with A are on the smaller side of the matrix. Where the
//! matrix is long, only A is iterated (A <- Q A Q with Q = a I + b A + c A²), the Qs are multiplied up, and
//! X is multiplied once, at the end: for sides of r n and n this takes about (4 r + 34) n³ multiplications and
//! additions, and iterating X itself (20 r + 10) n³.

use burn::tensor::Tensor;

use crate::config::NewtonSchulz;

/// a, b and c of one iteration.
type Quintic = [f64; 3];

/// Jordan et al., 2024: the steepest slope at 0 that keeps singular values near 1.
const JORDAN: Quintic = [3.4445, -4.775, 2.0315];

/// Amsel et al., 2025 (arXiv 2505.16932), for singular values from 0.001 to 1: each quintic is the best for the
/// interval that the one before leads to. `benches/peers/optimizer_reference.py` derives the numbers. All but the
/// last are made for values up to 1.01, so that rounding cannot lead out of the interval.
const POLAR_EXPRESS: [Quintic; ITERATIONS] = [
    [8.28721201814563, -23.595886519098837, 17.300387312530933],
    [4.107059111542203, -2.9478499167379106, 0.5448431082926601],
    [3.9486908534822946, -2.908902115962949, 0.5518191394370137],
    [3.3184196573706015, -2.488488024314874, 0.51004894012372],
    [2.300652019954817, -1.6689039845747493, 0.4188073119525673],
];

const ITERATIONS: usize = 5;

/// The margin of Polar Express against rounding.
const SAFETY: f64 = 1.01;

/// Matrices whose sides differ by at least this factor are multiplied once, at the end.
const LONG: f64 = 1.5;

/// The norm of a matrix counts as at least this much.
const EPSILON: f64 = 1e-7;

impl NewtonSchulz {
    fn quintics(self) -> [Quintic; ITERATIONS] {
        match self {
            Self::Quintic => [JORDAN; ITERATIONS],
            Self::PolarExpress => {
                let mut quintics = POLAR_EXPRESS;
                let [before @ .., _] = &mut quintics;
                for [a, b, c] in before {
                    *a /= SAFETY;
                    *b /= SAFETY.powi(3);
                    *c /= SAFETY.powi(5);
                }
                quintics
            }
        }
    }

    /// The factor by which the norm is divided besides itself.
    fn margin(self) -> f64 {
        match self {
            Self::Quintic => 1.0,
            Self::PolarExpress => SAFETY,
        }
    }

    /// The matrix with its singular values brought near 1.
    pub(super) fn orthogonalized(self, x: Tensor<2>) -> Tensor<2> {
        let [rows, columns] = x.dims();
        let norm = x.clone().square().sum().sqrt().mul_scalar(self.margin());
        let x = x.div(norm.clamp_min(EPSILON).unsqueeze());
        let sides = [rows.min(columns), rows.max(columns)];
        let eye = Tensor::eye(sides[0], &x.device());
        let side = if rows <= columns {
            Side::Rows
        } else {
            Side::Columns
        };
        if sides[1] as f64 >= LONG * sides[0] as f64 {
            side.times(self.accumulated(side.gram(x.clone()), &eye), x)
        } else {
            self.quintics().into_iter().fold(x, |x, quintic| {
                side.times(polynomial(quintic, side.gram(x.clone()), &eye), x)
            })
        }
    }

    /// The product of all iterations' polynomials, from the Gram matrix before the first.
    fn accumulated(self, mut gram: Tensor<2>, eye: &Tensor<2>) -> Tensor<2> {
        let quintics = self.quintics();
        let mut product: Option<Tensor<2>> = None;
        for (i, quintic) in quintics.into_iter().enumerate() {
            let q = polynomial(quintic, gram.clone(), eye);
            if i + 1 < quintics.len() {
                gram = q.clone().matmul(gram).matmul(q.clone());
            }
            // All of these matrices are polynomials of the same one, and so they commute.
            product = Some(match product {
                Some(product) => product.matmul(q),
                None => q,
            });
        }
        // There is at least one iteration.
        product.unwrap_or_else(|| eye.clone())
    }
}

/// a I + b A + c A².
fn polynomial([a, b, c]: Quintic, gram: Tensor<2>, eye: &Tensor<2>) -> Tensor<2> {
    let inner = gram.clone().mul_scalar(c) + eye.clone().mul_scalar(b);
    gram.matmul(inner) + eye.clone().mul_scalar(a)
}

/// The smaller side of a matrix.
#[derive(Clone, Copy)]
enum Side {
    Rows,
    Columns,
}

impl Side {
    /// The products of all pairs of rows, or of columns.
    fn gram(self, x: Tensor<2>) -> Tensor<2> {
        let transposed = x.clone().transpose();
        match self {
            Self::Rows => x.matmul(transposed),
            Self::Columns => transposed.matmul(x),
        }
    }

    /// The matrix multiplied on this side by a symmetric one.
    fn times(self, symmetric: Tensor<2>, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Rows => symmetric.matmul(x),
            Self::Columns => x.matmul(symmetric),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    type Rows = Vec<Vec<f64>>;

    fn product(a: &Rows, b: &Rows) -> Rows {
        let columns = 0..b[0].len();
        let entry = |row: &Vec<f64>, j: usize| row.iter().zip(b).map(|(x, b)| x * b[j]).sum();
        let row = |row| columns.clone().map(|j| entry(row, j)).collect();
        a.iter().map(row).collect()
    }

    fn transposed(a: &Rows) -> Rows {
        let column = |j: usize| a.iter().map(|row| row[j]).collect();
        (0..a[0].len()).map(column).collect()
    }

    /// The iteration as the papers write it, in f64, on the rows of any matrix.
    fn reference(scheme: NewtonSchulz, x: &Rows) -> Rows {
        let norm = x.iter().flatten().map(|x| x * x).sum::<f64>().sqrt();
        let scale = norm * scheme.margin();
        let mut x: Rows = x
            .iter()
            .map(|row| row.iter().map(|x| x / scale).collect())
            .collect();
        for [a, b, c] in scheme.quintics() {
            let gram = product(&x, &transposed(&x));
            let squared = product(&gram, &gram);
            let inner: Rows = gram
                .iter()
                .zip(&squared)
                .map(|(g, s)| g.iter().zip(s).map(|(g, s)| b * g + c * s).collect())
                .collect();
            let moved = product(&inner, &x);
            for (row, moved) in x.iter_mut().zip(&moved) {
                for (x, moved) in row.iter_mut().zip(moved) {
                    *x = a * *x + moved;
                }
            }
        }
        x
    }

    /// A matrix of rank 5 whose directions differ by orders of magnitude, and a little of every other.
    fn matrix(rows: usize, columns: usize) -> Rows {
        let value = |i: usize, j: usize| {
            let part = |k: usize| {
                let (i, j, k) = (i as f64, j as f64, k as f64);
                (i * (k + 1.3) + k).sin() * (j * (k + 0.7) - k).cos() / 10f64.powf(k)
            };
            let noise = ((i * 7919 + j * 104_729) % 1009) as f64 / 1009.0 - 0.5;
            (0..5).map(part).sum::<f64>() + 1e-5 * noise
        };
        let row = |i| (0..columns).map(|j| value(i, j)).collect();
        (0..rows).map(row).collect()
    }

    #[test]
    fn o1_the_products_on_the_smaller_side_are_the_papers_iteration() {
        let device = Device::flex();
        for scheme in [NewtonSchulz::Quintic, NewtonSchulz::PolarExpress] {
            for [rows, columns] in [[24, 60], [60, 24], [30, 31], [31, 30], [1, 9], [9, 1]] {
                let x = matrix(rows, columns);
                let values: Vec<f32> = x.iter().flatten().map(|x| *x as f32).collect();
                let data = TensorData::new(values, [rows, columns]);
                let found = scheme.orthogonalized(Tensor::from_data(data, &device));
                let found = found.into_data();
                let expected = reference(scheme, &x);
                let pairs = found.iter::<f32>().zip(expected.iter().flatten());
                let errors = pairs.map(|(found, expected)| (f64::from(found) - expected).abs());
                let largest = errors.fold(0.0, f64::max);
                // Entries are of the size 1 / sqrt(60) and more.
                assert!(largest < 1e-3, "{scheme:?} {rows} x {columns}: {largest}");
            }
        }
    }

    #[test]
    fn o1_singular_values_end_near_one() {
        // The papers' bounds for singular values from 0.01 on, as shares of the norm.
        for (scheme, low, high) in [
            (NewtonSchulz::Quintic, 0.65, 1.25),
            (NewtonSchulz::PolarExpress, 0.85, 1.15),
        ] {
            for i in 1..=100 {
                let quintics = scheme.quintics().into_iter();
                let end = quintics.fold(f64::from(i) / 100.0, |s, [a, b, c]| {
                    a * s + b * s.powi(3) + c * s.powi(5)
                });
                assert!((low..high).contains(&end), "{scheme:?} {i}: {end}");
            }
        }
    }

    #[test]
    fn a_matrix_of_zeros_stays_zero() {
        for dims in [[3, 3], [2, 9]] {
            let zeros = Tensor::<2>::zeros(dims, &Device::flex());
            let found = NewtonSchulz::Quintic.orthogonalized(zeros).into_data();
            assert!(found.iter::<f32>().all(|x| x == 0.0));
        }
    }
}
