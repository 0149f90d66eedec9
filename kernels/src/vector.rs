//! Loops over f32 that the compiler vectorises, once for each set of instructions.

/// A function over slices, compiled for each [`Path`](crate::panel::Path), its first argument: its body is plain Rust in
/// shapes that compilers vectorise; it may have a number as its one generic parameter. A path that the processor cannot take panics.
macro_rules! vectorised {
    ($(
        $(#[$doc:meta])*
        $vis:vis fn $name:ident $(<const $n:ident: usize>)? ($($argument:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block
    )*) => {$(
        $(#[$doc])*
        #[allow(unsafe_code)]
        $vis fn $name $(<const $n: usize>)? (path: $crate::panel::Path, $($argument: $type),*) $(-> $out)? {
            #[inline(always)]
            fn body $(<const $n: usize>)? ($($argument: $type),*) $(-> $out)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f")]
            fn avx512 $(<const $n: usize>)? ($($argument: $type),*) $(-> $out)? { body $(::<$n>)? ($($argument),*) }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<const $n: usize>)? ($($argument: $type),*) $(-> $out)? { body $(::<$n>)? ($($argument),*) }

            assert!(path.available());
            match path {
                // SAFETY: the processor has the instructions.
                #[cfg(target_arch = "x86_64")]
                $crate::panel::Path::Avx512 => unsafe { avx512 $(::<$n>)? ($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::panel::Path::Avx2 => unsafe { avx2 $(::<$n>)? ($($argument),*) },
                _ => body $(::<$n>)? ($($argument),*),
            }
        }
    )*};
}
pub(crate) use vectorised;

/// e^x to within 2e-7 of its value; 0 where that is below the smallest normal number, and infinite above 88.3.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, then eight terms of the power series, and n put into the exponent.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // n plus this has n in its lowest bits.
    const SHIFT: f32 = 12_582_912.0; // 1.5 x 2^23
    const LARGEST: f32 = 88.3;
    const SMALLEST: f32 = -87.3;
    // ln 2 in two parts: n times the first is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let within = x.clamp(SMALLEST, LARGEST);
    let shifted = within * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = within - n * LN_2[0] - n * LN_2[1];
    let series = 1.0 / 5040.0;
    let series = series * r + 1.0 / 720.0;
    let series = series * r + 1.0 / 120.0;
    let series = series * r + 1.0 / 24.0;
    let series = series * r + 1.0 / 6.0;
    let series = series * r + 0.5;
    let series = series * r + 1.0;
    let series = series * r + 1.0;
    let exponent = shifted
        .to_bits()
        .wrapping_sub(SHIFT.to_bits())
        .wrapping_add(127);
    let power = f32::from_bits(exponent << 23);
    if x < SMALLEST {
        0.0
    } else if x > LARGEST {
        f32::INFINITY
    } else {
        series * power
    }
}

/// ln(1 + t) of t from 0 to 1, to within 2e-7 of its value.
///
/// With s = t / (2 + t), at most 1/3, it is 2 artanh(s): eight terms of a series in s².
#[inline(always)]
pub(crate) fn ln_1p_below_1(t: f32) -> f32 {
    let s = t / (2.0 + t);
    let square = s * s;
    let series = 1.0 / 15.0;
    let series = series * square + 1.0 / 13.0;
    let series = series * square + 1.0 / 11.0;
    let series = series * square + 1.0 / 9.0;
    let series = series * square + 1.0 / 7.0;
    let series = series * square + 1.0 / 5.0;
    let series = series * square + 1.0 / 3.0;
    let series = series * square + 1.0;
    2.0 * s * series
}

/// Independent partial sums of a reduction: as many as fill a register of 512 bits, twice.
const PARTS: usize = 32;

/// Σ of what `value` makes of each element of equally long slices.
#[inline(always)]
pub(crate) fn sum2(a: &[f32], b: &[f32], value: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0f32; PARTS];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<PARTS>(), b.as_chunks::<PARTS>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..PARTS {
            sums[i] += value(a[i], b[i]);
        }
    }
    for (i, (&a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[i] += value(a, b);
    }
    folded(sums)
}

/// Σ of a slice whose elements `change` replaces first.
#[inline(always)]
pub(crate) fn sum_of_changed(values: &mut [f32], change: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0f32; PARTS];
    let (chunks, rest) = values.as_chunks_mut::<PARTS>();
    for chunk in chunks {
        for i in 0..PARTS {
            chunk[i] = change(chunk[i]);
            sums[i] += chunk[i];
        }
    }
    for (i, value) in rest.iter_mut().enumerate() {
        *value = change(*value);
        sums[i] += *value;
    }
    folded(sums)
}

/// The largest, `least` if there is none. A NaN is passed over.
#[inline(always)]
pub(crate) fn max(values: &[f32], least: f32) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut most = [least; PARTS];
    let (chunks, rest) = values.as_chunks::<PARTS>();
    for chunk in chunks {
        for i in 0..PARTS {
            most[i] = larger(most[i], chunk[i]);
        }
    }
    for (i, &value) in rest.iter().enumerate() {
        most[i] = larger(most[i], value);
    }
    most.into_iter().fold(least, larger)
}

/// Their sum, in pairs: the error grows with the logarithm of their number.
#[inline(always)]
fn folded(mut sums: [f32; PARTS]) -> f32 {
    let mut count = PARTS;
    while count > 1 {
        count /= 2;
        for i in 0..count {
            sums[i] += sums[i + count];
        }
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panel::Path;

    vectorised! {
        fn all(values: &mut [f32]) {
            values.iter_mut().for_each(|x| *x = exp(*x));
        }
    }

    #[test]
    fn e_to_the_x_is_within_2e7_on_every_path() {
        let x: Vec<f32> = (-870_000..883_000).map(|i| i as f32 * 1e-4).collect();
        for path in Path::ALL.into_iter().filter(|path| path.available()) {
            let mut y = x.clone();
            all(path, &mut y);
            for (x, y) in x.iter().zip(y) {
                let expected = f64::from(*x).exp();
                let error = (f64::from(y) - expected).abs() / expected;
                assert!(error < 2e-7, "{path:?}: e^{x} = {y}, off by {error:e}");
            }
        }
    }

    #[test]
    fn e_to_the_x_at_its_ends() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(1e30), f32::INFINITY);
        assert!(exp(88.3).is_finite());
    }

    #[test]
    fn reductions_take_every_element() {
        for count in [0, 1, 31, 32, 33, 100] {
            let mut values: Vec<f32> = (0..count).map(|i| i as f32).collect();
            let expected = (count * (count.max(1) - 1) / 2) as f32;
            assert_eq!(sum2(&values, &values, |a, _| a), expected);
            assert_eq!(max(&values, -1.0), count as f32 - 1.0);
            assert_eq!(
                sum_of_changed(&mut values, |x| x + 1.0),
                expected + count as f32
            );
        }
    }
}
