//! Eigenvectors of a symmetric matrix and orthonormal bases, in f32, on the host.
//!
//! Each is computed on one core; the cores share the matrices of a model.

use burn::tensor::{DType, Tensor, TensorData};
use faer::{Mat, MatRef, Side};

/// The eigenvectors of a symmetric matrix as columns, that of the largest eigenvalue first. The identity if
/// the decomposition fails, as it may only for a matrix that is not finite.
pub(super) fn eigenbasis(matrix: Tensor<2>) -> Tensor<2> {
    on_host(matrix, |matrix| {
        let n = matrix.nrows();
        let eigen = matrix.self_adjoint_eigen(Side::Lower);
        match eigen {
            // They come in the order of the eigenvalues, the smallest first.
            Ok(eigen) => Mat::from_fn(n, n, |i, j| eigen.U()[(i, n - 1 - j)]),
            Err(_) => Mat::identity(n, n),
        }
    })
}

/// An orthonormal basis of a square matrix's columns, in their order (QR, by Householder reflections).
pub(super) fn orthonormal(matrix: Tensor<2>) -> Tensor<2> {
    on_host(matrix, |matrix| matrix.qr().compute_Q())
}

fn on_host(matrix: Tensor<2>, compute: impl FnOnce(MatRef<'_, f32>) -> Mat<f32>) -> Tensor<2> {
    let device = matrix.device();
    let [rows, columns] = matrix.dims();
    let data = matrix.into_data();
    let values: Vec<f32> = data.iter::<f32>().collect();
    let result = compute(MatRef::from_row_major_slice(&values, rows, columns));
    let values = (0..rows * columns).map(|i| result[(i / columns, i % columns)]);
    let data = TensorData::new(values.collect::<Vec<f32>>(), [rows, columns]);
    Tensor::from_data(data, (&device, DType::F32))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;

    /// The largest entry, in magnitude, of those that `is_meant` says.
    fn largest(matrix: Tensor<2>, is_meant: impl Fn(usize, usize) -> bool) -> f32 {
        let [_, columns] = matrix.dims();
        let data = matrix.into_data();
        let entries = data.iter::<f32>().enumerate();
        let meant = entries.filter(|(i, _)| is_meant(i / columns, i % columns));
        meant.map(|(_, x)| x.abs()).fold(0.0, f32::max)
    }

    fn is_orthonormal(basis: &Tensor<2>) {
        let eye = Tensor::eye(basis.dims()[1], &basis.device());
        let product = basis.clone().transpose().matmul(basis.clone());
        assert!(largest(product - eye, |_, _| true) < 1e-5);
    }

    fn random(rows: usize, columns: usize) -> Tensor<2> {
        Tensor::random([rows, columns], Distribution::Default, &Device::flex()) - 0.5
    }

    #[test]
    fn eigenvectors_come_largest_first() {
        // The second has less than full rank.
        for [n, inner] in [[1, 1], [7, 2], [40, 90]] {
            let x = random(n, inner);
            let matrix = x.clone().matmul(x.transpose());
            let basis = eigenbasis(matrix.clone());
            is_orthonormal(&basis);
            let turned = basis.clone().transpose().matmul(matrix).matmul(basis);
            assert!(largest(turned.clone(), |i, j| i != j) < 1e-4);
            let data = turned.into_data();
            let values: Vec<f32> = data.iter::<f32>().step_by(n + 1).collect();
            assert!(values.windows(2).all(|pair| pair[0] + 1e-4 > pair[1]));
        }
    }

    #[test]
    fn a_basis_spans_the_columns_in_their_order() {
        for n in [1, 2, 33] {
            let matrix = random(n, n);
            let basis = orthonormal(matrix.clone());
            is_orthonormal(&basis);
            // Each column lies in the span of the basis' columns up to its own.
            let inside = basis.transpose().matmul(matrix);
            assert!(largest(inside, |i, j| i > j) < 1e-5);
        }
        // Columns that depend on each other still give a whole basis.
        let x = random(6, 2);
        is_orthonormal(&orthonormal(x.clone().matmul(x.transpose())));
    }
}
