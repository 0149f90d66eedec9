//! Which operation runs how on a device. None of it is a list: each operation of a family is called, and the body
//! that runs says what it is.

use std::any::TypeId;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::backend::{Backend, Flex};
use burn::tensor::Device;

/// How an operation runs on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// On the CPU, by these instructions.
    Simd(&'static str),
    /// By a kernel that CubeCL compiles for the device.
    CubeCl,
    /// By operations that every backend of burn has: slower, with the same result.
    Composed,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Simd(instructions) => write!(f, "SIMD ({instructions})"),
            Self::CubeCl => f.write_str("CubeCL kernel"),
            Self::Composed => f.write_str("composed"),
        }
    }
}

/// A body of an operation, for a backend, and what it says of itself.
struct Answer {
    backend: TypeId,
    operation: &'static str,
    way: Way,
}

/// Whether anybody listens to [`answer`].
static ASKED: AtomicBool = AtomicBool::new(false);

/// Fused operations run on a thread of their own, so that this is not a thread's.
static ANSWERS: Mutex<Vec<Answer>> = Mutex::new(Vec::new());

/// What every body of an operation begins with.
pub(crate) fn answer<B: Backend>(operation: &'static str, way: impl FnOnce() -> Way) {
    if ASKED.load(Ordering::Acquire) {
        lock(&ANSWERS).push(Answer {
            backend: TypeId::of::<B>(),
            operation,
            way: way(),
        });
    }
}

/// What the operations that `call` calls on `device` answer, sorted by name.
pub(crate) fn ask(device: &Device, call: impl FnOnce(&Device)) -> Vec<(&'static str, Way)> {
    static ASKING: Mutex<()> = Mutex::new(());
    let _turn = lock(&ASKING);
    let device = device.clone().without_autodiff();
    ASKED.store(true, Ordering::Release);
    call(&device);
    ASKED.store(false, Ordering::Release);
    // Another device may have been at work meanwhile, or this one.
    let mut ways = Vec::new();
    for answer in std::mem::take(&mut *lock(&ANSWERS)) {
        let way = (answer.operation, answer.way);
        if answer.backend == backend(&device) && !ways.contains(&way) {
            ways.push(way);
        }
    }
    ways.sort_by_key(|(operation, _)| *operation);
    ways
}

fn backend(device: &Device) -> TypeId {
    #[cfg(feature = "gpu")]
    if *device != Device::flex() {
        return TypeId::of::<burn_cubecl::CubeBackend>();
    }
    let _ = device;
    TypeId::of::<Flex>()
}

/// A panic elsewhere leaves nothing half done here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
