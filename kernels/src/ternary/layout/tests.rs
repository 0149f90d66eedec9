use proptest::prelude::*;

use super::gguf::BlockType;
use super::*;
use crate::ternary::Granularity;

/// Rows, columns and trits.
fn matrices() -> impl Strategy<Value = (usize, usize, Vec<i8>)> {
    (0usize..40, 0usize..200).prop_flat_map(|(rows, cols)| {
        let trits = proptest::collection::vec(-1i8..=1, rows * cols);
        trits.prop_map(move |trits| (rows, cols, trits))
    })
}

/// Matrices of whole blocks, with a scale a block that f16 holds exactly.
fn block_matrices() -> impl Strategy<Value = (usize, usize, Vec<i8>, Vec<f32>)> {
    (1usize..4, 1usize..4).prop_flat_map(|(rows, blocks)| {
        let trits = proptest::collection::vec(-1i8..=1, rows * blocks * 256);
        let scales = proptest::collection::vec(
            (1u16..2048).prop_map(|i| f32::from(i) / 64.0),
            rows * blocks,
        );
        (trits, scales).prop_map(move |(trits, scales)| (rows, 256 * blocks, trits, scales))
    })
}

const BLOCK_TYPES: [BlockType; 2] = [BlockType::Tq1_0, BlockType::Tq2_0];

proptest! {
    #[test]
    fn trits_come_back_from_every_layout((rows, cols, trits) in matrices()) {
        let words = compute::pack(&trits, rows, cols).unwrap();
        prop_assert_eq!(words.len(), compute::words(rows, cols));
        prop_assert_eq!(&compute::unpack(&words, rows, cols).unwrap(), &trits);
        let bytes = storage::pack(&trits, rows, cols).unwrap();
        prop_assert_eq!(bytes.len(), storage::bytes(rows, cols));
        prop_assert_eq!(&storage::unpack(&bytes, rows, cols).unwrap(), &trits);
        let planes = planes::pack(&trits, rows, cols).unwrap();
        prop_assert_eq!(planes.plus.len(), planes::words(rows, cols));
        prop_assert_eq!(&planes::unpack(&planes, rows, cols).unwrap(), &trits);
    }

    #[test]
    fn blocks_come_back((rows, cols, trits, scales) in block_matrices()) {
        let granularity = Granularity::Group(256);
        for block_type in BLOCK_TYPES {
            let bytes = block_type.pack(&trits, rows, cols, &scales, granularity).unwrap();
            let read = block_type.unpack(&bytes, rows, cols).unwrap();
            prop_assert_eq!(&read, &(trits.clone(), scales.clone()));
            // What llama.cpp's rule makes of g T is the same, unless a block is all zero.
            let values = block_type.dequantise(&bytes, rows, cols).unwrap();
            prop_assert_eq!(block_type.quantise(&values, rows, cols).unwrap(), bytes);
        }
    }

    /// Whatever bytes are read, the result is trits that lead back to the same bytes, or an error.
    #[test]
    fn hostile_bytes_are_errors_or_trits(
        rows in 0usize..6, cols in 0usize..300, seed: u64, length in 0usize..4000, exact: bool,
    ) {
        let mut state = seed;
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Now and then what is valid, so that more than the first check is reached.
            let byte = (state >> 56) as u8;
            if seed.is_multiple_of(2) { (byte % 243) & 0x55 } else { byte }
        };
        let length = |wanted: usize| if exact { wanted } else { length };
        let words: Vec<u32> = (0..length(compute::words(rows, cols)))
            .map(|_| u32::from_le_bytes([byte(), byte(), byte(), byte()]))
            .collect();
        if let Ok(trits) = compute::unpack(&words, rows, cols) {
            prop_assert_eq!(compute::pack(&trits, rows, cols).unwrap(), words);
        }
        let bytes: Vec<u8> = (0..length(storage::bytes(rows, cols))).map(|_| byte()).collect();
        if let Ok(trits) = storage::unpack(&bytes, rows, cols) {
            prop_assert_eq!(storage::pack(&trits, rows, cols).unwrap(), bytes);
        }
        let mut plane = || {
            let words = 0..length(planes::words(rows, cols));
            words.map(|_| u64::from_le_bytes([0; 8].map(|_| byte()))).collect()
        };
        let read = planes::Planes { plus: plane(), minus: plane() };
        if let Ok(trits) = planes::unpack(&read, rows, cols) {
            prop_assert_eq!(planes::pack(&trits, rows, cols).unwrap(), read);
        }
        for block_type in BLOCK_TYPES {
            let cols = cols / 100 * 256;
            let bytes = (0..length(block_type.bytes(rows, cols).unwrap())).map(|_| byte());
            let bytes: Vec<u8> = bytes.collect();
            if let Ok((trits, scales)) = block_type.unpack(&bytes, rows, cols) {
                prop_assert_eq!(trits.len(), rows * cols);
                prop_assert!(trits.iter().all(|trit| (-1..=1).contains(trit)));
                prop_assert_eq!(scales.len(), rows * cols / 256);
            }
        }
    }
}

/// The layout itself, not only that it is undone.
#[test]
fn the_compute_layout_is_as_documented() {
    let (rows, cols) = (18, 20);
    for (row, col) in [(0, 0), (0, 1), (3, 7), (15, 15), (16, 16), (17, 19)] {
        let mut trits = vec![0; rows * cols];
        trits[row * cols + col] = 1;
        let words = compute::pack(&trits, rows, cols).unwrap();
        let (group, lane, block) = (row / 16, row % 16, col / 16);
        let (plane, byte) = (col % 16 / 4, col % 4);
        for (i, &word) in words.iter().enumerate() {
            let change = if i == (group * 2 + block) * 16 + lane {
                3 << (8 * byte + 2 * plane)
            } else {
                0
            };
            assert_eq!(word, 0x5555_5555 ^ change, "{row} {col}");
        }
    }
}

#[test]
fn stored_bytes_are_as_documented() {
    let bytes = storage::pack(&[1, 0, -1, 0, 1, -1], 1, 6).unwrap();
    // 2 + 1·3 + 0·9 + 1·27 + 2·81, and 0 followed by four zeros: 1 · (3 + 9 + 27 + 81).
    assert_eq!(bytes, [194, 120]);
}

#[test]
fn layouts_are_found_by_name() {
    for layout in Layout::ALL {
        assert_eq!(Layout::from_name(layout.name()), Some(layout));
    }
    assert_eq!(Layout::from_name("ternary"), None);
}

#[test]
fn each_kind_of_damage_is_named() {
    let words = compute::pack(&[0; 16 * 17], 16, 17).unwrap();
    let mut bad = words.clone();
    bad[5] |= 2;
    assert_eq!(
        compute::unpack(&bad, 16, 17),
        Err(LayoutError::Code { row: 5, col: 0 })
    );
    let mut bad = words;
    bad[16 + 2] ^= 1 << compute::shift(1);
    assert_eq!(
        compute::unpack(&bad, 16, 17),
        Err(LayoutError::Padding { row: 2, col: 17 })
    );
    assert_eq!(
        compute::unpack(&bad[1..], 16, 17),
        Err(LayoutError::Length {
            what: "words",
            expected: 32,
            found: 31
        })
    );
    assert_eq!(
        compute::pack(&[0, 2], 1, 2),
        Err(LayoutError::Trit {
            value: 2,
            row: 0,
            col: 1
        })
    );
    assert_eq!(
        storage::unpack(&[243], 1, 5),
        Err(LayoutError::Code { row: 0, col: 0 })
    );
    assert_eq!(
        storage::unpack(&[0], 1, 4),
        Err(LayoutError::Padding { row: 0, col: 4 })
    );
    let planes = |plus, minus| planes::Planes {
        plus: vec![plus],
        minus: vec![minus],
    };
    assert_eq!(
        planes::unpack(&planes(6, 4), 1, 10),
        Err(LayoutError::Overlap { row: 0, col: 2 })
    );
    assert_eq!(
        planes::unpack(&planes(0, 1 << 12), 1, 10),
        Err(LayoutError::Padding { row: 0, col: 12 })
    );
    let tq2_0 = BlockType::Tq2_0;
    assert_eq!(
        tq2_0.bytes(1, 255),
        Err(LayoutError::PartialBlock { cols: 255 })
    );
    assert_eq!(
        tq2_0.unpack(&[0xC0; 66], 1, 256),
        Err(LayoutError::Code { row: 0, col: 0 })
    );
    for scale in [f32::NAN, f32::INFINITY, 70_000.0, 1e-9] {
        let error = tq2_0
            .pack(&[0; 256], 1, 256, &[scale], Granularity::Tensor)
            .unwrap_err();
        assert!(
            matches!(error, LayoutError::Scale { .. }),
            "{scale}: {error}"
        );
    }
    let words = [0x5555_5555; 32];
    for size in [0, 8, 24] {
        assert_eq!(
            PackedView::new(&words, 16, 32, &[1.0; 64], Granularity::Group(size)).unwrap_err(),
            LayoutError::GroupSize { size }
        );
    }
    assert!(matches!(
        PackedView::new(&words, usize::MAX / 4, 32, &[1.0], Granularity::Tensor),
        Err(LayoutError::TooLarge { .. })
    ));
    assert!(matches!(
        PackedView::new(&words, 0, 1 << 24, &[1.0], Granularity::Tensor),
        Err(LayoutError::TooWide { .. })
    ));
}

/// Blocks of the reference package, written from real weights, byte for byte.
#[test]
#[ignore = "reads FIREBRICK_DATA"]
fn blocks_equal_the_reference_package() {
    let folder =
        std::env::var("FIREBRICK_DATA").expect("FIREBRICK_DATA is the folder of test data");
    let read = |name: String| std::fs::read(format!("{folder}/gguf-vectors/{name}")).expect(&name);
    let floats = |bytes: Vec<u8>| -> Vec<f32> {
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect()
    };
    for name in ["emb", "w1", "wq"] {
        let values = floats(read(format!("{name}.f32")));
        let rows = values.len() / 256;
        for (block_type, kind) in [(BlockType::Tq1_0, "TQ1_0"), (BlockType::Tq2_0, "TQ2_0")] {
            let expected = read(format!("{name}.{kind}"));
            let bytes = block_type.quantise(&values, rows, 256).unwrap();
            assert_eq!(bytes, expected, "{name} {kind}");
            let expected = floats(read(format!("{name}.{kind}.deq.f32")));
            assert_eq!(
                block_type.dequantise(&bytes, rows, 256).unwrap(),
                expected,
                "{name} {kind}"
            );
        }
    }
}
