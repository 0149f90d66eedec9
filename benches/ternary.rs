//! Products with packed ternary weights beside the limits they are held against.
//!
//!     cargo bench --bench ternary [-- --json] [--threads 1,2] [--sizes 2048,5120,12800] [--tokens 1,16,64,512]
//!
//! The limits are probed in the same process: the rate at which memory is read, over the matrices themselves (1 GiB of
//! them), and the rate of integer multiplications in registers. `hot` multiplies with one matrix again and again,
//! `rotating` with all in turn: 1 GiB, since a shared third-level cache can be as large as 260 MiB. Each product starts from f32
//! activations and ends with f32 outputs, as a layer's does. Beside it: the same product of a dense f32 matrix by
//! burn's CPU backend, and the scalar reference. Random data, poisoned outputs, medians.
//!
//! `--json` prints a line a measurement; benches/peers/ternary.sh sets those beside llama.cpp's.

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use firebrick::environment::Environment;
use firebrick_kernels::ternary::Granularity;
use firebrick_kernels::ternary::cpu::{self, Path, probe};
use firebrick_kernels::ternary::layout::PackedView;
use firebrick_kernels::ternary::layout::compute;
use firebrick_kernels::ternary::reference;
use rayon::prelude::*;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Words of all matrices together: 1 GiB.
const WORDS: usize = 1 << 28;

struct Options {
    json: bool,
    threads: Vec<usize>,
    sizes: Vec<usize>,
    tokens: Vec<usize>,
}

impl Options {
    fn parse() -> Self {
        let arguments: Vec<String> = std::env::args().collect();
        let list = |name: &str, default: &[usize]| {
            let at = arguments.iter().position(|argument| argument == name);
            at.and_then(|at| arguments.get(at + 1))
                .map_or(default.to_vec(), |list| {
                    list.split(',')
                        .map(|n| n.parse().expect("a list of numbers"))
                        .collect()
                })
        };
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads: &[usize] = if cores > 1 { &[1, cores] } else { &[1] };
        Self {
            json: arguments.iter().any(|argument| argument == "--json"),
            threads: list("--threads", threads),
            sizes: list("--sizes", &[2048, 5120, 12800]),
            tokens: list("--tokens", &[1, 16, 64, 512]),
        }
    }
}

/// One measurement.
struct Row<'a> {
    who: &'a str,
    size: usize,
    tokens: usize,
    threads: usize,
    cache: &'a str,
    seconds: f64,
}

/// What the machine can do on so many threads.
struct Limits {
    /// Operations a second of one core, where the path has an instruction for them.
    operations: Option<f64>,
    /// Bytes a second on all threads.
    read: f64,
}

fn main() {
    let options = Options::parse();
    let environment = Environment::detect();
    let path = Path::detect();
    if !options.json {
        println!(
            "{}, {} threads, {}",
            environment.cpu,
            environment.threads,
            path.name()
        );
    }
    let words = random_words(WORDS);
    for &threads in &options.threads {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("threads");
        pool.install(|| measure(&options, threads, &words));
    }
}

fn measure(options: &Options, threads: usize, words: &[u32]) {
    let limits = Limits {
        operations: probe::peak_operations(Path::detect()),
        read: words.len() as f64 * 4.0 / seconds(7, |_| read(words, threads)),
    };
    if options.json {
        let limits = json!({
            "who": "limits", "threads": threads, "read_bytes_per_second": limits.read,
            "operations_per_second_and_core": limits.operations,
        });
        println!("{limits}");
    } else {
        println!(
            "\n{threads} threads: memory is read at {:.1} GB/s, a core does {:.0} GOP/s\n",
            limits.read / 1e9,
            limits.operations.unwrap_or(f64::NAN) / 1e9
        );
        println!(
            "{:<20} {:>6} {:>6} {:<9} {:>11} {:>12} {:>8} {:>7} {:>8}",
            "product",
            "size",
            "tokens",
            "cache",
            "us",
            "GOP/s a core",
            "of peak",
            "GB/s",
            "of read"
        );
    }
    let report = |row: Row| print(options, &limits, &row);
    for &size in &options.sizes {
        for &tokens in &options.tokens {
            ternary(Path::detect(), words, [size, tokens, threads], &report);
            dense(size, tokens, threads, &report);
        }
        if threads == 1 {
            scalar(size, &report);
        }
    }
    if let Some(&size) = options.sizes.get(1) {
        let others = Path::ALL
            .into_iter()
            .filter(|p| p.available() && *p != Path::detect());
        for path in others.filter(|_| threads == 1) {
            for tokens in [1, 64] {
                ternary(path, words, [size, tokens, threads], &report);
            }
        }
        training(size, threads, words, &report);
    }
}

fn print(options: &Options, limits: &Limits, row: &Row) {
    let Row {
        who,
        size,
        tokens,
        threads,
        cache,
        seconds,
    } = *row;
    if options.json {
        let row = json!({
            "who": who, "size": size, "tokens": tokens, "threads": threads, "cache": cache,
            "seconds": seconds,
        });
        println!("{row}");
        return;
    }
    let operations = 2.0 * (tokens * size * size) as f64 / seconds / threads as f64;
    let bytes = 4.0 * compute::words(size, size) as f64 / seconds;
    print!(
        "{who:<20} {size:>6} {tokens:>6} {cache:<9} {:>11.1} {:>12.1}",
        1e6 * seconds,
        operations / 1e9
    );
    match limits.operations {
        Some(peak) if who.starts_with("ternary") => print!(" {:>7.0}%", 100.0 * operations / peak),
        _ => print!("        -"),
    }
    if tokens == 1 && who.starts_with("ternary") {
        print!(
            " {:>7.1} {:>7.0}%",
            bytes / 1e9,
            100.0 * bytes / limits.read
        );
    }
    println!();
}

/// Median seconds of `count` calls.
fn seconds(count: usize, mut call: impl FnMut(usize)) -> f64 {
    let mut times: Vec<f64> = (0..count)
        .map(|i| {
            let started = Instant::now();
            call(i);
            started.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Calls that take about a second and a half in all, if one does so many operations.
fn calls(operations: f64, rate: f64) -> usize {
    ((1.5 * rate / operations) as usize).clamp(5, 300)
}

/// Valid codes, 16 a word, from a xorshift generator.
fn random_words(count: usize) -> Vec<u32> {
    let mut state = 88_172_645_463_325_252u64;
    let word = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Of the codes 0 to 3, 3 becomes 1.
        let bits = (state >> 32) as u32;
        bits & !((bits & bits << 1) & 0xAAAA_AAAA)
    };
    (0..count).map(word).collect()
}

fn random_floats(count: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9u32;
    let value = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / (1u32 << 31) as f32 - 1.0
    };
    (0..count).map(value).collect()
}

/// Reads every word once.
fn read(words: &[u32], threads: usize) {
    let share = words.len().div_ceil(threads);
    words.par_chunks(share).for_each(|words| {
        let mut sums = [0u32; 64];
        for words in words.as_chunks::<64>().0 {
            sums.iter_mut()
                .zip(words)
                .for_each(|(sum, word)| *sum ^= word);
        }
        black_box(sums);
    });
}

fn ternary(path: Path, words: &[u32], [size, tokens, threads]: [usize; 3], report: &impl Fn(Row)) {
    let matrices: Vec<&[u32]> = words.chunks_exact(compute::words(size, size)).collect();
    let scale = [0.5];
    let x = random_floats(tokens * size);
    let mut y = vec![f32::NAN; tokens * size];
    let mut call = |matrix: usize| {
        let view = PackedView::new(matrices[matrix], size, size, &scale, Granularity::Tensor);
        y.fill(f32::NAN);
        let view = view.expect("the matrix has the words of its shape");
        cpu::packed_linear_on(path, &x, tokens, &view, &mut y).expect("the path is available");
    };
    let count = calls(2.0 * (tokens * size * size) as f64, 1e11);
    let who = format!("ternary {}", path.name());
    call(0);
    let row = Row {
        who: &who,
        size,
        tokens,
        threads,
        cache: "hot",
        seconds: 0.0,
    };
    report(Row {
        seconds: seconds(count, |_| call(0)),
        ..row
    });
    let row = Row {
        cache: "rotating",
        ..row
    };
    let rotating = if tokens == 1 {
        matrices.len().min(count.max(25))
    } else {
        count.min(25)
    };
    report(Row {
        seconds: seconds(rotating, |i| call(i % matrices.len())),
        ..row
    });
}

/// The dense product, in layers' own order: x `[tokens, size]` times w `[size, size]`.
fn dense(size: usize, tokens: usize, threads: usize, report: &impl Fn(Row)) {
    let device = Device::flex();
    let tensor = |rows: usize| {
        Tensor::<2>::from_data(
            TensorData::new(random_floats(rows * size), [rows, size]),
            &device,
        )
    };
    let (x, w) = (tensor(tokens), tensor(size));
    let count = calls(2.0 * (tokens * size * size) as f64, 2e10);
    let seconds = seconds(count, |_| {
        black_box(x.clone().matmul(w.clone()));
    });
    report(Row {
        who: "dense f32",
        size,
        tokens,
        threads,
        cache: "hot",
        seconds,
    });
}

fn scalar(size: usize, report: &impl Fn(Row)) {
    let (trits, scale) =
        reference::quantise_weights(&random_floats(size * size), size, size, Granularity::Tensor);
    let x = random_floats(size);
    let seconds = seconds(3, |_| {
        black_box(reference::linear(
            &x,
            &trits,
            &scale,
            [1, size, size],
            Granularity::Tensor,
        ));
    });
    report(Row {
        who: "scalar",
        size,
        tokens: 1,
        threads: 1,
        cache: "hot",
        seconds,
    });
}

/// What a training step does besides: f32 activations, the gradient of x, fake-quantised operands.
fn training(size: usize, threads: usize, words: &[u32], report: &impl Fn(Row)) {
    let tokens = 512;
    let words = &words[..compute::words(size, size)];
    let view = PackedView::new(words, size, size, &[0.5], Granularity::Tensor);
    let view = view.expect("the matrix has the words of its shape");
    let x = random_floats(tokens * size);
    let mut y = vec![f32::NAN; tokens * size];
    let row = Row {
        who: "f32 x ternary",
        size,
        tokens,
        threads,
        cache: "hot",
        seconds: 0.0,
    };
    let forward = seconds(5, |_| {
        y.fill(f32::NAN);
        cpu::packed_linear_f32(&x, tokens, &view, &mut y).expect("lengths fit");
    });
    report(Row {
        seconds: forward,
        ..row
    });
    let backward = seconds(5, |_| {
        y.fill(f32::NAN);
        cpu::packed_linear_dx(&x, tokens, &view, &mut y).expect("lengths fit");
    });
    report(Row {
        who: "dx",
        seconds: backward,
        ..row
    });
    let w: Vec<f32> = random_floats(size * size)
        .iter()
        .map(|w| 0.5 * w.round())
        .collect();
    let matmul = seconds(5, |_| {
        y.fill(f32::NAN);
        cpu::int8_matmul(&x, tokens, size, &w, size, Granularity::Tensor, &mut y)
            .expect("lengths fit");
    });
    report(Row {
        who: "int8_matmul",
        seconds: matmul,
        ..row
    });
    let shape = [size, size];
    let pack = seconds(5, |_| {
        let packed =
            cpu::latent::pack_latent(&w, shape, cpu::Order::Transposed, Granularity::Tensor);
        black_box(packed).expect("lengths fit");
    });
    report(Row {
        who: "quantise and pack",
        seconds: pack,
        ..row
    });
}
