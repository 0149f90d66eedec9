//! Lossless differences: the bits of numbers, coded with the help of numbers that are near them.
//!
//! A checkpoint's weights are those of the one before, moved a little. [`encode`] writes what has to be known besides
//! the *parent* to have the *child* again, bit for bit: NaN payloads, negative zeros and denormals included.
//!
//! 1. The bits of a float become an integer that grows with it (for negative numbers all bits are inverted, for others
//!    the sign bit), so that neighbouring floats are neighbouring integers. Integers are taken as they are.
//! 2. The difference of child and parent, modulo 2^width, is folded to z = 0, 1, 2 ... for 0, -1, 1 ...
//! 3. z's lowest 0, 8 or 16 bits, where they are as good as random, are stored as they are. Of the rest the *token* says
//!    how many bits it has and the second-highest of them; the bits below are *raw*. A float far from its parent is
//!    cheaper to write as it is: its token has the exponent, relative to a scale, and whether the sign flipped, and its
//!    mantissa is raw. What neither says is *escaped*: its bits stand in a list.
//! 4. Tokens are coded by rANS (Duda, 2013, "Asymmetric numeral systems") with frequencies that depend on the parent's
//!    exponent: the step from a small weight to the next float is small, so that it moves by more of them.
//!    16, 32 or 64 coders take turns, element by element, so that SIMD registers hold one coder a lane. Raw bits go
//!    through the same coders.
//!
//! The *scale* of far floats and contexts is one exponent for all of a chunk, or [`Scale::Root`] of another array: what an
//! optimizer knows of a gradient's mean is best told beside the root of what it knows of its square.
//!
//! [`encode`] and [`decode`] take chunks of up to [`MOST`] elements; [`Path`] says with which instructions, and all of
//! them write and read the same bytes.

pub mod adam;
mod frequencies;
mod loops;
mod rans;
mod reference;
mod sample;
mod tokens;

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

pub use crate::panel::Path;
use frequencies::{Counts, Frequencies};
pub use reference::order_0_bits;
use tokens::{Known, Read, Spec, Tokens};

/// Most elements of a chunk.
pub const MOST: usize = 1 << 17;

/// What the bits of an element are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// Eight bits, no float.
    Bits8,
    /// 16 bits, no float.
    Bits16,
    /// 32 bits, no float.
    Bits32,
}

impl Element {
    /// Every kind.
    pub const ALL: [Self; 6] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Bits8,
        Self::Bits16,
        Self::Bits32,
    ];

    /// Bytes.
    pub const fn width(self) -> usize {
        match self {
            Self::Bits8 => 1,
            Self::F16 | Self::Bf16 | Self::Bits16 => 2,
            Self::F32 | Self::Bits32 => 4,
        }
    }

    const fn bits(self) -> u32 {
        8 * self.width() as u32
    }

    /// Bits of a float's mantissa.
    const fn mantissa(self) -> Option<u32> {
        match self {
            Self::F32 => Some(23),
            Self::F16 => Some(10),
            Self::Bf16 => Some(7),
            Self::Bits8 | Self::Bits16 | Self::Bits32 => None,
        }
    }
}

/// What exponents are held against.
#[derive(Debug, Clone, Copy)]
pub enum Scale<'a> {
    /// One exponent, which [`encode`] chooses.
    Chunk,
    /// The root of the magnitude of another f32 for each element, as little-endian bytes. Both sides need the same.
    Root(&'a [u8]),
}

/// Bytes that [`encode`] did not write, or that were written for another parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DifferenceError {
    /// It ends too soon.
    #[error("it ends too soon")]
    Truncated,
    /// It says something that cannot be.
    #[error("its {0} cannot be")]
    Corrupt(&'static str),
    /// Parent, child or scale of another length.
    #[error("{found} bytes where {expected} are needed")]
    Length {
        /// Bytes that there should be.
        expected: usize,
        /// Bytes that there are.
        found: usize,
    },
}

/// Bytes before tables: shape, the top exponent, words, escaped elements.
const HEADER: usize = 10;

/// What [`encode`] needs room for; one of it serves for many chunks.
#[derive(Debug, Default)]
pub struct Scratch {
    symbols: Vec<u32>,
    escaped: Vec<u8>,
}

impl Scratch {
    fn prepare(&mut self, elements: usize) {
        self.symbols.resize(elements, 0);
        self.escaped.clear();
    }
}

/// Appends to `out` what `child` is beside `parent`: both as little-endian bytes of equally many elements, up to
/// [`MOST`].
///
/// # Errors
///
/// If lengths do not fit.
pub fn encode(
    path: Path,
    element: Element,
    scale: Scale,
    (parent, child): (&[u8], &[u8]),
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> Result<(), DifferenceError> {
    let roots = check(element, scale, parent, child.len())?;
    let known = Known { parent, roots };
    let (mut spec, _) = sample::choose(path, element, known, child);
    let elements = child.len() / element.width();
    scratch.prepare(elements);
    let Scratch { symbols, escaped } = scratch;
    let start = out.len();
    let header_end = start + HEADER;
    // At once, or it is copied as it grows.
    out.reserve(HEADER + child.len() + 4 * (elements + rans::CODERS) + 4096);
    out.resize(header_end + elements * spec.low as usize / 8, 0);
    let mut tokens = Tokens {
        seen: 0,
        symbols,
        lows: &mut out[header_end..],
        escaped,
    };
    spec.tokenise(path, known, child, &mut tokens);

    let seen = tokens.seen;
    let mut counts = Counts::default();
    // Of wide elements most bits are raw: what frequencies are off by is little beside them, and counting is slow.
    if element.width() < 4 || elements <= 1 << 15 {
        counts.add(symbols);
    } else {
        counts.add_some(symbols, seen);
    }
    let frequencies = Frequencies::best(&counts.sums());
    spec.last_context = frequencies.of.len() as u32 - 1;
    let encoder = rans::Encoder::new(&frequencies, &spec);
    let registers = rans::registers_for(elements);
    let coders = registers * rans::REGISTER;

    frequencies.write(out);
    let at = out.len();
    let states = rans::encode(path, &encoder, symbols, coders, out);
    let words = (out.len() - at) / 2;
    let states = states[..coders].iter();
    out.extend(states.flat_map(|state| state.to_le_bytes()));
    out.extend_from_slice(escaped);

    let [shape, top, counts @ ..] = &mut out[start..][..HEADER] else {
        unreachable!("a header is that long");
    };
    *shape = (spec.low / 8) as u8 | (registers.ilog2() as u8) << 2 | (spec.last_context as u8) << 4;
    *top = spec.top as u8;
    let escaped = escaped.len() / element.width();
    counts[..4].copy_from_slice(&(words as u32).to_le_bytes());
    counts[4..].copy_from_slice(&(escaped as u32).to_le_bytes());
    Ok(())
}

/// Bytes that [`encode`] would write, about: what a sample of the elements makes one expect.
///
/// # Errors
///
/// If lengths do not fit.
pub fn estimate(
    path: Path,
    element: Element,
    scale: Scale,
    (parent, child): (&[u8], &[u8]),
) -> Result<usize, DifferenceError> {
    let roots = check(element, scale, parent, child.len())?;
    let (_, bits) = sample::choose(path, element, Known { parent, roots }, child);
    Ok((bits / 8.0 * (child.len() / element.width()) as f32) as usize)
}

/// Puts into `child` what [`encode`] was given, with the same parent and scale.
///
/// # Errors
///
/// If lengths do not fit; where it is noticed, if the bytes are damaged or the parent is another. Not all damage is: who
/// stores them keeps checksums.
pub fn decode(
    path: Path,
    element: Element,
    scale: Scale,
    parent: &[u8],
    bytes: &[u8],
    child: &mut [u8],
) -> Result<(), DifferenceError> {
    let roots = check(element, scale, parent, child.len())?;
    let (header, rest) = bytes
        .split_first_chunk::<HEADER>()
        .ok_or(DifferenceError::Truncated)?;
    let [shape, top, w0, w1, w2, w3, e0, e1, e2, e3] = *header;
    let (words, escaped) = (
        u32::from_le_bytes([w0, w1, w2, w3]),
        u32::from_le_bytes([e0, e1, e2, e3]),
    );
    let spec = Spec {
        element,
        low: 8 * u32::from(shape & 3),
        top: u32::from(top),
        last_context: u32::from(shape >> 4),
    };
    let registers = 1usize << ((shape >> 2) & 3);
    if spec.low > 16 || spec.low >= element.bits() || registers > rans::REGISTERS {
        return Err(DifferenceError::Corrupt("shape"));
    }
    let contexts = spec.last_context as usize + 1;
    let width = element.width();
    let elements = child.len() / width;
    let low_width = spec.low as usize / 8;
    let mut rest = rest;
    let lows = take(&mut rest, elements * low_width)?;
    let (frequencies, read) = Frequencies::read(contexts, rest)?;
    let decoder = rans::Decoder::new(&frequencies, &spec);
    let coders = registers * rans::REGISTER;

    let mut rest = &rest[read..];
    let stream = rest;
    let words = take(&mut rest, (words as usize).saturating_mul(2))?;
    let states = take(&mut rest, 4 * coders)?;
    let mut list = take(&mut rest, (escaped as usize).saturating_mul(width))?;
    if !rest.is_empty() {
        return Err(DifferenceError::Corrupt("length"));
    }

    let mut decoding = rans::Decoding {
        states: [rans::LEAST; rans::CODERS],
        words: stream.as_chunks().0,
        left: words.len() / 2,
        coders,
    };
    for (state, bytes) in decoding.states.iter_mut().zip(states.as_chunks().0) {
        *state = u32::from_le_bytes(*bytes);
        if *state < rans::LEAST || *state >= 1 << 31 {
            return Err(DifferenceError::Corrupt("state"));
        }
    }
    let known = Known { parent, roots };
    let mut escaped = Vec::new();
    let mut done = match path {
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 => {
            let shape = spec.shape(known);
            let read = (known, lows);
            avx512::decode(&mut decoding, &decoder, shape, read, child, &mut escaped)?
        }
        _ => 0,
    };
    let (mut contexts, mut tokens) = ([0u16; BLOCK], [0u16; BLOCK]);
    let mut raws = [0; BLOCK];
    while done < elements {
        let count = BLOCK.min(elements - done);
        let range = done..done + count;
        let (contexts, tokens, raws) = (
            &mut contexts[..count],
            &mut tokens[..count],
            &mut raws[..count],
        );
        let known = known.slice(width, range.clone());
        spec.contextualise(path, known, contexts);
        decoding.decode(path, &decoder, contexts, tokens, raws)?;
        let lows = &lows[range.start * low_width..range.end * low_width];
        let read = Read { tokens, raws, lows };
        let child = &mut child[range.start * width..range.end * width];
        if spec.restore(path, known, read, child) {
            let places = (done..).zip(read.tokens);
            let places = places.filter(|(_, token)| u32::from(**token) == tokens::ESCAPE);
            escaped.extend(places.map(|(place, _)| place));
        }
        done += count;
    }
    decoding.check_end()?;
    for place in escaped {
        child[place * width..][..width].copy_from_slice(take(&mut list, width)?);
    }
    if list.is_empty() {
        Ok(())
    } else {
        Err(DifferenceError::Corrupt("list of escaped elements"))
    }
}

/// Elements that are decoded at a time: what the first-level cache holds with ease, and whole turns of the coders.
const BLOCK: usize = 1024;
const _: () = assert!(BLOCK.is_multiple_of(rans::CODERS));

/// Splits so many bytes off.
fn take<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a [u8], DifferenceError> {
    let (taken, left) = rest
        .split_at_checked(length)
        .ok_or(DifferenceError::Truncated)?;
    *rest = left;
    Ok(taken)
}

/// The roots' bytes, or none.
fn check<'a>(
    element: Element,
    scale: Scale<'a>,
    parent: &[u8],
    child: usize,
) -> Result<&'a [u8], DifferenceError> {
    let length = |expected: usize, found: usize| {
        if found == expected {
            Ok(())
        } else {
            Err(DifferenceError::Length { expected, found })
        }
    };
    let elements = child / element.width();
    length(elements.min(MOST) * element.width(), child)?;
    length(child, parent.len())?;
    match scale {
        Scale::Chunk => Ok(&[]),
        Scale::Root(roots) => {
            length(4 * elements, roots.len())?;
            Ok(roots)
        }
    }
}
