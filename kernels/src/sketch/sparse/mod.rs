//! Sparse codes: of each block its largest elements.

mod choice;

use super::bits::{BitReader, BitWriter, MOST};
use super::hadamard::{rotate_piece, rotate_piece_back};
use crate::panel::Path;
use crate::vsa::Seed;
use choice::{Choice, marks, share};

/// A code of vectors that keeps at most a share of each block's elements, the largest ones. All
/// others become 0.
///
/// ```text
/// k     = round(density · n), at least 1         of the n elements of a block
/// kept  = the k largest |x|, ties by place
/// ```
///
/// All blocks are one stream of bits. For each kept element it has the distance from the one before
/// by a Rice code (Rice, 1979), and then what [`Kept`] says of it. At a density of 5 %, the places
/// and signs of a random block take 0.342 bits an element; their entropy is 0.336.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SparseCode {
    block: usize,
    density: f64,
    kept: Kept,
    /// Low bits of a distance that are written without a code.
    rice: u32,
}

/// What is written of a kept element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kept {
    /// Its value in bf16. The squared error is at most (1 - k/n) |x|².
    Values,
    /// Its sign; all kept elements of a block come back with one magnitude, their mean. It is
    /// written in front of the block in bf16.
    ///
    /// If a few elements hold most of the block, fewer than k are kept: the number of least error.
    /// The squared error is then at most (1 - δ) |x|² for every block, with
    /// δ = 1 / (n/k + (ln k + 1)/4): a flat block keeps k/n of its energy, and the logarithm bounds
    /// the cost of unequal magnitudes. Of a Gaussian block, 5 % keep 0.27 of the energy.
    Signs,
}

/// Why a vector cannot be coded, or bytes cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SparseError {
    /// A block that is no power of two from 16 to 32768.
    #[error("a block of {0} elements: a power of two from 16 to 32768 is needed")]
    Block(usize),
    /// A density that is not above 0 and at most 1.
    #[error("a density of {0}: it has to be above 0 and at most 1")]
    Density(f64),
    /// An element that is not finite.
    #[error("element {0} is not finite")]
    NotFinite(usize),
    /// The bytes end too early.
    #[error("the coded vector ends within block {block}")]
    Truncated {
        /// The block.
        block: usize,
    },
    /// Bytes that no vector of this length has.
    #[error("block {block} of the coded vector is damaged")]
    Damaged {
        /// The block.
        block: usize,
    },
    /// There are more bytes than the vector has.
    #[error("{0} bytes follow the coded vector")]
    Rest(usize),
}

impl SparseCode {
    /// A code with blocks of `block` elements, of which it keeps the share `density`.
    ///
    /// # Errors
    /// [`SparseError::Block`] for a block that is no power of two from 16 to 32768,
    /// [`SparseError::Density`] for a density that is not above 0 and at most 1.
    pub fn new(block: usize, density: f64, kept: Kept) -> Result<Self, SparseError> {
        if !block.is_power_of_two() || !(16..=1 << 15).contains(&block) {
            return Err(SparseError::Block(block));
        }
        if !(density > 0.0 && density <= 1.0) {
            return Err(SparseError::Density(density));
        }
        // Bits of a Rice code for distances of this density: r, and one for each whole 2^r.
        let expected = |rice: u32| {
            let beyond = (0..rice).fold(1.0 - density, |power, _| power * power);
            f64::from(rice) + 1.0 / (1.0 - beyond)
        };
        let mut rice = 0;
        while rice < 15 && expected(rice + 1) < expected(rice) {
            rice += 1;
        }
        Ok(Self {
            block,
            density,
            kept,
            rice,
        })
    }

    /// Elements of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The most elements that a block of `n` keeps.
    pub fn keep(&self, n: usize) -> usize {
        ((self.density * n as f64).round() as usize).clamp(1, n.max(1))
    }

    /// The share of the squared norm that a vector of `len` elements keeps at least.
    pub fn delta(&self, len: usize) -> f64 {
        // Only the last block may be short.
        let lengths = [self.block.min(len), len % self.block];
        let of_block = |n: usize| match self.kept {
            Kept::Values => self.keep(n) as f32 / n as f32,
            Kept::Signs => share(n, self.keep(n)),
        };
        let shares = lengths.into_iter().filter(|n| *n > 0).map(of_block);
        // A number in bf16 is off by up to 2^-9, and the largest f32 by 2^-8 of it: that costs the square.
        f64::from(shares.fold(1.0, f32::min)) * (1.0 - 2f64.powi(-15))
    }

    /// Appends the code of `values` to `out`, and subtracts from `values` what it decodes to: they
    /// become the error.
    ///
    /// # Errors
    /// [`SparseError::NotFinite`]; blocks before that element have changed then, in both.
    pub fn encode(
        &self,
        path: Path,
        values: &mut [f32],
        out: &mut Vec<u8>,
    ) -> Result<(), SparseError> {
        self.encode_blocks(path, values, out, |_, _| (), |_, _| ())
    }

    /// The same for the rotation of `values` by [`rotate`](super::rotate) with this code's block:
    /// what is coded is the rotated vector, and `values` become the error, rotated back. Each block
    /// goes through all of it while it is in the first-level cache.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_rotated(
        &self,
        path: Path,
        seed: Seed,
        values: &mut [f32],
        out: &mut Vec<u8>,
    ) -> Result<(), SparseError> {
        self.encode_blocks(
            path,
            values,
            out,
            |place, block| rotate_piece(path, seed, place, self.block, block),
            |place, block| rotate_piece_back(path, seed, place, self.block, block),
        )
    }

    fn encode_blocks(
        &self,
        path: Path,
        values: &mut [f32],
        out: &mut Vec<u8>,
        before: impl Fn(usize, &mut [f32]),
        after: impl Fn(usize, &mut [f32]),
    ) -> Result<(), SparseError> {
        let mut writer = BitWriter::new(out);
        let mut near = 0;
        for (number, values) in values.chunks_mut(self.block).enumerate() {
            let place = number * self.block;
            before(place, values);
            let keep = self.keep(values.len());
            let Some(choice) = Choice::of(path, values, (self.kept, keep), near) else {
                let bad = values.iter().position(|x| !x.is_finite());
                return Err(SparseError::NotFinite(place + bad.unwrap_or(0)));
            };
            near = choice.threshold;
            match self.kept {
                Kept::Values => {}
                Kept::Signs if choice.count == keep => writer.push(u64::from(choice.level), 16),
                Kept::Signs => {
                    let count = (choice.count as u64) << 16;
                    writer.push(u64::from(choice.level | COUNT_FOLLOWS) | count, 32);
                }
            }
            self.write(path, values, &choice, &mut writer);
            after(place, values);
        }
        writer.finish();
        Ok(())
    }

    /// Writes the places and signs of a block, and leaves the error in `values`.
    fn write(&self, path: Path, values: &mut [f32], choice: &Choice, writer: &mut BitWriter) {
        let level = widened(choice.level);
        let (mut ties, mut next) = (choice.ties, 0usize);
        for (word, values) in values.chunks_mut(64).enumerate() {
            let [mut kept, equal] = marks(path, values, choice.threshold);
            // The first of the elements that are as large as the threshold.
            let mut rest = equal;
            while ties > 0 && rest != 0 {
                kept |= rest & rest.wrapping_neg();
                rest &= rest - 1;
                ties -= 1;
            }
            while kept != 0 {
                let bit = kept.trailing_zeros();
                kept &= kept - 1;
                let place = word * 64 + bit as usize;
                let value = &mut values[bit as usize];
                self.push_distance(writer, (place - next) as u64);
                match self.kept {
                    Kept::Values => {
                        let sign = (value.to_bits() >> 16) as u16 & SIGN;
                        let bits = narrowed(value.abs()) | sign;
                        writer.push(u64::from(bits), 16);
                        *value -= widened(bits);
                    }
                    Kept::Signs => {
                        let is_negative = value.is_sign_negative();
                        writer.push(u64::from(is_negative), 1);
                        *value -= if is_negative { -level } else { level };
                    }
                }
                next = place + 1;
            }
        }
    }

    /// Writes a distance: a zero for each whole 2^rice, a one, and the rest.
    #[inline(always)]
    fn push_distance(&self, writer: &mut BitWriter, distance: u64) {
        let mut zeros = (distance >> self.rice) as u32;
        let low = distance & ((1 << self.rice) - 1);
        while zeros + self.rice + 1 > MOST {
            let some = zeros.min(MOST / 2);
            writer.push(0, some);
            zeros -= some;
        }
        writer.push((1 | low << 1) << zeros, zeros + self.rice + 1);
    }

    /// Adds what `bytes` decode to, times `factor`, to `sum`, of as many elements as were coded.
    ///
    /// # Errors
    /// [`SparseError::Truncated`], [`SparseError::Damaged`], [`SparseError::Rest`]; `sum` may have changed.
    pub fn add_decoded(
        &self,
        bytes: &[u8],
        factor: f32,
        sum: &mut [f32],
    ) -> Result<(), SparseError> {
        let mut reader = BitReader::new(bytes);
        let blocks = sum.len().div_ceil(self.block);
        for (block, sum) in sum.chunks_mut(self.block).enumerate() {
            let (truncated, damaged) = (
                SparseError::Truncated { block },
                SparseError::Damaged { block },
            );
            let keep = self.keep(sum.len());
            let (level, count) = match self.kept {
                Kept::Values => (0.0, keep),
                Kept::Signs => {
                    let level = reader.take(16).ok_or(truncated)? as u16;
                    let count = match level & COUNT_FOLLOWS {
                        0 => keep,
                        _ => reader.take(16).ok_or(truncated)? as usize,
                    };
                    (widened(level & !COUNT_FOLLOWS), count)
                }
            };
            if count > keep || !level.is_finite() || (count == 0 && level != 0.0) {
                return Err(damaged);
            }
            let mut next = 0u64;
            for _ in 0..count {
                let whole = reader.take_unary().ok_or(truncated)?;
                let low = reader.take(self.rice).ok_or(truncated)?;
                let place = next + (whole << self.rice | low);
                let element = sum.get_mut(place as usize).ok_or(damaged)?;
                next = place + 1;
                let value = match self.kept {
                    Kept::Values => widened(reader.take(16).ok_or(truncated)? as u16),
                    Kept::Signs if reader.take(1).ok_or(truncated)? == 1 => -level,
                    Kept::Signs => level,
                };
                if !value.is_finite() {
                    return Err(damaged);
                }
                *element += value * factor;
            }
        }
        if !reader.ends_in_zeros() {
            let block = blocks.saturating_sub(1);
            return Err(SparseError::Damaged { block });
        }
        match bytes.len() - reader.bytes_read() {
            0 => Ok(()),
            more => Err(SparseError::Rest(more)),
        }
    }
}

/// The sign bit of bf16.
const SIGN: u16 = 0x8000;

/// Set in a level, which has no sign: the block keeps fewer elements than k, and their number
/// follows.
const COUNT_FOLLOWS: u16 = SIGN;

/// bf16 as f32.
fn widened(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bf16 of a number from 0; the largest for what is beyond it.
fn narrowed(value: f32) -> u16 {
    const LARGEST: u32 = 0x7f7f;
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).min(LARGEST) as u16
}
