//! Sums of hypervectors.

use super::Hypervector;
use super::loops::{add_digit, add_digits, compare_digit};
use crate::panel::Path;

/// The element-wise sums of many hypervectors.
///
/// A bundle counts how often each element was 1 and how often it was -1. The counts are binary
/// numbers, and each of their digits is a plane of bits, so adding a vector takes a few operations
/// for 64 elements. Sums are exact: merging bundles gives the bundle of all their vectors, in any
/// order.
///
/// Operations panic if lengths differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    len: usize,
    /// How many vectors were added.
    vectors: u64,
    /// How often each element was 1, as planes of binary digits, the lowest first.
    plus: Counter,
    /// The same for -1.
    minus: Counter,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Counter {
    digits: Vec<Vec<u64>>,
}

impl Bundle {
    /// The bundle of no vectors of `len` elements.
    pub fn new(len: usize) -> Self {
        Self {
            len,
            vectors: 0,
            plus: Counter::default(),
            minus: Counter::default(),
        }
    }

    /// The bundle of these vectors of `len` elements.
    pub fn of<'a>(len: usize, vectors: impl IntoIterator<Item = &'a Hypervector>) -> Self {
        let mut bundle = Self::new(len);
        vectors.into_iter().for_each(|vector| bundle.add(vector));
        bundle
    }

    /// How many elements each vector has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no vector was added.
    pub fn is_empty(&self) -> bool {
        self.vectors == 0
    }

    /// How many vectors were added.
    pub fn vectors(&self) -> u64 {
        self.vectors
    }

    /// Adds a vector.
    pub fn add(&mut self, vector: &Hypervector) {
        self.check(vector.len());
        let (plus, minus) = vector.planes();
        self.plus.add(plus);
        self.minus.add(minus);
        self.vectors += 1;
    }

    /// Adds all vectors of another bundle.
    pub fn merge(&mut self, other: &Self) {
        self.check(other.len);
        self.plus.merge(&other.plus);
        self.minus.merge(&other.minus);
        self.vectors += other.vectors;
    }

    /// The sum of each element.
    pub fn sums(&self) -> Vec<i64> {
        let sum = |place| self.plus.number(place) as i64 - self.minus.number(place) as i64;
        (0..self.len).map(sum).collect()
    }

    /// The sign of each element's sum; 0 where as many were 1 as -1.
    pub fn majority(&self) -> Hypervector {
        let words = self.len.div_ceil(64);
        let (mut above, mut below) = (vec![0; words], vec![0; words]);
        let none = vec![0; words];
        let digits = self.plus.digits.len().max(self.minus.digits.len());
        for digit in 0..digits {
            let plus = self.plus.digits.get(digit).unwrap_or(&none);
            let minus = self.minus.digits.get(digit).unwrap_or(&none);
            compare_digit(Path::detect(), plus, minus, &mut above, &mut below);
        }
        Hypervector::from_planes(self.len, above, below)
            .unwrap_or_else(|error| unreachable!("a number is larger or smaller: {error}"))
    }

    fn check(&self, len: usize) {
        assert!(
            self.len == len,
            "a hypervector of {len} elements in a bundle of {}",
            self.len
        );
    }
}

impl Counter {
    fn add(&mut self, plane: &[u64]) {
        let mut carry = plane.to_vec();
        if carry.iter().all(|word| *word == 0) {
            return;
        }
        for digit in &mut self.digits {
            if !add_digit(Path::detect(), digit, &mut carry) {
                return;
            }
        }
        self.digits.push(carry);
    }

    fn merge(&mut self, other: &Self) {
        let Some(words) = other.digits.first().map(Vec::len) else {
            return;
        };
        let mut carry = vec![0; words];
        let none = vec![0; words];
        let digits = self.digits.len().max(other.digits.len());
        self.digits.resize(digits, none.clone());
        for (place, digit) in self.digits.iter_mut().enumerate() {
            let other = other.digits.get(place).unwrap_or(&none);
            add_digits(Path::detect(), digit, other, &mut carry);
        }
        if carry.iter().any(|word| *word != 0) {
            self.digits.push(carry);
        }
    }

    fn number(&self, place: usize) -> u64 {
        let digits = self.digits.iter().enumerate();
        digits
            .map(|(digit, bits)| (bits[place / 64] >> (place % 64) & 1) << digit)
            .sum()
    }
}
