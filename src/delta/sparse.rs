//! The elements that differ: how many equal ones come before each, and its bytes.
//!
//! Gaps are in the base-128 code of unsigned numbers (LEB128), the lowest bits first; after all gaps come the elements'
//! bytes in the same order.

use super::chunk::ChunkError;

/// Appends what differs to `out`, unless more than `most` elements do.
pub(super) fn encode(
    width: usize,
    parent: &[u8],
    child: &[u8],
    most: usize,
    out: &mut Vec<u8>,
) -> bool {
    /// Elements that are compared at once.
    const RUN: usize = 64;
    let mut values = Vec::new();
    let (mut next, mut count) = (0, 0);
    let runs = parent.chunks(RUN * width).zip(child.chunks(RUN * width));
    for (run, (before, after)) in runs.enumerate() {
        if before == after {
            continue;
        }
        let elements = before.chunks(width).zip(after.chunks(width)).enumerate();
        for (i, (_, after)) in elements.filter(|(_, (before, after))| before != after) {
            let place = run * RUN + i;
            let mut gap = place - next;
            while gap >= 128 {
                out.push(gap as u8 | 128);
                gap >>= 7;
            }
            out.push(gap as u8);
            values.extend_from_slice(after);
            next = place + 1;
            count += 1;
        }
        if count > most {
            return false;
        }
    }
    out.extend_from_slice(&values);
    true
}

/// Puts what differs into `child`, which was the parent.
pub(super) fn decode(width: usize, bytes: &[u8], child: &mut [u8]) -> Result<(), ChunkError> {
    // Every gap ends with a byte below 128; there are as many as elements. Where gaps end follows from their number.
    let mut places = Vec::new();
    let (mut place, mut gap, mut shift) = (0usize, 0usize, 0u32);
    let mut at = 0;
    while at + places.len() * width < bytes.len() {
        let byte = bytes[at];
        at += 1;
        if shift > 28 {
            return Err(ChunkError::Place);
        }
        gap |= usize::from(byte & 127) << shift;
        shift += 7;
        if byte < 128 {
            place += gap;
            places.push(place);
            place += 1;
            (gap, shift) = (0, 0);
        }
    }
    let values = &bytes[at..];
    if shift != 0 || values.len() != places.len() * width {
        return Err(ChunkError::Length);
    }
    for (&place, value) in places.iter().zip(values.chunks(width)) {
        let element = child.get_mut(place * width..(place + 1) * width);
        element.ok_or(ChunkError::Place)?.copy_from_slice(value);
    }
    Ok(())
}
