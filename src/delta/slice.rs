//! One tensor's bytes, without a file around them.

use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;

use super::chunk::{self, ChunkError, Known, Scratch, chunk_bytes, width};
use super::hash::{of_chunk, of_chunks};
use super::{Codec, DeltaError};

/// Bytes before the table of chunks: the child's length and BLAKE3.
const HEADER: usize = 40;
/// Bytes of a row of the table: a chunk's length and codec.
const ROW: usize = 5;

/// What `child` is beside `parent`, or alone, on the threads of the current rayon pool. Both are the little-endian bytes of
/// numbers of one type; the child's BLAKE3 is kept with it.
///
/// ```
/// use firebrick::delta::{decode_slice, encode_slice};
/// use safetensors::Dtype;
///
/// let before: Vec<u8> = (0..10_000).flat_map(|i| (i as f32).sin().to_le_bytes()).collect();
/// let after: Vec<u8> = (0..10_000).flat_map(|i| ((i as f32).sin() + 1e-5).to_le_bytes()).collect();
/// let coded = encode_slice(Dtype::F32, Some(&before), &after)?;
/// assert!(coded.len() < after.len() / 2);
/// assert_eq!(decode_slice(Dtype::F32, Some(&before), &coded)?, after);
/// assert!(decode_slice(Dtype::F32, Some(&after), &coded).is_err(), "that is another parent");
/// # Ok::<(), firebrick::delta::DeltaError>(())
/// ```
///
/// # Errors
/// Lengths that are no whole number of elements, or that differ.
pub fn encode_slice(
    dtype: Dtype,
    parent: Option<&[u8]>,
    child: &[u8],
) -> Result<Vec<u8>, DeltaError> {
    check(dtype, parent, child.len())?;
    let length = chunk_bytes(dtype);
    let coded: Vec<_> = child
        .par_chunks(length)
        .enumerate()
        .map(|(i, child_part)| {
            let known = known(dtype, parent, i, child_part.len());
            let mut bytes = Vec::new();
            let codec = Scratch::with(|scratch| {
                chunk::encode_beside(known, None, child_part, scratch, &mut bytes)
            });
            let hash = of_chunk(child_part, i * length, child.len());
            (codec, bytes, hash)
        })
        .collect();
    let hashes: Vec<_> = coded.iter().map(|(_, _, hash)| *hash).collect();
    let size: usize = coded.iter().map(|(_, bytes, _)| bytes.len() + ROW).sum();
    let mut out = Vec::with_capacity(HEADER + size);
    out.extend((child.len() as u64).to_le_bytes());
    out.extend(of_chunks(&hashes, length, child.len()).as_bytes());
    for (codec, bytes, _) in &coded {
        out.extend((bytes.len() as u32).to_le_bytes());
        out.push(codec.id());
    }
    coded
        .iter()
        .for_each(|(_, bytes, _)| out.extend_from_slice(bytes));
    Ok(out)
}

/// The child again: the same bytes, or an error.
///
/// # Errors
/// Bytes that [`encode_slice`] did not write, or that are damaged; another parent.
pub fn decode_slice(
    dtype: Dtype,
    parent: Option<&[u8]>,
    coded: &[u8],
) -> Result<Vec<u8>, DeltaError> {
    let short = || wrong("it ends too soon");
    let (header, rest) = coded.split_first_chunk::<HEADER>().ok_or_else(short)?;
    let (total, hash) = header.split_at(8);
    let total = total
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let length = chunk_bytes(dtype);
    let rows = usize::try_from(total.div_ceil(length as u64)).unwrap_or(usize::MAX);
    let table = rows.checked_mul(ROW).filter(|&table| table <= rest.len());
    let (table, mut rest) = rest.split_at(table.ok_or_else(short)?);
    // No more than the table's rows have room for.
    let total = total as usize;
    check(dtype, parent, total)?;
    let mut parts = Vec::with_capacity(rows);
    for row in table.as_chunks::<ROW>().0 {
        let [l0, l1, l2, l3, codec] = *row;
        let codec = Codec::of_id(codec).ok_or_else(|| wrong("it has a codec that there is not"))?;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let (bytes, after) = rest.split_at_checked(length).ok_or_else(short)?;
        rest = after;
        parts.push((codec, bytes));
    }
    if !rest.is_empty() {
        return Err(wrong("there are bytes after its end"));
    }
    let mut child = Vec::new();
    let room = child.try_reserve_exact(total);
    room.map_err(|_| wrong(format!("no memory has room for its {total} bytes")))?;
    child.resize(total, 0);
    let hashes = child
        .par_chunks_mut(length)
        .zip(parts)
        .enumerate()
        .map(|(i, (child, (codec, bytes)))| {
            let known = known(dtype, parent, i, child.len());
            Scratch::with(|scratch| {
                chunk::decode_beside(codec, known, || None, bytes, scratch, child)
            })?;
            Ok(of_chunk(child, i * length, total))
        })
        .collect::<Result<Vec<_>, ChunkError>>();
    let hashes = hashes.map_err(|error| wrong(error.to_string()))?;
    if of_chunks(&hashes, length, total).as_bytes() != hash {
        return Err(wrong(
            "it is damaged, or of another parent: its BLAKE3 is another",
        ));
    }
    Ok(child)
}

fn known(dtype: Dtype, parent: Option<&[u8]>, chunk: usize, length: usize) -> Known<'_> {
    let start = chunk * chunk_bytes(dtype);
    Known {
        dtype,
        parent: parent.map(|parent| &parent[start..start + length]),
        roots: None,
        basis: None,
    }
}

fn check(dtype: Dtype, parent: Option<&[u8]>, child: usize) -> Result<(), DeltaError> {
    if parent.is_some_and(|parent| parent.len() != child) {
        return Err(wrong(format!(
            "parent and child are not equally long: the child has {child} bytes"
        )));
    }
    if child.is_multiple_of(width(dtype)) {
        Ok(())
    } else {
        Err(wrong(format!(
            "{child} bytes are no whole number of {dtype}"
        )))
    }
}

fn wrong(message: impl Into<String>) -> DeltaError {
    DeltaError::header(Path::new("a slice"), message)
}
