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
mod rans;
mod reference;
mod tokens;

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

pub use crate::panel::Path;
use frequencies::Frequencies;
pub use reference::order_0_bits;
use tokens::{BLOCK, CONTEXTS, ESCAPE, Known, Read, Spec, TOKENS, Tokens};

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
    symbols: Vec<u16>,
    raws: Vec<u16>,
    words: Vec<u16>,
    lows: Vec<u8>,
    escaped: Vec<u8>,
}

impl Scratch {
    fn prepare(&mut self, elements: usize, low_bytes: usize) {
        self.symbols.resize(elements, 0);
        self.raws.resize(elements, 0);
        self.lows.resize(elements * low_bytes, 0);
        self.words.clear();
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
    let (mut spec, _) = choose(element, scale, parent, child);
    let elements = child.len() / element.width();
    scratch.prepare(elements, spec.low as usize / 8);
    let Scratch {
        symbols,
        raws,
        words,
        lows,
        escaped,
    } = scratch;
    let known = Known { parent, roots };
    let mut tokens = Tokens {
        symbols,
        raws,
        lows,
        escaped,
    };
    spec.tokenise(path, known, child, &mut tokens);

    let counts = count(symbols);
    let frequencies = best_contexts(&counts);
    spec.last_context = frequencies.of.len() as u32 - 1;
    let encoder = rans::Encoder::new(&frequencies, &spec);
    let registers = rans::registers(elements);
    let coders = registers * rans::REGISTER;
    let states = rans::encode(path, &encoder, (symbols, raws), coders, words);

    out.push(
        (spec.low / 8) as u8 | (registers.ilog2() as u8) << 2 | (spec.last_context as u8) << 4,
    );
    out.push(spec.top as u8);
    out.extend((words.len() as u32).to_le_bytes());
    out.extend(((escaped.len() / element.width()) as u32).to_le_bytes());
    frequencies.write(out);
    out.extend(
        states[..coders]
            .iter()
            .flat_map(|state| state.to_le_bytes()),
    );
    let at = out.len();
    out.resize(at + 2 * words.len(), 0);
    for (bytes, word) in out[at..].as_chunks_mut().0.iter_mut().zip(words.iter()) {
        *bytes = word.to_le_bytes();
    }
    out.extend_from_slice(escaped);
    out.extend_from_slice(lows);
    Ok(())
}

/// Bytes that [`encode`] would write, about: what a sample of the elements makes one expect.
///
/// # Errors
///
/// If lengths do not fit.
pub fn estimate(
    element: Element,
    scale: Scale,
    (parent, child): (&[u8], &[u8]),
) -> Result<usize, DifferenceError> {
    check(element, scale, parent, child.len())?;
    let (_, bits) = choose(element, scale, parent, child);
    Ok((bits / 8.0 * (child.len() / element.width()) as f64) as usize)
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
    let (frequencies, read) = Frequencies::read(contexts, rest)?;
    let decoder = rans::Decoder::new(&frequencies, &spec);
    let width = element.width();
    let elements = child.len() / width;
    let coders = registers * rans::REGISTER;

    let mut rest = &rest[read..];
    let states = take(&mut rest, 4 * coders)?;
    let words = take(&mut rest, (words as usize).saturating_mul(2))?;
    let mut escaped = take(&mut rest, (escaped as usize).saturating_mul(width))?;
    let low_width = spec.low as usize / 8;
    let lows = take(&mut rest, elements * low_width)?;
    if !rest.is_empty() {
        return Err(DifferenceError::Corrupt("length"));
    }

    let mut decoding = rans::Decoding {
        states: [rans::LEAST; rans::CODERS],
        words: words.as_chunks().0,
        left: words.len() / 2,
        coders,
    };
    for (state, bytes) in decoding.states.iter_mut().zip(states.as_chunks().0) {
        *state = u32::from_le_bytes(*bytes);
        if *state < rans::LEAST || *state >= 1 << 31 {
            return Err(DifferenceError::Corrupt("state"));
        }
    }
    let (mut contexts, mut tokens) = ([0; BLOCK], [0; BLOCK]);
    let mut raws = [0; BLOCK];
    let pieces = parent
        .chunks(BLOCK * width)
        .zip(child.chunks_mut(BLOCK * width));
    for (i, (parent, child)) in pieces.enumerate() {
        let count = parent.len() / width;
        let (contexts, tokens, raws) = (
            &mut contexts[..count],
            &mut tokens[..count],
            &mut raws[..count],
        );
        let roots = if roots.is_empty() {
            roots
        } else {
            &roots[4 * i * BLOCK..][..4 * count]
        };
        let known = Known { parent, roots };
        spec.contextualise(path, known, contexts);
        decoding.decode(path, &decoder, contexts, tokens, raws)?;
        let lows = &lows[i * BLOCK * low_width..][..count * low_width];
        let read = Read { tokens, raws, lows };
        if spec.restore(path, known, read, child) > 0 {
            let away = child.chunks_mut(width).zip(read.tokens);
            for (child, _) in away.filter(|(_, token)| u32::from(**token) == ESCAPE) {
                child.copy_from_slice(take(&mut escaped, width)?);
            }
        }
    }
    decoding.check_end()?;
    if escaped.is_empty() {
        Ok(())
    } else {
        Err(DifferenceError::Corrupt("list of escaped elements"))
    }
}

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

/// How often each token comes in each context.
fn count(symbols: &[u16]) -> [[u32; TOKENS]; CONTEXTS] {
    // Equal symbols in a row would wait for each other.
    let mut counts = [const { [0u32; CONTEXTS * TOKENS] }; 4];
    let (fours, rest) = symbols.as_chunks::<4>();
    for four in fours {
        for (counts, &symbol) in counts.iter_mut().zip(four) {
            counts[usize::from(symbol) % (CONTEXTS * TOKENS)] += 1;
        }
    }
    for &symbol in rest {
        counts[0][usize::from(symbol) % (CONTEXTS * TOKENS)] += 1;
    }
    std::array::from_fn(|context| {
        std::array::from_fn(|token| {
            counts
                .iter()
                .map(|counts| counts[context * TOKENS + token])
                .sum()
        })
    })
}

/// Frequencies with as many contexts as pay for themselves.
fn best_contexts(counts: &[[u32; TOKENS]; CONTEXTS]) -> Frequencies {
    let merged = |contexts: usize| {
        let mut merged = counts[..contexts].to_vec();
        for later in &counts[contexts..] {
            for (sum, count) in merged[contexts - 1].iter_mut().zip(later) {
                *sum += count;
            }
        }
        merged
    };
    let candidates = [1, 4, 8, CONTEXTS].map(|contexts| {
        let counts = merged(contexts);
        let frequencies = Frequencies::of_counts(&counts);
        let bits = frequencies.cost(&counts);
        (bits, frequencies)
    });
    let best = candidates.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or_else(
        || Frequencies::of_counts(&[[0; TOKENS]]),
        |(_, frequencies)| frequencies,
    )
}

/// Elements that [`choose`] looks at.
const SAMPLE: usize = 256;

/// The exponent and the number of low bits that suit a chunk, judged by a sample of it, and bits an element with them.
fn choose(element: Element, scale: Scale, parent: &[u8], child: &[u8]) -> (Spec, f64) {
    let mut spec = Spec {
        element,
        low: 0,
        top: 0,
        last_context: CONTEXTS as u32 - 1,
    };
    let width = element.width();
    let elements = child.len() / width;
    let places = SAMPLE.min(elements);
    let at = |i: usize| i * elements / places * width;
    let bits = |bytes: &[u8], at: usize| {
        let bytes = bytes[at..at + width].iter().rev();
        bytes.fold(0u32, |bits, &byte| bits << 8 | u32::from(byte))
    };
    let sample: Vec<_> = (0..places)
        .map(|i| (bits(parent, at(i)), bits(child, at(i))))
        .collect();
    spec.top = spec.top_of(&sample);
    let roots: Vec<u32> = match scale {
        Scale::Chunk => Vec::new(),
        Scale::Root(roots) => {
            let of = |i: usize| u32::from_le_bytes(roots.as_chunks().0[at(i) / width]);
            (0..places).map(of).collect()
        }
    };
    let lows: &[u32] = match element.width() {
        1 => &[0],
        2 => &[0, 8],
        _ => &[0, 8, 16],
    };
    let cost = |low: u32| Spec { low, ..spec }.sample_cost(&sample, &roots);
    // Bits stored as they are cost no time, and are preferred where they hardly cost room.
    let mut least = f64::INFINITY;
    for &low in lows {
        let cost = cost(low);
        if cost <= least * 1.002 {
            spec.low = low;
        }
        least = least.min(cost);
    }
    (spec, least / places.max(1) as f64)
}
