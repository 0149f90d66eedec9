//! The same in plain scalar Rust, in f64.

use super::{AttentionShape, Operands};

/// o `[rows x seq, heads x head_dim]`.
pub fn forward(operands: &Operands) -> Vec<f32> {
    let mut out = Vec::new();
    let AttentionShape {
        heads, head_dim, ..
    } = operands.shape;
    for (row, query) in queries(operands) {
        for head in 0..heads {
            let weights = weights(operands, row, query, head);
            let mut mixed = vec![0.0; head_dim];
            for (key, p) in weights {
                let value = head_of(operands, operands.v, row, key, head);
                mixed.iter_mut().zip(value).for_each(|(o, v)| *o += p * v);
            }
            out.extend(mixed.into_iter().map(|o| o as f32));
        }
    }
    out
}

/// dq, dk and dv of do `[rows x seq, heads x head_dim]`.
pub fn backward(operands: &Operands, upstream: &[f32]) -> [Vec<f32>; 3] {
    let shape = operands.shape;
    let (seq, head_dim, group) = (operands.seq(), shape.head_dim, shape.heads / shape.kv_heads);
    let scale = (head_dim as f64).powf(-0.5);
    let mut gradients = [operands.q, operands.k, operands.v].map(|x| vec![0.0f64; x.len()]);
    for (row, query) in queries(operands) {
        for head in 0..shape.heads {
            let at = (row * seq + query) * shape.width() + head * head_dim;
            let upstream: Vec<f64> = wide(&upstream[at..][..head_dim]).collect();
            let weights = weights(operands, row, query, head);
            let value = |key| head_of(operands, operands.v, row, key, head);
            let dp = |key| -> f64 { value(key).zip(&upstream).map(|(v, o)| v * o).sum() };
            let mean: f64 = weights.iter().map(|&(key, p)| p * dp(key)).sum();
            let turned_query = turned(
                operands,
                row,
                query,
                wide(&operands.q[at..][..head_dim]),
                1.0,
            );
            let mut dq = vec![0.0; head_dim];
            for &(key, p) in &weights {
                let ds = p * (dp(key) - mean) * scale;
                let turned_key = turned(
                    operands,
                    row,
                    key,
                    head_of(operands, operands.k, row, key, head),
                    1.0,
                );
                let add = |to: &mut [f64], by: f64, what: &[f64]| {
                    to.iter_mut().zip(what).for_each(|(to, x)| *to += by * x);
                };
                add(&mut dq, ds, &turned_key);
                let back = turned(operands, row, key, turned_query.iter().copied(), -1.0);
                let at = (row * seq + key) * shape.kv_width() + head / group * head_dim;
                add(&mut gradients[1][at..][..head_dim], ds, &back);
                add(&mut gradients[2][at..][..head_dim], p, &upstream);
            }
            let dq = turned(operands, row, query, dq.into_iter(), -1.0);
            gradients[0][at..][..head_dim].copy_from_slice(&dq);
        }
    }
    gradients.map(|x| x.into_iter().map(|x| x as f32).collect())
}

/// Row and number of each query.
fn queries(operands: &Operands) -> impl Iterator<Item = (usize, usize)> {
    let seq = operands.seq();
    (0..operands.shape.rows * seq).map(move |i| (i / seq, i % seq))
}

/// The keys that a query sees, each with its p.
fn weights(operands: &Operands, row: usize, query: usize, head: usize) -> Vec<(usize, f64)> {
    let AttentionShape { head_dim, .. } = operands.shape;
    let at = (row * operands.seq() + query) * operands.shape.width() + head * head_dim;
    let q = turned(
        operands,
        row,
        query,
        wide(&operands.q[at..][..head_dim]),
        1.0,
    );
    let score = |key: usize| -> f64 {
        let k = head_of(operands, operands.k, row, key, head);
        let k = turned(operands, row, key, k, 1.0);
        let dot: f64 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
        dot / (head_dim as f64).sqrt()
    };
    let scores: Vec<_> = operands
        .span(row, query)
        .map(|key| (key, score(key)))
        .collect();
    let most = scores
        .iter()
        .fold(f64::NEG_INFINITY, |most, (_, s)| most.max(*s));
    let sum: f64 = scores.iter().map(|(_, s)| (s - most).exp()).sum();
    let weight = |(key, s): (usize, f64)| (key, (s - most).exp() / sum);
    scores.into_iter().map(weight).collect()
}

/// The key or value that a head of queries meets.
fn head_of<'a>(
    operands: &Operands<'a>,
    values: &'a [f32],
    row: usize,
    token: usize,
    head: usize,
) -> impl Iterator<Item = f64> + use<'a> {
    let shape = operands.shape;
    let head = head / (shape.heads / shape.kv_heads);
    let at = (row * operands.seq() + token) * shape.kv_width() + head * shape.head_dim;
    wide(&values[at..][..shape.head_dim])
}

/// By the token's angles, or back by them where `sign` is -1.
fn turned(
    operands: &Operands,
    row: usize,
    token: usize,
    x: impl Iterator<Item = f64>,
    sign: f64,
) -> Vec<f64> {
    let x: Vec<f64> = x.collect();
    let Some((cosines, sines)) = operands.angles(row, token) else {
        return x;
    };
    let half = x.len() / 2;
    let turn = |i: usize| {
        let (cos, sin) = (
            f64::from(cosines[i % half]),
            sign * f64::from(sines[i % half]),
        );
        if i < half {
            x[i] * cos - x[i + half] * sin
        } else {
            x[i] * cos + x[i - half] * sin
        }
    };
    (0..x.len()).map(turn).collect()
}

fn wide(x: &[f32]) -> impl Iterator<Item = f64> {
    x.iter().map(|&x| f64::from(x))
}
