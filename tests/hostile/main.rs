//! Model folders written by someone who means harm, or by a disk that failed: an error that names
//! what is wrong, never a panic, never more memory than the files justify.
#![allow(missing_docs)]
// A global allocator can only be written with unsafe; this one counts and passes on.
#![allow(unsafe_code)]

mod config;
mod fuzz;
mod index;
mod packed;
#[path = "../support/mod.rs"]
mod support;
mod tokenizer;
mod weights;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::Device;
use firebrick::config::{Architecture, SaveDtype, Ternary};
use firebrick::model::folder::{self, SaveOptions};
use firebrick::model::{Decoder, DecoderSpec, ModelError};
use support::tiny;

/// The system's allocator, watched per thread: tests run beside each other.
struct Counting;

thread_local! {
    /// The largest single allocation, bytes held, and the most that were.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn allocated(size: usize) {
    // Nothing to count in while a thread is being torn down.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
    let _ = HELD.try_with(|held| {
        held.set(held.get() + size as isize);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

fn freed(size: usize) {
    let _ = HELD.try_with(|held| held.set(held.get() - size as isize));
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        allocated(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        freed(layout.size());
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        allocated(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        freed(layout.size());
        allocated(size);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What any load may take whatever the size of the files: buffers, paths, parser state.
const CONSTANT: usize = 1 << 18;

/// Runs `work` and holds it to memory: no single allocation beyond twice the files (bf16 becomes
/// f32) and a constant, and at no time more than what parsed headers and one tensor add to that.
fn bounded<T>(files: usize, what: &str, work: impl FnOnce() -> T) -> T {
    let before = HELD.get();
    LARGEST.set(0);
    PEAK.set(before);
    let result = work();
    let (largest, peak) = (LARGEST.get(), (PEAK.get() - before).unsigned_abs());
    assert!(
        largest <= 2 * files + CONSTANT,
        "{what}: {largest} bytes at once for {files}"
    );
    assert!(
        peak <= 8 * files + 2 * CONSTANT,
        "{what}: {peak} bytes for {files}"
    );
    result
}

/// A folder with a small model in it.
struct Model {
    folder: tempfile::TempDir,
    spec: DecoderSpec,
}

impl Model {
    fn new(architecture: Architecture) -> Self {
        Self::sharded(architecture, u64::MAX)
    }

    fn sharded(architecture: Architecture, max_shard_bytes: u64) -> Self {
        let model = Decoder::new(&tiny(architecture), 5, &Device::flex()).unwrap();
        Self::of(&model, max_shard_bytes)
    }

    /// A LLaMA with packed ternary weights.
    fn packed(ternary: Ternary) -> Self {
        let mut spec = tiny(Architecture::Llama);
        spec.shape.ternary = Some(Ternary {
            packed: None,
            ..ternary
        });
        let model = Decoder::new(&spec, 5, &Device::flex()).unwrap();
        let packed = model.packed(ternary.packed.unwrap()).unwrap();
        Self::of(&packed, u64::MAX)
    }

    fn of(model: &Decoder, max_shard_bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = SaveOptions {
            dtype: SaveDtype::F32,
            max_shard_bytes,
        };
        let tensors = folder::hf_tensors(model);
        folder::save(folder.path(), model.spec(), &tensors, &options).unwrap();
        Self {
            folder,
            spec: model.spec().clone(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Bytes of every file in the folder.
    fn size(&self) -> usize {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let sizes = entries.filter_map(|e| fs::metadata(e.unwrap().path()).ok());
        sizes.map(|m| m.len() as usize).sum()
    }

    fn load(&self, what: &str) -> Result<Decoder, ModelError> {
        let size = self.size();
        bounded(size, what, || {
            folder::load(self.folder.path(), &Device::flex())
        })
    }

    /// The load fails and says all of `words`.
    fn refused(&self, words: &[&str]) -> ModelError {
        let what = words.join(" ");
        let error = match self.load(&what) {
            Ok(_) => panic!("{what}: loaded"),
            Err(error) => error,
        };
        let said = error.to_string();
        for word in words {
            assert!(said.contains(word), "{word:?} is not in: {said}");
        }
        assert!(said.len() < 2000, "{said}");
        error
    }
}

/// Runs the runner; exit code and standard error.
fn runner(folder: &Path, arguments: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_runner"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!stderr.contains("panicked"), "{stderr}");
    (output.status.code().unwrap(), stderr)
}
