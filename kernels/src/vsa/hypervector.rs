//! Vectors of trits.

use super::Seed;
use super::loops::{add_planes, dot_of_planes, multiply_planes, set_bits};
use crate::panel::Path;

/// Elements of a word of a plane.
const WORD: usize = 64;

/// A vector of -1, 0 and 1, on two planes of bits. The module's documentation has an example.
///
/// Operations of two vectors panic if their lengths differ.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Hypervector {
    len: usize,
    /// Bit i of word w is set where element 64w + i is 1. Bits beyond the last element are 0.
    plus: Vec<u64>,
    /// The same for -1. No bit is set in both planes.
    minus: Vec<u64>,
}

/// Planes or trits that are no hypervector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HypervectorError {
    /// A value other than -1, 0 and 1.
    #[error("element {place} is {value}, not -1, 0 or 1")]
    Trit {
        /// The element.
        place: usize,
        /// Its value.
        value: i8,
    },
    /// A plane of another length than the vector needs.
    #[error("a plane of {len} elements has {expected} words, not {found}")]
    Words {
        /// Elements of the vector.
        len: usize,
        /// Words that they need.
        expected: usize,
        /// Words of the plane.
        found: usize,
    },
    /// An element that is both 1 and -1.
    #[error("element {place} is set in both planes")]
    Overlap {
        /// The element.
        place: usize,
    },
    /// A bit beyond the last element.
    #[error("bit {place} is set, beyond the {len} elements")]
    Padding {
        /// The bit.
        place: usize,
        /// Elements of the vector.
        len: usize,
    },
}

impl Hypervector {
    /// All elements 0.
    pub fn zeros(len: usize) -> Self {
        let plane = vec![0; len.div_ceil(WORD)];
        Self {
            len,
            plus: plane.clone(),
            minus: plane,
        }
    }

    /// Random elements of -1 and 1, each with probability 1/2.
    pub fn bipolar(len: usize, seed: Seed) -> Self {
        let mut vector = Self::zeros(len);
        for (place, (plus, minus)) in vector.plus.iter_mut().zip(&mut vector.minus).enumerate() {
            let (bits, valid) = (seed.word(place as u64), valid_bits(len, place));
            (*plus, *minus) = (bits & valid, !bits & valid);
        }
        vector
    }

    /// Random elements: 0 with probability 1 - `density`, otherwise -1 or 1 with equal probability.
    /// The density is rounded to 1/65536.
    ///
    /// # Panics
    /// If the density is not between 0 and 1.
    pub fn sparse(len: usize, density: f64, seed: Seed) -> Self {
        assert!((0.0..=1.0).contains(&density), "a density of {density}");
        let share = (density * 65536.0).round() as u32;
        let (signs, places) = (seed.with(0), seed.with(1));
        let mut vector = Self::zeros(len);
        for (place, (plus, minus)) in vector.plus.iter_mut().zip(&mut vector.minus).enumerate() {
            let kept = bits_of_probability(share, |bit| places.word(place as u64 * 16 + bit));
            let (bits, kept) = (signs.word(place as u64), kept & valid_bits(len, place));
            (*plus, *minus) = (bits & kept, !bits & kept);
        }
        vector
    }

    /// The vector of these trits.
    ///
    /// # Errors
    /// [`HypervectorError::Trit`] for a value other than -1, 0 and 1.
    pub fn from_trits(trits: &[i8]) -> Result<Self, HypervectorError> {
        let bad = trits.iter().position(|trit| !(-1..=1).contains(trit));
        if let Some(place) = bad {
            let value = trits[place];
            return Err(HypervectorError::Trit { place, value });
        }
        let plane = |wanted: i8| {
            let words = trits.chunks(WORD);
            let bit = move |(i, trit): (usize, &i8)| u64::from(*trit == wanted) << i;
            words.map(move |word| word.iter().enumerate().map(bit).sum())
        };
        Ok(Self {
            len: trits.len(),
            plus: plane(1).collect(),
            minus: plane(-1).collect(),
        })
    }

    /// The vector of the signs of these numbers; 0 and NaN become 0.
    pub fn from_signs(values: &[f32]) -> Self {
        let plane = |is_set: fn(f32) -> bool| {
            let words = values.chunks(WORD);
            let bit = move |(i, value): (usize, &f32)| u64::from(is_set(*value)) << i;
            words.map(move |word| word.iter().enumerate().map(bit).sum())
        };
        Self {
            len: values.len(),
            plus: plane(|value| value > 0.0).collect(),
            minus: plane(|value| value < 0.0).collect(),
        }
    }

    /// The vector of these planes of ceil(`len` / 64) words: where elements are 1, and where they
    /// are -1.
    ///
    /// # Errors
    /// [`HypervectorError`] for planes of another length, for an element that is set in both, and
    /// for a bit beyond the last element.
    pub fn from_planes(
        len: usize,
        plus: Vec<u64>,
        minus: Vec<u64>,
    ) -> Result<Self, HypervectorError> {
        let expected = len.div_ceil(WORD);
        for found in [plus.len(), minus.len()] {
            if found != expected {
                return Err(HypervectorError::Words {
                    len,
                    expected,
                    found,
                });
            }
        }
        for (word, (plus, minus)) in plus.iter().zip(&minus).enumerate() {
            let first = |bits: u64| word * WORD + bits.trailing_zeros() as usize;
            if plus & minus != 0 {
                let place = first(plus & minus);
                return Err(HypervectorError::Overlap { place });
            }
            let padding = (plus | minus) & !valid_bits(len, word);
            if padding != 0 {
                let place = first(padding);
                return Err(HypervectorError::Padding { place, len });
            }
        }
        Ok(Self { len, plus, minus })
    }

    /// The elements.
    pub fn to_trits(&self) -> Vec<i8> {
        (0..self.len).map(|place| self.trit(place)).collect()
    }

    /// One element.
    ///
    /// # Panics
    /// If there is no such element.
    pub fn trit(&self, place: usize) -> i8 {
        assert!(place < self.len, "element {place} of {}", self.len);
        let bit = |plane: &[u64]| (plane[place / WORD] >> (place % WORD) & 1) as i8;
        bit(&self.plus) - bit(&self.minus)
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many elements are not 0.
    pub fn nonzeros(&self) -> usize {
        let path = Path::detect();
        (set_bits(path, &self.plus) + set_bits(path, &self.minus)) as usize
    }

    /// The planes: where elements are 1, and where they are -1.
    pub fn planes(&self) -> (&[u64], &[u64]) {
        (&self.plus, &self.minus)
    }

    /// The product, element by element. Commutes; a vector without zeros is its own inverse.
    pub fn bind(&self, other: &Self) -> Self {
        self.combined(other, multiply_planes)
    }

    /// Undoes [`bind`](Self::bind): `a.bind(&key).unbind(&key)` is `a` where the key is not 0, and
    /// 0 elsewhere.
    pub fn unbind(&self, key: &Self) -> Self {
        self.bind(key)
    }

    /// The sum modulo 3, element by element: 1 + 1 = -1. Another way to bind, which no zero spoils.
    pub fn add_mod3(&self, other: &Self) -> Self {
        self.combined(other, add_planes)
    }

    /// The difference modulo 3: `a.add_mod3(&b).sub_mod3(&b)` is `a`.
    pub fn sub_mod3(&self, other: &Self) -> Self {
        self.check(other);
        let mut out = Self::zeros(self.len);
        let negated = [&other.minus[..], &other.plus];
        add_planes(
            Path::detect(),
            [&self.plus, &self.minus],
            negated,
            [&mut out.plus, &mut out.minus],
        );
        out
    }

    /// Every element times -1.
    pub fn negate(&self) -> Self {
        Self {
            len: self.len,
            plus: self.minus.clone(),
            minus: self.plus.clone(),
        }
    }

    /// The elements, moved `shift` places towards the end; those that leave it come in again at the
    /// beginning. A negative shift moves them back.
    pub fn permute(&self, shift: isize) -> Self {
        if self.len == 0 {
            return self.clone();
        }
        let shift = shift.rem_euclid(self.len as isize) as usize;
        let rotated = |plane: &[u64]| {
            let mut words = vec![0; plane.len()];
            or_shifted_up(plane, shift, &mut words);
            or_shifted_down(plane, self.len - shift, &mut words);
            if let Some(last) = words.last_mut() {
                *last &= valid_bits(self.len, plane.len() - 1);
            }
            words
        };
        Self {
            len: self.len,
            plus: rotated(&self.plus),
            minus: rotated(&self.minus),
        }
    }

    /// Σ a b over the elements.
    pub fn dot(&self, other: &Self) -> i64 {
        self.check(other);
        dot_of_planes(
            Path::detect(),
            [&self.plus, &self.minus],
            [&other.plus, &other.minus],
        )
    }

    /// The cosine of the angle between the vectors; 0 if one of them is all zeros.
    pub fn similarity(&self, other: &Self) -> f64 {
        let norms = (self.nonzeros() as f64 * other.nonzeros() as f64).sqrt();
        let dot = self.dot(other) as f64;
        if norms > 0.0 { dot / norms } else { 0.0 }
    }

    fn combined(&self, other: &Self, combine: Combine) -> Self {
        self.check(other);
        let mut out = Self::zeros(self.len);
        combine(
            Path::detect(),
            [&self.plus, &self.minus],
            [&other.plus, &other.minus],
            [&mut out.plus, &mut out.minus],
        );
        out
    }

    fn check(&self, other: &Self) {
        let lengths = (self.len, other.len);
        assert!(
            self.len == other.len,
            "hypervectors of {} and {} elements",
            lengths.0,
            lengths.1
        );
    }
}

/// An operation on the planes of two vectors: path, operands, result.
type Combine = fn(Path, [&[u64]; 2], [&[u64]; 2], [&mut [u64]; 2]);

/// The bits of a word that are elements.
fn valid_bits(len: usize, word: usize) -> u64 {
    match len.saturating_sub(word * WORD) {
        0 => 0,
        count if count >= WORD => u64::MAX,
        count => (1 << count) - 1,
    }
}

/// A word whose bits are set with probability `share` / 65536, out of at most 16 random words.
///
/// The random words of a bit are digits of a number below 1, which is below the share if its first
/// digit that differs is: from the last digit on, a 1 of the share lets a 0 decide, a 0 a 1.
fn bits_of_probability(share: u32, random: impl Fn(u64) -> u64) -> u64 {
    if share >= 65536 {
        return u64::MAX;
    }
    (share.trailing_zeros().min(16)..16).fold(0, |below, digit| {
        let random = random(u64::from(digit));
        match share >> digit & 1 {
            1 => below | !random,
            _ => below & !random,
        }
    })
}

/// Sets the bits of `plane`, moved `shift` places up, in `out`. Bits beyond the last word are lost.
fn or_shifted_up(plane: &[u64], shift: usize, out: &mut [u64]) {
    let (words, bits) = (shift / WORD, shift % WORD);
    for (place, word) in plane.iter().enumerate() {
        if let Some(low) = out.get_mut(place + words) {
            *low |= word << bits;
        }
        if bits > 0
            && let Some(high) = out.get_mut(place + words + 1)
        {
            *high |= word >> (WORD - bits);
        }
    }
}

/// The same downwards. Bits below the first word are lost.
fn or_shifted_down(plane: &[u64], shift: usize, out: &mut [u64]) {
    let (words, bits) = (shift / WORD, shift % WORD);
    for (place, word) in out.iter_mut().enumerate() {
        let at = |place: usize| plane.get(place).copied().unwrap_or(0);
        *word |= at(place + words) >> bits;
        if bits > 0 {
            *word |= at(place + words + 1) << (WORD - bits);
        }
    }
}
