//! Loops from elements to tokens and back, in plain Rust that compilers vectorise.

use super::Path;
use super::tokens::{ESCAPE, Known, Loop, Read, Spec, TOKENS, Tokens};
use crate::vector::vectorised;

/// Calls a function that is generic in the bytes of an element.
macro_rules! by_width {
    ($spec:expr, $function:ident($($argument:expr),*)) => {
        match $spec.element.width() {
            1 => $function::<1>($($argument),*),
            2 => $function::<2>($($argument),*),
            _ => $function::<4>($($argument),*),
        }
    };
}

impl Spec {
    /// The largest exponent of parents and children that is one of a number.
    pub(super) fn top_of(&self, path: Path, parent: &[u8], child: &[u8]) -> u32 {
        let shape = self.of_loop();
        let top = |bytes| by_width!(self, top_exponent(path, shape, bytes));
        top(parent).max(top(child))
    }

    /// All slices are of as many elements.
    pub(super) fn tokenise(&self, path: Path, known: Known, child: &[u8], out: &mut Tokens) {
        let shape = self.shape(known);
        let done = match path {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => super::avx512::tokenise(shape, known, child, out),
            _ => 0,
        };
        by_width!(self, tokenise(path, shape, known, child, out, done));
    }

    pub(super) fn contextualise(&self, path: Path, known: Known, contexts: &mut [u16]) {
        let shape = self.shape(known);
        by_width!(self, contextualise(path, shape, known, contexts));
    }

    /// The children. Returns whether some are escaped: these are not restored.
    pub(super) fn restore(&self, path: Path, known: Known, read: Read, child: &mut [u8]) -> bool {
        let shape = self.shape(known);
        by_width!(self, restore(path, shape, known, read, child))
    }
}

/// Elements that are worked on at once: what is known of them stays in the first-level cache.
const BLOCK: usize = 256;

/// Little-endian numbers of `WIDTH` bytes.
#[inline(always)]
fn load<const WIDTH: usize>(bytes: &[u8], out: &mut [u32]) {
    match WIDTH {
        1 => {
            for (out, byte) in out.iter_mut().zip(bytes) {
                *out = u32::from(*byte);
            }
        }
        2 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = u32::from(u16::from_le_bytes(*bytes));
            }
        }
        _ => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = u32::from_le_bytes(*bytes);
            }
        }
    }
}

/// Their lowest `WIDTH` bytes.
#[inline(always)]
fn store<const WIDTH: usize>(numbers: &[u32], out: &mut [u8]) {
    match WIDTH {
        1 => {
            for (out, number) in out.iter_mut().zip(numbers) {
                *out = *number as u8;
            }
        }
        2 => {
            for (out, number) in out.as_chunks_mut().0.iter_mut().zip(numbers) {
                *out = (*number as u16).to_le_bytes();
            }
        }
        _ => {
            for (out, number) in out.as_chunks_mut().0.iter_mut().zip(numbers) {
                *out = number.to_le_bytes();
            }
        }
    }
}

/// An exponent of the root of a magnitude, biased as f32's.
#[inline(always)]
fn root_exponent(bits: u32) -> u32 {
    (((bits >> 23) & 0xff) + 127) >> 1
}

/// Parents' bits, and the exponents that they are relative to.
#[inline(always)]
fn load_known<const WIDTH: usize>(
    known: Known,
    start: usize,
    parents: &mut [u32],
    scales: &mut [u32],
) {
    load::<WIDTH>(&known.parent[start * WIDTH..], parents);
    if !known.roots.is_empty() {
        load::<4>(&known.roots[start * 4..], scales);
        for scale in scales {
            *scale = root_exponent(*scale);
        }
    }
}

vectorised! {
    /// The largest exponent that is one of a number.
    pub(super) fn top_exponent<const WIDTH: usize>(shape: Loop, bytes: &[u8]) -> u32 {
        let mut most = 0;
        let mut block = [0; BLOCK];
        for bytes in bytes.chunks(BLOCK * WIDTH) {
            let numbers = &mut block[..bytes.len() / WIDTH];
            load::<WIDTH>(bytes, numbers);
            for number in numbers {
                let exponent = shape.exponent(*number);
                let exponent = if exponent < shape.exponents { exponent } else { 0 };
                most = if exponent > most { exponent } else { most };
            }
        }
        most
    }

    /// Tokens of elements from one on.
    pub(super) fn tokenise<const WIDTH: usize>(
        shape: Loop,
        known: Known,
        child: &[u8],
        out: &mut Tokens,
        from: usize,
    ) {
        let elements = child.len() / WIDTH;
        let mut scales = [shape.top; BLOCK];
        let (mut parents, mut children, mut lows) = ([0; BLOCK], [0; BLOCK], [0; BLOCK]);
        for start in (from..elements).step_by(BLOCK) {
            let count = BLOCK.min(elements - start);
            load_known::<WIDTH>(known, start, &mut parents[..count], &mut scales[..count]);
            load::<WIDTH>(&child[start * WIDTH..], &mut children[..count]);
            let symbols = &mut out.symbols[start..][..count];
            // A bit for each token, in two halves.
            let mut seen = [0u32; 2];
            let before = parents[..count].iter().zip(&scales[..count]);
            let after = symbols.iter_mut().zip(&mut lows[..count]);
            for (((parent, scale), child), (symbol, lowest)) in before.zip(&children[..count]).zip(after) {
                let (token, raw, low) = shape.token(*parent, *child, *scale);
                *symbol = raw << 16 | (shape.context(*parent, *scale) * TOKENS as u32 + token);
                *lowest = low;
                let (bit, upper) = (1u32 << (token % 32), 0u32.wrapping_sub(token / 32));
                seen[0] |= bit & !upper;
                seen[1] |= bit & upper;
            }
            match shape.low {
                0 => {}
                8 => store::<1>(&lows[..count], &mut out.lows[start..]),
                _ => store::<2>(&lows[..count], &mut out.lows[start * 2..]),
            }
            let seen = u64::from(seen[1]) << 32 | u64::from(seen[0]);
            out.seen |= seen;
            if seen >> ESCAPE & 1 == 1 {
                let bytes = child[start * WIDTH..].as_chunks::<WIDTH>().0;
                for (symbol, bytes) in symbols.iter().zip(bytes) {
                    if symbol % TOKENS as u32 == ESCAPE {
                        out.escaped.extend_from_slice(bytes);
                    }
                }
            }
        }
    }

    pub(super) fn contextualise<const WIDTH: usize>(shape: Loop, known: Known, contexts: &mut [u16]) {
        let mut scales = [shape.top; BLOCK];
        let mut parents = [0; BLOCK];
        for (i, contexts) in contexts.chunks_mut(BLOCK).enumerate() {
            let (parents, scales) = (&mut parents[..contexts.len()], &mut scales[..contexts.len()]);
            load_known::<WIDTH>(known, i * BLOCK, parents, scales);
            for ((context, parent), scale) in contexts.iter_mut().zip(parents).zip(scales) {
                *context = shape.context(*parent, *scale) as u16;
            }
        }
    }

    pub(super) fn restore<const WIDTH: usize>(
        shape: Loop,
        known: Known,
        read: Read,
        child: &mut [u8],
    ) -> bool {
        let mut scales = [shape.top; BLOCK];
        let (mut parents, mut lows) = ([0; BLOCK], [0; BLOCK]);
        let mut children = [0; BLOCK];
        let mut any = false;
        for (i, child) in child.chunks_mut(BLOCK * WIDTH).enumerate() {
            let (start, count) = (i * BLOCK, child.len() / WIDTH);
            load_known::<WIDTH>(known, start, &mut parents[..count], &mut scales[..count]);
            match shape.low {
                0 => {}
                8 => load::<1>(&read.lows[start..], &mut lows[..count]),
                _ => load::<2>(&read.lows[start * 2..], &mut lows[..count]),
            }
            let before = parents[..count].iter().zip(&scales[..count]).zip(&lows[..count]);
            let tokens = read.tokens[start..][..count].iter().zip(&read.raws[start..][..count]);
            for ((child, (token, raw)), ((parent, scale), low)) in children.iter_mut().zip(tokens).zip(before) {
                let token = u32::from(*token);
                *child = shape.child(*parent, token, u32::from(*raw), *low, *scale);
                any |= token == ESCAPE;
            }
            store::<WIDTH>(&children[..count], child);
        }
        any
    }
}
