//! Matrices of low rank.

use super::{CompressError, LinearCompressor, Round, TensorContext};

/// Sends two thin matrices whose product is near the gradient (Vogels, Karimireddy and Jaggi, 2019,
/// "PowerSGD", algorithm 1), by one step of a power iteration that begins where the last one ended:
///
/// ```text
/// P = Σ M Q        [rows, rank], summed over the workers
/// P <- orthonormal columns of P
/// Q = Σ Mᵀ P       [cols, rank], summed
/// Σ M ≈ P Qᵀ
/// ```
///
/// A worker keeps M - P Pᵀ M, so that what all workers keep and what they send add up to all they
/// had. For one worker δ is 0 if P is orthogonal to M.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerSgd {
    rank: usize,
}

impl PowerSgd {
    /// Matrices of `rank` columns, or as many as the smaller side has.
    pub fn new(rank: usize) -> Self {
        Self { rank: rank.max(1) }
    }

    /// The rank of the approximation of a matrix.
    pub(super) fn rank(self, [rows, cols]: [usize; 2]) -> usize {
        self.rank.min(rows).min(cols).max(1)
    }

    /// Q of the last step. A column without values, as all are before the first step, begins at random.
    fn begin(&self, tensor: &TensorContext, memory: &[f32]) -> Vec<f32> {
        let dims = tensor.dims();
        let rank = self.rank(dims);
        let mut q = match memory.len() == dims[1] * rank {
            true => memory.to_vec(),
            false => vec![0.0; dims[1] * rank],
        };
        for column in 0..rank {
            let has_values = q[column..].iter().step_by(rank).any(|x| *x != 0.0);
            if has_values {
                continue;
            }
            for (row, x) in q[column..].iter_mut().step_by(rank).enumerate() {
                let word = tensor.seed.word((row * rank + column) as u64);
                *x = (word >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            }
        }
        q
    }
}

impl LinearCompressor for PowerSgd {
    fn rounds(&self) -> usize {
        2
    }

    fn project(
        &self,
        tensor: &TensorContext,
        round: &Round,
        values: &mut [f32],
        numbers: &mut Vec<f32>,
    ) -> Result<(), CompressError> {
        let dims @ [_, cols] = tensor.dims();
        let rank = self.rank(dims);
        let Some(p) = round.before.first() else {
            let q = self.begin(tensor, round.memory);
            numbers.extend(product(values, cols, &q, rank));
            return Ok(());
        };
        let p = orthonormal(p, rank);
        let q = transposed_product(values, cols, &p, rank);
        for (row, p) in values.chunks_mut(cols).zip(p.chunks(rank)) {
            for (value, q) in row.iter_mut().zip(q.chunks(rank)) {
                *value -= dot(p, q);
            }
        }
        numbers.extend(q);
        Ok(())
    }

    fn reconstruct(
        &self,
        tensor: &TensorContext,
        sums: &[&[f32]],
        memory: &mut Vec<f32>,
        sum: &mut [f32],
    ) -> Result<(), CompressError> {
        let dims @ [_, cols] = tensor.dims();
        let rank = self.rank(dims);
        let &[p, q] = sums else {
            return Err(CompressError::Damaged(format!("{} rounds", sums.len())));
        };
        let p = orthonormal(p, rank);
        for (row, p) in sum.chunks_mut(cols).zip(p.chunks(rank)) {
            for (value, q) in row.iter_mut().zip(q.chunks(rank)) {
                *value += dot(p, q);
            }
        }
        *memory = q.to_vec();
        Ok(())
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// M Q for M [rows, cols] and Q [cols, rank].
fn product(m: &[f32], cols: usize, q: &[f32], rank: usize) -> Vec<f32> {
    let mut p = Vec::with_capacity(m.len() / cols * rank);
    for row in m.chunks(cols) {
        let at = p.len();
        p.resize(at + rank, 0.0);
        for (x, q) in row.iter().zip(q.chunks(rank)) {
            p[at..].iter_mut().zip(q).for_each(|(p, q)| *p += x * q);
        }
    }
    p
}

/// Mᵀ P for M [rows, cols] and P [rows, rank].
fn transposed_product(m: &[f32], cols: usize, p: &[f32], rank: usize) -> Vec<f32> {
    let mut q = vec![0.0; cols * rank];
    for (row, p) in m.chunks(cols).zip(p.chunks(rank)) {
        for (x, q) in row.iter().zip(q.chunks_mut(rank)) {
            q.iter_mut().zip(p).for_each(|(q, p)| *q += x * p);
        }
    }
    q
}

/// The columns of P [rows, rank], made orthonormal from the first to the last (modified
/// Gram-Schmidt, twice). A column that depends on those before it becomes zero.
fn orthonormal(p: &[f32], rank: usize) -> Vec<f32> {
    let mut p = p.to_vec();
    let column = |p: &[f32], column: usize| -> Vec<f32> {
        p[column..].iter().step_by(rank).copied().collect()
    };
    for number in 0..rank {
        let mut own = column(&p, number);
        let before = dot(&own, &own).sqrt();
        for _ in 0..2 {
            for earlier in 0..number {
                let earlier = column(&p, earlier);
                let along = dot(&own, &earlier);
                let pairs = own.iter_mut().zip(&earlier);
                pairs.for_each(|(own, earlier)| *own -= along * earlier);
            }
        }
        let norm = dot(&own, &own).sqrt();
        let is_new = norm.is_normal() && norm > 1e-5 * before;
        let scale = if is_new { 1.0 / norm } else { 0.0 };
        for (p, own) in p[number..].iter_mut().step_by(rank).zip(own) {
            *p = own * scale;
        }
    }
    p
}
