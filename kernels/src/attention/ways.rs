//! Which operation of attention runs how on a device.

use burn::backend::Dispatch;
use burn::tensor::{Device, Int, Tensor};

use super::AttentionShape;
use super::op::AttentionOps;
use crate::ways::{Way, ask};

/// The operations of [`AttentionOps`] by name, and how each runs on `device`; none where it has none of them.
pub fn ways(device: &Device) -> Vec<(&'static str, Way)> {
    if device.clone().without_autodiff() != Device::flex() {
        return Vec::new();
    }
    let mut ways = ask(device, call_each);
    // Another family may have been at work meanwhile.
    ways.retain(|(operation, _)| operation.starts_with("span_attention"));
    ways
}

fn call_each(device: &Device) {
    const SHAPE: AttentionShape = AttentionShape {
        rows: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
    };
    let x = || Tensor::<2>::zeros([1, SHAPE.width()], device).into_dispatch();
    let angles = || Tensor::<3>::zeros([0, 0, 0], device).into_dispatch();
    let spans = || Tensor::<3, Int>::from_data([[[0, 1]]], device).into_dispatch();
    Dispatch::span_attention(x(), x(), x(), angles(), spans(), SHAPE);
    Dispatch::span_attention_backward(x(), x(), x(), angles(), spans(), x(), SHAPE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_both() {
        let names = ways(&Device::flex()).into_iter().map(|(name, _)| name);
        let names: Vec<_> = names.collect();
        assert_eq!(names, ["span_attention", "span_attention_backward"]);
    }
}
