//! What coding is held against.

use super::Element;

/// The order-0 bound: bits of the empirical entropies of each byte of the folded differences, added up. What coding byte
/// planes one by one cannot go below.
pub fn order_0_bits(element: Element, parent: &[u8], child: &[u8]) -> f64 {
    let width = element.width();
    let mut counts = vec![[0u64; 256]; width];
    for (parent, child) in parent.chunks_exact(width).zip(child.chunks_exact(width)) {
        let folded = folded_difference(element, parent, child);
        for (counts, byte) in counts.iter_mut().zip(folded.to_le_bytes()) {
            counts[usize::from(byte)] += 1;
        }
    }
    let of_plane = |counts: &[u64; 256]| {
        let total = counts.iter().sum::<u64>() as f64;
        let of_value = |&count: &u64| match count {
            0 => 0.0,
            count => count as f64 * (total / count as f64).log2(),
        };
        counts.iter().map(of_value).sum::<f64>()
    };
    counts.iter().map(of_plane).sum()
}

/// Step 1 and 2 of the coding, one number at a time.
pub(super) fn folded_difference(element: Element, parent: &[u8], child: &[u8]) -> u32 {
    let bits = element.bits();
    let ordered = |bytes: &[u8]| {
        let number = bytes
            .iter()
            .rev()
            .fold(0i64, |number, &byte| number << 8 | i64::from(byte));
        match element.mantissa() {
            None => number,
            // Negative floats: the larger the bits, the smaller the number.
            Some(_) if number >> (bits - 1) == 1 => {
                (1 << (bits - 1)) - 1 - (number - (1 << (bits - 1)))
            }
            Some(_) => (1 << (bits - 1)) + number,
        }
    };
    let modulus = 1i64 << bits;
    let difference = (ordered(child) - ordered(parent)).rem_euclid(modulus);
    let difference = if difference >= modulus / 2 {
        difference - modulus
    } else {
        difference
    };
    let folded = if difference < 0 {
        -2 * difference - 1
    } else {
        2 * difference
    };
    folded as u32
}
