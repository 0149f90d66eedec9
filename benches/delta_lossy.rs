//! Differences of which something may be lost, and the work that a large model's shard makes:
//! `cargo bench --bench delta_lossy -- RUNS`, where RUNS is what `benches/delta.sh` has trained. Without RUNS the shard
//! alone.
//!
//! Files lie in memory where there is a file system in it. BLAKE3 of parent and child is included; beside the seconds of the
//! shard stand those of the BLAKE3 and of a copy of its child alone.
#![allow(missing_docs, reason = "a program, not an interface")]

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use firebrick::delta::{Lossy, Memory, Method, Options, Parent, TensorInfo, open, restore, write};
use half::bf16;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

const ROUNDS: usize = 5;

/// Parameters of the model that the shard is a part of.
const WHOLE: f64 = 6.74e9;

type State = Vec<(TensorInfo, Vec<u8>)>;

fn main() {
    let environment = firebrick::environment::Environment::detect();
    println!(
        "{}, {} threads",
        environment.cpu,
        rayon::current_num_threads()
    );
    let runs = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"));
    if let Some(runs) = runs {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .build()
            .expect("a thread");
        pool.install(|| of_runs(Path::new(&runs)));
    }
    shard();
}

fn of_runs(runs: &Path) {
    println!(
        "one thread; bits an element of the file, the largest share of its change that a matrix loses (L2), GB/s of the \
         child's bytes\n{:<20}{:>5}  {:<6}{:<9}{:>7}{:>7}{:>9}{:>9}{:>8}",
        "run", "steps", "of", "method", "ratio", "bits", "lost", "encode", "decode"
    );
    let mut names: Vec<PathBuf> = fs::read_dir(runs)
        .expect("a folder of runs")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.join("checkpoints").is_dir())
        .collect();
    names.sort();
    for run in names {
        for steps in [10, 100] {
            let load = |step: u64| {
                state(&run.join(format!("checkpoints/step-{step:06}/model.safetensors")))
            };
            let name = run
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let (before, after) = (load(500), load(500 + steps));
            for (of, before, after) in [
                ("f32", before.clone(), after.clone()),
                ("bf16", halved(before), halved(after)),
            ] {
                for method in [
                    None,
                    Some(Method::Int8),
                    Some(Method::Hybrid),
                    Some(Method::Int4),
                    Some(Method::OneBit),
                    Some(Method::LowRank),
                ] {
                    let elements: usize = after
                        .iter()
                        .map(|(info, _)| info.shape.iter().product::<usize>())
                        .sum();
                    let total: usize = after.iter().map(|(_, bytes)| bytes.len()).sum();
                    // Directions of matrices take minutes to find often.
                    let rounds = if method == Some(Method::LowRank) {
                        1
                    } else {
                        ROUNDS
                    };
                    let Measured {
                        bytes,
                        lost,
                        encode,
                        decode,
                    } = measure(&before, &after, method, rounds);
                    println!(
                        "{name:<20}{steps:>5}  {of:<6}{:<9}{:>7.2}{:>7.2}{:>7.2} %{:>9.3}{:>8.2}",
                        method.map_or("exact", Method::name),
                        total as f64 / bytes as f64,
                        8.0 * bytes as f64 / elements as f64,
                        100.0 * lost,
                        total as f64 / encode / 1e9,
                        total as f64 / decode / 1e9,
                    );
                }
            }
        }
    }
}

fn state(path: &Path) -> State {
    let bytes = fs::read(path).expect("a checkpoint");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let of = |(name, view): (String, safetensors::tensor::TensorView)| {
        let info = TensorInfo {
            name,
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
        };
        (info, view.data().to_vec())
    };
    file.tensors().into_iter().map(of).collect()
}

fn halved(state: State) -> State {
    let half = |(info, bytes): (TensorInfo, Vec<u8>)| {
        let values = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes));
        let bytes = values
            .flat_map(|value| bf16::from_f32(value).to_le_bytes())
            .collect();
        (
            TensorInfo {
                dtype: Dtype::BF16,
                ..info
            },
            bytes,
        )
    };
    state.into_iter().map(half).collect()
}

struct Measured {
    bytes: u64,
    lost: f32,
    encode: f64,
    decode: f64,
}

fn measure(before: &State, after: &State, method: Option<Method>, rounds: usize) -> Measured {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    let folder = folder.expect("a folder");
    let path = folder.path().join("delta.safetensors");
    let of = |state: &'_ State| -> Vec<_> { state.iter().map(|(info, _)| info.clone()).collect() };
    let view = |state| -> Memory<'_> {
        let state: &State = state;
        Memory::new(
            of(state)
                .into_iter()
                .zip(state.iter().map(|(_, bytes)| bytes.as_slice())),
        )
    };
    let (parent, child) = (view(before), view(after));
    let options = Options {
        lossy: method.map(Lossy::new),
        ..Options::default()
    };
    let mut bytes = 0;
    let encode = fastest(rounds, || {
        let _ = fs::remove_file(&path);
        let written =
            write(&path, Some(&Parent::new(&parent)), &child, &options).expect("it is written");
        bytes = written.bytes;
    });
    let mut lost = 0.0f32;
    let decode = fastest(rounds, || {
        let opened = open(&path).expect("it is there");
        lost = opened
            .lossy()
            .values()
            .map(|record| record.relative_error)
            .fold(0.0, f32::max);
        let delta = opened.beside(Some(Box::new(&parent))).expect("its parent");
        restore(
            &delta,
            |_| true,
            |_, bytes| {
                black_box(bytes);
                Ok(())
            },
        )
        .expect("what was written");
    });
    Measured {
        bytes,
        lost,
        encode,
        decode,
    }
}

/// One layer of a 7B LLaMA in bf16, its parent, and two children: one number in a hundred changed, and all of them moved.
fn shard() {
    let matrices = [
        ("q", [4096, 4096]),
        ("k", [4096, 4096]),
        ("v", [4096, 4096]),
        ("o", [4096, 4096]),
        ("gate", [11_008, 4096]),
        ("up", [11_008, 4096]),
        ("down", [4096, 11_008]),
    ];
    let make = |change: &(dyn Fn(u64, f32) -> f32 + Sync)| -> State {
        let of = |(i, (name, shape)): (usize, &(&str, [usize; 2]))| {
            let elements = shape[0] * shape[1];
            let mut bytes = vec![0u8; 2 * elements];
            bytes.par_chunks_mut(2).enumerate().for_each(|(at, bytes)| {
                // Sums of uniform numbers are nearly normal.
                let mut random = mixed((i * elements + at) as u64);
                let value = (0..4).map(|_| uniform(&mut random)).sum::<f32>() * 0.02;
                bytes.copy_from_slice(&bf16::from_f32(change(random, value)).to_le_bytes());
            });
            let info = TensorInfo {
                name: name.to_string(),
                dtype: Dtype::BF16,
                shape: shape.to_vec(),
            };
            (info, bytes)
        };
        matrices.iter().enumerate().map(of).collect()
    };
    let parent = make(&|_, value| value);
    let sparse = make(&|random, value| {
        if mixed(random).is_multiple_of(100) {
            value * 1.1
        } else {
            value
        }
    });
    let moved = make(&|random, value| value + 1e-2 * uniform(&mut mixed(random)));
    let total: usize = parent.iter().map(|(_, bytes)| bytes.len()).sum();
    let scale = WHOLE / (total as f64 / 2.0);
    println!(
        "\nOne layer of 7B in bf16, {:.0} M parameters; seconds times {scale:.1}, for all of 7B\n{:<26}{:>7}{:>9}{:>9}",
        total as f64 / 2e6,
        "",
        "ratio",
        "encode",
        "decode"
    );
    for (what, child, method) in [
        ("1 % changed, exact", &sparse, None),
        ("all moved, exact", &moved, None),
        ("all moved, int8", &moved, Some(Method::Int8)),
        ("all moved, int4", &moved, Some(Method::Int4)),
        ("all moved, hybrid", &moved, Some(Method::Hybrid)),
        ("all moved, onebit", &moved, Some(Method::OneBit)),
    ] {
        let Measured {
            bytes,
            encode,
            decode,
            ..
        } = measure(&parent, child, method, ROUNDS);
        println!(
            "{what:<26}{:>7.2}{:>8.1}s{:>8.1}s",
            total as f64 / bytes as f64,
            encode * scale,
            decode * scale
        );
    }
    let hash = fastest(ROUNDS, || {
        moved.iter().for_each(|(_, bytes)| {
            let mut hasher = blake3::Hasher::new();
            bytes.chunks(1 << 19).for_each(|part| {
                hasher.update(part);
            });
            black_box(hasher.finalize());
        })
    });
    let mut copies: Vec<Vec<u8>> = moved
        .iter()
        .map(|(_, bytes)| vec![1; bytes.len()])
        .collect();
    let copy = fastest(ROUNDS, || {
        for ((_, bytes), copy) in moved.iter().zip(&mut copies) {
            copy.copy_from_slice(black_box(bytes));
        }
    });
    println!("BLAKE3 of one of them, one thread{:>17.1}s", hash * scale);
    println!("a copy of one of them, one thread{:>17.1}s", copy * scale);
}

/// SplitMix64.
fn mixed(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// From -1 to 1.
fn uniform(random: &mut u64) -> f32 {
    *random = mixed(*random);
    (*random >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// Seconds of the fastest of some rounds.
fn fastest(rounds: usize, mut work: impl FnMut()) -> f64 {
    let mut round = || {
        let started = Instant::now();
        work();
        started.elapsed().as_secs_f64()
    };
    (0..rounds).map(|_| round()).fold(f64::INFINITY, f64::min)
}
