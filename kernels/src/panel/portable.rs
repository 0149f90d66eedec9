//! Plain Rust, in shapes that compilers vectorise.

use super::{DEPTH, Kernel, LANES, Line, by_tokens};

pub(crate) static KERNEL: Kernel = Kernel {
    groups: 1,
    tile: 4,
    multiply,
};

fn multiply(panel: &[Line], activations: &[f32], tokens: usize, sums: &mut [f32]) {
    by_tokens!(tokens, multiply_tile(panel, activations, sums), 1 2 3 4)
}

#[inline(always)]
fn multiply_tile<const T: usize>(panel: &[Line], activations: &[f32], sums: &mut [f32]) {
    let activations = &activations.as_chunks::<DEPTH>().0[..T];
    let mut tile = [[0f32; LANES]; T];
    for (summand, line) in panel.iter().enumerate() {
        for (tile, x) in tile.iter_mut().zip(activations) {
            for (sum, weight) in tile.iter_mut().zip(&line.0) {
                *sum += weight * x[summand];
            }
        }
    }
    for (sum, tile) in sums.iter_mut().zip(tile.iter().flatten()) {
        *sum += tile;
    }
}
