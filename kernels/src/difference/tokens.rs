//! From child and parent to tokens and raw bits, and back.

use super::Element;

/// Tokens there can be.
pub(super) const TOKENS: usize = 64;
/// The bits stand in a list.
pub(super) const ESCAPE: u32 = 34;
/// The first that says exponent and sign: two for each octave.
pub(super) const FAR: u32 = 35;
/// Octaves that have a token.
const OCTAVES: u32 = 14;
/// Octaves above the scale that have one.
pub(super) const ABOVE: u32 = 2;
/// Bits of what near tokens say, at most.
const NEAR_BITS: u32 = 17;
/// Most raw bits of a token.
pub(super) const MOST_RAW: u32 = 15;

/// Contexts there can be.
pub(super) const CONTEXTS: usize = 16;
/// Where the exponent of the scale itself lies among contexts, with a scale for each element.
const ROOT_CONTEXT: u32 = 3;

/// How a chunk is turned into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spec {
    pub element: Element,
    /// Bits stored as they are.
    pub low: u32,
    /// The exponent that contexts and far tokens are relative to, biased; not used with a scale for each element.
    pub top: u32,
    /// Contexts after this one are this one.
    pub last_context: u32,
}

/// [`Spec`] as the loops want it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loop {
    pub bits: u32,
    /// A one in the sign's place.
    pub sign: u32,
    /// Ones below the sign.
    pub magnitude: u32,
    pub mantissa: u32,
    pub exponents: u32,
    pub low: u32,
    /// The largest folded difference with a near token.
    pub near: u32,
    /// Octaves with a far token: none where raw bits would be too many.
    pub octaves: u32,
    pub top: u32,
    pub context_of_top: u32,
    pub last_context: u32,
}

impl Spec {
    pub(super) fn of_loop(&self) -> Loop {
        let bits = self.element.bits();
        let float = self.element.mantissa();
        let ones = |bits: u32| ((1u64 << bits) - 1) as u32;
        let mantissa = float.unwrap_or(0);
        let is_far = float.is_some()
            && mantissa.saturating_sub(self.low) <= MOST_RAW
            && self.low <= mantissa;
        let most = NEAR_BITS + self.low;
        let near = if is_far { most.min(mantissa + 1) } else { most };
        Loop {
            bits,
            sign: 1 << (bits - 1),
            magnitude: if float.is_some() { ones(bits - 1) } else { 0 },
            mantissa,
            exponents: float.map_or(0, |mantissa| ones(bits - 1 - mantissa)),
            low: self.low,
            near: ones(near.min(32)),
            octaves: if is_far { OCTAVES } else { 0 },
            top: self.top,
            context_of_top: 0,
            last_context: self.last_context,
        }
    }

    /// Raw bits of a token.
    pub(super) fn raw_bits(&self, token: u32) -> u32 {
        match token {
            ESCAPE => 0,
            near if near < ESCAPE => (near >> 1).max(1) - 1,
            _ => self
                .element
                .mantissa()
                .unwrap_or(0)
                .saturating_sub(self.low)
                .min(MOST_RAW),
        }
    }
}

impl Loop {
    fn beside_roots(self) -> Self {
        Self {
            context_of_top: ROOT_CONTEXT,
            ..self
        }
    }

    /// An integer that grows with the number; integers are taken modulo 2^bits either way.
    #[inline(always)]
    fn ordered(&self, bits: u32) -> u32 {
        let is_negative = (bits >> (self.bits - 1)) & 1;
        bits ^ (0u32.wrapping_sub(is_negative) & self.magnitude) ^ (self.sign & self.float())
    }

    #[inline(always)]
    fn unordered(&self, ordered: u32) -> u32 {
        let is_positive = (ordered >> (self.bits - 1)) & 1;
        ordered ^ (is_positive.wrapping_sub(1) & self.magnitude) ^ (self.sign & self.float())
    }

    /// All ones for floats.
    #[inline(always)]
    fn float(&self) -> u32 {
        if self.magnitude == 0 { 0 } else { u32::MAX }
    }

    #[inline(always)]
    pub(super) fn exponent(&self, bits: u32) -> u32 {
        (bits >> self.mantissa) & self.exponents
    }

    #[inline(always)]
    pub(super) fn context(&self, parent: u32, scale: u32) -> u32 {
        let below = (scale + self.context_of_top) as i32 - self.exponent(parent) as i32;
        below.clamp(0, self.last_context as i32) as u32
    }

    /// Token, raw bits below whatever is above them, and low bits below whatever is above these.
    #[inline(always)]
    pub(super) fn token(&self, parent: u32, child: u32, scale: u32) -> (u32, u32, u32) {
        let unused = 32 - self.bits;
        let difference = self.ordered(child).wrapping_sub(self.ordered(parent));
        let difference = ((difference << unused) as i32) >> unused;
        let folded = ((difference << 1) ^ (difference >> 31)) as u32;

        let value = folded >> self.low;
        // A float's exponent and highest bit of mantissa say what the token says.
        let as_float = (value as i32 as f32).to_bits();
        let near = if value < 2 {
            value
        } else {
            (as_float >> 22).wrapping_sub(254)
        };

        let octave = (scale + ABOVE).wrapping_sub(self.exponent(child));
        let flipped = ((parent ^ child) >> (self.bits - 1)) & 1;
        let mantissa = child & ((1u32 << self.mantissa) - 1);

        let is_near = folded <= self.near;
        let is_far = octave < self.octaves;
        let far = if is_far {
            FAR + 2 * octave + flipped
        } else {
            ESCAPE
        };
        let far_raw = if is_far { mantissa >> self.low } else { 0 };
        (
            if is_near { near } else { far },
            if is_near { value } else { far_raw },
            if is_near { folded } else { mantissa },
        )
    }

    /// The child again; of an escaped one anything.
    #[inline(always)]
    pub(super) fn child(&self, parent: u32, token: u32, raw: u32, low: u32, scale: u32) -> u32 {
        let raw_bits = (token >> 1).max(1) - 1;
        let value = if token < 2 {
            token
        } else {
            ((2 | (token & 1)) << (raw_bits & 15)) | raw
        };
        let folded = (value << self.low) | low;
        let difference = (folded >> 1) ^ 0u32.wrapping_sub(folded & 1);
        let near = self.unordered(self.ordered(parent).wrapping_add(difference));

        let far = token.wrapping_sub(FAR);
        let exponent = (scale + ABOVE).wrapping_sub(far >> 1) & self.exponents;
        let flipped = parent ^ (far << (self.bits - 1));
        let mantissa = (raw << self.low) | low;
        let far = (flipped & self.sign) | (exponent << self.mantissa) | mantissa;
        if token < ESCAPE { near } else { far }
    }
}

/// What both sides know of some elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    pub parent: &'a [u8],
    /// What scales are the roots of, or nothing where there is one scale.
    pub roots: &'a [u8],
}

impl<'a> Known<'a> {
    /// Of some elements of them.
    pub(super) fn slice(self, width: usize, elements: std::ops::Range<usize>) -> Self {
        let of =
            |bytes: &'a [u8], width: usize| &bytes[width * elements.start..width * elements.end];
        Self {
            parent: of(self.parent, width),
            roots: if self.roots.is_empty() {
                self.roots
            } else {
                of(self.roots, 4)
            },
        }
    }
}

/// What is written of some elements, one by one.
#[derive(Debug)]
pub(super) struct Tokens<'a> {
    /// A bit for each token that comes.
    pub seen: u64,
    /// Context and token, `context * TOKENS + token`, in the lower half, raw bits in the upper one: below whatever is
    /// above them.
    pub symbols: &'a mut [u32],
    /// `low / 8` bytes an element.
    pub lows: &'a mut [u8],
    /// The bytes of those that are escaped.
    pub escaped: &'a mut Vec<u8>,
}

/// What was read of some elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Read<'a> {
    pub tokens: &'a [u16],
    pub raws: &'a [u16],
    /// `low / 8` bytes an element.
    pub lows: &'a [u8],
}

impl Spec {
    pub(super) fn shape(&self, known: Known) -> Loop {
        let plain = self.of_loop();
        if known.roots.is_empty() {
            plain
        } else {
            plain.beside_roots()
        }
    }
}
