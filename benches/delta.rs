//! Differences between checkpoints of real runs: `cargo bench --bench delta -- RUNS`, where RUNS is what
//! `benches/delta.sh` has trained.
//!
//! One thread, no files: of each tensor the encoded bytes and back, BLAKE3 of the child included. Beside the ratio stands
//! the order-0 bound: per tensor the sum, over byte planes, of their empirical entropies of the folded monotone-integer
//! difference. Beside the speeds stand those of BLAKE3 and of a copy, on the same bytes in the same run. At the end, for
//! one run, the speeds of the coder alone with each set of instructions that this processor has.
#![allow(missing_docs, reason = "a program, not an interface")]

use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use firebrick::delta::{decode_slice, encode_slice};
use firebrick_kernels::difference::{self, Element, MOST, Scale, Scratch, order_0_bits};
use half::bf16;
use safetensors::{Dtype, SafeTensors};

/// The runner's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 100;

fn main() {
    let runs = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"));
    let Some(runs) = runs.map(PathBuf::from) else {
        println!(
            "no runs to compare: bash benches/delta.sh FOLDER, then cargo bench --bench delta -- FOLDER"
        );
        return;
    };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .expect("a thread");
    pool.install(|| compare(&runs));
}

fn compare(runs: &Path) {
    let environment = firebrick::environment::Environment::detect();
    println!("{}, one thread; GB/s of the child's bytes", environment.cpu);
    println!(
        "{:<20}{:>5}  {:<14}{:>7}{:>8}{:>7}{:>9}{:>8}{:>8}{:>7}",
        "run", "steps", "of", "ratio", "bound", "to it", "encode", "decode", "BLAKE3", "copy"
    );
    let mut names: Vec<PathBuf> = fs::read_dir(runs)
        .expect("a folder of runs")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.join("checkpoints").is_dir())
        .collect();
    names.sort();
    for run in &names {
        for steps in [1, 10, 100] {
            let load = |step: u64, file: &str| {
                tensors(&run.join(format!("checkpoints/step-{step:06}/{file}.safetensors")))
            };
            let name = run
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let (before, after) = (load(500, "model"), load(500 + steps, "model"));
            row(&name, steps, "weights f32", Dtype::F32, &before, &after);
            row(
                &name,
                steps,
                "weights bf16",
                Dtype::BF16,
                &halved(&before),
                &halved(&after),
            );
            let (before, after) = (load(500, "optimizer"), load(500 + steps, "optimizer"));
            row(&name, steps, "moments f32", Dtype::F32, &before, &after);
        }
    }
    if let Some(run) = names.last() {
        by_instructions(run);
    }
}

/// The coder alone, at the first step after the 500th.
fn by_instructions(run: &Path) {
    println!();
    let name = run.file_name().unwrap_or_default().display();
    println!("the coder alone: {name}, +1");
    println!("{:<12}{:<14}{:>9}{:>8}", "with", "of", "encode", "decode");
    let load = |step: &str, file: &str| {
        tensors(&run.join(format!("checkpoints/step-{step}/{file}.safetensors")))
    };
    let weights = ["000500", "000501"].map(|step| load(step, "model"));
    let halves = weights.each_ref().map(halved);
    let moments = ["000500", "000501"].map(|step| load(step, "optimizer"));
    for path in difference::Path::ALL {
        if !path.available() {
            continue;
        }
        for (of, element, [before, after]) in [
            ("weights f32", Element::F32, &weights),
            ("weights bf16", Element::Bf16, &halves),
            ("moments f32", Element::F32, &moments),
        ] {
            let most = MOST * element.width();
            let chunks: Vec<(&[u8], &[u8])> = after
                .iter()
                .flat_map(|(name, after)| before[name].chunks(most).zip(after.chunks(most)))
                .collect();
            let mut coded = vec![Vec::new(); chunks.len()];
            let mut scratch = Scratch::default();
            let encode = fastest(|| {
                for (chunk, out) in chunks.iter().zip(&mut coded) {
                    out.clear();
                    difference::encode(path, element, Scale::Chunk, *chunk, &mut scratch, out)
                        .expect("it fits");
                }
            });
            let mut back = vec![0; most];
            let decode = fastest(|| {
                for ((parent, child), coded) in chunks.iter().zip(&coded) {
                    let back = &mut back[..child.len()];
                    difference::decode(path, element, Scale::Chunk, parent, coded, back)
                        .expect("what was encoded");
                }
            });
            let total: usize = chunks.iter().map(|(_, child)| child.len()).sum();
            let speed = |seconds: f64| total as f64 / seconds / 1e9;
            let name = path.name();
            println!(
                "{name:<12}{of:<14}{:>9.2}{:>8.2}",
                speed(encode),
                speed(decode)
            );
        }
    }
}

type Tensors = BTreeMap<String, Vec<u8>>;

fn tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).expect("a checkpoint");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    file.iter()
        .map(|(name, view)| (name.to_string(), view.data().to_vec()))
        .collect()
}

fn halved(tensors: &Tensors) -> Tensors {
    let half = |bytes: &Vec<u8>| {
        let values = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes));
        values
            .flat_map(|value| bf16::from_f32(value).to_le_bytes())
            .collect()
    };
    tensors
        .iter()
        .map(|(name, bytes)| (name.clone(), half(bytes)))
        .collect()
}

fn row(run: &str, steps: u64, of: &str, dtype: Dtype, before: &Tensors, after: &Tensors) {
    let element = if dtype == Dtype::F32 {
        Element::F32
    } else {
        Element::Bf16
    };
    let pairs: Vec<(&[u8], &[u8])> = after
        .iter()
        .map(|(name, after)| (before[name].as_slice(), after.as_slice()))
        .collect();
    let total: usize = pairs.iter().map(|(_, after)| after.len()).sum();
    let bound: f64 = pairs
        .iter()
        .map(|(before, after)| order_0_bits(element, before, after) / 8.0)
        .sum();
    let mut coded = Vec::new();
    let encode = fastest(|| {
        coded = pairs
            .iter()
            .map(|(before, after)| encode_slice(dtype, Some(before), after).expect("it fits"))
            .collect();
    });
    let decode = fastest(|| {
        for ((before, after), coded) in pairs.iter().zip(&coded) {
            let back = decode_slice(dtype, Some(before), coded).expect("what was encoded");
            assert!(back.len() == after.len());
        }
    });
    for ((before, after), coded) in pairs.iter().zip(&coded) {
        assert!(decode_slice(dtype, Some(before), coded).expect("what was encoded") == *after);
    }
    let hash = fastest(|| {
        pairs.iter().for_each(|(_, after)| {
            black_box(blake3::hash(after));
        })
    });
    let mut copies: Vec<Vec<u8>> = pairs
        .iter()
        .map(|(_, after)| vec![1; after.len()])
        .collect();
    let copy = fastest(|| {
        for ((_, after), copy) in pairs.iter().zip(&mut copies) {
            copy.copy_from_slice(black_box(after));
        }
    });
    let size: usize = coded.iter().map(Vec::len).sum();
    let (ratio, bound) = (total as f64 / size as f64, total as f64 / bound);
    let speed = |seconds: f64| total as f64 / seconds / 1e9;
    println!(
        "{run:<20}{steps:>5}  {of:<14}{ratio:>7.3}{bound:>8.3}{:>7.3}{:>9.2}{:>8.2}{:>8.2}{:>7.2}",
        ratio / bound,
        speed(encode),
        speed(decode),
        speed(hash),
        speed(copy),
    );
}

/// Seconds of the fastest of some rounds.
fn fastest(mut work: impl FnMut()) -> f64 {
    let mut round = || {
        let started = Instant::now();
        work();
        started.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min)
}
