//! Plain Rust, in shapes that compilers vectorise.

use super::unpack::{Decode, Kernel, Runs};
use crate::blockwise::layout::BLOCK;
use crate::panel::{LANES, Line, PORTABLE};

pub(super) static KERNEL: Kernel = Kernel {
    panel: &PORTABLE,
    columns,
    rows,
    stream: None,
};

fn columns(words: &[u32], decode: Decode, runs: Runs, panel: &mut [Line], stride: usize) {
    let shift = runs.run.trailing_zeros();
    let mut lines = panel.iter_mut().step_by(stride).enumerate();
    for words in words.as_chunks::<BLOCK>().0 {
        for position in 0..per_word(decode) {
            let Some((col, line)) = lines.next() else {
                return;
            };
            let (scale, zero) = (&runs.scales[col >> shift].0, &runs.zeros[col >> shift].0);
            for lane in 0..LANES {
                line.0[lane] = weight(words[lane], position, decode, zero[lane]) * scale[lane];
            }
        }
    }
}

fn rows(
    words: &[u32],
    decode: Decode,
    scale: &Line,
    zero: &Line,
    panel: &mut [Line],
    stride: usize,
) {
    let per_word = per_word(decode);
    for (row, line) in panel.iter_mut().step_by(stride).enumerate() {
        for (col, out) in line.0.iter_mut().enumerate() {
            let word = words[col / per_word * BLOCK + row];
            *out = weight(word, col % per_word, decode, zero.0[row]) * scale.0[row];
        }
    }
}

fn per_word(decode: Decode) -> usize {
    match decode {
        Decode::Bytes => 4,
        Decode::Levels(_) | Decode::Shifted(_) => 8,
    }
}

/// What the code at a position of a word stands for, before the scale.
#[inline(always)]
fn weight(word: u32, position: usize, decode: Decode, zero: f32) -> f32 {
    match decode {
        Decode::Levels(levels) => levels[(word >> (4 * position) & 15) as usize],
        Decode::Shifted(levels) => levels[(word >> (4 * position) & 15) as usize] - zero,
        Decode::Bytes => f32::from((word >> (8 * position)) as i8),
    }
}
