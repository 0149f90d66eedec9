//! Numbers of eight bytes: the lower halves of their differences, then what the upper halves are beyond the lower's sign.
//!
//! Small differences have upper halves of nothing but zeros, which cost next to nothing; either part is coded as a tensor
//! of 32-bit integers beside zeros.

use firebrick_kernels::difference::{self, Element, Path, Scale, Scratch};
use safetensors::Dtype;

use super::chunk::ChunkError;

const SIGN: u64 = 1 << 63;

/// An integer that grows with the number.
fn ordered(dtype: Dtype, bits: u64) -> u64 {
    match dtype {
        Dtype::F64 if bits & SIGN == 0 => bits ^ SIGN,
        Dtype::F64 => !bits,
        _ => bits,
    }
}

fn unordered(dtype: Dtype, ordered: u64) -> u64 {
    match dtype {
        Dtype::F64 if ordered & SIGN == 0 => !ordered,
        Dtype::F64 => ordered ^ SIGN,
        _ => ordered,
    }
}

pub(super) fn encode(
    dtype: Dtype,
    parent: &[u8],
    child: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) {
    let number = |bytes: &[u8; 8]| ordered(dtype, u64::from_le_bytes(*bytes));
    let pairs = parent.as_chunks().0.iter().zip(child.as_chunks().0);
    let differences = pairs.map(|(parent, child)| number(child).wrapping_sub(number(parent)));
    let (mut lower, mut upper) = (Vec::new(), Vec::new());
    for difference in differences {
        let low = difference as i32;
        let high = difference.wrapping_sub(i64::from(low) as u64) >> 32;
        lower.extend(low.to_le_bytes());
        upper.extend((high as u32).to_le_bytes());
    }
    let zeros = vec![0; lower.len()];
    for part in [lower, upper] {
        let length_at = out.len();
        out.extend([0; 4]);
        // Half a chunk's bytes in elements of half their size are as many elements.
        difference::encode(
            Path::detect(),
            Element::Bits32,
            Scale::Chunk,
            (&zeros, &part),
            scratch,
            out,
        )
        .expect("a chunk of the right length");
        let length = (out.len() - length_at - 4) as u32;
        out[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }
}

pub(super) fn decode(
    dtype: Dtype,
    parent: &[u8],
    bytes: &[u8],
    child: &mut [u8],
) -> Result<(), ChunkError> {
    let zeros = vec![0; child.len() / 2];
    let mut rest = bytes;
    let mut part = || -> Result<Vec<u8>, ChunkError> {
        let (length, after) = rest.split_first_chunk().ok_or(ChunkError::Length)?;
        let length = u32::from_le_bytes(*length) as usize;
        let (coded, after) = after.split_at_checked(length).ok_or(ChunkError::Length)?;
        rest = after;
        let mut part = vec![0; zeros.len()];
        difference::decode(
            Path::detect(),
            Element::Bits32,
            Scale::Chunk,
            &zeros,
            coded,
            &mut part,
        )?;
        Ok(part)
    };
    let (lower, upper) = (part()?, part()?);
    if !rest.is_empty() {
        return Err(ChunkError::Length);
    }
    let parts = lower.as_chunks().0.iter().zip(upper.as_chunks().0);
    let pairs = parent.as_chunks().0.iter().zip(child.as_chunks_mut().0);
    for ((parent, child), (low, high)) in pairs.zip(parts) {
        let low = i64::from(i32::from_le_bytes(*low)) as u64;
        let difference = low.wrapping_add(u64::from(u32::from_le_bytes(*high)) << 32);
        let number = ordered(dtype, u64::from_le_bytes(*parent)).wrapping_add(difference);
        *child = unordered(dtype, number).to_le_bytes();
    }
    Ok(())
}
