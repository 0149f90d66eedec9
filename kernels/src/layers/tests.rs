//! Every path against the scalar reference, on odd sizes; and gradients through burn.

use burn::tensor::{Device, Int, Tensor, TensorData};
use proptest::prelude::*;

use super::{Activation, add_product, cpu, gated, reference, rms_norm, token_nats};
use crate::panel::Path;
use crate::samples::{Random, paths};

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let error = (a - b).abs();
        assert!(
            error <= 1e-5 * (1.0 + b.abs()),
            "{what} {i}: {a} instead of {b}"
        );
    }
}

const EPS: f64 = 1e-5;

proptest! {
    #[test]
    fn f3_rms_norm_equals_the_reference(
        rows in 0usize..40,
        dim in 1usize..900,
        scale in prop::sample::select(vec![1e-3f32, 1.0, 30.0]),
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed | 1);
        let x = random.values(rows * dim, scale);
        let (weight, dy) = (random.values(dim, 1.0), random.values(rows * dim, 1.0));
        let expected = reference::rms_norm(&x, &weight, EPS);
        let [dx, dw] = reference::rms_norm_backward(&x, &weight, &dy, EPS);
        // Gradients are as large as one over x.
        let shrink = |values: &[f32]| values.iter().map(|v| v * scale.min(1.0)).collect::<Vec<_>>();
        for path in paths() {
            let (mut y, mut of_x) = (x.clone(), dy.clone());
            cpu::rms_norm(path, &mut y, &weight, EPS as f32);
            assert_close("y", &y, &expected);
            let of_weight = cpu::rms_norm_backward(path, &x, &weight, &mut of_x, EPS as f32, true);
            assert_close("dx", &shrink(&of_x), &shrink(&dx));
            assert_close("dw", &of_weight, &dw);
        }
    }

    #[test]
    fn f3_a_gated_product_equals_the_reference(
        count in prop_oneof![0usize..200, 16_000usize..40_000],
        scale in prop::sample::select(vec![0.1f32, 3.0, 200.0, 1e4, 1e18]),
        activation in prop::sample::select(Activation::ALL.to_vec()),
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed | 1);
        let gate = random.values(count, scale);
        let (up, dy) = (random.values(count, 1.0), random.values(count, 1.0));
        let expected = reference::gated(activation, &gate, &up);
        let [of_gate, of_up] = reference::gated_backward(activation, &gate, &up, &dy);
        for path in paths() {
            let mut y = gate.clone();
            cpu::gated(path, activation, &mut y, &up);
            assert_close("y", &y, &expected);
            let (mut gate, mut dy) = (gate.clone(), dy.clone());
            cpu::gated_backward(path, activation, &mut gate, &up, &mut dy);
            assert_close("gate", &gate, &of_gate);
            assert_close("up", &dy, &of_up);
        }
    }

    #[test]
    fn f1_token_nats_equal_the_reference(
        rows in 1usize..40,
        vocab in 1usize..3000,
        scale in prop::sample::select(vec![0.1f32, 10.0, 1e4]),
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed | 1);
        let logits = random.values(rows * vocab, scale);
        let targets: Vec<i32> = (0..rows).map(|_| (random.bits() % vocab) as i32).collect();
        let mut dy = random.values(rows, 1.0);
        dy[0] = 0.0;
        let expected = reference::token_nats(&logits, &targets);
        let gradient = reference::token_nats_backward(&logits, &targets, &dy);
        for path in paths() {
            let mut log_sums = vec![[0.0; 2]; rows];
            cpu::log_sum_exp(path, &logits, &mut log_sums);
            let nats = log_sums.iter().zip(&targets).enumerate();
            let nats: Vec<f32> = nats
                .map(|(row, (sum, &target))| cpu::nats(*sum, logits[row * vocab + target as usize]))
                .collect();
            assert_close("nats", &nats, &expected);
            let mut found = logits.clone();
            cpu::token_nats_backward(path, &mut found, &targets, &log_sums, &dy);
            assert_close("dz", &found, &gradient);
        }
    }

    #[test]
    fn a_product_is_added(
        rows in 0usize..40,
        inputs in 0usize..200,
        outputs in 1usize..200,
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed | 1);
        let y = random.values(rows * outputs, 1.0);
        let (x, weight) = (random.values(rows * inputs, 1.0), random.values(inputs * outputs, 1.0));
        let expected = reference::add_product(&y, &x, &weight, outputs);
        for path in paths() {
            let mut y = y.clone();
            cpu::add_product(path, &mut y, &x, &weight, outputs);
            assert_close("y", &y, &expected);
        }
    }
}

/// More rows than a block of the product has, and more summands.
#[test]
fn a_product_of_several_blocks_is_added() {
    let (rows, inputs, outputs) = (530, 1100, 33);
    let mut random = Random(3);
    let y = random.values(rows * outputs, 1.0);
    let (x, weight) = (
        random.values(rows * inputs, 0.1),
        random.values(inputs * outputs, 0.1),
    );
    let expected = reference::add_product(&y, &x, &weight, outputs);
    for path in paths() {
        let mut y = y.clone();
        cpu::add_product(path, &mut y, &x, &weight, outputs);
        assert_close("y", &y, &expected);
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let mut random = Random(5);
    let (rows, dim) = (300, 200);
    let x = random.values(rows * dim, 1.0);
    let (weight, dy) = (random.values(dim, 1.0), random.values(rows * dim, 1.0));
    let bits = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let run = || {
            let mut dx = dy.clone();
            let dw = cpu::rms_norm_backward(Path::detect(), &x, &weight, &mut dx, 1e-5, true);
            let mut sum = vec![0.0; rows * rows];
            cpu::add_product(Path::detect(), &mut sum, &x, &x[..dim * rows], rows);
            [dx, dw, sum]
        };
        let values = pool.build().unwrap().install(run);
        values
            .into_iter()
            .flatten()
            .map(f32::to_bits)
            .collect::<Vec<_>>()
    };
    assert_eq!(bits(1), bits(3));
}

fn matrix(values: &[f32], dims: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values.to_vec(), dims), device)
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

#[test]
fn gradients_arrive_through_burn_in_every_operand() {
    let (device, mut random) = (Device::flex().autodiff(), Random(11));
    let (rows, dim) = (5, 37);
    let dims = [rows, dim];
    let [x, up, dy] = [(); 3].map(|()| random.values(rows * dim, 1.0));
    let upstream = || matrix(&dy, dims, &device);
    let leaf = |values: &[f32]| matrix(values, dims, &device).require_grad();

    let weight = random.values(dim, 1.0);
    let [of_x, of_weight] = reference::rms_norm_backward(&x, &weight, &dy, EPS);
    let w = Tensor::<1>::from_data(TensorData::new(weight, [dim]), &device).require_grad();
    let leaf_x = leaf(&x);
    let grads = (rms_norm(leaf_x.clone(), w.clone(), EPS) * upstream())
        .sum()
        .backward();
    assert_close("dx", &floats(leaf_x.grad(&grads).unwrap()), &of_x);
    assert_close("dw", &floats(w.grad(&grads).unwrap()), &of_weight);

    for activation in Activation::ALL {
        let [of_gate, of_up] = reference::gated_backward(activation, &x, &up, &dy);
        let (gate, leaf_up) = (leaf(&x), leaf(&up));
        let grads = (gated(gate.clone(), leaf_up.clone(), activation) * upstream())
            .sum()
            .backward();
        assert_close("gate", &floats(gate.grad(&grads).unwrap()), &of_gate);
        assert_close("up", &floats(leaf_up.grad(&grads).unwrap()), &of_up);
    }

    let targets = [3, 0, 36, 7, 7];
    let weights = random.values(rows, 1.0);
    let expected = reference::token_nats_backward(&x, &targets, &weights);
    let ids = Tensor::<1, Int>::from_data(TensorData::new(targets.to_vec(), [rows]), &device);
    let weights = Tensor::<1>::from_data(TensorData::new(weights, [rows]), &device);
    let logits = leaf(&x);
    let nats = token_nats(logits.clone() * 1.0, ids);
    assert_close(
        "nats",
        &floats(nats.clone().inner()),
        &reference::token_nats(&x, &targets),
    );
    let grads = (nats * weights).sum().backward();
    assert_close("dz", &floats(logits.grad(&grads).unwrap()), &expected);

    let inputs = 6;
    let (low, b) = (
        random.values(rows * inputs, 1.0),
        random.values(inputs * dim, 1.0),
    );
    let leaves = [
        leaf(&x),
        matrix(&low, [rows, inputs], &device).require_grad(),
        matrix(&b, [inputs, dim], &device).require_grad(),
    ];
    let [y, low, b] = leaves.clone();
    let grads = (add_product(y.clone(), low, b) * upstream())
        .sum()
        .backward();
    let [y, low, b] = leaves;
    let sum = y.clone() + low.clone().matmul(b.clone());
    let expected = (sum * upstream()).sum().backward();
    for leaf in [y, low, b] {
        let [found, expected] = [&grads, &expected].map(|grads| floats(leaf.grad(grads).unwrap()));
        assert_close("operand", &found, &expected);
    }
}

/// The reference has formulas of its own for slopes. They are held against differences of its values.
#[test]
fn slopes_of_the_reference_are_differences_of_its_values() {
    let x: Vec<f32> = (-60..=60).map(|i| i as f32 / 8.0 + 0.01).collect();
    let ones = vec![1.0; x.len()];
    let step = 1.0 / 512.0;
    let at = |shift: f32| x.iter().map(|x| x + shift).collect::<Vec<_>>();
    for activation in Activation::ALL {
        let value = |shift| reference::gated(activation, &at(shift), &ones);
        let [slopes, values] = reference::gated_backward(activation, &x, &ones, &ones);
        assert_close("value", &values, &value(0.0));
        let differences = value(step).into_iter().zip(value(-step));
        for ((above, below), slope) in differences.zip(slopes) {
            let found = (above - below) / (2.0 * step);
            assert!(
                (found - slope).abs() < 2e-3,
                "{activation:?}: {found} {slope}"
            );
        }
    }
}

#[test]
fn a_gate_that_is_no_number_gives_no_number() {
    for (activation, path) in Activation::ALL
        .into_iter()
        .flat_map(|activation| paths().map(move |path| (activation, path)))
    {
        let mut y = vec![f32::NAN; 40];
        cpu::gated(path, activation, &mut y, &[1.0; 40]);
        assert!(y.iter().all(|y| y.is_nan()), "{activation:?}");
    }
}

#[test]
fn what_something_else_holds_is_left_as_it_is() {
    let device = Device::flex();
    let x = matrix(&[1.0, 2.0, 3.0, 4.0], [2, 2], &device);
    let w = Tensor::<1>::ones([2], &device);
    let _ = rms_norm(x.clone(), w, EPS);
    let _ = gated(x.clone(), x.clone(), Activation::Silu);
    let _ = add_product(x.clone(), x.clone(), x.clone());
    assert_eq!(floats(x), [1.0, 2.0, 3.0, 4.0]);
}
