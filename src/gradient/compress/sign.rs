//! One bit an element.

use firebrick_kernels::difference::Element;
use firebrick_kernels::lossy::{self, Levels, NO_LIMIT, Path, Quantised, Rounding};
use half::bf16;

use super::{CompressError, Compressor, TensorContext};

/// Sends the sign of every element, and for each 128 elements their mean magnitude in bf16 (Seide
/// et al., 2014): 1.125 bits an element. It is the 1-bit code of lossy checkpoints.
///
/// A block keeps (Σ|x|)² / (n Σx²) of its squared norm, which is at least 1/128: all of it if its
/// elements have one magnitude, 0.64 if they are Gaussian.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sign;

/// Elements that are coded at a time: whole blocks, so that copies stay in a cache.
const PIECE: usize = 1 << 14;

const LEVELS: Levels = Levels::Sign;

impl Sign {
    /// The bytes of a matrix of `len` elements.
    pub(super) fn bytes(len: usize) -> usize {
        let pieces = [len / PIECE, usize::from(!len.is_multiple_of(PIECE))];
        let of_piece = |len: usize| 2 * len.div_ceil(LEVELS.block()) + LEVELS.packed(len);
        pieces[0] * of_piece(PIECE) + pieces[1] * of_piece(len % PIECE)
    }
}

impl Compressor for Sign {
    fn encode(
        &self,
        _tensor: &TensorContext,
        values: &mut [f32],
        bytes: &mut Vec<u8>,
    ) -> Result<(), CompressError> {
        let zeros = vec![0u8; 4 * PIECE.min(values.len())];
        let (mut own, mut quantised) = (Vec::new(), Quantised::default());
        for (number, values) in values.chunks_mut(PIECE).enumerate() {
            own.clear();
            own.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            let zeros = &zeros[..own.len()];
            let path = Path::detect();
            let how = (LEVELS, Rounding::Nearest);
            lossy::quantise(
                path,
                Element::F32,
                how,
                NO_LIMIT,
                (zeros, &own),
                &mut quantised,
            )
            .unwrap_or_else(|error| unreachable!("f32 is a float: {error}"));
            if let Some(place) = quantised.exact.first() {
                return Err(CompressError::NotFinite(number * PIECE + *place as usize));
            }
            bytes.extend(
                quantised
                    .scales
                    .iter()
                    .flat_map(|scale| scale.to_le_bytes()),
            );
            let at = bytes.len();
            bytes.resize(at + LEVELS.packed(values.len()), 0);
            lossy::pack(path, LEVELS, &quantised.codes, &mut bytes[at..]);
            let codes = quantised.codes.chunks(LEVELS.block());
            let blocks = values.chunks_mut(LEVELS.block()).zip(codes);
            for ((values, codes), scale) in blocks.zip(&quantised.scales) {
                add_codes(values, codes, -bf16::from_bits(*scale).to_f32());
            }
        }
        Ok(())
    }

    fn add_decoded(
        &self,
        _tensor: &TensorContext,
        bytes: &[u8],
        sum: &mut [f32],
    ) -> Result<(), CompressError> {
        let (found, mut rest, mut codes) = (bytes.len(), bytes, Vec::new());
        for sum in sum.chunks_mut(PIECE) {
            let blocks = sum.len().div_ceil(LEVELS.block());
            let ends = rest
                .split_at_checked(2 * blocks)
                .and_then(|(scales, rest)| {
                    let (signs, rest) = rest.split_at_checked(LEVELS.packed(sum.len()))?;
                    Some((scales, signs, rest))
                });
            let Some((scales, signs, after)) = ends else {
                return Err(CompressError::Damaged(format!("{found} bytes are too few")));
            };
            rest = after;
            codes.clear();
            codes.resize(sum.len(), 0);
            lossy::unpack(Path::detect(), LEVELS, signs, &mut codes);
            let blocks = sum
                .chunks_mut(LEVELS.block())
                .zip(codes.chunks(LEVELS.block()));
            for ((sum, codes), scale) in blocks.zip(scales.as_chunks::<2>().0) {
                let scale = bf16::from_le_bytes(*scale).to_f32();
                if !scale.is_finite() {
                    let reason = "a scale that is not finite".to_string();
                    return Err(CompressError::Damaged(reason));
                }
                add_codes(sum, codes, scale);
            }
        }
        match rest.len() {
            0 => Ok(()),
            more => Err(CompressError::Damaged(format!("{more} bytes are left"))),
        }
    }
}

/// Adds code · scale to each value.
fn add_codes(values: &mut [f32], codes: &[i8], scale: f32) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value += f32::from(*code) * scale;
    }
}
