//! Codes of blockwise weights: bitsandbytes' bytes, properties of every format, and hostile inputs.
#![allow(missing_docs)]

use firebrick_kernels::blockwise::layout::BlockwiseView;
use firebrick_kernels::blockwise::tables::{DYNAMIC_MAP, NF4};
use firebrick_kernels::blockwise::{
    BlockwiseError, BlockwiseShape, Format, Quantised, Scales, quantise, reference,
};
use proptest::prelude::*;

fn shape(rows: usize, cols: usize, format: Format, block: usize) -> BlockwiseShape {
    BlockwiseShape {
        rows,
        cols,
        format,
        block,
        double: false,
    }
}

fn bytes_of_hex(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks(2);
    digits
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn floats_of_hex(hex: &str) -> Vec<f32> {
    let bytes = bytes_of_hex(hex);
    let floats = bytes.as_chunks::<4>().0.iter();
    floats.map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn single(quantised: &Quantised) -> &[f32] {
    match quantised.scales() {
        Scales::Single(scales) => scales,
        Scales::Double { .. } => panic!("single scales were asked for"),
    }
}

/// The dynamic map, and cases of five lines. data/peer_codes.py writes it.
const BITSANDBYTES: &str = include_str!("data/bitsandbytes.txt");

#[test]
fn q2_the_dynamic_map_is_that_of_bitsandbytes() {
    let expected = floats_of_hex(BITSANDBYTES.lines().next().unwrap());
    let bits = |levels: &[f32]| levels.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&DYNAMIC_MAP[..]), bits(&expected));
}

/// Q1: data/peer_codes.py has made them with bitsandbytes.
#[test]
fn q1_codes_are_those_of_bitsandbytes_byte_for_byte() {
    let lines: Vec<&str> = BITSANDBYTES.lines().skip(1).collect();
    let cases = lines.as_chunks::<5>().0;
    assert_eq!(cases.len(), 28);
    for [name, kind, values, codes, absmax] in cases {
        let (format, block) = kind.split_once(' ').unwrap();
        let format = Format::from_name(format).unwrap();
        let values = floats_of_hex(values);
        let shape = shape(1, values.len(), format, block.parse().unwrap());
        let quantised = quantise(&values, shape).unwrap();
        assert_eq!(quantised.codes(), bytes_of_hex(codes), "{name} {kind}");
        let bits = |scales: &[f32]| scales.iter().map(|s| s.to_bits()).collect::<Vec<_>>();
        let expected = bits(&floats_of_hex(absmax));
        assert_eq!(bits(single(&quantised)), expected, "{name} {kind}");
    }
}

#[test]
fn q1_a_block_of_zeros_is_zeros() {
    for format in Format::ALL {
        for double in [false, true] {
            let shape = BlockwiseShape {
                double,
                ..shape(3, 64, format, 64)
            };
            let quantised = quantise(&[0.0; 192], shape).unwrap();
            assert!(quantised.dequantise().iter().all(|w| *w == 0.0));
            if format == Format::Nf4 {
                assert!(quantised.codes().iter().all(|byte| *byte == 0x77));
            }
        }
    }
}

/// Q2: 4 bits, 8 / 64 for a scale, 32 / (64 * 256) for its scale, and the mean.
#[test]
fn q2_double_quantisation_takes_4_127_bits_a_parameter() {
    let weights = random(1 << 20, 7);
    let single = shape(1 << 10, 1 << 10, Format::Nf4, 64);
    let double = BlockwiseShape {
        double: true,
        ..single
    };
    assert_eq!(single.bits_per_parameter(), 4.5);
    assert!((double.bits_per_parameter() - 4.127).abs() < 5e-4);
    for shape in [single, double] {
        let quantised = quantise(&weights, shape).unwrap();
        let scales = match quantised.scales() {
            Scales::Single(scales) => 4 * scales.len(),
            Scales::Double { codes, scales, .. } => codes.len() + 4 * scales.len() + 4,
        };
        assert_eq!(quantised.codes().len() + scales, shape.bytes());
    }
    assert!(double.bytes() < single.bytes());
}

/// What double quantisation does to a scale is bounded by half the widest step of its map.
#[test]
fn q2_scales_come_back_near_what_they_were() {
    let weights = random(1 << 18, 3);
    let plain = shape(512, 512, Format::Nf4, 64);
    let double = BlockwiseShape {
        double: true,
        ..plain
    };
    let (plain, double) = (quantise(&weights, plain), quantise(&weights, double));
    let (plain, double) = (plain.unwrap(), double.unwrap());
    assert_eq!(plain.codes(), double.codes());
    let expected = single(&plain);
    let Scales::Double { offset, scales, .. } = double.scales() else {
        panic!("double scales were asked for");
    };
    let mean: f64 = expected.iter().map(|&s| f64::from(s)).sum();
    assert!((f64::from(*offset) - mean / expected.len() as f64).abs() < 1e-7);
    for (i, (found, expected)) in double.scales().expand().iter().zip(expected).enumerate() {
        // -1 is further from the lowest level than any number between levels is from one.
        let bound = 0.0071 * scales[i / 256];
        assert!((found - expected).abs() <= bound, "{found} {expected}");
    }
}

/// Q3: on numbers of one sign, half of NF4's levels are of no use.
#[test]
fn q3_affine_int4_beats_nf4_on_asymmetric_weights() {
    type Change = fn(f32) -> f32;
    let cases: [(&str, Change); 3] = [
        ("0 to 1", |x| 0.5 * x + 0.5),
        ("-0.2 to 1", |x| 0.6 * x + 0.4),
        ("squares", |x| x * x),
    ];
    for (name, change) in cases {
        let weights: Vec<f32> = random(1 << 14, 5).into_iter().map(change).collect();
        let error = |format| {
            let quantised = quantise(&weights, shape(128, 128, format, 64)).unwrap();
            let restored = quantised.dequantise();
            let errors = restored.iter().zip(&weights);
            errors
                .map(|(a, b)| f64::from(a - b) * f64::from(a - b))
                .sum::<f64>()
        };
        let (affine, nf4) = (error(Format::Int4Affine), error(Format::Nf4));
        assert!(affine <= nf4, "{name}: {affine} for {nf4}");
    }
}

#[test]
fn q3_bits_a_parameter_of_each_format() {
    let bits = |format, block| shape(256, 256, format, block).bits_per_parameter();
    assert_eq!(bits(Format::Fp4, 64), 4.5);
    assert_eq!(bits(Format::Int4Symmetric, 32), 5.0);
    assert_eq!(bits(Format::Int4Affine, 64), 4.5625);
    assert_eq!(bits(Format::Int8, 64), 8.5);
    // A scale a row.
    assert_eq!(bits(Format::Int8, 256), 8.125);
}

/// No weight is further from what it was than half a step, and rounding.
fn most_error(format: Format, weights: &[f32]) -> f32 {
    let absmax = weights.iter().fold(0f32, |max, x| max.max(x.abs()));
    let (min, max) = weights
        .iter()
        .fold((0f32, 0f32), |(min, max), x| (min.min(*x), max.max(*x)));
    let step = match format {
        // The widest gap is next to -1.
        Format::Nf4 => absmax * (NF4[1] - NF4[0]),
        Format::Fp4 => absmax / 3.0,
        Format::Int4Symmetric => absmax / 7.0,
        // The zero point may be half a step off, and cut what is furthest.
        Format::Int4Affine => 2.0 * (max / 15.0 - min / 15.0),
        Format::Int8 => absmax / 127.0,
    };
    0.5 * step * (1.0 + 1e-5) + 1e-38
}

fn format() -> impl Strategy<Value = Format> {
    prop::sample::select(&Format::ALL[..])
}

/// Numbers of all magnitudes that blocks may have, and zeros.
fn weights(count: usize) -> impl Strategy<Value = Vec<f32>> {
    (-40i32..38, any::<u64>()).prop_map(move |(exponent, seed)| {
        let scale = 10f32.powi(exponent);
        let values = random(count, seed).into_iter();
        values
            .map(|x| if x.abs() < 0.1 { 0.0 } else { x * scale })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn threads_and_vectors_give_the_reference_s_bytes(
        (rows, cols, weights) in (1usize..30, 1usize..90)
            .prop_flat_map(|(rows, cols)| (Just(rows), Just(cols), weights(rows * cols))),
        format in format(),
        block in 1usize..200,
    ) {
        let shape = shape(rows, cols, format, block);
        let (codes, scales, zeros) = reference::quantise(&weights, shape);
        let quantised = quantise(&weights, shape).unwrap();
        let code = |i: usize| match format {
            Format::Int8 => quantised.codes()[i],
            _ => quantised.codes()[i / 2] >> (4 * (1 - i % 2)) & 15,
        };
        for (i, &expected) in codes.iter().enumerate() {
            prop_assert_eq!(code(i), expected, "{} {:?}", i, weights[i]);
        }
        prop_assert_eq!(single(&quantised), &scales[..]);
        let restored = quantised.dequantise();
        let restored = restored.iter().zip(&weights).enumerate();
        for (i, (&found, &weight)) in restored {
            let (scale, zero) = (scales[i / block], zeros[i / block]);
            let expected = reference::dequantise(format, codes[i], zero, scale);
            prop_assert_eq!(found.to_bits(), expected.to_bits());
            let first = i / block * block;
            let neighbours = &weights[first..weights.len().min(first + block)];
            let error = (f64::from(found) - f64::from(weight)).abs();
            prop_assert!(error <= f64::from(most_error(format, neighbours)), "{} {}", found, weight);
        }
    }

    #[test]
    fn what_products_read_is_the_same_matrix(
        (rows, cols, weights) in (1usize..40, 1usize..70)
            .prop_flat_map(|(rows, cols)| (Just(rows), Just(cols), weights(rows * cols))),
        format in format(),
        block in 1usize..100,
        double: bool,
    ) {
        let shape = BlockwiseShape { double, ..shape(rows, cols, format, block) };
        let quantised = quantise(&weights, shape).unwrap();
        let operands = quantised.operands();
        prop_assert_eq!(operands.words.len(), shape.words());
        prop_assert_eq!(operands.scales.len(), shape.scales());
        prop_assert_eq!(operands.side.len(), shape.side_words());
        prop_assert_eq!(operands.view().to_quantised().unwrap(), quantised);
    }
}

#[test]
fn large_matrices_have_the_same_bytes_on_any_number_of_threads() {
    let weights = random(300 * 511, 11);
    for format in Format::ALL {
        for block in [64, 100, 511, 1 << 20, 7] {
            let shape = shape(300, 511, format, block);
            let [one, three] = [1, 3].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let pool = pool.build().unwrap();
                pool.install(|| quantise(&weights, shape).unwrap())
            });
            assert_eq!(one, three);
            let (_, scales, _) = reference::quantise(&weights, shape);
            assert_eq!(single(&one), &scales[..]);
        }
    }
}

#[test]
fn weights_that_are_not_finite_are_named() {
    for format in Format::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weights = random(64 * 1000, 2);
            weights[40_001] = bad;
            weights[50_000] = f32::NAN;
            let error = quantise(&weights, shape(64, 1000, format, 64)).unwrap_err();
            let BlockwiseError::NotFinite { index, value } = error else {
                panic!("{error}");
            };
            assert_eq!((index, value.to_bits()), (40_001, bad.to_bits()));
        }
    }
}

#[test]
fn shapes_that_cannot_be_are_errors() {
    let good = shape(3, 5, Format::Nf4, 4);
    let error = quantise(&[0.0; 14], good).unwrap_err();
    assert!(matches!(
        error,
        BlockwiseError::Length {
            expected: 15,
            found: 14,
            ..
        }
    ));
    let empty = BlockwiseShape { block: 0, ..good };
    assert_eq!(quantise(&[0.0; 15], empty), Err(BlockwiseError::EmptyBlock));
    for (rows, cols) in [
        (usize::MAX, 1),
        (1, usize::MAX),
        (1 << 40, 1 << 40),
        (1 << 31, 1 << 31),
        (usize::MAX - 20, 0),
    ] {
        let shape = shape(rows, cols, Format::Nf4, 64);
        let found = Quantised::from_parts(shape, vec![], Scales::Single(vec![]), vec![]);
        if cols == 0 {
            assert!(found.is_err() || shape.elements() == 0);
        } else {
            assert_eq!(found, Err(BlockwiseError::TooLarge { rows, cols }));
        }
        assert!(BlockwiseView::new(shape, &[], &[], &[0]).is_err() || cols == 0);
    }
}

#[test]
fn parts_that_do_not_fit_are_errors() {
    let shape = shape(4, 10, Format::Int4Affine, 16);
    let quantised = quantise(&random(40, 1), shape).unwrap();
    let (codes, zeros) = (quantised.codes().to_vec(), quantised.zero_points().to_vec());
    let scales = quantised.scales().clone();
    let load = |codes: &[u8], scales: &Scales, zeros: &[u8]| {
        Quantised::from_parts(shape, codes.to_vec(), scales.clone(), zeros.to_vec())
    };
    assert_eq!(load(&codes, &scales, &zeros), Ok(quantised.clone()));
    assert!(load(&codes[1..], &scales, &zeros).is_err());
    assert!(load(&codes, &scales, &zeros[1..]).is_err());
    assert!(load(&codes, &scales, &[]).is_err());
    assert!(load(&codes, &Scales::Single(vec![1.0; 2]), &zeros).is_err());
    let nan = Scales::Single(vec![1.0, f32::NAN, 1.0]);
    let error = load(&codes, &nan, &zeros).unwrap_err();
    assert!(matches!(error, BlockwiseError::Scale { index: 1, .. }));
    let double = Scales::Double {
        codes: vec![0; 3],
        scales: vec![1.0],
        offset: 0.0,
    };
    let error = load(&codes, &double, &zeros).unwrap_err();
    assert!(matches!(error, BlockwiseError::ScaleKind { .. }));
    for (scale, offset) in [(f32::INFINITY, 0.0), (1.0, f32::NAN), (f32::MAX, f32::MAX)] {
        let double = Scales::Double {
            codes: vec![0; 3],
            scales: vec![scale],
            offset,
        };
        let shape = BlockwiseShape {
            double: true,
            ..shape
        };
        let error = Quantised::from_parts(shape, codes.clone(), double, zeros.clone());
        assert!(matches!(error, Err(BlockwiseError::Scale { .. })));
    }
}

#[test]
fn names_are_formats() {
    for format in Format::ALL {
        assert_eq!(Format::from_name(format.name()), Some(format));
    }
    assert_eq!(Format::from_name("nf5"), None);
    assert!(DYNAMIC_MAP.is_sorted());
}

/// Numbers that look random, in [-1, 1), uneven in magnitude.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next() * next().abs()).collect()
}
