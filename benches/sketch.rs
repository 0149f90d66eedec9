//! The speed of hypervectors, rotations and sparse codes, compared with memory bandwidth.
//!
//!     cargo bench --bench sketch [-- --threads 1,2] [--seconds 3]
//!
//! Each operation processes 2^24 random elements, split over all threads. An operation cannot be faster than memory can
//! deliver the bytes that it reads and writes. To measure this limit, the bench reads the same number of bytes in turns
//! with the operation. Both times are the tenth percentile of their samples. `compress` is one step of error feedback:
//! it adds the gradient to the residual, rotates and codes the sum, and keeps the error, rotated back. `cargo bench`
//! passes `--bench`; without it, small sizes run once (`cargo test --benches`).

use std::hint::black_box;
use std::time::Instant;

use firebrick::environment::Environment;
use firebrick_kernels::sketch::{Kept, Path, SparseCode, hadamard, rotate};
use firebrick_kernels::ternary::cpu::probe;
use firebrick_kernels::vsa::{Bundle, Hypervector, Seed};
use rayon::prelude::*;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The number of elements that one thread processes at a time.
const PIECE: usize = 1 << 18;

/// The number of elements that are rotated together.
const BLOCK: usize = 4096;

struct Operation {
    name: String,
    /// The bytes that have to be read and written for each element.
    bytes: f64,
    /// Processes all elements once. Returns the number of bytes coded, or 0 if it codes nothing.
    run: Box<dyn FnMut() -> usize + Send>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)
    };
    let measured = arguments.iter().any(|argument| argument == "--bench");
    let elements = if measured { 1 << 24 } else { 10_000 };
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
    let cpu = Environment::detect().cpu;
    println!("{cpu}, {}, {elements} elements", Path::detect().name());
    println!(
        "{:<20} {:>7} {:>10} {:>12} {:>9} {:>8}",
        "operation", "threads", "Gelem/s", "limit Gel/s", "of limit", "ratio"
    );
    for threads in threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.expect("threads start");
        for mut operation in operations(elements) {
            let [own, limit, coded] = pool.install(|| measure(&mut operation, elements, seconds));
            let ratio = match coded {
                0.0 => String::new(),
                bytes => format!("{:.1}x", 4.0 * elements as f64 / bytes),
            };
            println!(
                "{:<20} {threads:>7} {own:>10.2} {limit:>12.2} {:>8.0}% {ratio:>8}",
                operation.name,
                100.0 * own / limit,
            );
        }
    }
}

/// Measures an operation and its limit in turns. Returns the speed of both in billions of elements
/// per second, and the number of bytes that the operation coded.
fn measure(operation: &mut Operation, elements: usize, seconds: f64) -> [f64; 3] {
    let words: Vec<u32> = (0..1 << 26).collect();
    let mut samples = [const { Vec::new() }; 2];
    let mut coded = 0;
    let started = Instant::now();
    for turn in 0.. {
        if turn >= 3 && started.elapsed().as_secs_f64() > seconds {
            break;
        }
        let timed = |run: &mut dyn FnMut()| {
            let started = Instant::now();
            run();
            started.elapsed().as_secs_f64()
        };
        samples[0].push(timed(&mut || coded = black_box((operation.run)())));
        let length = 1 << 24;
        let words = &words[turn % 4 * length..][..length];
        let read = timed(&mut || probe::read(words));
        samples[1].push(operation.bytes * elements as f64 / (4 * length) as f64 * read);
    }
    let [own, limit] = samples.map(|mut samples| {
        samples.sort_by(f64::total_cmp);
        elements as f64 / samples[samples.len() / 10] / 1e9
    });
    [own, limit, coded as f64]
}

/// Random values that are close to Gaussian: each is a sum of four uniform ones.
fn gradient(elements: usize) -> Vec<f32> {
    let seed = Seed::new(5);
    let value = |i: usize| {
        let word = seed.word(i as u64);
        let part = |k: u32| (word >> (16 * k) & 0xffff) as f32 / 32768.0 - 1.0;
        (0..4).map(part).sum()
    };
    (0..elements).into_par_iter().map(value).collect()
}

fn operations(elements: usize) -> Vec<Operation> {
    let path = Path::detect();
    let mut all = Vec::new();
    let mut add = |name: &str, bytes: f64, run: Box<dyn FnMut() -> usize + Send>| {
        all.push(Operation {
            name: name.to_string(),
            bytes,
            run,
        });
    };
    let vectors: Vec<[Hypervector; 2]> = (0..elements.div_ceil(PIECE) as u64)
        .map(|i| [1, 2].map(|k| Hypervector::bipolar(PIECE.min(elements), Seed::new(k).with(i))))
        .collect();
    let pairs = vectors.clone();
    // A trit takes two bits.
    add(
        "bind",
        3.0 / 4.0,
        Box::new(move || {
            pairs
                .par_iter()
                .for_each(|[a, b]| drop(black_box(a.bind(b))));
            0
        }),
    );
    let pairs = vectors.clone();
    add(
        "dot",
        2.0 / 4.0,
        Box::new(move || {
            black_box(pairs.par_iter().map(|[a, b]| a.dot(b)).sum::<i64>());
            0
        }),
    );
    let mut bundles: Vec<Bundle> = vectors.iter().map(|[a, _]| Bundle::new(a.len())).collect();
    add(
        "bundle 8",
        8.0 / 4.0,
        Box::new(move || {
            let each = bundles.par_iter_mut().zip(&vectors);
            each.for_each(|(bundle, [a, b])| {
                *bundle = Bundle::new(a.len());
                (0..4).for_each(|_| [a, b].into_iter().for_each(|vector| bundle.add(vector)));
            });
            0
        }),
    );
    for block in [64, 1024, BLOCK] {
        let mut values = gradient(elements.next_power_of_two());
        add(
            &format!("hadamard {block}"),
            8.0,
            Box::new(move || {
                values.par_chunks_mut(PIECE).for_each(|piece| {
                    piece
                        .chunks_mut(block)
                        .for_each(|block| hadamard(path, block));
                });
                0
            }),
        );
    }
    let mut values = gradient(elements);
    add(
        "rotate 4096",
        8.0,
        Box::new(move || {
            let pieces = values.par_chunks_mut(PIECE).enumerate();
            pieces.for_each(|(i, piece)| rotate(path, Seed::new(i as u64), BLOCK, piece));
            0
        }),
    );
    for density in [0.23, 0.05] {
        let code = SparseCode::new(BLOCK, density, Kept::Signs).expect("a code");
        let gradient = gradient(elements);
        let mut residual = vec![0.0f32; elements];
        let mut coded: Vec<Vec<u8>> = vec![Vec::new(); elements.div_ceil(PIECE)];
        add(
            &format!("compress {density}"),
            12.0,
            Box::new(move || {
                let pieces = residual
                    .par_chunks_mut(PIECE)
                    .zip(gradient.par_chunks(PIECE));
                pieces.zip(&mut coded).enumerate().for_each(
                    |(i, ((residual, gradient), coded))| {
                        coded.clear();
                        let seed = Seed::new(i as u64);
                        // A block at a time, so that it stays in the first cache.
                        for (residual, gradient) in residual.iter_mut().zip(gradient) {
                            *residual += gradient;
                        }
                        code.encode_rotated(path, seed, residual, coded)
                            .expect("finite numbers");
                    },
                );
                coded.iter().map(Vec::len).sum()
            }),
        );
    }
    all
}
