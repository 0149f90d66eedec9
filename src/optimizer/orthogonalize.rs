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
