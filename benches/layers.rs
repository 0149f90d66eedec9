//! Layers as one operation of the CPU beside the same as a graph of burn's: forward and backward, through autodiff.
//!
//!     cargo bench --bench layers [-- --json] [--threads 1,2] [--tokens 512] [--seconds 3]
//!
//! The sizes are those of a model of 124M parameters (width 768, 12 heads of 64, 2048 wide gated layers, 50,257 tokens).
//! Both sides of a layer take turns, and with them its limit: for attention multiply-adds in registers, of the products
//! that causal attention needs; for the others memory, of what has to be read and written at least. Counted is the time
//! that a tenth of the samples beat. Random data; first, results and gradients of both sides are compared. Without
//! `--bench`, which `cargo bench` gives, small sizes run once (`cargo test --benches`).

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::activation::{relu, sigmoid, silu, softmax, softplus};
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick::environment::Environment;
use firebrick_kernels::attention::{AttentionShape, attention};
use firebrick_kernels::blockwise::cpu::Path;
use firebrick_kernels::layers::{Activation, add_product, gated, rms_norm, token_nats};
use firebrick_kernels::ternary::cpu::probe;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What a layer cannot be faster than.
#[derive(Clone, Copy)]
enum Limit {
    /// Multiplications and additions.
    Operations(f64),
    /// Bytes to and from memory.
    Bytes(f64),
}

/// What computes a layer.
type Side = Box<dyn Fn(&[Tensor<2>]) -> Tensor<2> + Send + Sync>;

/// ERA-GELU as a graph.
fn gelu_era(x: Tensor<2>) -> Tensor<2> {
    let t = (x.clone() + x.clone().powi_scalar(3) * 0.044715) * (2.0 / std::f64::consts::PI).sqrt();
    x.clone() * sigmoid(t * 2.0) + softplus(x, 1.0) * 0.1
}

/// One layer on both sides: from its operands to what comes out, each on the autodiff device.
struct Layer {
    name: &'static str,
    operands: Vec<Tensor<2>>,
    ours: Side,
    composed: Side,
    limit: Limit,
}

struct Sizes {
    tokens: usize,
    heads: usize,
    head_dim: usize,
    ffn: usize,
    vocab: usize,
    rank: usize,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)
    };
    let measured = has("--bench");
    let sizes = Sizes {
        tokens: value("--tokens").map_or(if measured { 512 } else { 33 }, |n| {
            n.parse().expect("a number")
        }),
        heads: if measured { 12 } else { 2 },
        head_dim: 64,
        ffn: if measured { 2048 } else { 100 },
        vocab: if measured { 50_257 } else { 300 },
        rank: 16,
    };
    let seconds: f64 = match value("--seconds") {
        Some(seconds) => seconds.parse().expect("a number of seconds"),
        None if measured => 3.0,
        None => 0.0,
    };
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads: Vec<usize> = match value("--threads") {
        Some(list) => list
            .split(',')
            .map(|n| n.parse().expect("a number"))
            .collect(),
        None if cores > 1 => vec![1, cores],
        None => vec![1],
    };
    let environment = Environment::detect();
    let path = Path::detect().name();
    if has("--json") {
        println!(
            "{}",
            json!({ "cpu": environment.cpu, "cores": cores, "path": path })
        );
    } else {
        println!("{}, {path}, {} tokens", environment.cpu, sizes.tokens);
        println!(
            "{:<14} {:>7} {:>11} {:>11} {:>9} {:>11} {:>9}",
            "layer", "threads", "ours us", "burn us", "of burn", "limit us", "of limit"
        );
    }
    for threads in threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.expect("threads start");
        for layer in layers(&sizes) {
            assert_same(&layer);
            let [ours, composed, limit] = pool.install(|| measure(&layer, seconds));
            if has("--json") {
                println!(
                    "{}",
                    json!({
                        "layer": layer.name, "tokens": sizes.tokens, "threads": threads,
                        "ours_us": ours * 1e6, "burn_us": composed * 1e6, "limit_us": limit * 1e6,
                    })
                );
                continue;
            }
            println!(
                "{:<14} {threads:>7} {:>11.0} {:>11.0} {:>9.3} {:>11.0} {:>8.0}%",
                layer.name,
                ours * 1e6,
                composed * 1e6,
                ours / composed,
                limit * 1e6,
                100.0 * limit / ours
            );
        }
    }
}

/// Seconds of both sides, and of the limit.
fn measure(layer: &Layer, seconds: f64) -> [f64; 3] {
    let mut samples = [const { Vec::new() }; 3];
    let words: Vec<u32> = (0..1 << 26).collect();
    let started = Instant::now();
    for turn in 0.. {
        if turn >= 3 && started.elapsed().as_secs_f64() > seconds {
            break;
        }
        let timed = |run: &dyn Fn()| {
            let started = Instant::now();
            run();
            started.elapsed().as_secs_f64()
        };
        samples[0].push(timed(&|| {
            drop(black_box(run(&layer.ours, &layer.operands, Weighs::Alike)))
        }));
        samples[1].push(timed(&|| {
            drop(black_box(run(
                &layer.composed,
                &layer.operands,
                Weighs::Alike,
            )))
        }));
        samples[2].push(match layer.limit {
            Limit::Operations(operations) => {
                let (done, seconds) = Path::detect().float_operations().unwrap_or((0.0, f64::NAN));
                operations / done * seconds
            }
            Limit::Bytes(bytes) => {
                let length = 1 << 24;
                let words = &words[turn % 4 * length..][..length];
                bytes / (4 * length) as f64 * timed(&|| probe::read(words))
            }
        });
    }
    samples.map(|mut samples| {
        samples.sort_by(f64::total_cmp);
        samples[samples.len() / 10]
    })
}

/// What each number that comes out weighs in the sum whose gradients are taken.
#[derive(Clone, Copy)]
enum Weighs {
    /// One: what is timed is the layer.
    Alike,
    /// Something else: what is compared is every gradient.
    Apart,
}

/// What comes out, and the gradients of all operands.
fn run(layer: &Side, operands: &[Tensor<2>], weighs: Weighs) -> Vec<Tensor<2>> {
    let leaves: Vec<_> = operands.iter().map(|x| x.clone().require_grad()).collect();
    let out = layer(&leaves);
    let sum = match weighs {
        Weighs::Alike => out.clone().sum(),
        Weighs::Apart => {
            let weights = matrix(out.dims(), 17, &out.device());
            (out.clone() * weights).sum()
        }
    };
    let grads = sum.backward();
    let gradients = leaves
        .iter()
        .map(|leaf| leaf.grad(&grads).expect("a gradient"));
    std::iter::once(out.inner()).chain(gradients).collect()
}

fn assert_same(layer: &Layer) {
    let [ours, composed] =
        [&layer.ours, &layer.composed].map(|side| run(side, &layer.operands, Weighs::Apart));
    for (ours, composed) in ours.into_iter().zip(composed) {
        let most = composed.clone().abs().max().into_scalar::<f32>();
        let error = (ours - composed).abs().max().into_scalar::<f32>();
        let bound = 1e-4 * most.max(1e-3);
        assert!(
            error <= bound,
            "{}: {error} is more than {bound}",
            layer.name
        );
    }
}

fn layers(sizes: &Sizes) -> Vec<Layer> {
    let device = Device::flex().autodiff();
    let Sizes {
        tokens,
        heads,
        head_dim,
        ffn,
        vocab,
        rank,
    } = *sizes;
    let dim = heads * head_dim;
    let x = |width: usize, seed: u32| matrix([tokens, width], seed, &device);
    let floats = |count: usize| 4.0 * count as f64;
    let plain = device.clone().inner();
    // Scores, their mixture, and the four products of the backward pass and one more for scores again; half of them.
    let scores = (tokens * tokens * dim) as f64;
    let targets: Vec<i32> = (0..tokens).map(|i| (i * 7919 % vocab) as i32).collect();
    let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [tokens]), &plain);
    let nats_targets = targets.clone();
    vec![
        Layer {
            name: "attention",
            operands: vec![x(dim, 1), x(dim, 2), x(dim, 3)],
            ours: ours_attention(sizes, &plain),
            composed: composed_attention(sizes, &device),
            limit: Limit::Operations(2.0 * 7.0 * scores / 2.0),
        },
        Layer {
            name: "rms_norm",
            operands: vec![x(dim, 1), matrix([1, dim], 2, &device)],
            ours: Box::new(|x| rms_norm(x[0].clone(), x[1].clone().squeeze_dim(0), 1e-5)),
            composed: Box::new(|x| {
                let rms = x[0].clone().square().mean_dim(1).add_scalar(1e-5).sqrt();
                x[0].clone() / rms * x[1].clone()
            }),
            // Forward reads one and writes one, backward reads two and writes one.
            limit: Limit::Bytes(5.0 * floats(tokens * dim)),
        },
        Layer {
            name: "swiglu",
            operands: vec![x(ffn, 1), x(ffn, 2)],
            ours: Box::new(|x| gated(x[0].clone(), x[1].clone(), Activation::Silu)),
            composed: Box::new(|x| silu(x[0].clone()) * x[1].clone()),
            limit: Limit::Bytes(8.0 * floats(tokens * ffn)),
        },
        Layer {
            name: "relu2_glu",
            operands: vec![x(ffn, 1), x(ffn, 2)],
            ours: Box::new(|x| gated(x[0].clone(), x[1].clone(), Activation::Relu2)),
            composed: Box::new(|x| relu(x[0].clone()).square() * x[1].clone()),
            limit: Limit::Bytes(8.0 * floats(tokens * ffn)),
        },
        Layer {
            name: "era_glu",
            operands: vec![x(ffn, 1), x(ffn, 2)],
            ours: Box::new(|x| gated(x[0].clone(), x[1].clone(), Activation::GeluEra)),
            composed: Box::new(|x| gelu_era(x[0].clone()) * x[1].clone()),
            limit: Limit::Bytes(8.0 * floats(tokens * ffn)),
        },
        Layer {
            name: "token_nats",
            operands: vec![x(vocab, 1)],
            ours: Box::new(move |x| {
                token_nats(x[0].clone(), nats_targets.clone()).unsqueeze_dim(1)
            }),
            composed: Box::new(move |x| {
                let logits = burn::tensor::activation::log_softmax(x[0].clone(), 1);
                -logits.gather(1, targets.clone().unsqueeze_dim(1))
            }),
            limit: Limit::Bytes(3.0 * floats(tokens * vocab)),
        },
        Layer {
            name: "add_product",
            operands: vec![x(ffn, 1), x(rank, 2), matrix([rank, ffn], 3, &device)],
            ours: Box::new(|x| add_product(x[0].clone(), x[1].clone(), x[2].clone())),
            composed: Box::new(|x| x[0].clone() + x[1].clone().matmul(x[2].clone())),
            limit: Limit::Bytes(4.0 * floats(tokens * ffn)),
        },
    ]
}

fn ours_attention(sizes: &Sizes, plain: &Device) -> Side {
    let shape = AttentionShape {
        rows: 1,
        heads: sizes.heads,
        kv_heads: sizes.heads,
        head_dim: sizes.head_dim,
    };
    let spans: Vec<i32> = (0..sizes.tokens).flat_map(|i| [0, i as i32 + 1]).collect();
    let spans = Tensor::<3, Int>::from_data(TensorData::new(spans, [1, sizes.tokens, 2]), plain);
    let angles = Tensor::<3>::zeros([0, 0, 0], plain);
    Box::new(move |x| {
        let qkv = [x[0].clone(), x[1].clone(), x[2].clone()];
        attention(qkv, angles.clone(), spans.clone(), shape)
    })
}

fn composed_attention(sizes: &Sizes, device: &Device) -> Side {
    let Sizes {
        tokens,
        heads,
        head_dim,
        ..
    } = *sizes;
    let mask: Vec<f32> = (0..tokens * tokens)
        .map(|i| if i % tokens > i / tokens { -1e30 } else { 0.0 })
        .collect();
    let mask = Tensor::<4>::from_data(TensorData::new(mask, [1, 1, tokens, tokens]), device);
    Box::new(move |x| {
        let split = |x: &Tensor<2>| {
            x.clone()
                .reshape([1, tokens, heads, head_dim])
                .swap_dims(1, 2)
        };
        let [q, k, v] = [&x[0], &x[1], &x[2]].map(split);
        let q = q.mul_scalar((head_dim as f64).powf(-0.5));
        let scores = q.matmul(k.swap_dims(2, 3)) + mask.clone();
        softmax(scores, 3)
            .matmul(v)
            .swap_dims(1, 2)
            .reshape([tokens, heads * head_dim])
    })
}

fn matrix(dims: [usize; 2], seed: u32, device: &Device) -> Tensor<2> {
    let mut state = 0x9E37_79B9u32 ^ seed;
    let value = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / (1u32 << 31) as f32 - 1.0
    };
    let values: Vec<f32> = (0..dims[0] * dims[1]).map(value).collect();
    Tensor::from_data(TensorData::new(values, dims), device)
}
