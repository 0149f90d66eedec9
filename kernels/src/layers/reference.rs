//! The same in plain scalar Rust, in f64.

use super::Activation;

/// y of x `[rows, dim]` and w `[dim]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f64) -> Vec<f32> {
    let rows = x.chunks(weight.len()).flat_map(|row| {
        let factor = norm(row, eps);
        let values = row.iter().zip(weight);
        values.map(move |(x, w)| (f64::from(*x) * factor * f64::from(*w)) as f32)
    });
    rows.collect()
}

/// dx and dw of dy `[rows, dim]`.
pub fn rms_norm_backward(x: &[f32], weight: &[f32], upstream: &[f32], eps: f64) -> [Vec<f32>; 2] {
    let dim = weight.len();
    let mut dx = Vec::new();
    let mut dw = vec![0.0f64; dim];
    for (x, dy) in x.chunks(dim).zip(upstream.chunks(dim)) {
        let factor = norm(x, eps);
        let wide = |i: usize| (f64::from(x[i]), f64::from(dy[i]), f64::from(weight[i]));
        let dot: f64 = (0..dim).map(wide).map(|(x, dy, w)| x * dy * w).sum();
        for (i, dw) in dw.iter_mut().enumerate() {
            let (x, dy, w) = wide(i);
            dx.push((factor * (dy * w - x * factor * factor * dot / dim as f64)) as f32);
            *dw += dy * x * factor;
        }
    }
    [dx, dw.into_iter().map(|x| x as f32).collect()]
}

fn norm(row: &[f32], eps: f64) -> f64 {
    let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
    (squares / row.len() as f64 + eps).powf(-0.5)
}

/// activation(gate) up.
pub fn gated(activation: Activation, gate: &[f32], up: &[f32]) -> Vec<f32> {
    let one = |(gate, up): (&f32, &f32)| {
        let [value, _] = value_and_slope(activation, f64::from(*gate));
        (value * f64::from(*up)) as f32
    };
    gate.iter().zip(up).map(one).collect()
}

/// The gradients of gate and up.
pub fn gated_backward(
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    upstream: &[f32],
) -> [Vec<f32>; 2] {
    let each = || gate.iter().zip(up).zip(upstream);
    let wide = |((gate, up), dy): ((&f32, &f32), &f32)| {
        let [gate, up, dy] = [gate, up, dy].map(|x| f64::from(*x));
        let [value, slope] = value_and_slope(activation, gate);
        [dy * up * slope, dy * value]
    };
    let of = |i: usize| each().map(|x| wide(x)[i] as f32).collect();
    [of(0), of(1)]
}

fn value_and_slope(activation: Activation, x: f64) -> [f64; 2] {
    match activation {
        Activation::Silu => {
            let s = sigmoid(x);
            [x * s, s * (1.0 + x * (1.0 - s))]
        }
        Activation::Relu2 => [x.max(0.0).powi(2), 2.0 * x.max(0.0)],
        Activation::GeluEra => {
            let scale = (2.0 / std::f64::consts::PI).sqrt();
            let tanh = (scale * (x + 0.044715 * x.powi(3))).tanh();
            let inner = scale * (1.0 + 3.0 * 0.044715 * x.powi(2));
            let [gelu, slope] = match x.abs() < 1e3 {
                true => [
                    0.5 * x * (1.0 + tanh),
                    0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner,
                ],
                false => [x.max(0.0), f64::from(x > 0.0)],
            };
            let softplus = x.max(0.0) + (-x.abs()).exp().ln_1p();
            [gelu + 0.1 * softplus, slope + 0.1 * sigmoid(x)]
        }
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Nats of each row of logits `[rows, vocab]`.
pub fn token_nats(logits: &[f32], targets: &[i32]) -> Vec<f32> {
    let rows = logits.chunks(logits.len() / targets.len().max(1));
    let nats = rows.zip(targets);
    nats.map(|(row, &target)| (log_sum_exp(row) - f64::from(row[target as usize])) as f32)
        .collect()
}

/// The gradient of logits, from the one of each row's nats.
pub fn token_nats_backward(logits: &[f32], targets: &[i32], upstream: &[f32]) -> Vec<f32> {
    let vocab = logits.len() / targets.len().max(1);
    let rows = logits.chunks(vocab).zip(targets).zip(upstream);
    let gradients = rows.flat_map(|((row, &target), &dy)| {
        let whole = log_sum_exp(row);
        row.iter().enumerate().map(move |(i, &z)| {
            let hit = if i == target as usize { 1.0 } else { 0.0 };
            (((f64::from(z) - whole).exp() - hit) * f64::from(dy)) as f32
        })
    });
    gradients.collect()
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let most = row
        .iter()
        .fold(f64::NEG_INFINITY, |most, &z| most.max(z.into()));
    let sum: f64 = row.iter().map(|&z| (f64::from(z) - most).exp()).sum();
    most + sum.ln()
}

/// y + x w of y `[rows, outputs]`, x `[rows, inputs]` and w `[inputs, outputs]`.
pub fn add_product(y: &[f32], x: &[f32], weight: &[f32], outputs: usize) -> Vec<f32> {
    let inputs = weight.len() / outputs;
    let one = |(i, &y): (usize, &f32)| {
        let (row, output) = (i / outputs, i % outputs);
        let products = (0..inputs)
            .map(|k| f64::from(x[row * inputs + k]) * f64::from(weight[k * outputs + output]));
        (f64::from(y) + products.sum::<f64>()) as f32
    };
    y.iter().enumerate().map(one).collect()
}
