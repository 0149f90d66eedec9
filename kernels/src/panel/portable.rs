//! Plain Rust, in shapes that compilers vectorise.

use super::{DEPTH, Kernel, LANES, Line, Sums, by_tokens};

pub(crate) static KERNEL: Kernel = Kernel {
    groups: 1,
    tile: 4,
    multiply,
};

fn multiply(panel: &[Line], activations: &[f32], tokens: usize, sums: Sums) {
    by_tokens!(tokens, multiply_tile(panel, activations, sums), 1 2 3 4)
}

#[inline(always)]
fn multiply_tile<const T: usize>(panel: &[Line], activations: &[f32], sums: Sums) {
    let activations = &activations.as_chunks::<DEPTH>().0[..T];
    let mut tile = [[0f32; LANES]; T];
    let kept = &mut sums.kept.as_chunks_mut::<LANES>().0[..T];
    if !sums.first {
        tile.copy_from_slice(kept);
    }
    for (summand, line) in panel.iter().enumerate() {
        for (tile, x) in tile.iter_mut().zip(activations) {
            for (sum, weight) in tile.iter_mut().zip(&line.0) {
                *sum += weight * x[summand];
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
