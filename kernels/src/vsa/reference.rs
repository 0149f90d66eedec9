//! The operations in plain scalar Rust, on trits, against which the planes are tested.

/// The product, element by element.
pub fn bind(a: &[i8], b: &[i8]) -> Vec<i8> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

/// The sum modulo 3, as -1, 0 or 1.
pub fn add_mod3(a: &[i8], b: &[i8]) -> Vec<i8> {
    let sum = |(a, b): (&i8, &i8)| (a + b + 1).rem_euclid(3) - 1;
    a.iter().zip(b).map(sum).collect()
}

/// Moves every element `shift` places towards the end, around it.
pub fn permute(a: &[i8], shift: isize) -> Vec<i8> {
    let len = a.len() as isize;
    let from = |place: isize| a[(place - shift).rem_euclid(len) as usize];
    (0..len).map(from).collect()
}

/// Σ a b.
pub fn dot(a: &[i8], b: &[i8]) -> i64 {
    a.iter().zip(b).map(|(a, b)| i64::from(a * b)).sum()
}

/// The sum of each element over all vectors, of `len` elements each.
pub fn sums(len: usize, vectors: &[Vec<i8>]) -> Vec<i64> {
    let sum = |place| vectors.iter().map(|trits| i64::from(trits[place])).sum();
    (0..len).map(sum).collect()
}
