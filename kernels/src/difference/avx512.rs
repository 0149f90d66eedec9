//! With registers of 512 bits: 16 elements, or coders, at a time.

mod decode;
mod encode;
mod shape;
mod tokenise;

pub(super) use decode::decode;
pub(super) use encode::encode;
pub(super) use tokenise::tokenise;

fn available() -> bool {
    super::Path::Avx512.available()
}

/// Calls a function that is generic in the bytes of an element and of what is stored of it as it is.
macro_rules! by_width {
    ($shape:expr, $function:ident $(::<$r:literal>)? ($($argument:expr),* $(,)?)) => {
        match ($shape.bits, $shape.low) {
            (8, _) => $function::<1, 0 $(, $r)?>($($argument),*),
            (16, 0) => $function::<2, 0 $(, $r)?>($($argument),*),
            (16, _) => $function::<2, 1 $(, $r)?>($($argument),*),
            (_, 0) => $function::<4, 0 $(, $r)?>($($argument),*),
            (_, 8) => $function::<4, 1 $(, $r)?>($($argument),*),
            _ => $function::<4, 2 $(, $r)?>($($argument),*),
        }
    };
}
use by_width;
