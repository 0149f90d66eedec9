//! Which layer runs how on a device.

use burn::backend::Dispatch;
use burn::tensor::{Device, Int, Tensor};

use super::Activation;
use super::op::LayerOps;
use crate::ways::{Way, ask};

/// The operations of [`LayerOps`] by name, and how each runs on `device`; none where it has none of them.
pub fn ways(device: &Device) -> Vec<(&'static str, Way)> {
    if device.clone().without_autodiff() != Device::flex() {
        return Vec::new();
    }
    let mut ways = ask(device, call_each);
    // Another family may have been at work meanwhile.
    ways.retain(|(operation, _)| operation.starts_with("fused_"));
    ways
}

fn call_each(device: &Device) {
    let x = || Tensor::<2>::zeros([1, 1], device).into_dispatch();
    let row = || Tensor::<1>::zeros([1], device).into_dispatch();
    let targets = || Tensor::<1, Int>::zeros([1], device).into_dispatch();
    Dispatch::fused_rms_norm(x(), row(), 1.0);
    Dispatch::fused_rms_norm_backward(x(), row(), x(), 1.0, true);
    Dispatch::fused_gated(x(), x(), Activation::Silu);
    Dispatch::fused_gated_backward(x(), x(), x(), Activation::Silu);
    Dispatch::fused_token_nats(x(), targets());
    Dispatch::fused_token_nats_backward(x(), targets(), row(), row());
    Dispatch::fused_add_product(x(), x(), x());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_all() {
        assert_eq!(ways(&Device::flex()).len(), 7);
    }
}
