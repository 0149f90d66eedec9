use proptest::prelude::*;

use super::reference::folded_difference;
use super::*;

fn paths() -> impl Iterator<Item = Path> {
    Path::ALL.into_iter().filter(|path| path.available())
}

/// Codes on every path, which must write the same bytes, and decodes them on every path.
fn there_and_back(element: Element, scale: Scale, parent: &[u8], child: &[u8]) -> Vec<u8> {
    let mut written: Option<Vec<u8>> = None;
    for path in paths() {
        let mut out = vec![1, 2, 3];
        encode(
            path,
            element,
            scale,
            (parent, child),
            &mut Scratch::default(),
            &mut out,
        )
        .unwrap();
        let bytes = out.split_off(3);
        assert!(
            written.as_ref().is_none_or(|written| *written == bytes),
            "{path:?} writes other bytes"
        );
        let mut back = vec![0xa5; child.len()];
        for reader in paths() {
            decode(reader, element, scale, parent, &bytes, &mut back).unwrap();
            assert!(back == child, "{path:?} to {reader:?}");
        }
        written = Some(bytes);
    }
    written.unwrap()
}

fn float_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// A parent and a child of `elements`, the child `near` it in as many of 16 cases; bits of every kind.
fn pair(element: Element, elements: usize, near: u8, seed: u64) -> (Vec<u8>, Vec<u8>) {
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 24
    };
    let special = [
        0,
        1,
        u32::MAX,
        1 << 31,
        0x7f80_0001,
        0xffc0_0000,
        0x7fff,
        0x8000,
        0x7f80,
        0xff81,
    ];
    let (mut parent, mut child) = (Vec::new(), Vec::new());
    for _ in 0..elements {
        let before = match next() % 4 {
            0 => special[next() as usize % special.len()],
            1 => next() as u32,
            _ => (next() as f32 / 1e9).to_bits() >> (32 - element.bits()),
        };
        let after = match next() % 16 {
            case if case < u64::from(near) => before.wrapping_add((next() >> (next() % 40)) as u32),
            15 => special[next() as usize % special.len()],
            _ => next() as u32,
        };
        parent.extend(&before.to_le_bytes()[..element.width()]);
        child.extend(&after.to_le_bytes()[..element.width()]);
    }
    (parent, child)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn d2_all_bits_come_back_on_every_path(
        element in prop::sample::select(&Element::ALL),
        elements in 0usize..3000,
        near in 0u8..16,
        seed: u64,
        by_root: bool,
    ) {
        let (parent, child) = pair(element, elements, near, seed);
        let roots = pair(Element::F32, elements, 0, seed ^ 77).0;
        let scale = if by_root { Scale::Root(&roots) } else { Scale::Chunk };
        there_and_back(element, scale, &parent, &child);
    }

    #[test]
    fn d2_hostile_bytes_are_an_error_or_something(
        element in prop::sample::select(&Element::ALL),
        elements in 0usize..600,
        seed: u64,
        at: prop::sample::Index,
        flip in 1u8..,
        cut: prop::sample::Index,
    ) {
        let (parent, child) = pair(element, elements, 12, seed);
        let mut bytes = Vec::new();
        encode(Path::detect(), element, Scale::Chunk, (&parent, &child), &mut Scratch::default(), &mut bytes).unwrap();
        let mut back = vec![0; child.len()];
        let short = cut.index(bytes.len());
        for path in paths() {
            let cut = decode(path, element, Scale::Chunk, &parent, &bytes[..short], &mut back);
            prop_assert!(cut.is_err());
        }
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let results: Vec<_> = paths()
            .map(|path| {
                let mut back = vec![0; child.len()];
                decode(path, element, Scale::Chunk, &parent, &bytes, &mut back).map(|()| back)
            })
            .collect();
        prop_assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn d2_large_chunks_come_back() {
    for elements in [16_384, 16_385, 65_536, 65_537, 100_000, MOST] {
        let (parent, child) = pair(Element::F32, elements, 14, elements as u64);
        there_and_back(Element::F32, Scale::Chunk, &parent, &child);
    }
}

/// Steps of about `step`, as an optimizer takes them, from weights of about 0.02.
fn steps(elements: usize, step: f32) -> (Vec<f32>, Vec<f32>) {
    let wave = |i: usize, by: f32| ((i as f32 + 0.5) * by).sin() + ((i as f32) * by * 1.7).cos();
    let before = (0..elements).map(|i| 0.02 * wave(i, 12.9898) * wave(i, 0.317));
    let before: Vec<f32> = before.collect();
    let after = before
        .iter()
        .enumerate()
        .map(|(i, x)| x - step * wave(i, 78.233))
        .collect();
    (before, after)
}

#[test]
fn d2_ratio_is_at_least_that_of_the_order_0_bound() {
    for step in [1e-3, 1e-4, 1e-5] {
        let (before, after) = steps(100_000, step);
        let (before, after) = (float_bytes(before), float_bytes(after));
        let bound = order_0_bits(Element::F32, &before, &after) / 8.0;
        let coded = there_and_back(Element::F32, Scale::Chunk, &before, &after).len() as f64;
        assert!(coded < bound / 0.99, "step {step}: {coded} to {bound}");

        let half = |bytes: &[u8]| -> Vec<u8> {
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .flat_map(|b| [b[2], b[3]])
                .collect()
        };
        let (before, after) = (half(&before), half(&after));
        let bound = order_0_bits(Element::Bf16, &before, &after) / 8.0;
        let coded = there_and_back(Element::Bf16, Scale::Chunk, &before, &after).len() as f64;
        assert!(coded < bound, "bf16, step {step}: {coded} to {bound}");
    }
}

#[test]
fn d2_neighbours_are_one_apart() {
    let folded =
        |a: f32, b: f32| folded_difference(Element::F32, &a.to_le_bytes(), &b.to_le_bytes());
    assert_eq!(folded(1.0, 1.0), 0);
    assert_eq!(folded(1.0, 1.0f32.next_down()), 1);
    assert_eq!(folded(1.0, 1.0f32.next_up()), 2);
    assert_eq!(folded(-1.0, (-1.0f32).next_up()), 2);
    assert_eq!(folded(-0.0, 0.0), 2);
    assert_eq!(folded(f32::from_bits(1), 0.0), 1);
    let bytes = |a: u8, b: u8| folded_difference(Element::Bits8, &[a], &[b]);
    assert_eq!((bytes(255, 0), bytes(0, 255), bytes(3, 5)), (2, 1, 4));
}

#[test]
fn d2_equal_chunks_are_next_to_nothing() {
    let (parent, _) = pair(Element::F32, 70_000, 0, 3);
    let bytes = there_and_back(Element::F32, Scale::Chunk, &parent, &parent);
    assert!(bytes.len() < 300, "{}", bytes.len());
}

#[test]
fn d2_what_comes_once_is_coded_though_only_some_are_counted() {
    let (parent, _) = pair(Element::F32, 40_000, 0, 3);
    for place in [0, 20, 63, 39_999] {
        let mut child = parent.clone();
        child[4 * place] ^= 0x55;
        child[4 * place + 3] ^= 0x80;
        there_and_back(Element::F32, Scale::Chunk, &parent, &child);
    }
}

#[test]
fn lengths_that_do_not_fit_are_errors() {
    let coded = |parent: usize, child: usize, roots: Option<usize>| {
        let (parent, child) = (vec![0; parent], vec![0; child]);
        let roots = roots.map(|length| vec![0; length]);
        let scale = roots.as_deref().map_or(Scale::Chunk, Scale::Root);
        encode(
            Path::detect(),
            Element::F32,
            scale,
            (&parent, &child),
            &mut Scratch::default(),
            &mut Vec::new(),
        )
    };
    assert!(coded(8, 8, None).is_ok());
    for (parent, child, roots) in [
        (8, 12, None),
        (7, 7, None),
        (8, 8, Some(4)),
        (4 * MOST + 4, 4 * MOST + 4, None),
    ] {
        assert!(matches!(
            coded(parent, child, roots),
            Err(DifferenceError::Length { .. })
        ));
    }
}

#[test]
fn another_parent_or_scale_does_not_panic() {
    let (parent, child) = pair(Element::F32, 5000, 14, 9);
    let other = pair(Element::F32, 5000, 14, 10).0;
    let mut bytes = Vec::new();
    encode(
        Path::detect(),
        Element::F32,
        Scale::Chunk,
        (&parent, &child),
        &mut Scratch::default(),
        &mut bytes,
    )
    .unwrap();
    let mut back = vec![0; child.len()];
    let _ = decode(
        Path::detect(),
        Element::F32,
        Scale::Chunk,
        &other,
        &bytes,
        &mut back,
    );
    assert!(back != child);
}
