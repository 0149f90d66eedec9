//! The operations that the CPU has in one piece, as tensors meet them: gradients whoever of their operands is trained,
//! other dtypes, views, values that are not numbers, and operands that something else holds.

use burn::tensor::activation::{log_softmax, relu, sigmoid, silu, softmax, softplus};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_kernels::attention::{AttentionShape, attention};
use firebrick_kernels::layers::{Activation, add_product, gated, rms_norm, token_nats};

type Function = Box<dyn Fn(&[Tensor<2>]) -> Tensor<2>>;

/// An operation, and the same in burn's.
struct Operation {
    name: &'static str,
    dims: Vec<[usize; 2]>,
    ours: Function,
    composed: Function,
    /// Its result is f32 whatever its operands are.
    is_f32: bool,
}

const ROWS: usize = 2;
const SEQ: usize = 7;
const TOKENS: usize = ROWS * SEQ;
const WIDTH: usize = 12;

fn operations() -> Vec<Operation> {
    let matrix = [TOKENS, WIDTH];
    let targets = || {
        let targets: Vec<i32> = (0..TOKENS as i32).map(|i| i * 5 % WIDTH as i32).collect();
        Tensor::<1, Int>::from_data(TensorData::new(targets, [TOKENS]), &Device::flex())
    };
    vec![
        Operation {
            name: "rms_norm",
            dims: vec![matrix, [1, WIDTH]],
            ours: Box::new(|x| rms_norm(x[0].clone(), x[1].clone().squeeze_dim(0), 1e-5)),
            composed: Box::new(|x| {
                let rms = x[0].clone().square().mean_dim(1).add_scalar(1e-5).sqrt();
                x[0].clone() / rms * x[1].clone()
            }),
            is_f32: false,
        },
        Operation {
            name: "gated by SiLU",
            dims: vec![matrix, matrix],
            ours: Box::new(|x| gated(x[0].clone(), x[1].clone(), Activation::Silu)),
            composed: Box::new(|x| silu(x[0].clone()) * x[1].clone()),
            is_f32: false,
        },
        Operation {
            name: "gated by ReLU²",
            dims: vec![matrix, matrix],
            ours: Box::new(|x| gated(x[0].clone(), x[1].clone(), Activation::Relu2)),
            composed: Box::new(|x| relu(x[0].clone()).square() * x[1].clone()),
            is_f32: false,
        },
        Operation {
            name: "gated by ERA-GELU",
            dims: vec![matrix, matrix],
            ours: Box::new(|x| gated(x[0].clone(), x[1].clone(), Activation::GeluEra)),
            composed: Box::new(|x| gelu_era(x[0].clone()) * x[1].clone()),
            is_f32: false,
        },
        Operation {
            name: "token_nats",
            dims: vec![matrix],
            ours: Box::new(move |x| token_nats(x[0].clone(), targets()).unsqueeze_dim(1)),
            composed: Box::new(move |x| {
                let logs = log_softmax(x[0].clone(), 1);
                -logs.gather(1, targets().unsqueeze_dim(1))
            }),
            is_f32: true,
        },
        Operation {
            name: "add_product",
            dims: vec![matrix, [TOKENS, 3], [3, WIDTH]],
            ours: Box::new(|x| add_product(x[0].clone(), x[1].clone(), x[2].clone())),
            composed: Box::new(|x| x[0].clone() + x[1].clone().matmul(x[2].clone())),
            is_f32: false,
        },
        Operation {
            name: "attention",
            dims: vec![matrix, [TOKENS, WIDTH / 2], [TOKENS, WIDTH / 2]],
            ours: Box::new(|x| fused_attention([&x[0], &x[1], &x[2]].map(Clone::clone))),
            composed: Box::new(|x| composed_attention([&x[0], &x[1], &x[2]].map(Clone::clone))),
            is_f32: false,
        },
    ]
}

fn gelu_era(x: Tensor<2>) -> Tensor<2> {
    let t = (x.clone() + x.clone().powi_scalar(3) * 0.044715) * (2.0 / std::f64::consts::PI).sqrt();
    x.clone() * sigmoid(t * 2.0) + softplus(x, 1.0) * 0.1
}

const SHAPE: AttentionShape = AttentionShape {
    rows: ROWS,
    heads: 4,
    kv_heads: 2,
    head_dim: WIDTH / 4,
};

/// Causal, without positions: heads are of an odd width.
fn fused_attention(qkv: [Tensor<2>; 3]) -> Tensor<2> {
    let device = &Device::flex();
    let spans: Vec<i64> = (0..SEQ as i64).flat_map(|i| [0, i + 1]).collect();
    let spans = Tensor::<3, Int>::from_data(TensorData::new(spans, [1, SEQ, 2]), device);
    attention(qkv, Tensor::zeros([0, 0, 0], device), spans, SHAPE)
}

fn composed_attention([q, k, v]: [Tensor<2>; 3]) -> Tensor<2> {
    let device = q.device();
    let group = SHAPE.heads / SHAPE.kv_heads;
    let split = |x: Tensor<2>, heads: usize| {
        x.reshape([ROWS, SEQ, heads, SHAPE.head_dim])
            .swap_dims(1, 2)
    };
    let shared = |x: Tensor<2>| {
        let heads = split(x, SHAPE.kv_heads).unsqueeze_dim::<5>(2);
        let heads = heads.repeat_dim(2, group);
        heads.reshape([ROWS, SHAPE.heads, SEQ, SHAPE.head_dim])
    };
    let q = split(q, SHAPE.heads).mul_scalar((SHAPE.head_dim as f64).powf(-0.5));
    let hidden = |i: usize| if i % SEQ > i / SEQ { -1e30 } else { 0.0 };
    let mask: Vec<f32> = (0..SEQ * SEQ).map(hidden).collect();
    let mask = Tensor::<4>::from_data(TensorData::new(mask, [1, 1, SEQ, SEQ]), &device);
    let scores = q.matmul(shared(k).swap_dims(2, 3)) + mask;
    let mixed = softmax(scores, 3).matmul(shared(v));
    mixed.swap_dims(1, 2).reshape([TOKENS, WIDTH])
}

fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = 0x9E37_79B9u32 ^ (seed << 8);
    let value = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / (1u32 << 31) as f32 - 1.0
    };
    (0..count).map(value).collect()
}

fn matrix(values: Vec<f32>, dims: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, dims), device)
}

fn operands(operation: &Operation, device: &Device) -> Vec<Tensor<2>> {
    let dims = operation.dims.iter().zip(1..);
    dims.map(|(dims, seed)| matrix(values(dims[0] * dims[1], seed), *dims, device))
        .collect()
}

fn floats(x: Tensor<2>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

fn assert_close(what: &str, found: Tensor<2>, expected: Tensor<2>, limit: f32) {
    let (found, expected) = (floats(found), floats(expected));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        let error = (a - b).abs();
        assert!(
            error <= limit * (1.0 + b.abs()),
            "{what} {i}: {a} instead of {b}"
        );
    }
}

/// The result, and the gradients of what is trained; each number of the result weighs something else.
fn pass(function: &Function, leaves: &[Tensor<2>]) -> Vec<Tensor<2>> {
    let y = function(leaves);
    let [rows, width] = y.dims();
    let weights = matrix(values(rows * width, 77), [rows, width], &y.device());
    let grads = (y.clone().cast(DType::F32) * weights).sum().backward();
    let gradients = leaves.iter().filter_map(|leaf| leaf.grad(&grads));
    std::iter::once(y.inner()).chain(gradients).collect()
}

#[test]
fn gradients_are_burns_whoever_is_trained() {
    let device = Device::flex().autodiff();
    for operation in operations() {
        let operands = operands(&operation, &device);
        // Every subset but the empty one.
        for trained in 1..1usize << operands.len() {
            let is_trained = |i: usize| trained >> i & 1 == 1;
            let leaves = operands.iter().enumerate().map(|(i, x)| {
                if is_trained(i) {
                    x.clone().require_grad()
                } else {
                    x.clone()
                }
            });
            let leaves: Vec<_> = leaves.collect();
            let [ours, composed] =
                [&operation.ours, &operation.composed].map(|function| pass(function, &leaves));
            assert_eq!(ours.len(), 1 + trained.count_ones() as usize);
            for (i, (ours, composed)) in ours.into_iter().zip(composed).enumerate() {
                let what = format!("{} {trained:b} {i}", operation.name);
                assert_close(&what, ours, composed, 1e-5);
            }
        }
    }
}

#[test]
fn half_precision_is_that_of_operands_and_results_alone() {
    let device = Device::flex().autodiff();
    for operation in operations() {
        for dtype in [DType::BF16, DType::F16] {
            let leaf = |x: Tensor<2>| Tensor::from_inner(x.inner().cast(dtype)).require_grad();
            let halves: Vec<_> = operands(&operation, &device)
                .into_iter()
                .map(leaf)
                .collect();
            let leaf = |x: &Tensor<2>| x.clone().inner().cast(DType::F32);
            let wide: Vec<_> = halves
                .iter()
                .map(|x| Tensor::from_inner(leaf(x)).require_grad())
                .collect();
            let result = (operation.ours)(&halves).dtype();
            assert_eq!(result, if operation.is_f32 { DType::F32 } else { dtype });
            let [half, wide] = [halves, wide].map(|leaves| pass(&operation.ours, &leaves));
            for (half, wide) in half.into_iter().zip(wide) {
                // Results and gradients are rounded once, and so is what comes back from the result.
                assert_close(operation.name, half.cast(DType::F32), wide, 0.02);
            }
        }
    }
}

#[test]
fn a_view_is_read_as_what_it_shows() {
    let device = Device::flex();
    for operation in operations() {
        let operands = operands(&operation, &device);
        let expected = floats((operation.ours)(&operands));
        let turned = operands.iter().map(|x| {
            let copy = floats(x.clone().transpose());
            let [rows, cols] = x.dims();
            matrix(copy, [cols, rows], &device).transpose()
        });
        let turned: Vec<_> = turned.collect();
        assert_eq!(
            floats((operation.ours)(&turned)),
            expected,
            "{}",
            operation.name
        );
        let part = operands.iter().map(|x| {
            let [rows, cols] = x.dims();
            let around = Tensor::cat(vec![x.clone(), x.clone(), x.clone()], 1);
            let around = Tensor::cat(vec![around.clone(), around], 0);
            around.slice([rows..2 * rows, cols..2 * cols])
        });
        let part: Vec<_> = part.collect();
        assert_eq!(
            floats((operation.ours)(&part)),
            expected,
            "{}",
            operation.name
        );
    }
}

#[test]
fn what_is_not_a_number_comes_out_and_goes_back() {
    let device = Device::flex().autodiff();
    for operation in operations() {
        for (i, dims) in operation.dims.iter().enumerate() {
            let mut operands = operands(&operation, &device);
            let mut with_nan = values(dims[0] * dims[1], 5);
            *with_nan.last_mut().unwrap() = f32::NAN;
            operands[i] = matrix(with_nan, *dims, &device);
            let leaves: Vec<_> = operands.into_iter().map(Tensor::require_grad).collect();
            let mut found = pass(&operation.ours, &leaves).into_iter();
            let y = floats(found.next().unwrap());
            let name = operation.name;
            assert!(y.iter().any(|y| y.is_nan()), "{name}: operand {i}");
            // A sum does not depend on what its terms are.
            let gradients: Vec<f32> = found.flat_map(floats).collect();
            let is_term = name == "add_product" && i == 0;
            assert_eq!(
                gradients.iter().any(|g| g.is_nan()),
                !is_term,
                "{name}: operand {i}"
            );
        }
    }
}

#[test]
fn what_something_else_holds_is_left_as_it_is_in_both_passes() {
    let device = Device::flex().autodiff();
    for operation in operations() {
        let leaves = operands(&operation, &device).into_iter();
        let leaves: Vec<_> = leaves.map(Tensor::require_grad).collect();
        let shown = |leaves: &[Tensor<2>]| -> Vec<Vec<f32>> {
            leaves.iter().map(|x| floats(x.clone().inner())).collect()
        };
        let before = shown(&leaves);
        let y = (operation.ours)(&leaves);
        let result = floats(y.clone().inner());
        let twice = y.clone() + y.clone() * 2.0;
        twice.sum().backward();
        assert_eq!(shown(&leaves), before, "{}", operation.name);
        assert_eq!(floats(y.inner()), result, "{}", operation.name);
    }
}

#[test]
fn nothing_is_as_good_as_something() {
    let device = Device::flex();
    let empty = |width: usize| Tensor::<2>::zeros([0, width], &device);
    assert_eq!(
        rms_norm(empty(4), Tensor::ones([4], &device), 1e-5).dims(),
        [0, 4]
    );
    for activation in Activation::ALL {
        assert_eq!(gated(empty(4), empty(4), activation).dims(), [0, 4]);
    }
    assert_eq!(
        token_nats(empty(4), Tensor::zeros([0], &device)).dims(),
        [0]
    );
    let weight = Tensor::ones([3, 4], &device);
    assert_eq!(add_product(empty(4), empty(3), weight).dims(), [0, 4]);
    let spans = Tensor::<3, Int>::zeros([1, 0, 2], &device);
    let angles = Tensor::zeros([0, 0, 0], &device);
    let qkv = [empty(12), empty(6), empty(6)];
    assert_eq!(attention(qkv, angles, spans, SHAPE).dims(), [0, 12]);
}
