//! Products with blockwise weights beside the dense ones they take the place of, and the limits of both.
//!
//!     cargo bench --bench blockwise [-- --json] [--threads 1,2] [--shapes 576x1536,2048x2048] [--tokens 512]
//!                                   [--formats nf4,int8] [--seconds 3]
//!
//! A training step's part: the product forward and the gradient of x, ours and those of burn's CPU backend in f32 with
//! weights `[in, out]`, through tensors as a model calls them. A step of decoding: one token, with one matrix again and
//! again (`hot`), and with enough matrices in turn that memory is what they come from (`rotating`), since a shared
//! third-level cache can be as large as 260 MiB.
//!
//! All contestants of a round take turns, and with them the limits, multiply-adds in registers and reading memory, so
//! that what disturbs the machine disturbs all of them. Counted is the time that a tenth of the samples beat; the
//! median stands beside it. Random data, poisoned outputs; first, products are compared with those of the same weights
//! dequantised. Without `--bench`, which `cargo bench` gives, a small shape runs once (`cargo test --benches`).

mod report;

use std::hint::black_box;
use std::time::Instant;

use burn::backend::Dispatch;
use burn::tensor::{Device, Tensor, TensorData};
use firebrick::environment::Environment;
use firebrick_kernels::blockwise::cpu::{self, Path};
use firebrick_kernels::blockwise::layout::{BlockwiseView, Operands};
use firebrick_kernels::blockwise::{
    BlockwiseOps, BlockwiseShape, Format, blockwise_linear, quantise,
};
use firebrick_kernels::ternary::cpu::probe;
use rayon::ThreadPool;
use serde_json::json;

use report::{PEAK, READ, Round, Row, Work};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Words of codes that rotate: 1 GiB.
const WORDS: usize = 1 << 28;

/// Words that a sample reads at least where memory is what is measured: 32 MiB.
const SAMPLE_WORDS: usize = 1 << 23;

/// Seconds that a sample of several calls takes, about.
const SAMPLE_SECONDS: f64 = 2e-3;

/// A contestant's block, but for int8.
const BLOCK: usize = 64;

struct Options {
    json: bool,
    threads: Vec<usize>,
    /// Inputs and outputs.
    shapes: Vec<[usize; 2]>,
    tokens: Vec<usize>,
    formats: Vec<Format>,
    seconds: f64,
    words: usize,
}

impl Options {
    fn parse() -> Self {
        let arguments: Vec<String> = std::env::args().collect();
        let has = |name: &str| arguments.iter().any(|argument| argument == name);
        let value = |name: &str| {
            let at = arguments.iter().position(|argument| argument == name);
            at.and_then(|at| arguments.get(at + 1))
        };
        let numbers = |list: &str, by: char| -> Vec<usize> {
            let numbers = list.split(by);
            numbers.map(|n| n.parse().expect("a number")).collect()
        };
        let list = |name: &str, default: &[usize]| {
            value(name).map_or(default.to_vec(), |list| numbers(list, ','))
        };
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads: &[usize] = if cores > 1 { &[1, cores] } else { &[1] };
        let measured = has("--bench");
        let default = if measured {
            "576x1536,768x768,768x2048,2048x2048"
        } else {
            "128x192"
        };
        let shapes = value("--shapes").map_or(default, String::as_str).split(',');
        let formats = value("--formats").map_or("nf4", String::as_str).split(',');
        Self {
            json: has("--json"),
            threads: list("--threads", threads),
            shapes: shapes
                .map(|shape| match numbers(shape, 'x')[..] {
                    [inputs, outputs] => [inputs, outputs],
                    _ => panic!("{shape}: a shape is inputs x outputs"),
                })
                .collect(),
            tokens: list("--tokens", &[1, 512]),
            formats: formats
                .map(|name| Format::from_name(name).expect("a format's name"))
                .collect(),
            seconds: match value("--seconds") {
                Some(seconds) => seconds.parse().expect("a number of seconds"),
                None if measured => 3.0,
                None => 0.0,
            },
            words: if measured { WORDS } else { WORDS >> 10 },
        }
    }
}

/// A row, and what fills it: one sample's seconds a call.
type Contestant<'a> = (Row, Box<dyn FnMut() -> f64 + 'a>);

fn main() {
    let options = Options::parse();
    let environment = Environment::detect();
    if options.json {
        let first = json!({
            "cpu": environment.cpu, "cores": environment.threads, "path": Path::detect().name(),
            "seconds_a_round": options.seconds,
        });
        println!("{first}");
    } else {
        println!("{}, {}", environment.cpu, Path::detect().name());
    }
    let words = random_words(options.words);
    for &[inputs, outputs] in &options.shapes {
        for &threads in &options.threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().expect("threads start");
            for &tokens in &options.tokens {
                let bench = Bench {
                    words: &words,
                    pool: &pool,
                    inputs,
                    outputs,
                    tokens,
                    threads,
                };
                bench.run(&options);
            }
        }
    }
}

/// One round.
struct Bench<'a> {
    words: &'a [u32],
    pool: &'a ThreadPool,
    inputs: usize,
    outputs: usize,
    tokens: usize,
    threads: usize,
}

impl Bench<'_> {
    fn run(&self, options: &Options) {
        let weights = random_floats(self.outputs * self.inputs, 1);
        let operands: Vec<Operands> = (options.formats.iter())
            .map(|&format| self.quantised(format, &weights))
            .collect();
        let mut contestants = Vec::new();
        for operands in &operands {
            contestants.extend(self.blockwise(operands));
            if self.tokens == 1 {
                contestants.push(self.rotating(operands));
            }
        }
        contestants.extend(self.dense(&weights));
        contestants.extend(self.peak());
        if self.tokens == 1 {
            contestants.push(self.read());
        }
        // Caches, threads and clocks warm up.
        contestants.iter_mut().for_each(|(_, sample)| _ = sample());
        let started = Instant::now();
        for turn in 0.. {
            if turn >= 3 && started.elapsed().as_secs_f64() > options.seconds {
                break;
            }
            for (row, sample) in &mut contestants {
                row.samples.push(sample());
            }
        }
        let round = Round {
            inputs: self.inputs,
            outputs: self.outputs,
            tokens: self.tokens,
            threads: self.threads,
            rows: contestants.into_iter().map(|(row, _)| row).collect(),
        };
        round.print(options.json);
    }

    fn quantised(&self, format: Format, weights: &[f32]) -> Operands {
        let by_rows = format == Format::Int8;
        let shape = BlockwiseShape {
            rows: self.outputs,
            cols: self.inputs,
            format,
            block: if by_rows { self.inputs } else { BLOCK },
            double: !by_rows,
        };
        let quantised = quantise(weights, shape);
        quantised.expect("random numbers are finite").operands()
    }

    /// Calls of a sample: some for a clock to measure, and where matrices rotate, some that read much memory.
    fn calls(&self, operands: &Operands, matrices: usize) -> usize {
        if matrices > 1 {
            return (SAMPLE_WORDS / operands.words.len()).max(1);
        }
        let operations = 2.0 * (self.tokens * self.inputs * self.outputs) as f64;
        let seconds = operations / (1e11 * self.threads as f64);
        ((SAMPLE_SECONDS / seconds) as usize).max(1)
    }

    /// Forward and, with many tokens, backward, through tensors.
    fn blockwise(&self, operands: &Operands) -> Vec<Contestant<'_>> {
        let (device, shape) = (Device::flex(), operands.shape);
        let (words, scales, side) = operands.clone().into_tensors(&device);
        let calls = self.calls(operands, 1);
        let name = shape.format.name();
        let bytes = bytes(operands);
        let (x, dy) = (self.x(), self.dy());
        let weights = (words.clone(), scales.clone(), side.clone());
        let forward = move || {
            let (words, scales, side) = weights.clone();
            blockwise_linear(x.clone(), words, scales, side, shape)
        };
        let backward = move || {
            let [words, side] = [words.clone().into_dispatch(), side.clone().into_dispatch()];
            let (dy, scales) = (dy.clone().into_dispatch(), scales.clone().into_dispatch());
            let dx = Dispatch::blockwise_linear_dx(dy, words, scales, side, shape);
            Tensor::<2>::from_dispatch(dx)
        };
        let quantised = operands.view().to_quantised().expect("scales are finite");
        let weight = [self.outputs, self.inputs];
        let weight =
            Tensor::<2>::from_data(TensorData::new(quantised.dequantise(), weight), &device);
        let dense = self.x().matmul(weight.clone().transpose());
        assert_close(forward(), dense, self.inputs);
        assert_close(backward(), self.dy().matmul(weight), self.outputs);
        let mut contestants = vec![self.tensors(&format!("{name} y"), bytes, calls, forward)];
        if self.tokens > 1 {
            contestants.push(self.tensors(&format!("{name} dx"), bytes, calls, backward));
        }
        contestants
    }

    /// The same with W `[inputs, outputs]` in f32.
    fn dense(&self, weights: &[f32]) -> Vec<Contestant<'_>> {
        let device = Device::flex();
        let [inputs, outputs] = [self.inputs, self.outputs];
        let turned: Vec<f32> = (0..inputs * outputs)
            .map(|i| weights[i % outputs * inputs + i / outputs])
            .collect();
        let w = Tensor::<2>::from_data(TensorData::new(turned, [inputs, outputs]), &device);
        let operations = 2.0 * (self.tokens * inputs * outputs) as f64;
        let calls = ((SAMPLE_SECONDS * 1e11 * self.threads as f64 / operations) as usize).max(1);
        let bytes = 4.0 * (inputs * outputs) as f64;
        let (x, dy) = (self.x(), self.dy());
        let weight = w.clone();
        let forward = move || x.clone().matmul(weight.clone());
        let backward = move || dy.clone().matmul(w.clone().transpose());
        let mut contestants = vec![self.tensors("dense f32 y", bytes, calls, forward)];
        if self.tokens > 1 {
            contestants.push(self.tensors("dense f32 dx", bytes, calls, backward));
        }
        contestants
    }

    fn x(&self) -> Tensor<2> {
        let data = TensorData::new(
            random_floats(self.tokens * self.inputs, 2),
            [self.tokens, self.inputs],
        );
        Tensor::from_data(data, &Device::flex())
    }

    fn dy(&self) -> Tensor<2> {
        let data = TensorData::new(
            random_floats(self.tokens * self.outputs, 3),
            [self.tokens, self.outputs],
        );
        Tensor::from_data(data, &Device::flex())
    }

    fn tensors<'a>(
        &'a self,
        who: &str,
        bytes: f64,
        calls: usize,
        product: impl Fn() -> Tensor<2> + Send + Sync + 'a,
    ) -> Contestant<'a> {
        let sample = move || {
            self.pool.install(|| {
                let started = Instant::now();
                for _ in 0..calls {
                    black_box(product());
                }
                started.elapsed().as_secs_f64() / calls as f64
            })
        };
        (
            Row::new(who, "hot", Work::Product { bytes }),
            Box::new(sample),
        )
    }

    /// One matrix after another from memory, with the scales of the first.
    fn rotating<'a>(&'a self, operands: &'a Operands) -> Contestant<'a> {
        let x = random_floats(self.tokens * self.inputs, 2);
        let mut y = vec![f32::NAN; self.tokens * self.outputs];
        let length = operands.words.len();
        let matrices = self.words.len() / length;
        let (calls, mut next) = (self.calls(operands, matrices), 0);
        let sample = move || {
            y.fill(f32::NAN);
            let seconds = self.pool.install(|| {
                let started = Instant::now();
                for _ in 0..calls {
                    let words = &self.words[next % matrices * length..][..length];
                    next += 1;
                    let (scales, side) = (&operands.scales, &operands.side);
                    let view = BlockwiseView::new(operands.shape, words, scales, side);
                    let view = view.expect("the matrix has the words of its shape");
                    cpu::linear(&x, self.tokens, &view, &mut y).expect("lengths fit");
                }
                started.elapsed().as_secs_f64() / calls as f64
            });
            assert!(!y.iter().any(|y| y.is_nan()), "every output is written");
            seconds
        };
        let name = format!("{} y", operands.shape.format.name());
        let bytes = bytes(operands);
        (
            Row::new(name, "rotating", Work::Product { bytes }),
            Box::new(sample),
        )
    }

    fn peak(&self) -> Option<Contestant<'_>> {
        let run = || self.pool.install(|| Path::detect().float_operations());
        let (operations, _) = run()?;
        let sample = move || run().map_or(f64::NAN, |(_, seconds)| seconds);
        let row = Row::new(PEAK, "-", Work::Operations(operations));
        Some((row, Box::new(sample)))
    }

    fn read(&self) -> Contestant<'_> {
        let length = SAMPLE_WORDS.min(self.words.len());
        let mut parts = self.words.chunks_exact(length).cycle();
        let sample = move || {
            let words = parts.next().unwrap_or_default();
            self.pool.install(|| {
                let started = Instant::now();
                probe::read(words);
                started.elapsed().as_secs_f64()
            })
        };
        let row = Row::new(READ, "-", Work::Bytes(4.0 * length as f64));
        (row, Box::new(sample))
    }
}

/// Whether sums of so many products of numbers below 1 are the same but for rounding.
fn assert_close(found: Tensor<2>, expected: Tensor<2>, summands: usize) {
    let error = (found - expected).abs().max().into_scalar::<f32>();
    let bound = 1e-6 * summands as f32;
    assert!(error <= bound, "{error} is more than {bound}");
}

/// Of codes and all scales.
fn bytes(operands: &Operands) -> f64 {
    4.0 * (operands.words.len() + operands.scales.len() + operands.side.len()) as f64
}

fn random_words(count: usize) -> Vec<u32> {
    let mut state = 88_172_645_463_325_252u64;
    let word = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32
    };
    (0..count).map(word).collect()
}

fn random_floats(count: usize, seed: u32) -> Vec<f32> {
    let mut state = 0x9E37_79B9u32 ^ seed;
    let value = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / (1u32 << 31) as f32 - 1.0
    };
    (0..count).map(value).collect()
}
