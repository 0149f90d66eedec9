//! The elements that differ: how many equal ones come before each, and what stands there.
//!
//! As a *list*, for few of them ([`Codec::Sparse`]): gaps in the base-128 code of unsigned numbers (LEB128), the lowest
//! bits first; after all gaps the elements' bytes in the same order. *Coded*, for many ([`Codec::Scattered`]): gaps as
//! 32-bit integers, and elements beside those of the parent that they replace, both under the entropy coder
//! ([`firebrick_kernels::difference`]).

use firebrick_kernels::difference::{self, Element, Path, Scale, Scratch};

use super::chunk::{ChunkError, Codec};

/// Changed elements from which coding is tried: its tables take about as much as so many in a list.
const MANY: usize = 64;

/// Elements that differ.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Equal elements before each, since the one before it.
    gaps: Vec<u32>,
    /// Their bytes in the parent, one after another.
    before: Vec<u8>,
    /// And in the child.
    after: Vec<u8>,
}

/// Finds what differs, unless more than `most` elements do.
pub(super) fn changes(width: usize, parent: &[u8], child: &[u8], most: usize) -> Option<Changes> {
    if are_many(width, parent, child, most) {
        return None;
    }
    match width {
        1 => changes_of::<1>(parent, child, most),
        2 => changes_of::<2>(parent, child, most),
        4 => changes_of::<4>(parent, child, most),
        _ => changes_of::<8>(parent, child, most),
    }
}

/// [`changes`] of elements of `WIDTH` bytes.
fn changes_of<const WIDTH: usize>(parent: &[u8], child: &[u8], most: usize) -> Option<Changes> {
    /// Bytes that are compared at once.
    const RUN: usize = 32;
    let mut found = Changes::default();
    let mut next = 0;
    let (runs, rest) = child.as_chunks::<RUN>();
    let (parents, parents_rest) = parent.as_chunks::<RUN>();
    let mut look = |start: usize, before: &[u8], after: &[u8]| {
        let pairs = before
            .as_chunks::<WIDTH>()
            .0
            .iter()
            .zip(after.as_chunks::<WIDTH>().0);
        for (i, (before, after)) in pairs
            .enumerate()
            .filter(|(_, (before, after))| before != after)
        {
            let place = start + i;
            found.gaps.push((place - next) as u32);
            found.before.extend_from_slice(before);
            found.after.extend_from_slice(after);
            next = place + 1;
        }
        found.gaps.len() <= most
    };
    for (i, (before, after)) in parents.iter().zip(runs).enumerate() {
        let words = before.as_chunks().0.iter().zip(after.as_chunks().0);
        let differ = words.fold(0, |differ, (before, after)| {
            differ | (u64::from_ne_bytes(*before) ^ u64::from_ne_bytes(*after))
        });
        if differ != 0 && !look(i * (RUN / WIDTH), before, after) {
            return None;
        }
    }
    look(runs.len() * (RUN / WIDTH), parents_rest, rest).then_some(found)
}

/// Whether far more than `most` elements differ, judged by a sample of large chunks.
fn are_many(width: usize, parent: &[u8], child: &[u8], most: usize) -> bool {
    const RUNS: usize = 64;
    /// Bytes.
    const RUN: usize = 64;
    let elements = child.len() / width;
    if child.len() < 16 * RUNS * RUN || most >= elements {
        return false;
    }
    let differ = |run: usize| {
        let start = run * (child.len() / RUNS) / width * width;
        let pair = parent[start..start + RUN]
            .chunks(width)
            .zip(child[start..].chunks(width));
        pair.filter(|(before, after)| before != after).count()
    };
    let found: usize = (0..RUNS).map(differ).sum();
    found * elements > 2 * most * (RUNS * RUN / width)
}

/// Appends elements that differ to `out`, in the smaller way. `element` is what the coder makes of them, if it knows them.
pub(super) fn encode(
    element: Option<Element>,
    changes: &Changes,
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> Codec {
    let Changes {
        gaps,
        before,
        after,
    } = changes;
    let start = out.len();
    list(gaps, after, out);
    let Some(element) = element.filter(|_| gaps.len() >= MANY) else {
        return Codec::Sparse;
    };
    let listed = out.len();
    out.extend((gaps.len() as u32).to_le_bytes());
    let at = out.len();
    out.extend([0; 4]);
    let gaps: Vec<u8> = gaps.iter().flat_map(|gap| gap.to_le_bytes()).collect();
    let zeros = vec![0; gaps.len()];
    let mut code = |element, of, out: &mut Vec<u8>| {
        // Changes are no more than a chunk's elements.
        difference::encode(Path::detect(), element, Scale::Chunk, of, scratch, out)
            .expect("no more than a chunk");
    };
    code(Element::Bits32, (&zeros, &gaps), out);
    let length = (out.len() - at - 4) as u32;
    out[at..at + 4].copy_from_slice(&length.to_le_bytes());
    code(element, (before, after), out);
    if out.len() - listed < listed - start {
        out.drain(start..listed);
        Codec::Scattered
    } else {
        out.truncate(listed);
        Codec::Sparse
    }
}

/// Puts coded changes into `child`, which was the parent.
pub(super) fn decode(element: Element, bytes: &[u8], child: &mut [u8]) -> Result<(), ChunkError> {
    let width = element.width();
    let (&[c0, c1, c2, c3, l0, l1, l2, l3], bytes) =
        bytes.split_first_chunk::<8>().ok_or(ChunkError::Length)?;
    let count = u32::from_le_bytes([c0, c1, c2, c3]) as usize;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if count > child.len() / width {
        return Err(ChunkError::Place);
    }
    let (coded, values) = bytes.split_at_checked(length).ok_or(ChunkError::Length)?;
    let (zeros, mut gaps) = (vec![0; 4 * count], vec![0; 4 * count]);
    let path = Path::detect();
    difference::decode(
        path,
        Element::Bits32,
        Scale::Chunk,
        &zeros,
        coded,
        &mut gaps,
    )?;
    let mut next = 0usize;
    let places = gaps.as_chunks().0.iter().map(|gap| {
        let place = next.saturating_add(u32::from_le_bytes(*gap) as usize);
        next = place.saturating_add(1);
        place
    });
    let places: Vec<usize> = places.collect();
    if places
        .last()
        .is_some_and(|&last| last >= child.len() / width)
    {
        return Err(ChunkError::Place);
    }
    let mut before = Vec::with_capacity(count * width);
    for &place in &places {
        before.extend_from_slice(&child[place * width..(place + 1) * width]);
    }
    let mut after = vec![0; before.len()];
    difference::decode(path, element, Scale::Chunk, &before, values, &mut after)?;
    for (&place, value) in places.iter().zip(after.chunks(width)) {
        child[place * width..(place + 1) * width].copy_from_slice(value);
    }
    Ok(())
}

/// Whether the parents' exponents tell where changes are: whether a coder that knows them could save one byte in
/// [`TOLD`] of `length`. Judged by a sample of the parents.
pub(super) fn are_told_by_parents(
    element: Element,
    changes: &Changes,
    parent: &[u8],
    length: usize,
) -> bool {
    const TOLD: f64 = 20.0;
    const SAMPLE: usize = 4096;
    let shift = match element {
        Element::F32 => 23,
        Element::Bf16 => 7,
        Element::F16 => 10,
        Element::Bits8 | Element::Bits16 | Element::Bits32 => return false,
    };
    let width = element.width();
    let exponent = |bytes: &[u8]| {
        let bits = bytes
            .iter()
            .rev()
            .fold(0u32, |bits, &byte| bits << 8 | u32::from(byte));
        (bits >> shift) as usize & 255
    };
    let (mut of_changed, mut of_all) = ([0.0f64; 256], [0.0f64; 256]);
    let elements = parent.len() / width;
    for bytes in parent
        .chunks_exact(width)
        .step_by(elements.div_ceil(SAMPLE).max(1))
    {
        of_all[exponent(bytes)] += 1.0;
    }
    for bytes in changes.before.chunks_exact(width) {
        of_changed[exponent(bytes)] += 1.0;
    }
    let (changed, all) = (of_changed.iter().sum::<f64>(), of_all.iter().sum::<f64>());
    // The divergence of one distribution from the other, in bits for each change.
    let told = of_changed
        .iter()
        .zip(&of_all)
        .filter(|(changed, _)| **changed > 0.0);
    let bits = told.map(|(of_changed, of_all)| {
        of_changed * (of_changed / changed / (of_all.max(0.5) / all)).log2()
    });
    bits.sum::<f64>() * TOLD > 8.0 * length as f64
}

/// Appends elements to `out`: gaps, then bytes.
fn list(gaps: &[u32], values: &[u8], out: &mut Vec<u8>) {
    for &gap in gaps {
        let mut gap = gap;
        while gap >= 128 {
            out.push(gap as u8 | 128);
            gap >>= 7;
        }
        out.push(gap as u8);
    }
    out.extend_from_slice(values);
}

/// Appends all elements of `child` that are not those of `parent`.
pub(super) fn list_all(width: usize, parent: &[u8], child: &[u8], out: &mut Vec<u8>) {
    if let Some(changes) = changes(width, parent, child, usize::MAX) {
        list(&changes.gaps, &changes.after, out);
    }
}

/// Puts what [`list_all`] told into `child`, which was the parent.
pub(super) fn unlist(width: usize, bytes: &[u8], child: &mut [u8]) -> Result<(), ChunkError> {
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
