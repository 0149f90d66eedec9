use proptest::prelude::*;

use super::{Kept, Path, SparseCode, SparseError, hadamard, reference, rotate, rotate_back};
use crate::samples::{Random, paths};
use crate::vsa::Seed;

fn norm(values: &[f32]) -> f64 {
    let squares = values.iter().map(|x| f64::from(*x) * f64::from(*x));
    squares.sum::<f64>().sqrt()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn t8_the_transform_is_its_definition_on_every_path() {
    for power in 0..=12 {
        let n = 1 << power;
        let values = Random(power).values(n, 1.0);
        let expected = reference::hadamard(&values);
        let mut first: Option<Vec<u32>> = None;
        for path in paths() {
            let mut found = values.clone();
            hadamard(path, &mut found);
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let error = (f64::from(*found) - expected).abs();
                assert!(
                    error < 1e-5,
                    "{path:?}, element {i} of {n}: off by {error:e}"
                );
            }
            let same = first.get_or_insert_with(|| bits(&found));
            assert_eq!(
                *same,
                bits(&found),
                "{path:?} gives other bits for {n} values"
            );
        }
    }
}

#[test]
fn t8_more_than_three_passes() {
    // 2^18 values have four passes; the transform of one element is a row of signs.
    let n = 1 << 18;
    for path in paths() {
        let mut values = vec![0.0; n];
        values[12_345] = 1.0;
        hadamard(path, &mut values);
        for (i, value) in values.iter().enumerate() {
            let sign = if (i & 12_345).count_ones().is_multiple_of(2) {
                1.0
            } else {
                -1.0
            };
            assert_eq!(*value, sign / 512.0, "element {i}");
        }
    }
}

proptest! {
    #[test]
    fn t8_a_rotation_keeps_the_norm_and_is_undone(
        len in 1usize..3000, power in 0u32..13, seed: u64, scale in -20i32..20,
    ) {
        let (seed, block) = (Seed::new(seed), 1 << power);
        let values = Random(len as u64).values(len, 10f32.powi(scale));
        let mut first: Option<Vec<u32>> = None;
        for path in paths() {
            let mut rotated = values.clone();
            rotate(path, seed, block, &mut rotated);
            prop_assert!((norm(&rotated) / norm(&values) - 1.0).abs() < 1e-5);
            prop_assert_eq!(first.get_or_insert_with(|| bits(&rotated)), &bits(&rotated));
            rotate_back(path, seed, block, &mut rotated);
            let largest = values.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            let bound = largest * 1e-5 * (1.0 + f32::from(power as u16));
            for (back, value) in rotated.iter().zip(&values) {
                prop_assert!((back - value).abs() <= bound);
            }
        }
    }

    #[test]
    fn t8_a_rotation_is_signs_and_blocks_of_transforms(len in 1usize..700, power in 0u32..9, seed: u64) {
        let (seed, block) = (Seed::new(seed), 1 << power);
        let values = Random(len as u64).values(len, 1.0);
        let mut found = values.clone();
        rotate(Path::detect(), seed, block, &mut found);
        let mut place = 0;
        for length in reference::blocks(len, block) {
            let at = place..place + length;
            let flipped: Vec<f32> = at.clone().map(|i| values[i] * reference::sign(seed, i)).collect();
            for (found, expected) in found[at].iter().zip(reference::hadamard(&flipped)) {
                prop_assert!((f64::from(*found) - expected).abs() < 1e-5);
            }
            place += length;
        }
        prop_assert_eq!(place, len);
    }
}

#[test]
fn t8_one_large_element_is_spread_evenly() {
    let mut values = vec![0.0; 4096];
    values[77] = 64.0;
    rotate(Path::detect(), Seed::new(5), 4096, &mut values);
    assert!(values.iter().all(|x| x.abs() == 1.0));
}

#[test]
#[should_panic(expected = "3 values are not 2^k")]
fn t8_other_lengths_are_refused() {
    hadamard(Path::detect(), &mut [0.0; 3]);
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum()
}

/// What a code makes of the values: the bytes, and what they decode to.
fn coded(path: Path, code: &SparseCode, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let (mut error, mut bytes) = (values.to_vec(), Vec::new());
    code.encode(path, &mut error, &mut bytes)
        .expect("finite values");
    let mut decoded = vec![0.0; values.len()];
    code.add_decoded(&bytes, 1.0, &mut decoded)
        .expect("its own bytes");
    for ((value, error), decoded) in values.iter().zip(&error).zip(&decoded) {
        assert_eq!(value - decoded, *error, "{value} - {decoded}");
    }
    (bytes, decoded)
}

fn kinds() -> impl Strategy<Value = Kept> {
    prop_oneof![Just(Kept::Values), Just(Kept::Signs)]
}

/// The values of a block with a few large ones, equal ones, zeros, all in any scale.
fn uneven(len: usize) -> impl Strategy<Value = Vec<f32>> {
    let element = prop_oneof![
        4 => -1.0f32..1.0,
        2 => Just(0.0f32),
        1 => Just(-0.0f32),
        2 => prop_oneof![Just(0.5f32), Just(-0.5f32)],
        1 => -1000.0f32..1000.0,
    ];
    let scale = prop_oneof![Just(0i32), -44i32..36];
    (prop::collection::vec(element, len), scale)
        .prop_map(|(values, scale)| values.iter().map(|x| x * 10f32.powi(scale)).collect())
}

proptest! {
    #[test]
    fn g1_the_error_of_sparse_trits_is_within_the_declared_bound(
        values in (1usize..600).prop_flat_map(uneven), power in 4u32..10, density in 0.001f64..1.0,
        kept in kinds(),
    ) {
        let code = SparseCode::new(1 << power, density, kept).unwrap();
        let mut first: Option<Vec<u8>> = None;
        for path in paths() {
            let (bytes, decoded) = coded(path, &code, &values);
            prop_assert_eq!(first.get_or_insert_with(|| bytes.clone()), &bytes, "{:?}", path);
            let blocks = values.chunks(code.block()).zip(decoded.chunks(code.block()));
            for (values, decoded) in blocks {
                let count = decoded.iter().filter(|x| **x != 0.0).count();
                prop_assert!(count <= code.keep(values.len()));
                let mut levels: Vec<u32> = decoded.iter().filter(|x| **x != 0.0).map(|x| x.abs().to_bits()).collect();
                levels.dedup();
                prop_assert!(kept == Kept::Values || levels.len() <= 1);
                // No element that is left out is larger than one that is kept, and signs agree.
                let sent = values.iter().zip(decoded).filter(|(_, d)| **d != 0.0);
                let least = sent.clone().map(|(x, _)| x.abs()).fold(f32::INFINITY, f32::min);
                prop_assert!(sent.into_iter().all(|(x, d)| *x == 0.0 || x.signum() == d.signum()));
                let left_out = values.iter().zip(decoded).filter(|(_, d)| **d == 0.0);
                if least.is_finite() {
                    prop_assert!(left_out.into_iter().all(|(x, _)| x.abs() <= least));
                }
            }
            let error: f64 = values.iter().zip(&decoded).map(|(x, d)| (f64::from(*x) - f64::from(*d)).powi(2)).sum();
            // Below the smallest normal number levels have fewer bits.
            let whole = squares(&values);
            let tiny = values.iter().all(|x| x.abs() < 1e-34);
            prop_assert!(tiny || error <= (1.0 - code.delta(values.len())) * whole * (1.0 + 1e-6), "{} of {}", error, whole);
        }
    }

    #[test]
    fn g1_damaged_bytes_are_errors_and_never_panics(
        values in (1usize..300).prop_flat_map(uneven), density in 0.01f64..1.0, cut in 0usize..1000,
        kept in kinds(),
        change in (0usize..1000, 1u8..=255),
    ) {
        let code = SparseCode::new(64, density, kept).unwrap();
        let (bytes, decoded) = coded(Path::detect(), &code, &values);
        let mut out = vec![0.0; values.len()];
        let cut = &bytes[..cut % bytes.len()];
        prop_assert!(code.add_decoded(cut, 1.0, &mut out).is_err());
        let mut longer = bytes.clone();
        longer.push(0);
        prop_assert!(matches!(code.add_decoded(&longer, 1.0, &mut out), Err(SparseError::Rest(1))));
        let mut changed = bytes.clone();
        let at = change.0 % bytes.len();
        changed[at] ^= change.1;
        let mut out = vec![0.0; values.len()];
        // Some changes give another vector; none gives this one, unless signs of a 0 changed.
        let is_same = code.add_decoded(&changed, 1.0, &mut out).is_ok() && bits(&out) == bits(&decoded);
        let zeros = match kept {
            Kept::Values => values.contains(&0.0) || values.contains(&-0.0),
            Kept::Signs => decoded.chunks(64).any(|block| block.iter().all(|x| *x == 0.0)),
        };
        prop_assert!(!is_same || zeros);
    }
}

#[test]
fn g1_sparse_trits_of_gaussian_blocks_keep_what_the_theory_says() {
    // Sums of twelve are near Gaussian.
    let mut random = Random(9);
    let values: Vec<f32> = (0..1 << 16)
        .map(|_| random.values(12, 1.0).iter().sum())
        .collect();
    // Density, share of the energy kept, bits an element in all, the entropy of places and signs.
    for (density, energy, bits, entropy) in
        [(0.05, 0.273, 0.352, 0.336), (0.25, 0.678, 1.12, 1.061)]
    {
        let code = SparseCode::new(4096, density, Kept::Signs).unwrap();
        let (bytes, decoded) = coded(Path::detect(), &code, &values);
        let error: Vec<f32> = values.iter().zip(&decoded).map(|(x, d)| x - d).collect();
        let kept = 1.0 - squares(&error) / squares(&values);
        assert!(
            (kept - energy).abs() < 0.01,
            "{density}: {kept} of the energy"
        );
        let found = 8.0 * bytes.len() as f64 / values.len() as f64;
        assert!(
            found > entropy && found < bits,
            "{density}: {found} bits an element"
        );
    }
    // 1 % as values in bf16 take 132 times fewer bytes than f32.
    let code = SparseCode::new(4096, 0.01, Kept::Values).unwrap();
    let (bytes, _) = coded(Path::detect(), &code, &values);
    let ratio = 4.0 * values.len() as f64 / bytes.len() as f64;
    assert!((ratio - 132.0).abs() < 2.0, "{ratio}");
}

proptest! {
    #[test]
    fn g1_a_rotated_code_is_rotation_code_and_rotation_back(
        values in (1usize..700).prop_flat_map(uneven), power in 4u32..9, density in 0.01f64..1.0, seed: u64,
        kept in kinds(),
    ) {
        // Sums of larger ones are not finite.
        prop_assume!(values.iter().all(|x| x.abs() < 1e34));
        let (seed, block) = (Seed::new(seed), 1 << power);
        let code = SparseCode::new(block, density, kept).unwrap();
        for path in paths() {
            let (mut error, mut bytes) = (values.clone(), Vec::new());
            code.encode_rotated(path, seed, &mut error, &mut bytes).unwrap();
            let (mut steps, mut other) = (values.clone(), Vec::new());
            rotate(path, seed, block, &mut steps);
            code.encode(path, &mut steps, &mut other).unwrap();
            rotate_back(path, seed, block, &mut steps);
            prop_assert_eq!(&bytes, &other);
            prop_assert_eq!(bits(&error), bits(&steps));
        }
    }
}

#[test]
fn g1_extreme_blocks() {
    let code = SparseCode::new(64, 0.1, Kept::Signs).unwrap();
    let one_hot: Vec<f32> = (0..64).map(|i| f32::from(i == 40)).collect();
    let (bytes, decoded) = coded(Path::detect(), &code, &one_hot);
    // Only the one is sent: level, count, a distance of 40, a sign.
    assert_eq!(decoded, one_hot);
    assert!(bytes.len() <= 6, "{} bytes", bytes.len());
    let (bytes, decoded) = coded(Path::detect(), &code, &[0.0; 64]);
    assert_eq!((bytes.len(), decoded), (4, vec![0.0; 64]));
    // Of a flat block the first are sent, as many as may be.
    let (_, decoded) = coded(Path::detect(), &code, &[-3.0; 64]);
    assert!(decoded[..6].iter().all(|x| *x == -3.0) && decoded[6..].iter().all(|x| *x == 0.0));
    for value in [f32::MAX, f32::MIN_POSITIVE, 1e-45] {
        let mut values = [0.0; 64];
        values[3] = value;
        values[60] = -value;
        coded(Path::detect(), &code, &values);
    }
    for value in [f32::NAN, f32::INFINITY] {
        let mut values = one_hot.clone();
        values[5] = value;
        let found = code.encode(Path::detect(), &mut values, &mut Vec::new());
        assert_eq!(found, Err(SparseError::NotFinite(5)));
    }
}

#[test]
fn g1_what_is_no_code_is_refused() {
    assert_eq!(
        SparseCode::new(0, 0.1, Kept::Signs),
        Err(SparseError::Block(0))
    );
    assert_eq!(
        SparseCode::new(1 << 16, 0.1, Kept::Signs),
        Err(SparseError::Block(65536))
    );
    assert_eq!(
        SparseCode::new(64, 0.0, Kept::Signs),
        Err(SparseError::Density(0.0))
    );
    assert!(SparseCode::new(64, f64::NAN, Kept::Signs).is_err());
}
