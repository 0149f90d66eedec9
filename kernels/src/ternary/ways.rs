//! Which operation runs how on a device. None of it is a list: each operation is called, without
//! tokens, and the body that runs says what it is.

use std::any::TypeId;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, Flex};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::Granularity;
use super::layout::compute::{BLOCK, ZERO_WORD};
use super::op::{PackedShape, TernaryOps};

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
pub(super) fn answer<B: Backend>(operation: &'static str, way: impl FnOnce() -> Way) {
    if ASKED.load(Ordering::Acquire) {
        lock(&ANSWERS).push(Answer {
            backend: TypeId::of::<B>(),
            operation,
            way: way(),
        });
    }
}

/// The operations of [`TernaryOps`] by name, and how each runs on `device`.
pub fn ways(device: &Device) -> Vec<(&'static str, Way)> {
    ways_with(device, 0)
}

fn ways_with(device: &Device, tokens: usize) -> Vec<(&'static str, Way)> {
    static ASKING: Mutex<()> = Mutex::new(());
    let _turn = lock(&ASKING);
    let device = device.clone().without_autodiff();
    ASKED.store(true, Ordering::Release);
    call_each(&device, tokens);
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

fn call_each(device: &Device, tokens: usize) {
    const SHAPE: PackedShape = PackedShape {
        rows: BLOCK,
        cols: BLOCK,
        granularity: Granularity::Tensor,
        rounds_activations: true,
    };
    let floats = |dims: [usize; 2]| Tensor::<2>::zeros(dims, device).into_dispatch();
    let x = || floats([tokens, BLOCK]);
    let packed = || -> (IntTensor<Dispatch>, FloatTensor<Dispatch>) {
        let words = TensorData::new(vec![ZERO_WORD; BLOCK], [1, BLOCK]);
        let words = Tensor::<2, Int>::from_data(words, (device, DType::U32));
        (
            words.into_dispatch(),
            Tensor::<1>::ones([1], device).into_dispatch(),
        )
    };
    // A fused operation runs when its values are asked for. Whether the device can compute them is
    // not what is asked here.
    let run = |y: FloatTensor<Dispatch>| drop(Tensor::<2>::from_dispatch(y).try_into_data());

    run(Dispatch::ternary_fake_quantize_weight(
        x(),
        Granularity::Tensor,
    ));
    run(Dispatch::ternary_fake_quantize_activations(x()));
    let weight = floats([BLOCK, BLOCK]);
    run(Dispatch::ternary_int8_matmul(
        x(),
        weight,
        Granularity::Tensor,
    ));
    let (words, scales) = packed();
    run(Dispatch::ternary_linear(x(), words, scales, SHAPE));
    let (words, scales) = packed();
    run(Dispatch::ternary_linear_dx(x(), words, scales, SHAPE));
}

/// A panic elsewhere leaves nothing half done here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_answers_without_tokens_answers_with_some() {
        let device = Device::flex();
        let without = ways(&device);
        assert_eq!(without.len(), 5);
        assert_eq!(without, ways_with(&device, 3));
    }
}
