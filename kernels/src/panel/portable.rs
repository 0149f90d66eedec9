//! Plain Rust, in shapes that compilers vectorise.

use super::{Kernel, LANES, Line, Sums, by_tokens, strides};

pub(crate) static KERNEL: Kernel = Kernel {
    groups: 1,
    tile: 4,
    multiply: multiply::<false>,
    multiply_columns: multiply::<true>,
};

fn multiply<const COLUMNS: bool>(panel: &[Line], activations: &[f32], tokens: usize, sums: Sums) {
    by_tokens!(tokens, multiply_tile[COLUMNS](panel, activations, sums), 1 2 3 4)
}

#[inline(always)]
fn multiply_tile<const T: usize, const COLUMNS: bool>(
    panel: &[Line],
    activations: &[f32],
    sums: Sums,
) {
    let mut tile = [[0f32; LANES]; T];
    let kept = &mut sums.kept.as_chunks_mut::<LANES>().0[..T];
    if !sums.first {
        tile.copy_from_slice(kept);
    }
    let [by_token, by_summand] = const { strides(COLUMNS) };
    for (summand, line) in panel.iter().enumerate() {
        let activations = &activations[summand * by_summand..];
        for (token, tile) in tile.iter_mut().enumerate() {
            let x = activations[token * by_token];
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
