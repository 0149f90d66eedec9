use burn::tensor::{Device, FloatDType};
use firebrick_kernels::ternary::Granularity;

use super::*;
use crate::config::{
    AdapterInit, AdapterPlan, BlockFormat, BlockSize, Blockwise, DecoderSpec, Preset,
};
use crate::model::Decoder;

const DIMS: [usize; 2] = [48, 20];

const DORA: LoraShape = LoraShape {
    rank: 3,
    scale: 2.0,
    dropout: 0.5,
    magnitude: true,
};

fn init() -> Init {
    Init::new(3, &Device::flex())
}

fn values(x: Tensor<2>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

fn input() -> Tensor<2> {
    init().normal("x", [8, DIMS[0]], 1.0).val()
}

/// A layer with an adapter that changes something; the path names what is dropped.
fn adapted(path: &str) -> Linear {
    let mut layer = Linear::new(&init(), "layer", DIMS, false, 0.5);
    layer.attach(&init(), path, DORA);
    layer.measure();
    let adapter = layer.adapter.as_mut().unwrap();
    let a = init().normal("a", [DIMS[0], 3], 0.3);
    adapter.lora_a = a;
    adapter.lora_b = init().normal("b", [3, DIMS[1]], 0.3);
    layer
}

#[test]
fn a2_layers_that_read_the_same_drop_the_same() {
    let [q, k] = ["q", "k"].map(adapted);
    let dropout = Dropout {
        seed: [1, 2],
        first: 0,
        dims: [2, 4],
    };
    let [first, second] = Linear::forward_shared([&q, &k], input(), Some(&dropout));
    assert_eq!(values(first.clone()), values(second));
    assert_ne!(values(first), values(q.forward(input())));
}

/// The third output of a layer has no weights.
fn with_nothing(path: &str) -> Linear {
    let mut layer = adapted(path);
    let weight = layer.dense_weight();
    let device = weight.device();
    let mask = Tensor::<1>::from_data([0.0], &device).unsqueeze::<2>();
    let zero = mask.expand([DIMS[0], 1]);
    layer.set_weight(weight.slice_assign([0..DIMS[0], 2..3], zero));
    let adapter = layer.adapter.as_mut().unwrap();
    adapter.lora_b = init().full([3, DIMS[1]], 0.0);
    layer.measure();
    layer
}

#[test]
fn a2_an_output_without_weights_stays_one_and_can_learn() {
    let mut layer = with_nothing("q");
    let plain = values(input().matmul(layer.dense_weight()));
    let adapted = values(layer.forward(input()));
    let error = plain.iter().zip(&adapted).map(|(a, b)| (a - b).abs());
    assert!(error.fold(0.0, f32::max) < 1e-5, "{adapted:?}");
    layer.merge();
    let merged = values(layer.forward(input()));
    assert!(merged.iter().all(|value| value.is_finite()));
    assert!(merged.iter().skip(2).step_by(DIMS[1]).all(|&y| y == 0.0));
}

#[test]
fn a2_in_half_precision_lengths_are_divided_in_f32() {
    let spec = DecoderSpec {
        shape: Preset::Stories260K.shape(),
        vocab_size: 32,
        eos_token_id: None,
        bos_token_id: None,
    };
    let path = "layers.0.mlp.up_proj";
    let plan = AdapterPlan {
        layers: [(path.to_string(), DORA)].into(),
        saved: Vec::new(),
        init: AdapterInit::Default,
        loftq_iterations: 1,
        lora_plus_ratio: 1.0,
    };
    let model = Decoder::new(&spec, 3, &Device::flex()).unwrap();
    let mut model = model.adapted(&plan, 1).unwrap();
    let adapter = model.linear_mut(path).unwrap().adapter.as_mut().unwrap();
    let magnitude = adapter.magnitude.as_mut().unwrap();
    *magnitude = Param::initialized(magnitude.id, magnitude.val() * 1.37);
    let model = model.with_fixed_norms();
    let stretch = |model: &Decoder| {
        let adapter = model.linear(path).unwrap().adapter.as_ref().unwrap();
        values(
            adapter
                .stretch(|_| unreachable!("norms are there"))
                .unwrap(),
        )
    };
    let half = model.clone().cast(FloatDType::BF16);
    assert_eq!(stretch(&half), stretch(&model));
    let layer = half.linear(path).unwrap();
    let x = init()
        .normal("x", [4, 64], 1.0)
        .val()
        .cast(FloatDType::BF16);
    assert_eq!(layer.forward(x).dtype(), DType::BF16);
}

/// What a product with the identity makes of the layer.
fn by_product(layer: &Linear) -> Vec<f32> {
    values(layer.plain_product(Tensor::eye(DIMS[0], &Device::flex())))
}

#[test]
fn q5_t4_codes_stand_for_what_they_multiply_as() {
    let dense = Linear::new(&init(), "layer", DIMS, false, 0.5);
    let weight = dense.dense_weight();
    assert_eq!(values(weight.clone()), by_product(&dense));
    for granularity in [
        Granularity::Tensor,
        Granularity::Row,
        Granularity::Group(16),
    ] {
        let ternary = Ternary {
            granularity,
            rounds_activations: true,
            packed: None,
        };
        let mut layer = dense.clone();
        layer.ternary = Some(ternary);
        let latent = values(layer.dense_weight());
        layer.pack();
        assert!(matches!(layer.weight, Weight::Packed(_)));
        assert_eq!(values(layer.dense_weight()), by_product(&layer));
        assert_eq!(values(layer.dense_weight()), latent);
    }
    let turned = values(weight.transpose());
    for format in BlockFormat::ALL {
        for (block, double) in [(BlockSize::Weights(7), true), (BlockSize::Row, false)] {
            let blockwise = Blockwise {
                format,
                block,
                double,
            };
            let shape = blockwise.of_matrix(DIMS);
            let quantised = firebrick_kernels::blockwise::quantise(&turned, shape).unwrap();
            let mut layer = dense.clone();
            let mut codes = QuantisedWeight::empty(&init(), DIMS, blockwise);
            let (words, scales, side) = quantised.operands().into_tensors(&Device::flex());
            codes.words = Param::initialized(codes.words.id, words);
            codes.scales = Param::initialized(codes.scales.id, scales);
            codes.side = Param::initialized(codes.side.id, side);
            layer.weight = Weight::Quantised(codes);
            assert_eq!(
                values(layer.dense_weight()),
                by_product(&layer),
                "{format:?}"
            );
        }
    }
}

#[test]
fn t5_a_blend_is_the_mean_of_dense_and_ternary_and_has_the_gradient_of_the_weights() {
    let device = Device::flex().autodiff();
    let init = Init::new(3, &device);
    let ternary = Ternary {
        granularity: Granularity::Tensor,
        rounds_activations: true,
        packed: None,
    };
    let layer = |share: f64| {
        let mut layer = Linear::new(&init, "layer", DIMS, false, 0.5);
        layer.ternary = Some(ternary);
        layer.blend_ternary(share);
        layer
    };
    let dense = layer(0.0);
    let Weight::Dense(weight) = &dense.weight else {
        unreachable!()
    };
    let (x, weight) = (input(), weight.val().inner());
    let rounded_x = fake_quantize_activations(x.clone());
    let rounded = fake_quantize_weight(weight.clone(), Granularity::Tensor);
    let mean = |a: &Tensor<2>, b: &Tensor<2>, share: f64| {
        a.clone().mul_scalar(1.0 - share) + b.clone().mul_scalar(share)
    };
    for share in [0.0, 0.3, 1.0] {
        let layer = layer(share);
        let input = Tensor::from_inner(x.clone()).require_grad();
        let output = layer.forward(input.clone());
        let blended = mean(&weight, &rounded, share);
        let blended_x = mean(&x, &rounded_x, share);
        let expected = values(blended_x.clone().matmul(blended.clone()));
        for (found, expected) in values(output.clone().inner()).iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-5,
                "{share}: {found} {expected}"
            );
        }
        // Straight through: as if input and weights were the blended ones.
        let gradients = output.clone().sum().backward();
        let ones = Tensor::<2>::ones([8, DIMS[1]], &Device::flex());
        let Weight::Dense(own) = &layer.weight else {
            unreachable!()
        };
        let of_weight = values(own.val().grad(&gradients).unwrap());
        let of_input = values(input.grad(&gradients).unwrap());
        let expected = values(blended_x.transpose().matmul(ones.clone()));
        for (found, expected) in of_weight.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-4,
                "{share}: {found} {expected}"
            );
        }
        let expected = values(ones.matmul(blended.transpose()));
        for (found, expected) in of_input.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-4,
                "{share}: {found} {expected}"
            );
        }
        // Rounding once for a step gives the same, and a blend is never packed.
        let mut once = layer.clone();
        once.round();
        let again = values(once.forward(Tensor::from_inner(x.clone())).inner());
        for (again, found) in again.iter().zip(values(output.inner())) {
            assert!((again - found).abs() < 1e-5, "{share}");
        }
        once.pack();
        assert_eq!(matches!(once.weight, Weight::Packed(_)), share == 1.0);
    }
}
