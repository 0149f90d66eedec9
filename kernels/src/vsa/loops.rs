//! Loops over planes, compiled for each set of instructions.

use crate::vector::vectorised;

vectorised! {
    /// The product of trits.
    pub(super) fn multiply_planes(a: [&[u64]; 2], b: [&[u64]; 2], out: [&mut [u64]; 2]) {
        let [plus, minus] = out;
        for (i, (plus, minus)) in plus.iter_mut().zip(minus).enumerate() {
            let (a, b) = ([a[0][i], a[1][i]], [b[0][i], b[1][i]]);
            *plus = a[0] & b[0] | a[1] & b[1];
            *minus = a[0] & b[1] | a[1] & b[0];
        }
    }

    /// The sum of trits modulo 3.
    pub(super) fn add_planes(a: [&[u64]; 2], b: [&[u64]; 2], out: [&mut [u64]; 2]) {
        let [plus, minus] = out;
        for (i, (plus, minus)) in plus.iter_mut().zip(minus).enumerate() {
            let (a, b) = ([a[0][i], a[1][i]], [b[0][i], b[1][i]]);
            let zero = [!(a[0] | a[1]), !(b[0] | b[1])];
            *plus = a[0] & zero[1] | zero[0] & b[0] | a[1] & b[1];
            *minus = a[1] & zero[1] | zero[0] & b[1] | a[0] & b[0];
        }
    }

    pub(super) fn set_bits(plane: &[u64]) -> i64 {
        plane.iter().map(|word| i64::from(word.count_ones())).sum()
    }

    /// Σ a b: places of equal signs minus places of opposite ones.
    pub(super) fn dot_of_planes(a: [&[u64]; 2], b: [&[u64]; 2]) -> i64 {
        let words = a[0].iter().zip(a[1]).zip(b[0].iter().zip(b[1]));
        words
            .map(|((a_plus, a_minus), (b_plus, b_minus))| {
                let equal = a_plus & b_plus | a_minus & b_minus;
                let opposite = a_plus & b_minus | a_minus & b_plus;
                i64::from(equal.count_ones()) - i64::from(opposite.count_ones())
            })
            .sum()
    }

    /// Adds the bits of `carry` to one binary digit of many numbers, and puts the carries to the next digit into `carry`.
    /// Returns whether there are any.
    pub(super) fn add_digit(digit: &mut [u64], carry: &mut [u64]) -> bool {
        let mut rest = 0;
        for (digit, carry) in digit.iter_mut().zip(carry) {
            (*digit, *carry) = (*digit ^ *carry, *digit & *carry);
            rest |= *carry;
        }
        rest != 0
    }

    /// Adds the same digit of other numbers and the carries of the digit before, and puts the new carries into `carry`.
    pub(super) fn add_digits(digit: &mut [u64], other: &[u64], carry: &mut [u64]) {
        for ((digit, other), carry) in digit.iter_mut().zip(other).zip(carry) {
            let sum = *digit ^ other;
            (*digit, *carry) = (sum ^ *carry, *digit & other | sum & *carry);
        }
    }

    /// Updates a comparison of two rows of numbers with their next higher digit. `above` and `below` mark where the first
    /// number is larger and smaller so far.
    pub(super) fn compare_digit(a: &[u64], b: &[u64], above: &mut [u64], below: &mut [u64]) {
        for (i, (above, below)) in above.iter_mut().zip(below).enumerate() {
            let (more, less) = (a[i] & !b[i], b[i] & !a[i]);
            let equal = !(more | less);
            (*above, *below) = (more | equal & *above, less | equal & *below);
        }
    }
}
