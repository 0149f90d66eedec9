//! Which ternary operation runs how on a device.

use burn::backend::Dispatch;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::Granularity;
use super::layout::compute::{BLOCK, ZERO_WORD};
use super::op::{PackedShape, TernaryOps};
pub use crate::ways::Way;
pub(super) use crate::ways::answer;
use crate::ways::ask;

/// The operations of [`TernaryOps`] by name, and how each runs on `device`.
pub fn ways(device: &Device) -> Vec<(&'static str, Way)> {
    ways_with(device, 0)
}

fn ways_with(device: &Device, tokens: usize) -> Vec<(&'static str, Way)> {
    let mut ways = ask(device, |device| call_each(device, tokens));
    // Another family may have been at work meanwhile.
    ways.retain(|(operation, _)| operation.starts_with("ternary"));
    ways
}

fn call_each(device: &Device, tokens: usize) {
    const SHAPE: PackedShape = PackedShape {
        rows: BLOCK,
        cols: BLOCK,
        granularity: Granularity::Tensor,
        rounds_activations: true,
    };
    let floats = |dims: [usize; 2]| Tensor::<2>::zeros(dims, device).into_dispatch();
    let x = || floats([tokens, BLOCK]);
    let packed = || -> (IntTensor<Dispatch>, FloatTensor<Dispatch>) {
        let words = TensorData::new(vec![ZERO_WORD; BLOCK], [1, BLOCK]);
        let words = Tensor::<2, Int>::from_data(words, (device, DType::U32));
        (
            words.into_dispatch(),
            Tensor::<1>::ones([1], device).into_dispatch(),
        )
    };
    // A fused operation runs when its values are asked for. Whether the device can compute them is
    // not what is asked here.
    let run = |y: FloatTensor<Dispatch>| drop(Tensor::<2>::from_dispatch(y).try_into_data());

    run(Dispatch::ternary_fake_quantize_weight(
        x(),
        Granularity::Tensor,
    ));
    run(Dispatch::ternary_fake_quantize_activations(x()));
    let weight = floats([BLOCK, BLOCK]);
    run(Dispatch::ternary_int8_matmul(
        x(),
        weight,
        Granularity::Tensor,
    ));
    let (words, scales) = packed();
    run(Dispatch::ternary_linear(x(), words, scales, SHAPE));
    let (words, scales) = packed();
    run(Dispatch::ternary_linear_dx(x(), words, scales, SHAPE));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_answers_without_tokens_answers_with_some() {
        let device = Device::flex();
        let without = ways(&device);
        assert_eq!(without.len(), 5);
        assert_eq!(without, ways_with(&device, 3));
    }
}
