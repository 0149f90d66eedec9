//! Scales in eight bits: double quantisation (Dettmers et al., 2023, "QLoRA", section 3).

use rayon::prelude::*;

use super::tables::{DYNAMIC_BORDERS, DYNAMIC_MAP};

/// Scales that share a scale.
pub const SCALE_BLOCK: usize = 256;

/// Codes, their scales, and the mean that was subtracted.
pub(super) fn compress(scales: &[f32]) -> (Vec<u8>, Vec<f32>, f32) {
    let mean = mean(scales);
    let mut codes = vec![0; scales.len()];
    let blocks = codes.par_chunks_mut(SCALE_BLOCK);
    let block_scales = blocks
        .zip(scales.par_chunks(SCALE_BLOCK))
        .map(|(codes, scales)| {
            let largest = |max: f32, scale: &f32| max.max((scale - mean).abs());
            let block_scale = scales.iter().fold(0f32, largest);
            for (code, scale) in codes.iter_mut().zip(scales) {
                *code = nearest((scale - mean) / block_scale);
            }
            block_scale
        })
        .collect();
    (codes, block_scales, mean)
}

/// Summed in f64, first to last, whatever the number of threads.
fn mean(scales: &[f32]) -> f32 {
    if scales.is_empty() {
        return 0.0;
    }
    let sum: f64 = scales.iter().map(|&scale| f64::from(scale)).sum();
    (sum / scales.len() as f64) as f32
}

/// The code of the nearest level; of two as near, the lower. The code of 0 for 0 / 0, in blocks of zeros.
fn nearest(value: f32) -> u8 {
    let value = if value.is_nan() { 0.0 } else { value };
    DYNAMIC_BORDERS.partition_point(|&border| border < value) as u8
}

/// A scale from its code, the scale of its block of scales, and the mean.
#[inline(always)]
pub(super) fn expand(map: &[f32; 256], code: u8, block_scale: f32, mean: f32) -> f32 {
    map[usize::from(code)] * block_scale + mean
}

/// All scales from their codes.
pub(super) fn expand_all(codes: &[u8], block_scales: &[f32], mean: f32) -> Vec<f32> {
    let map = &*DYNAMIC_MAP;
    let scale = |(i, &code): (usize, &u8)| expand(map, code, block_scales[i / SCALE_BLOCK], mean);
    codes.iter().enumerate().map(scale).collect()
}
