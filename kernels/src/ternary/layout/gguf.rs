//! llama.cpp's ternary blocks, as GGUF files hold them: 256 weights of a row, and their scale as f16.
//!
//! `TQ2_0`, 66 bytes: two halves of 128 weights, 32 bytes each; byte m of a half holds its elements m, m + 32, m + 64
//! and m + 96 as codes T + 1, low bits first. Then the scale.
//!
//! `TQ1_0`, 54 bytes: 32 bytes for elements 0 to 159, byte m those at m + 32n; 16 bytes for 160 to 239, byte m those at
//! 160 + m + 16n; 4 bytes for 240 to 255, byte m those at 240 + m + 4n; n counts up to five, in the last part four,
//! followed by a digit 0. Digits T + 1 make a number of base 3, the first the most significant, and a byte is
//! `ceil(number * 256 / 243)`: multiplying it by 3 moves the first digit into the ninth bit. Then the scale.

use half::f16;

use super::LayoutError;
use super::compute::check_shape;
use crate::ternary::Granularity;

/// Weights of a block.
pub const BLOCK: usize = 256;

/// A kind of block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockType {
    /// 1.69 bits a weight.
    Tq1_0,
    /// 2.06 bits a weight.
    Tq2_0,
}

/// How `TQ1_0` lays elements out: bytes, the first element, the digits of a byte. Digit n of byte m is element
/// `first + m + n * bytes`.
const TQ1_0_PARTS: [(usize, usize, usize); 3] = [(32, 0, 5), (16, 160, 5), (4, 240, 4)];

impl BlockType {
    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Tq1_0 => 54,
            Self::Tq2_0 => 66,
        }
    }

    /// Bytes of a matrix.
    ///
    /// # Errors
    ///
    /// If rows are not of whole blocks.
    pub fn bytes(self, rows: usize, cols: usize) -> Result<usize, LayoutError> {
        check_shape(rows, cols, Granularity::Tensor)?;
        if !cols.is_multiple_of(BLOCK) {
            return Err(LayoutError::PartialBlock { cols });
        }
        Ok(rows * (cols / BLOCK) * self.block_bytes())
    }

    /// Quantises row-major f32 `[rows, cols]` as llama.cpp does: the scale of a block is its largest magnitude, and a
    /// trit its value over that, rounded, halves away from 0.
    ///
    /// These are not the trits of BitNet, whose scale is a mean. Weights that are g T come through unchanged, but for
    /// the rounding of g to f16.
    ///
    /// # Errors
    ///
    /// A wrong length, rows that are not of whole blocks, a block whose largest magnitude f16 does not hold.
    pub fn quantise(
        self,
        values: &[f32],
        rows: usize,
        cols: usize,
    ) -> Result<Vec<u8>, LayoutError> {
        let mut bytes = Vec::with_capacity(self.bytes(rows, cols)?);
        length("weights", rows * cols, values.len())?;
        for values in values.as_chunks::<BLOCK>().0 {
            let bits = values.iter().map(|value| value.abs().to_bits()).max();
            let scale = f32::from_bits(bits.unwrap_or(0));
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            let trits = values.map(|value| (value * inverse).round() as i8);
            self.write(&trits, scale, &mut bytes)?;
        }
        Ok(bytes)
    }

    /// The row-major f32 `[rows, cols]` that blocks stand for.
    ///
    /// # Errors
    ///
    /// As [`Self::unpack`].
    pub fn dequantise(
        self,
        bytes: &[u8],
        rows: usize,
        cols: usize,
    ) -> Result<Vec<f32>, LayoutError> {
        let (trits, scales) = self.unpack(bytes, rows, cols)?;
        let values = trits.iter().enumerate();
        Ok(values
            .map(|(i, &trit)| f32::from(trit) * scales[i / BLOCK])
            .collect())
    }

    /// Blocks of row-major trits `[rows, cols]`, unchanged, and their scales, rounded to f16.
    ///
    /// # Errors
    ///
    /// A wrong length, a value that is not a trit, rows that are not of whole blocks, groups that are not of whole blocks,
    /// a scale that f16 does not hold.
    pub fn pack(
        self,
        trits: &[i8],
        rows: usize,
        cols: usize,
        scales: &[f32],
        granularity: Granularity,
    ) -> Result<Vec<u8>, LayoutError> {
        let mut bytes = Vec::with_capacity(self.bytes(rows, cols)?);
        super::check_trits(trits, rows, cols)?;
        if let Granularity::Group(size) = granularity
            && (size == 0 || size % BLOCK != 0)
        {
            return Err(LayoutError::PartialBlock { cols: size });
        }
        length("scales", granularity.scales(rows, cols), scales.len())?;
        for (i, trits) in trits.as_chunks::<BLOCK>().0.iter().enumerate() {
            let (row, col) = (i * BLOCK / cols, i * BLOCK % cols);
            let scale = crate::ternary::reference::scale_index(granularity, cols, row, col);
            self.write(trits, scales[scale], &mut bytes)?;
        }
        Ok(bytes)
    }

    /// The row-major trits `[rows, cols]` of blocks, and the scale of each: those of [`Granularity::Group`] of 256.
    ///
    /// # Errors
    ///
    /// A wrong length, rows that are not of whole blocks, a code that stands for no trit.
    pub fn unpack(
        self,
        bytes: &[u8],
        rows: usize,
        cols: usize,
    ) -> Result<(Vec<i8>, Vec<f32>), LayoutError> {
        length("bytes", self.bytes(rows, cols)?, bytes.len())?;
        let mut trits = vec![0i8; rows * cols];
        let mut scales = Vec::with_capacity(rows * cols / BLOCK);
        let blocks = bytes.chunks_exact(self.block_bytes());
        for (i, (block, trits)) in blocks.zip(trits.as_chunks_mut().0).enumerate() {
            let (codes, scale) = block.split_at(self.block_bytes() - 2);
            let known = match self {
                Self::Tq1_0 => read_tq1_0(codes, trits),
                Self::Tq2_0 => read_tq2_0(codes, trits),
            };
            if !known {
                let (row, col) = (i * BLOCK / cols, i * BLOCK % cols);
                return Err(LayoutError::Code { row, col });
            }
            scales.push(f16::from_le_bytes([scale[0], scale[1]]).to_f32());
        }
        Ok((trits, scales))
    }

    fn write(
        self,
        trits: &[i8; BLOCK],
        scale: f32,
        bytes: &mut Vec<u8>,
    ) -> Result<(), LayoutError> {
        let half = f16::from_f32(scale);
        // A scale that vanished would take its weights along.
        if !half.is_finite() || (half == f16::ZERO && scale != 0.0) {
            return Err(LayoutError::Scale { scale });
        }
        let digit = |element: usize| (trits[element] + 1) as u8;
        match self {
            Self::Tq1_0 => {
                for (count, first, digits) in TQ1_0_PARTS {
                    for byte in 0..count {
                        let digit = |n| digit(first + byte + n * count);
                        let number =
                            (0..digits).fold(0u16, |number, n| 3 * number + u16::from(digit(n)));
                        let number = number * 3u16.pow((5 - digits) as u32);
                        bytes.push((number * 256).div_ceil(243) as u8);
                    }
                }
            }
            Self::Tq2_0 => {
                for half in [0, 128] {
                    for byte in half..half + 32 {
                        bytes.push((0..4).map(|n| digit(byte + 32 * n) << (2 * n)).sum());
                    }
                }
            }
        }
        bytes.extend(half.to_le_bytes());
        Ok(())
    }
}

/// Every byte stands for five trits.
fn read_tq1_0(codes: &[u8], trits: &mut [i8; BLOCK]) -> bool {
    let mut codes = codes.iter();
    for (count, first, digits) in TQ1_0_PARTS {
        for (byte, &code) in codes.by_ref().take(count).enumerate() {
            let mut rest = code;
            for n in 0..digits {
                trits[first + byte + n * count] = ((u16::from(rest) * 3) >> 8) as i8 - 1;
                rest = rest.wrapping_mul(3);
            }
        }
    }
    true
}

/// False if a code is 3.
fn read_tq2_0(codes: &[u8], trits: &mut [i8; BLOCK]) -> bool {
    for (i, &code) in codes.iter().enumerate() {
        for n in 0..4 {
            trits[i / 32 * 128 + i % 32 + 32 * n] = (code >> (2 * n) & 3) as i8 - 1;
        }
    }
    codes.iter().all(|code| code & code >> 1 & 0x55 == 0)
}

fn length(what: &'static str, expected: usize, found: usize) -> Result<(), LayoutError> {
    if expected == found {
        Ok(())
    } else {
        Err(LayoutError::Length {
            what,
            expected,
            found,
        })
    }
}
