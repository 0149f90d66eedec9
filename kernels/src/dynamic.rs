//! Eight-bit dynamic quantisation in blocks: what an optimizer keeps from step to step (Dettmers et al., 2022, "8-bit
//! Optimizers via Block-wise Quantization").
//!
//! A block of 256 numbers has one f32, its largest magnitude a; each number x becomes the nearest of 256 levels to x / a.
//! Levels are dense near 0 and near 1, over seven powers of ten, so that small numbers keep their order of magnitude:
//! with signs for means of gradients ([`DynamicMap::signed`]), without for means of squares ([`DynamicMap::unsigned`]).

use std::sync::LazyLock;

use rayon::prelude::*;

use crate::blockwise::tables;

/// Numbers that share a largest magnitude.
pub const BLOCK: usize = 256;

/// Levels, and a way to the nearest.
#[derive(Debug)]
pub struct DynamicMap {
    levels: [f32; 256],
    /// Halfway between neighbours: a number above border i has a code above i.
    borders: [f32; 255],
    /// By the upper 16 bits of a number: the code of the least number that has them.
    starts: Vec<u8>,
}

impl DynamicMap {
    /// Levels of both signs.
    pub fn signed() -> &'static Self {
        static MAP: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(tables::dynamic_map()));
        &MAP
    }

    /// Levels from 0 up.
    pub fn unsigned() -> &'static Self {
        static MAP: LazyLock<DynamicMap> =
            LazyLock::new(|| DynamicMap::new(tables::unsigned_dynamic_map()));
        &MAP
    }

    fn new(levels: [f32; 256]) -> Self {
        let borders: [f32; 255] = std::array::from_fn(|i| (levels[i] + levels[i + 1]) / 2.0);
        let least = |upper: u32| {
            let is_negative = upper >> 15 == 1;
            // Of a negative number the least has all lower bits set.
            let bits = upper << 16 | if is_negative { 0xffff } else { 0 };
            let value = f32::from_bits(bits);
            let value = if value.is_nan() { 0.0 } else { value };
            borders.partition_point(|&border| border < value) as u8
        };
        let starts = (0..1u32 << 16).map(least).collect();
        Self {
            levels,
            borders,
            starts,
        }
    }

    /// The 256 levels, ascending.
    pub fn levels(&self) -> &[f32; 256] {
        &self.levels
    }

    /// The code of the level nearest to `value`; of two as near, the lower. That of 0 for what is no number.
    #[inline]
    pub fn code(&self, value: f32) -> u8 {
        let mut code = self.starts[(value.to_bits() >> 16) as usize];
        while code < 255 && self.borders[usize::from(code)] < value {
            code += 1;
        }
        code
    }

    /// Codes of at most [`BLOCK`] numbers; returns their largest magnitude.
    #[inline]
    pub fn quantise_block(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let absmax = values.iter().fold(0f32, |max, value| max.max(value.abs()));
        let inverse = if absmax > 0.0 { 1.0 / absmax } else { 0.0 };
        for (code, value) in codes.iter_mut().zip(values) {
            // The inverse of a subnormal number is infinite; codes are of numbers within ±1.
            *code = self.code((value * inverse).clamp(-1.0, 1.0));
        }
        absmax
    }

    /// The numbers that codes of one block stand for.
    #[inline]
    pub fn dequantise_block(&self, codes: &[u8], absmax: f32, values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = self.levels[usize::from(*code)] * absmax;
        }
    }
}

/// Numbers in eight bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Dynamic8 {
    /// One for each number.
    pub codes: Vec<u8>,
    /// The largest magnitude of each 256.
    pub absmax: Vec<f32>,
}

impl Dynamic8 {
    /// So many zeros.
    pub fn zeros(map: &DynamicMap, count: usize) -> Self {
        Self {
            codes: vec![map.code(0.0); count],
            absmax: vec![0.0; count.div_ceil(BLOCK)],
        }
    }

    /// Of `values`, block by block. Threads are those of the current rayon pool; the bytes do not depend on them.
    pub fn quantise(map: &DynamicMap, values: &[f32]) -> Self {
        let mut codes = vec![0; values.len()];
        let blocks = codes.par_chunks_mut(BLOCK).zip(values.par_chunks(BLOCK));
        let absmax = blocks
            .map(|(codes, values)| map.quantise_block(values, codes))
            .collect();
        Self { codes, absmax }
    }

    /// The numbers again.
    pub fn dequantise(&self, map: &DynamicMap) -> Vec<f32> {
        let mut values = vec![0.0; self.codes.len()];
        let blocks = values
            .par_chunks_mut(BLOCK)
            .zip(self.codes.par_chunks(BLOCK));
        blocks
            .zip(&self.absmax)
            .for_each(|((values, codes), absmax)| {
                map.dequantise_block(codes, *absmax, values);
            });
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition: all levels compared.
    fn reference(levels: &[f32; 256], value: f32) -> u8 {
        let borders = levels.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        borders.filter(|border| *border < value).count() as u8
    }

    #[test]
    fn q7_levels_are_those_of_the_paper() {
        let signed = DynamicMap::signed().levels();
        assert!(signed.is_sorted() && signed[255] == 1.0 && signed[0] > -1.0);
        assert_eq!(signed.iter().filter(|level| **level == 0.0).count(), 1);
        let unsigned = DynamicMap::unsigned().levels();
        assert!(unsigned.is_sorted() && unsigned[0] == 0.0 && unsigned[255] == 1.0);
        // Seven powers of ten: 2 magnitudes at the lowest, 128 at the highest.
        assert_eq!(unsigned.iter().filter(|level| **level > 0.1).count(), 129);
        assert_eq!(
            unsigned
                .iter()
                .filter(|level| **level > 0.0 && **level < 1e-6)
                .count(),
            2
        );
    }

    #[test]
    fn q7_every_kind_of_number_has_the_code_of_its_nearest_level() {
        for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
            let exact = map.levels.into_iter().chain(map.borders);
            let near = exact.flat_map(|x| [x, x.next_up(), x.next_down()]);
            let odd = [f32::MIN_POSITIVE, -1e-45, 1e-45, -0.0, 0.0, 2.0, -2.0];
            for value in near.chain(odd) {
                assert_eq!(map.code(value), reference(&map.levels, value), "{value}");
            }
            let zero = reference(&map.levels, 0.0);
            assert_eq!([f32::NAN, -f32::NAN].map(|nan| map.code(nan)), [zero; 2]);
        }
    }

    proptest! {
        #[test]
        fn q7_codes_are_the_nearest_levels_at_any_length(
            values in proptest::collection::vec(-1e3f32..1e3, 0..900),
            power in -30i32..30,
        ) {
            let values: Vec<f32> = values.iter().map(|v| v * 2f32.powi(power)).collect();
            for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
                let quantised = Dynamic8::quantise(map, &values);
                let back = quantised.dequantise(map);
                prop_assert_eq!(quantised.absmax.len(), values.len().div_ceil(BLOCK));
                for (block, values) in values.chunks(BLOCK).enumerate() {
                    let absmax = values.iter().fold(0f32, |max, v| max.max(v.abs()));
                    prop_assert_eq!(quantised.absmax[block], absmax);
                    for (i, value) in values.iter().enumerate() {
                        let at = block * BLOCK + i;
                        let inverse = if absmax > 0.0 { 1.0 / absmax } else { 0.0 };
                        let scaled = (value * inverse).clamp(-1.0, 1.0);
                        prop_assert_eq!(quantised.codes[at], reference(&map.levels, scaled));
                        let level = map.levels[usize::from(quantised.codes[at])];
                        prop_assert_eq!(back[at], level * absmax);
                    }
                }
            }
        }
    }
}
