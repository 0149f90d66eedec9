//! The largest frequencies of each tile, as DeMo sends them.

use std::f64::consts::PI;

use firebrick_kernels::sketch::{Path, SparseCode, SparseError};

use super::{CompressError, Compressor, TensorContext, sparse};

/// Cuts a matrix into tiles of at most 64 x 64, transforms each by the orthonormal discrete cosine
/// transform (DCT-II, rows and columns), and sends the largest elements in bf16 (Peng, Quesnelle and
/// Kingma, 2024, "DeMo: Decoupled Momentum Optimization", section 3). A frequency of the result is
/// the mean over those workers that sent it, as in the published code.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Demo {
    density: f64,
}

/// The longest side of a tile.
const SIDE: usize = 64;

impl Demo {
    /// Sends the share `density` of the frequencies of each tile, above 0 and at most 1.
    ///
    /// # Errors
    /// [`SparseError::Density`] for a density that is not above 0 and at most 1.
    pub fn new(density: f64) -> Result<Self, SparseError> {
        sparse::checked(density).map(|density| Self { density })
    }

    fn tiles(self, tensor: &TensorContext) -> Tiles {
        Tiles::new(tensor.dims(), self.density)
    }

    /// The bits that a matrix takes if the large frequencies lie at random places.
    pub(super) fn expected_bits(self, dims: [usize; 2]) -> f64 {
        Tiles::new(dims, self.density)
            .code
            .expected_bits(dims[0] * dims[1])
    }
}

/// How a matrix is cut.
struct Tiles {
    cols: usize,
    /// Rows and columns of a tile: the largest divisors of the matrix's that are at most 64.
    side: [usize; 2],
    code: SparseCode,
    /// The transform along each side, [frequency, place].
    waves: [Vec<f32>; 2],
}

impl Tiles {
    fn new([rows, cols]: [usize; 2], density: f64) -> Self {
        let divisor = |len: usize| {
            let mut sides = (1..=SIDE.min(len.max(1))).rev();
            sides.find(|side| len.is_multiple_of(*side)).unwrap_or(1)
        };
        let side = [divisor(rows), divisor(cols)];
        let code = sparse::values(side[0] * side[1], density);
        Self {
            cols,
            side,
            code: code.unwrap_or_else(|error| unreachable!("a tile is at most 4096: {error}")),
            waves: side.map(waves),
        }
    }

    /// The matrix as its tiles, one after the other.
    fn cut(&self, values: &[f32]) -> Vec<f32> {
        let [height, width] = self.side;
        let mut tiles = Vec::with_capacity(values.len());
        for band in values.chunks(height * self.cols) {
            for first in (0..self.cols).step_by(width) {
                for row in band.chunks(self.cols) {
                    tiles.extend_from_slice(&row[first..first + width]);
                }
            }
        }
        tiles
    }

    /// Puts tiles back into a matrix.
    fn join(&self, tiles: &[f32], values: &mut [f32]) {
        let [height, width] = self.side;
        let mut rows = tiles.chunks(width);
        for band in values.chunks_mut(height * self.cols) {
            for first in (0..self.cols).step_by(width) {
                for row in band.chunks_mut(self.cols) {
                    if let Some(own) = rows.next() {
                        row[first..first + width].copy_from_slice(own);
                    }
                }
            }
        }
    }

    /// Transforms every tile, or undoes it.
    fn transform(&self, tiles: &mut [f32], is_back: bool) {
        let [height, width] = self.side;
        let mut half = vec![0.0; height * width];
        for tile in tiles.chunks_mut(height * width) {
            half.fill(0.0);
            // Along the columns of each row.
            for (row, half) in tile.chunks(width).zip(half.chunks_mut(width)) {
                multiply(row, &self.waves[1], half, is_back);
            }
            tile.fill(0.0);
            // Along the rows.
            for (at, half) in half.chunks(width).enumerate() {
                for (to, tile) in tile.chunks_mut(width).enumerate() {
                    let wave = match is_back {
                        false => self.waves[0][to * height + at],
                        true => self.waves[0][at * height + to],
                    };
                    let pairs = tile.iter_mut().zip(half);
                    pairs.for_each(|(tile, half)| *tile += wave * half);
                }
            }
        }
    }
}

/// Adds to `out` the row times the transform or its inverse.
fn multiply(row: &[f32], waves: &[f32], out: &mut [f32], is_back: bool) {
    let len = row.len();
    match is_back {
        false => {
            for (out, wave) in out.iter_mut().zip(waves.chunks(len)) {
                *out += row.iter().zip(wave).map(|(x, wave)| x * wave).sum::<f32>();
            }
        }
        true => {
            for (x, wave) in row.iter().zip(waves.chunks(len)) {
                let pairs = out.iter_mut().zip(wave);
                pairs.for_each(|(out, wave)| *out += x * wave);
            }
        }
    }
}

/// The orthonormal DCT-II of so many values, [frequency, place].
fn waves(len: usize) -> Vec<f32> {
    let n = len as f64;
    let wave = |frequency: usize| {
        let scale = if frequency == 0 { 1.0 } else { 2.0 } / n;
        (0..len).map(move |place| {
            let angle = PI * (place as f64 + 0.5) * frequency as f64 / n;
            (scale.sqrt() * angle.cos()) as f32
        })
    };
    (0..len).flat_map(wave).collect()
}

impl Compressor for Demo {
    fn encode(
        &self,
        tensor: &TensorContext,
        values: &mut [f32],
        bytes: &mut Vec<u8>,
    ) -> Result<(), CompressError> {
        let tiles = self.tiles(tensor);
        let mut frequencies = tiles.cut(values);
        tiles.transform(&mut frequencies, false);
        tiles.code.encode(Path::detect(), &mut frequencies, bytes)?;
        tiles.transform(&mut frequencies, true);
        tiles.join(&frequencies, values);
        Ok(())
    }

    /// The sum; [`decode`](Self::decode) has the mean.
    fn add_decoded(
        &self,
        tensor: &TensorContext,
        bytes: &[u8],
        sum: &mut [f32],
    ) -> Result<(), CompressError> {
        let tiles = self.tiles(tensor);
        let mut frequencies = vec![0.0; sum.len()];
        tiles.code.add_decoded(bytes, 1.0, &mut frequencies)?;
        tiles.transform(&mut frequencies, true);
        let mut own = vec![0.0; sum.len()];
        tiles.join(&frequencies, &mut own);
        sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
        Ok(())
    }

    fn decode(
        &self,
        tensor: &TensorContext,
        codes: &[&[u8]],
        sum: &mut [f32],
    ) -> Result<(), (usize, CompressError)> {
        let tiles = self.tiles(tensor);
        let (mut all, mut senders) = (vec![0.0f32; sum.len()], vec![0u32; sum.len()]);
        let mut own = vec![0.0; sum.len()];
        for (worker, code) in codes.iter().enumerate() {
            own.fill(0.0);
            let decoded = tiles.code.add_decoded(code, 1.0, &mut own);
            decoded.map_err(|error| (worker, error.into()))?;
            for ((all, senders), own) in all.iter_mut().zip(&mut senders).zip(&own) {
                *all += own;
                *senders += u32::from(*own != 0.0);
            }
        }
        for (all, senders) in all.iter_mut().zip(senders) {
            *all /= senders.max(1) as f32;
        }
        tiles.transform(&mut all, true);
        tiles.join(&all, sum);
        Ok(())
    }
}
