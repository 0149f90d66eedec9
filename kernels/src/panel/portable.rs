//! Plain Rust, in shapes that compilers vectorise.

use super::{DEPTH, Kernel, LANES, Line, Sums, by_tokens, summand_stride};

pub(crate) static KERNEL: Kernel = Kernel {
    groups: 1,
    tile: 4,
    multiply: multiply::<DEPTH>,
    multiply_columns: multiply::<1>,
};

fn multiply<const STRIDE: usize>(panel: &[Line], activations: &[f32], tokens: usize, sums: Sums) {
    by_tokens!(tokens, multiply_tile[STRIDE](panel, activations, sums), 1 2 3 4)
}

#[inline(always)]
fn multiply_tile<const T: usize, const STRIDE: usize>(
    panel: &[Line],
    activations: &[f32],
    sums: Sums,
) {
    let mut tile = [[0f32; LANES]; T];
    let kept = &mut sums.kept.as_chunks_mut::<LANES>().0[..T];
    if !sums.first {
        tile.copy_from_slice(kept);
    }
    for (summand, line) in panel.iter().enumerate() {
        let activations = &activations[summand * summand_stride(STRIDE)..];
        for (token, tile) in tile.iter_mut().enumerate() {
            let x = activations[token * STRIDE];
            for (sum, weight) in tile.iter_mut().zip(&line.0) {
                *sum += weight * x;
            }
        }
    }
    if sums.out.is_empty() {
        kept.copy_from_slice(&tile);
    }
    for (y, tile) in sums.out.iter_mut().zip(tile) {
        let y = &mut y[sums.at..][..LANES];
        if sums.add {
            y.iter_mut().zip(tile).for_each(|(y, sum)| *y += sum);
        } else {
            y.copy_from_slice(&tile);
        }
    }
}
