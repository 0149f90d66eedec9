//! One element at a time.

#![cfg(test)]

use half::{bf16, f16};

use super::{Levels, Quantised, Rounding};
use crate::difference::Element;

pub(super) fn value(element: Element, bytes: &[u8]) -> f32 {
    let half = || u16::from_le_bytes([bytes[0], bytes[1]]);
    match element {
        Element::F16 => f16::from_bits(half()).to_f32(),
        Element::Bf16 => bf16::from_bits(half()).to_f32(),
        _ => f32::from_le_bytes(bytes.try_into().unwrap()),
    }
}

fn bytes(element: Element, value: f32) -> Vec<u8> {
    match element {
        Element::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Element::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

pub(super) fn values(element: Element, bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks(element.width())
        .map(|bytes| value(element, bytes))
        .collect()
}

/// The smallest bf16 that is no less.
fn bf16_above(value: f32) -> bf16 {
    let near = bf16::from_f32(value);
    if near.to_f32() < value {
        bf16::from_bits(near.to_bits() + 1)
    } else {
        near
    }
}

pub(super) fn quantise(
    element: Element,
    (levels, rounding): (Levels, Rounding),
    limit: f32,
    (parent, child): (&[u8], &[u8]),
) -> Quantised {
    let (parent, child) = (values(element, parent), values(element, child));
    let mut out = Quantised::default();
    let mut differences: Vec<f32> = child.iter().zip(&parent).map(|(c, p)| c - p).collect();
    for (i, d) in differences.iter_mut().enumerate() {
        if !d.is_finite() || d.abs() > limit {
            out.exact.push(i as u32);
            *d = 0.0;
        }
    }
    for block in differences.chunks(levels.block()) {
        let most = match levels {
            Levels::Int8 => 127.0,
            Levels::Int4 => 7.0,
            Levels::Sign => {
                // In the order that lanes have, since sums depend on it.
                let mut lanes = [0.0f32; 16];
                for (i, d) in block.iter().enumerate() {
                    lanes[i % 16] += d.abs() / 128.0;
                }
                let mean = lanes.iter().sum::<f32>() * (128.0 / block.len() as f32);
                out.scales.push(bf16::from_f32(mean).to_bits());
                out.codes
                    .extend(block.iter().map(|&d| if d < 0.0 { -1i8 } else { 1 }));
                continue;
            }
        };
        let largest = block.iter().fold(0.0f32, |a, d| a.max(d.abs()));
        let scale = bf16_above(largest / most);
        out.scales.push(scale.to_bits());
        out.codes.extend(block.iter().map(|&d| {
            if scale.to_f32() == 0.0 {
                return 0;
            }
            let inverse = 1.0 / scale.to_f32();
            // Of the smallest scales the inverse is infinite.
            let q = if inverse.is_finite() {
                d * inverse
            } else {
                d / scale.to_f32()
            };
            let q = if rounding == Rounding::Up {
                q.ceil()
            } else {
                q.round_ties_even()
            };
            q.clamp(-most, most) as i8
        }));
    }
    out
}

pub(super) fn reconstruct(
    element: Element,
    levels: Levels,
    coded: &Quantised,
    parent: &[u8],
) -> Vec<u8> {
    let parent = values(element, parent);
    let all = parent.iter().zip(&coded.codes).enumerate();
    all.flat_map(|(i, (p, code))| {
        let scale = bf16::from_bits(coded.scales[i / levels.block()]).to_f32();
        bytes(element, p + f32::from(*code) * scale)
    })
    .collect()
}
