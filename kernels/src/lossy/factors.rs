//! Differences as the product of two narrow matrices.

use super::floats::{narrow, widen};
use super::loops::PIECE;
use super::{NoFloat, check, count};
use crate::difference::Element;
use crate::panel::Path;
use crate::vector::vectorised;

/// The largest code of a factor.
const FACTOR_LEVELS: f32 = 127.0;

/// U `[rows, rank]` and V `[rank, cols]` in eight bits: U V = Σ over k of (u_k s_k) v_k, each direction k with one scale.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    cols: usize,
    /// s, one for each direction.
    scales: Vec<f32>,
    /// `[rows, rank]`
    left: Vec<i8>,
    /// `[rank, cols]`
    right: Vec<i8>,
}

impl Factors {
    /// Rounds U `[rows, rank]` and V `[rank, cols]` to 255 levels for each column of U and each row of V.
    ///
    /// # Panics
    ///
    /// If lengths are no multiples of `rank`.
    pub fn round(rank: usize, left: &[f32], right: &[f32]) -> Self {
        assert!(left.len().is_multiple_of(rank.max(1)) && right.len().is_multiple_of(rank.max(1)));
        let cols = right.len() / rank.max(1);
        let largest =
            |values: &mut dyn Iterator<Item = &f32>| values.fold(0.0f32, |a, b| a.max(b.abs()));
        let scale = |largest: f32| largest / FACTOR_LEVELS;
        let of_left: Vec<f32> = (0..rank)
            .map(|k| scale(largest(&mut left.iter().skip(k).step_by(rank))))
            .collect();
        let of_right: Vec<f32> = right
            .chunks(cols.max(1))
            .map(|row| scale(largest(&mut row.iter())))
            .collect();
        let code = |value: f32, scale: f32| {
            let code = if scale > 0.0 {
                (value / scale).round_ties_even()
            } else {
                0.0
            };
            code.clamp(-FACTOR_LEVELS, FACTOR_LEVELS) as i8
        };
        Self {
            cols,
            scales: of_left.iter().zip(&of_right).map(|(a, b)| a * b).collect(),
            left: left
                .iter()
                .enumerate()
                .map(|(i, &value)| code(value, of_left[i % rank]))
                .collect(),
            right: right
                .iter()
                .enumerate()
                .map(|(i, &value)| code(value, of_right[i / cols]))
                .collect(),
        }
    }

    /// Bytes of factors of a matrix.
    pub const fn bytes(rows: usize, cols: usize, rank: usize) -> usize {
        rank.saturating_mul(rows.saturating_add(cols).saturating_add(4))
    }

    /// Appends scales, U and V.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.scales.iter().flat_map(|scale| scale.to_le_bytes()));
        out.extend(self.left.iter().chain(&self.right).map(|&code| code as u8));
    }

    /// What [`write`](Self::write) wrote of a matrix `[rows, cols]`; none if the bytes are no such factors.
    pub fn read(rows: usize, cols: usize, bytes: &[u8]) -> Option<Self> {
        let of_one = Self::bytes(rows, cols, 1);
        if !bytes.len().is_multiple_of(of_one) {
            return None;
        }
        let rank = bytes.len() / of_one;
        let (scales, codes) = bytes.split_at(4 * rank);
        let (left, right) = codes.split_at(rank * rows);
        let codes = |bytes: &[u8]| bytes.iter().map(|&byte| byte as i8).collect();
        Some(Self {
            cols,
            scales: scales
                .as_chunks()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect(),
            left: codes(left),
            right: codes(right),
        })
    }

    /// Directions.
    pub fn rank(&self) -> usize {
        self.scales.len()
    }

    /// Puts parent + U V into `out`, both of equally many elements, from element `start` of the matrix on.
    ///
    /// # Errors
    ///
    /// Elements that are no floats.
    ///
    /// # Panics
    ///
    /// If the matrix has fewer elements.
    pub fn reconstruct(
        &self,
        path: Path,
        element: Element,
        start: usize,
        parent: &[u8],
        out: &mut [u8],
    ) -> Result<(), NoFloat> {
        check(element)?;
        let elements = count(element, parent, out);
        let (mut at, mut done) = (start, 0);
        let mut row = vec![0.0; self.cols];
        let width = element.width();
        while done < elements {
            let (i, j) = (at / self.cols, at % self.cols);
            let length = (self.cols - j).min(elements - done);
            let left = &self.left[i * self.rank()..][..self.rank()];
            let range = done * width..(done + length) * width;
            add_row(
                path,
                element,
                (&self.scales, left, &self.right[j..], self.cols),
                &parent[range.clone()],
                &mut row[..length],
                &mut out[range],
            );
            (at, done) = (at + length, done + length);
        }
        Ok(())
    }
}

vectorised! {
    fn add_row(
        element: Element,
        factors: (&[f32], &[i8], &[i8], usize),
        parent: &[u8],
        row: &mut [f32],
        out: &mut [u8],
    ) {
        let (scales, left, right, cols) = factors;
        row.fill(0.0);
        for ((scale, left), right) in scales.iter().zip(left).zip(right.chunks(cols)) {
            let factor = f32::from(*left) * scale;
            for (sum, right) in row.iter_mut().zip(right) {
                *sum += factor * f32::from(*right);
            }
        }
        let mut before = [0.0; PIECE];
        let width = element.width();
        let pieces = parent.chunks(PIECE * width).zip(out.chunks_mut(PIECE * width));
        for (row, (parent, out)) in row.chunks_mut(PIECE).zip(pieces) {
            let before = &mut before[..row.len()];
            widen(element, parent, before);
            for (sum, before) in row.iter_mut().zip(before) {
                *sum += *before;
            }
            narrow(element, row, out);
        }
    }
}
