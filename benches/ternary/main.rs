//! Products with packed ternary weights beside the limits they are held against.
//!
//!     cargo bench --bench ternary [-- --json] [--threads 1,2] [--sizes 2048,5120,12800] [--tokens 1,16,64,512]
//!                                 [--seconds 3] [--peer "python benches/peers/ternary_tq2.py"]
//!
//! For each size, number of tokens and number of threads, all contestants take turns, for some seconds and three
//! turns at least, so that what disturbs the machine disturbs all of them: our product, the dense f32 one of burn's CPU
//! backend, the scalar reference, a peer, and two limits, the rate at which memory is read and that of integer
//! multiplications in registers. Counted is the time that a tenth of the samples beat; the median stands beside it.
//!
//! `hot` multiplies with one matrix again and again, `rotating` with 1 GiB of them in turn, since a shared
//! third-level cache can be as large as 260 MiB. Each product starts from f32 activations and ends with f32
//! outputs, as a layer's does. Random data, poisoned outputs. Without `--bench`, which `cargo bench` gives, small sizes
//! run once (`cargo test --benches`).

mod peer;
mod report;

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use firebrick::environment::Environment;
use firebrick_kernels::ternary::cpu::{self, Order, Path, latent, probe};
use firebrick_kernels::ternary::layout::{PackedView, compute};
use firebrick_kernels::ternary::{Granularity, reference};
use rayon::ThreadPool;
use serde_json::json;

use peer::Peer;
use report::{PEAK, READ, Round, Row, Work};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Words of all matrices together: 1 GiB.
const WORDS: usize = 1 << 28;

/// Words that a sample reads at least where memory is what is measured: 32 MiB.
const SAMPLE_WORDS: usize = 1 << 23;

/// Seconds that a sample of several calls takes, about.
const SAMPLE_SECONDS: f64 = 2e-3;

/// The scale of every matrix.
const SCALE: [f32; 1] = [0.5];

struct Options {
    json: bool,
    threads: Vec<usize>,
    sizes: Vec<usize>,
    tokens: Vec<usize>,
    seconds: f64,
    peer: Option<String>,
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
        let list = |name: &str, default: &[usize]| match value(name) {
            Some(list) => list
                .split(',')
                .map(|n| n.parse().expect("a list of numbers"))
                .collect(),
            None => default.to_vec(),
        };
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads: &[usize] = if cores > 1 { &[1, cores] } else { &[1] };
        let measured = has("--bench");
        let sizes: &[usize] = if measured {
            &[2048, 5120, 12800]
        } else {
            &[256]
        };
        Self {
            json: has("--json"),
            threads: list("--threads", threads),
            sizes: list("--sizes", sizes),
            tokens: list("--tokens", &[1, 16, 64, 512]),
            seconds: match value("--seconds") {
                Some(seconds) => seconds.parse().expect("a number of seconds"),
                None if measured => 3.0,
                None => 0.0,
            },
            peer: value("--peer").cloned(),
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
    let mut peer = options.peer.as_deref().map(Peer::start);
    for (i, &size) in options.sizes.iter().enumerate() {
        // Of the middle size only.
        let more = i == options.sizes.len() / 2;
        for &threads in &options.threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().expect("threads start");
            for &tokens in &options.tokens {
                let bench = Bench {
                    words: &words,
                    pool: &pool,
                    shape: [size, tokens, threads],
                    more,
                };
                bench.run(peer.as_mut(), &options);
            }
            if more {
                let bench = Bench {
                    words: &words,
                    pool: &pool,
                    shape: [size, 512, threads],
                    more,
                };
                bench.training(&options);
            }
        }
    }
}

/// One round.
struct Bench<'a> {
    words: &'a [u32],
    pool: &'a ThreadPool,
    /// Size, tokens, threads.
    shape: [usize; 3],
    /// Whether paths other than the best are measured too.
    more: bool,
}

impl Bench<'_> {
    fn run(&self, peer: Option<&mut Peer>, options: &Options) {
        let [_, tokens, threads] = self.shape;
        let mut contestants = vec![self.ternary(Path::detect(), 1)];
        if tokens == 1 {
            contestants.push(self.ternary(Path::detect(), self.matrices()));
        }
        if self.more && threads == 1 && matches!(tokens, 1 | 64) {
            let others = Path::ALL.into_iter();
            let others = others.filter(|path| path.available() && *path != Path::detect());
            contestants.extend(others.map(|path| self.ternary(path, 1)));
        }
        contestants.push(self.dense());
        if tokens == 1 && threads == 1 {
            contestants.push(self.scalar());
        }
        if let Some(peer) = peer {
            contestants.extend(self.peer(peer));
        }
        contestants.extend(self.peak());
        if tokens == 1 {
            contestants.push(self.read());
        }
        self.turns(contestants, options);
    }

    /// Lets all take turns, and prints what they took.
    fn turns(&self, mut contestants: Vec<Contestant>, options: &Options) {
        let [size, tokens, threads] = self.shape;
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
        let rows = contestants.into_iter().map(|(row, _)| row).collect();
        let round = Round {
            size,
            tokens,
            threads,
            rows,
        };
        round.print(options.json);
    }

    fn matrices(&self) -> usize {
        let [size, ..] = self.shape;
        (self.words.len() / compute::words(size, size)).max(1)
    }

    fn matrix(&self, index: usize) -> PackedView<'_> {
        let [size, ..] = self.shape;
        let length = compute::words(size, size);
        let words = &self.words[index * length..][..length];
        PackedView::new(words, size, size, &SCALE, Granularity::Tensor)
            .expect("the matrix has the words of its shape")
    }

    /// Calls of a sample: some for a clock to measure, and where matrices rotate, some that read much memory.
    fn calls(&self, matrices: usize) -> usize {
        let [size, tokens, threads] = self.shape;
        if matrices > 1 {
            return (SAMPLE_WORDS / compute::words(size, size)).max(1);
        }
        let seconds = 2.0 * (tokens * size * size) as f64 / (3e11 * threads as f64);
        ((SAMPLE_SECONDS / seconds) as usize).max(1)
    }

    fn ternary(&self, path: Path, matrices: usize) -> Contestant<'_> {
        let [size, tokens, _] = self.shape;
        let x = random_floats(tokens * size);
        let mut y = vec![f32::NAN; tokens * size];
        let (calls, mut next) = (self.calls(matrices), 0);
        let sample = move || {
            y.fill(f32::NAN);
            let seconds = self.pool.install(|| {
                let started = Instant::now();
                for _ in 0..calls {
                    let view = self.matrix(next % matrices);
                    next += 1;
                    cpu::packed_linear_on(path, &x, tokens, &view, &mut y)
                        .expect("the path is available");
                }
                started.elapsed().as_secs_f64() / calls as f64
            });
            assert!(!y.iter().any(|y| y.is_nan()), "every output is written");
            seconds
        };
        let cache = if matrices == 1 { "hot" } else { "rotating" };
        let row = Row::new(format!("ternary {}", path.name()), cache, Work::Product);
        (row, Box::new(sample))
    }

    /// The dense product, in layers' own order: x `[tokens, size]` times w `[size, size]`.
    fn dense(&self) -> Contestant<'_> {
        let [size, tokens, _] = self.shape;
        let device = Device::flex();
        let tensor = |rows: usize| {
            let data = TensorData::new(random_floats(rows * size), [rows, size]);
            Tensor::<2>::from_data(data, &device)
        };
        let (x, w) = (tensor(tokens), tensor(size));
        let sample = move || {
            self.pool.install(|| {
                seconds(|| {
                    black_box(x.clone().matmul(w.clone()));
                })
            })
        };
        (
            Row::new("dense f32", "hot", Work::Product),
            Box::new(sample),
        )
    }

    fn scalar(&self) -> Contestant<'_> {
        let [size, ..] = self.shape;
        let trits: Vec<i8> = random_floats(size * size)
            .iter()
            .map(|w| (1.5 * w).round_ties_even() as i8)
            .collect();
        let x = random_floats(size);
        let sample = move || {
            seconds(|| {
                let shape = [1, size, size];
                black_box(reference::linear(
                    &x,
                    &trits,
                    &SCALE,
                    shape,
                    Granularity::Tensor,
                ));
            })
        };
        (Row::new("scalar", "hot", Work::Product), Box::new(sample))
    }

    /// The peer, hot and, for one token, rotating. Both through one process.
    fn peer<'a>(&'a self, peer: &'a mut Peer) -> Vec<Contestant<'a>> {
        let [_, tokens, _] = self.shape;
        let peer = std::rc::Rc::new(std::cell::RefCell::new(peer));
        let contestant = |matrices: usize| {
            let (calls, peer) = (self.calls(matrices), peer.clone());
            let sample = move || {
                let seconds = peer.borrow_mut().seconds(self.shape, matrices, calls);
                seconds.iter().sum::<f64>() / calls as f64
            };
            let cache = if matrices == 1 { "hot" } else { "rotating" };
            let row = Row::new("peer", cache, Work::Product);
            (row, Box::new(sample) as Box<dyn FnMut() -> f64>)
        };
        let mut contestants = vec![contestant(1)];
        if tokens == 1 {
            contestants.push(contestant(self.matrices()));
        }
        contestants
    }

    fn peak(&self) -> Option<Contestant<'_>> {
        let run = || {
            self.pool
                .install(|| probe::integer_operations(Path::detect()))
        };
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
            self.pool.install(|| seconds(|| probe::read(words)))
        };
        let row = Row::new(READ, "-", Work::Bytes(4.0 * length as f64));
        (row, Box::new(sample))
    }

    /// What a training step does besides: f32 activations, the gradient of x, fake-quantised operands, and packing.
    fn training(&self, options: &Options) {
        let [size, tokens, _] = self.shape;
        let x = random_floats(tokens * size);
        let w: Vec<f32> = random_floats(size * size)
            .iter()
            .map(|w| 0.5 * (1.5 * w).round_ties_even())
            .collect();
        let (x, w, view) = (&x[..], &w[..], self.matrix(0));
        let forward = |y: &mut [f32]| {
            cpu::packed_linear_f32(x, tokens, &view, y).expect("lengths fit");
        };
        let backward = |y: &mut [f32]| {
            cpu::packed_linear_dx(x, tokens, &view, y).expect("lengths fit");
        };
        let fake = |y: &mut [f32]| {
            cpu::int8_matmul(x, tokens, size, w, size, Granularity::Tensor, y)
                .expect("lengths fit");
        };
        let pack = |_: &mut [f32]| {
            let shape = [size, size];
            let packed = latent::pack_latent(w, shape, Order::Transposed, Granularity::Tensor);
            black_box(packed).expect("lengths fit");
        };
        let contestants = vec![
            self.step("f32 x ternary", Work::Product, forward),
            self.step("dx", Work::Product, backward),
            self.step("int8_matmul", Work::Product, fake),
            self.step("quantise and pack", Work::Pass, pack),
            self.dense(),
        ];
        self.turns(contestants, options);
    }

    /// One call a sample, of something that writes outputs.
    fn step<'a>(
        &'a self,
        who: &str,
        work: Work,
        call: impl Fn(&mut [f32]) + Send + Sync + 'a,
    ) -> Contestant<'a> {
        let [size, tokens, _] = self.shape;
        let mut y = vec![f32::NAN; tokens * size];
        let sample = move || self.pool.install(|| seconds(|| call(&mut y)));
        (Row::new(who, "hot", work), Box::new(sample))
    }
}

fn seconds(call: impl FnOnce()) -> f64 {
    let started = Instant::now();
    call();
    started.elapsed().as_secs_f64()
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
