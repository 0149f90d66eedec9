//! Which blockwise operation runs how on a device.

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Device, Tensor};

use super::op::BlockwiseOps;
use super::{BlockwiseShape, Format, quantise};
use crate::ways::{Way, ask};

/// The operations of [`BlockwiseOps`] by name, and how each runs on `device`.
pub fn ways(device: &Device) -> Vec<(&'static str, Way)> {
    ways_with(device, 0)
}

fn ways_with(device: &Device, tokens: usize) -> Vec<(&'static str, Way)> {
    let mut ways = ask(device, |device| call_each(device, tokens));
    // Another family may have been at work meanwhile.
    ways.retain(|(operation, _)| operation.starts_with("blockwise"));
    ways
}

fn call_each(device: &Device, tokens: usize) {
    const SIZE: usize = 16;
    const SHAPE: BlockwiseShape = BlockwiseShape {
        rows: SIZE,
        cols: SIZE,
        format: Format::Nf4,
        block: SIZE,
        double: false,
    };
    let quantised = quantise(&[0.0; SIZE * SIZE], SHAPE);
    // Zeros are finite, and as many as the shape has.
    let weights = quantised.expect("zeros can be quantised").operands();
    let x = || Tensor::<2>::zeros([tokens, SIZE], device).into_dispatch();
    // A fused operation runs when its values are asked for. Whether the device can compute them is
    // not what is asked here.
    let run = |y: FloatTensor<Dispatch>| drop(Tensor::<2>::from_dispatch(y).try_into_data());

    let (words, scales, side) = weights.into_tensors(device);
    let (words, side) = (words.into_dispatch(), side.into_dispatch());
    let scales = scales.into_dispatch();
    run(Dispatch::blockwise_linear(
        x(),
        words.clone(),
        scales.clone(),
        side.clone(),
        SHAPE,
    ));
    run(Dispatch::blockwise_linear_dx(
        x(),
        words,
        scales,
        side,
        SHAPE,
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_answers_without_tokens_answers_with_some() {
        let device = Device::flex();
        let without = ways(&device);
        assert_eq!(without.len(), 2);
        assert_eq!(without, ways_with(&device, 3));
    }
}
