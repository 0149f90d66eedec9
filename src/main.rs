//! `runner`: see [`firebrick::cli`].

/// Training allocates and frees large buffers all the time; the system's allocator gives each back
/// to the kernel and faults it in again, which costs a third of a matrix product.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    firebrick::cli::run()
}
