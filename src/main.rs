//! `runner`: see [`firebrick::cli`].

use libmimalloc_sys::{mi_option_set_default, mi_option_t};

/// Training allocates and frees large buffers all the time; the system's allocator gives each back
/// to the kernel and faults it in again, which costs a third of a matrix product.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc 2, which the crate has no name for.
const PURGE_DELAY: mi_option_t = 15;

fn main() -> std::process::ExitCode {
    keep_freed_memory();
    firebrick::cli::run()
}

/// mimalloc too gives memory back that has been free for some milliseconds, and a step asks for it
/// again: up to a quarter of a step went into cleared pages. `MIMALLOC_PURGE_DELAY` still decides
/// where it is set.
#[allow(unsafe_code)]
fn keep_freed_memory() {
    // SAFETY: it sets a number that the allocator reads; no other thread runs yet.
    unsafe { mi_option_set_default(PURGE_DELAY, -1) };
}
