//! Rows of all sizes, some tens of KiB a task.

use rayon::prelude::*;

use super::Activation;
use crate::panel::{self, LANES, Line, Panels, Path};
use crate::vector::{exp, ln_1p_below_1, max, sum2, vectorised};

/// Elements that one task takes: 64 KiB of f32.
const PIECE: usize = 1 << 14;

/// Rows of a task.
fn rows(width: usize) -> usize {
    (PIECE / width.max(1)).max(1)
}

/// The most parts that a sum over rows has: each part takes a row's memory.
const PARTS: usize = 64;

/// y of x `[rows, dim]`, in place of it.
pub fn rms_norm(path: Path, x: &mut [f32], weight: &[f32], eps: f32) {
    let dim = weight.len();
    x.par_chunks_mut(rows(dim) * dim)
        .for_each(|x| normalise(path, x, weight, eps));
}

/// dx in place of dy `[rows, dim]`, and dw `[dim]`; nothing for that unless it is `wanted`.
pub fn rms_norm_backward(
    path: Path,
    x: &[f32],
    weight: &[f32],
    upstream: &mut [f32],
    eps: f32,
    wanted: bool,
) -> Vec<f32> {
    let dim = weight.len();
    let count = if wanted { dim } else { 0 };
    let most = (x.len() / dim.max(1)).div_ceil(PARTS);
    let piece = rows(dim).max(most) * dim;
    let work = x.par_chunks(piece).zip(upstream.par_chunks_mut(piece));
    let parts = work.map(|(x, dy)| {
        let mut dw = vec![0.0; count];
        normalise_backward(path, x, weight, dy, eps, &mut dw);
        dw
    });
    // Pieces are the same however many threads there are, and so is their order.
    let parts: Vec<_> = parts.collect();
    let mut dw = vec![0.0; count];
    parts.iter().for_each(|part| add(path, &mut dw, part));
    dw
}

/// activation(gate) up, in place of gate.
pub fn gated(path: Path, activation: Activation, gate: &mut [f32], up: &[f32]) {
    let piece = match activation {
        Activation::Silu => multiply::<SILU>,
        Activation::Relu2 => multiply::<RELU2>,
        Activation::GeluEra => multiply::<GELU_ERA>,
    };
    let work = gate.par_chunks_mut(PIECE).zip(up.par_chunks(PIECE));
    work.for_each(|(gate, up)| piece(path, gate, up));
}

/// The gradient of gate in place of gate, that of up in place of dy.
pub fn gated_backward(
    path: Path,
    activation: Activation,
    gate: &mut [f32],
    up: &[f32],
    upstream: &mut [f32],
) {
    let piece = match activation {
        Activation::Silu => multiply_backward::<SILU>,
        Activation::Relu2 => multiply_backward::<RELU2>,
        Activation::GeluEra => multiply_backward::<GELU_ERA>,
    };
    let work = gate.par_chunks_mut(PIECE).zip(up.par_chunks(PIECE));
    let work = work.zip(upstream.par_chunks_mut(PIECE));
    work.for_each(|((gate, up), dy)| piece(path, gate, up, dy));
}

/// m and log Σ exp(z - m) of each row of logits z `[rows, vocab]`, m the largest of its row. Their sum would lose the
/// digits that count where logits are large.
pub fn log_sum_exp(path: Path, logits: &[f32], out: &mut [[f32; 2]]) {
    let vocab = logits.len() / out.len().max(1);
    let count = rows(vocab);
    let work = logits
        .par_chunks((count * vocab).max(1))
        .zip(out.par_chunks_mut(count));
    work.for_each(|(logits, out)| {
        for (row, out) in logits.chunks(vocab).zip(out) {
            *out = log_sum_exp_of_row(path, row);
        }
    });
}

/// What [`log_sum_exp`] says of a row, minus the logit of its target.
pub fn nats([most, log_sum]: [f32; 2], target: f32) -> f32 {
    log_sum + (most - target)
}

/// The gradient of logits `[rows, vocab]` in place of them, from the one of each row's nats.
pub fn token_nats_backward(
    path: Path,
    logits: &mut [f32],
    targets: &[i32],
    log_sums: &[[f32; 2]],
    upstream: &[f32],
) {
    let vocab = logits.len() / targets.len().max(1);
    let count = rows(vocab);
    let work = logits.par_chunks_mut((count * vocab).max(1)).enumerate();
    work.for_each(|(piece, logits)| {
        for (row, i) in logits.chunks_mut(vocab).zip(piece * count..) {
            let dy = upstream[i];
            // A token without weight, such as padding or a prompt, needs no softmax.
            if dy == 0.0 {
                row.fill(0.0);
                continue;
            }
            softmax_times(path, row, log_sums[i], dy);
            row[targets[i] as usize] -= dy;
        }
    });
}

/// Adds x w of x `[rows, inputs]` and w `[inputs, outputs]` to y `[rows, outputs]`.
pub fn add_product(path: Path, y: &mut [f32], x: &[f32], weight: &[f32], outputs: usize) {
    if y.is_empty() || weight.is_empty() {
        return;
    }
    // Whoever chose the path knows that it is there.
    let kernel = path.kernel().expect("a path that this processor can take");
    let inputs = weight.len() / outputs;
    let weight = Dense { weight, outputs };
    panel::product(kernel, x, inputs, &weight, outputs, y, true);
}

/// A matrix `[summands, outputs]`.
struct Dense<'a> {
    weight: &'a [f32],
    outputs: usize,
}

impl Panels for Dense<'_> {
    fn unpack(
        &self,
        group: usize,
        summands: std::ops::Range<usize>,
        panel: &mut [Line],
        stride: usize,
    ) {
        let first = group * LANES;
        let width = LANES.min(self.outputs - first);
        let rows = self
            .weight
            .chunks(self.outputs)
            .map(Some)
            .chain(std::iter::repeat(None));
        let rows = rows.skip(summands.start).take(summands.len());
        for (line, row) in panel.iter_mut().step_by(stride).zip(rows) {
            line.0.fill(0.0);
            if let Some(row) = row {
                line.0[..width].copy_from_slice(&row[first..][..width]);
            }
        }
    }
}

vectorised! {
    fn normalise(x: &mut [f32], weight: &[f32], eps: f32) {
        for row in x.chunks_mut(weight.len()) {
            let factor = factor(row, eps);
            for (x, w) in row.iter_mut().zip(weight) {
                *x = *x * factor * w;
            }
        }
    }

    fn normalise_backward(
        x: &[f32],
        weight: &[f32],
        dy: &mut [f32],
        eps: f32,
        dw: &mut [f32],
    ) {
        let dim = weight.len();
        for (x, dy) in x.chunks(dim).zip(dy.chunks_mut(dim)) {
            let factor = factor(x, eps);
            for ((dw, dy), x) in dw.iter_mut().zip(dy.iter()).zip(x) {
                *dw += *dy * (x * factor);
            }
            dy.iter_mut().zip(weight).for_each(|(dy, w)| *dy *= w);
            let dot = sum2(x, dy, |x, dy| x * dy);
            let shift = factor * factor * dot / dim as f32;
            for (dy, x) in dy.iter_mut().zip(x) {
                *dy = factor * (*dy - x * shift);
            }
        }
    }

    fn multiply<const ACTIVATION: usize>(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = value::<ACTIVATION>(*gate) * up;
        }
    }

    fn multiply_backward<const ACTIVATION: usize>(gate: &mut [f32], up: &[f32], dy: &mut [f32]) {
        for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
            let [value, slope] = value_and_slope::<ACTIVATION>(*gate);
            *gate = *dy * up * slope;
            *dy *= value;
        }
    }

    fn log_sum_exp_of_row(row: &[f32]) -> [f32; 2] {
        let most = max(row, f32::NEG_INFINITY);
        [most, sum2(row, row, |z, _| exp(z - most)).ln()]
    }

    fn softmax_times(row: &mut [f32], log_sum: [f32; 2], factor: f32) {
        let [most, log_sum] = log_sum;
        row.iter_mut().for_each(|z| *z = exp(*z - most - log_sum) * factor);
    }

    fn add(to: &mut [f32], row: &[f32]) {
        to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
    }
}

/// One over the root of the mean square.
#[inline(always)]
fn factor(row: &[f32], eps: f32) -> f32 {
    let squares = sum2(row, row, |x, _| x * x);
    1.0 / (squares / row.len() as f32 + eps).sqrt()
}

/// The numbers of the [`Activation`]s. A loop takes one as a constant, so that it is compiled once for each.
const SILU: usize = 0;
const RELU2: usize = 1;
const GELU_ERA: usize = 2;

#[inline(always)]
fn value<const ACTIVATION: usize>(x: f32) -> f32 {
    match ACTIVATION {
        SILU => x / (1.0 + exp(-x)),
        RELU2 => {
            let positive = positive_part(x);
            positive * positive
        }
        _ => x / (1.0 + exp(-tanh_argument(x)[0])) + ERA_SHARE * softplus(x),
    }
}

#[inline(always)]
fn value_and_slope<const ACTIVATION: usize>(x: f32) -> [f32; 2] {
    match ACTIVATION {
        SILU => {
            let sigmoid = 1.0 / (1.0 + exp(-x));
            let silu = x * sigmoid;
            [silu, sigmoid + silu * (1.0 - sigmoid)]
        }
        RELU2 => {
            let positive = positive_part(x);
            [positive * positive, 2.0 * positive]
        }
        _ => {
            let [argument, slope] = tanh_argument(x);
            let sigmoid = 1.0 / (1.0 + exp(-argument));
            let gelu = x * sigmoid;
            let of_softplus = 1.0 / (1.0 + exp(-x));
            [
                gelu + ERA_SHARE * softplus(x),
                sigmoid + gelu * (1.0 - sigmoid) * slope + ERA_SHARE * of_softplus,
            ]
        }
    }
}

/// x above 0, else 0. A NaN stays one, which `max` would make 0.
#[inline(always)]
fn positive_part(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

/// What softplus is multiplied with in ERA-GELU.
pub(super) const ERA_SHARE: f32 = 0.1;

/// 2 t and its derivative, of GELU_tanh(x) = x (1 + tanh t) / 2 = x sigmoid(2 t). The sigmoid is 0 or 1 in f32 long
/// before the bounds, and the powers of x stay finite within them.
#[inline(always)]
fn tanh_argument(x: f32) -> [f32; 2] {
    const SCALE: f32 = 2.0 * 0.797_884_6; // 2 sqrt(2 / pi)
    const CUBIC: f32 = 0.044_715;
    let x = x.clamp(-20.0, 20.0);
    let square = x * x;
    [
        SCALE * x * (1.0 + CUBIC * square),
        SCALE * (1.0 + 3.0 * CUBIC * square),
    ]
}

/// log(1 + e^x).
#[inline(always)]
fn softplus(x: f32) -> f32 {
    positive_part(x) + ln_1p_below_1(exp(-x.abs()))
}
