//! Sparse codes keep the largest elements of each block.

mod choice;

use half::bf16;

use super::bits::{BitReader, BitWriter, MOST};
use super::hadamard::{rotate_piece, rotate_piece_back};
use crate::panel::Path;
use crate::vsa::Seed;
use choice::{Choice, marks, share};

/// A lossy code of vectors. It keeps the largest elements of each block, up to a given share, and
/// drops the others, which decode to 0.
///
/// ```text
/// k     = round(density · n), at least 1         of the n elements of a block
/// kept  = the k largest |x|, ties by place
/// ```
///
/// The code of a vector is one stream of bits. Each kept element is the distance from the previous
/// one, in a Rice code (Rice, 1979), followed by its value or its sign ([`Kept`]). At a density of
/// 5 %, signs take 0.343 bits for each element of a block of 4,096 in all; the entropy of places and
/// signs is 0.336.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SparseCode {
    block: usize,
    density: f64,
    kept: Kept,
    /// Low bits of a distance that are written without a code.
    rice: u32,
}

/// How kept elements are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kept {
    /// Each element has its value in bf16. The squared error is at most (1 - k/n) |x|².
    Values,
    /// Each element has its sign. All kept elements of a block decode to one magnitude, the mean of
    /// theirs, which is written once for the block, in bf16.
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
    /// The block size is not from 1 to 32768.
    #[error("a block of {0} elements: a number from 1 to 32768 is needed")]
    Block(usize),
    /// The density is not above 0 and at most 1.
    #[error("a density of {0}: it has to be above 0 and at most 1")]
    Density(f64),
    /// An element is not finite.
    #[error("element {0} is not finite")]
    NotFinite(usize),
    /// The bytes end too early.
    #[error("the coded vector ends within block {block}")]
    Truncated {
        /// The block.
        block: usize,
    },
    /// The bytes are not the code of any vector of this length.
    #[error("block {block} of the coded vector is damaged")]
    Damaged {
        /// The block.
        block: usize,
    },
    /// Bytes follow the end of the coded vector.
    #[error("{0} bytes follow the coded vector")]
    Rest(usize),
}

impl SparseCode {
    /// Makes a code that cuts vectors into blocks of `block` elements and keeps the share `density`
    /// of each.
    ///
    /// # Errors
    /// [`SparseError::Block`] for a block that is not from 1 to 32768, [`SparseError::Density`] for a density that is not above 0 and at most 1.
    pub fn new(block: usize, density: f64, kept: Kept) -> Result<Self, SparseError> {
        if !(1..=1 << 15).contains(&block) {
            return Err(SparseError::Block(block));
        }
        if !(density > 0.0 && density <= 1.0) {
            return Err(SparseError::Density(density));
        }
        let mut rice = 0;
        while rice < 15 && distance_bits(density, rice + 1) < distance_bits(density, rice) {
            rice += 1;
        }
        Ok(Self {
            block,
            density,
            kept,
            rice,
        })
    }

    /// The number of elements of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The largest number of elements that a block of `n` elements keeps.
    pub fn keep(&self, n: usize) -> usize {
        ((self.density * n as f64).round() as usize).clamp(1, n.max(1))
    }

    /// The number of bits that the code of `len` elements takes if the kept elements lie at random places.
    /// The code is shorter if they lie close together.
    pub fn expected_bits(&self, len: usize) -> f64 {
        let of_block = |n: usize| {
            let keep = self.keep(n) as f64;
            let place = distance_bits(keep / n as f64, self.rice);
            match self.kept {
                Kept::Values => keep * (place + 16.0),
                Kept::Signs => keep * (place + 1.0) + 16.0,
            }
        };
        let rest = len % self.block;
        let whole = (len / self.block) as f64 * of_block(self.block);
        whole + if rest > 0 { of_block(rest) } else { 0.0 }
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

    /// Appends the code of `values` to `out`, and subtracts the decoded code from `values`, so that
    /// they hold the error.
    ///
    /// # Errors
    /// [`SparseError::NotFinite`]. The blocks before that element have already been changed in
    /// `values` and written to `out`.
    pub fn encode(
        &self,
        path: Path,
        values: &mut [f32],
        out: &mut Vec<u8>,
    ) -> Result<(), SparseError> {
        self.encode_blocks(path, values, out, |_, _| (), |_, _| ())
    }

    /// Appends the code of `values` rotated by [`rotate`](super::rotate) with this code's block size.
    /// Afterwards `values` hold the error, rotated back. Each block takes all three steps while it is
    /// in the first-level cache.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    ///
    /// # Panics
    /// If this code's block is not a power of two.
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

    /// Decodes `bytes` and adds the result, times `factor`, to `sum`, which has as many elements as
    /// the vector that was coded.
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

/// The mean number of bits of a distance in a Rice code, for elements of this density at random places.
/// A distance takes one bit for each whole 2^rice in it, a bit that ends those, and `rice` bits for the
/// rest.
fn distance_bits(density: f64, rice: u32) -> f64 {
    let beyond = (0..rice).fold(1.0 - density, |power, _| power * power);
    f64::from(rice) + 1.0 / (1.0 - beyond)
}

/// The sign bit of bf16.
const SIGN: u16 = 0x8000;

/// Set in a level, which has no sign: the block keeps fewer elements than k, and their number
/// follows.
const COUNT_FOLLOWS: u16 = SIGN;

/// The f32 of bf16 bits.
fn widened(bits: u16) -> f32 {
    bf16::from_bits(bits).to_f32()
}

/// The bits of the bf16 nearest to a number that is not negative. Numbers above the largest bf16
/// become the largest, and not infinite.
fn narrowed(value: f32) -> u16 {
    bf16::from_f32(value).to_bits().min(bf16::MAX.to_bits())
}
