use proptest::prelude::*;

use super::*;

const FLOATS: [Element; 3] = [Element::F32, Element::F16, Element::Bf16];

fn paths() -> impl Iterator<Item = Path> {
    Path::ALL.into_iter().filter(|path| path.available())
}

/// Floats near each other, and anything at all at some places.
fn pair(
    element: Element,
    elements: usize,
    scale: f32,
    wild: &[(usize, u32, u32)],
) -> (Vec<u8>, Vec<u8>) {
    let (mut parent, mut child) = (vec![0.0; elements], vec![0.0; elements]);
    let mut state = 7u32 + elements as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    for (p, c) in parent.iter_mut().zip(&mut child) {
        *p = next();
        // Some blocks heavy-tailed.
        *c = *p + scale * next() * next() * next();
    }
    for &(at, before, after) in wild {
        if elements > 0 {
            parent[at % elements] = f32::from_bits(before);
            child[at % elements] = f32::from_bits(after);
        }
    }
    let bytes = |values: &[f32]| {
        let mut bytes = vec![0; values.len() * element.width()];
        floats::narrow(element, values, &mut bytes);
        bytes
    };
    (bytes(&parent), bytes(&child))
}

fn same_or_nan(element: Element, a: &[u8], b: &[u8]) -> bool {
    let (a, b) = (reference::values(element, a), reference::values(element, b));
    a.iter()
        .zip(&b)
        .all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn d3_every_path_rounds_as_one_element_at_a_time(
        element in prop::sample::select(&FLOATS),
        levels in prop::sample::select(&Levels::ALL),
        up: bool,
        elements in 0usize..3000,
        exponent in -44i32..38,
        limit in prop::sample::select(&[NO_LIMIT, 1e-3, 0.1]),
        wild in prop::collection::vec((any::<usize>(), any::<u32>(), any::<u32>()), 0..6),
    ) {
        let rounding = if up { Rounding::Up } else { Rounding::Nearest };
        let (parent, child) = pair(element, elements, 10f32.powi(exponent), &wild);
        let expected = reference::quantise(element, (levels, rounding), limit, (&parent, &child));
        let back = reference::reconstruct(element, levels, &expected, &parent);
        for path in paths() {
            let mut found = Quantised::default();
            quantise(path, element, (levels, rounding), limit, (&parent, &child), &mut found).unwrap();
            prop_assert!(found == expected, "{path:?}");
            let mut out = vec![0xa5; parent.len()];
            reconstruct(path, element, levels, (&found.scales, &found.codes), &parent, &mut out).unwrap();
            prop_assert!(same_or_nan(element, &out, &back), "{path:?}");

            let mut packed = vec![0xa5; levels.packed(elements)];
            pack(path, levels, &found.codes, &mut packed);
            let mut codes = vec![100; elements];
            unpack(path, levels, &packed, &mut codes);
            prop_assert_eq!(&codes, &found.codes);
        }
    }

    #[test]
    fn d3_losses_are_sums_over_elements(
        element in prop::sample::select(&FLOATS),
        elements in 0usize..3000,
        wild in prop::collection::vec((any::<usize>(), any::<u32>(), any::<u32>()), 0..3),
    ) {
        let (parent, child) = pair(element, elements, 1e-2, &wild);
        let (_, back) = pair(element, elements, 1.1e-2, &wild);
        let of = |bytes: &[u8]| reference::values(element, bytes);
        let mut expected = Loss::default();
        for ((p, c), b) in of(&parent).into_iter().zip(of(&child)).zip(of(&back)) {
            let error = if b.to_bits() == c.to_bits() { 0.0 } else { b - c };
            let change = if (c - p).is_finite() { c - p } else { 0.0 };
            expected = expected.and(Loss {
                largest: error.abs(),
                error: f64::from(error).powi(2),
                change: f64::from(change).powi(2),
            });
        }
        for path in paths() {
            let found = loss(path, element, &parent, &child, &back).unwrap();
            prop_assert_eq!(found.largest, expected.largest);
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * a.abs().max(1e-300);
            prop_assert!(near(found.error, expected.error) && near(found.change, expected.change));
            let mut d = vec![f32::NAN; elements];
            subtract(path, element, (&parent, &child), &mut d).unwrap();
            let sum: f64 = d.iter().map(|&d| f64::from(d).powi(2)).sum();
            prop_assert!(near(sum, expected.change));
        }
    }

    #[test]
    fn d3_factors_come_back_and_multiply(
        element in prop::sample::select(&FLOATS),
        rows in 1usize..40,
        cols in 1usize..90,
        rank in 1usize..6,
        start: prop::sample::Index,
        length: prop::sample::Index,
    ) {
        let wave = |count: usize, by: f32| -> Vec<f32> { (0..count).map(|i| (i as f32 * by).sin()).collect() };
        let (left, right) = (wave(rows * rank, 0.7), wave(rank * cols, 1.3));
        let factors = Factors::round(rank, &left, &right);
        let mut bytes = Vec::new();
        factors.write(&mut bytes);
        prop_assert_eq!(bytes.len(), Factors::bytes(rows, cols, rank));
        let read = Factors::read(rows, cols, &bytes);
        prop_assert_eq!(read.as_ref(), Some(&factors));
        if rows + cols > 1 {
            prop_assert_eq!(Factors::read(rows, cols, &bytes[1..]), None);
        }
        let start = start.index(rows * cols);
        let length = length.index(rows * cols - start) + 1;
        let (parent, _) = pair(element, length, 0.0, &[]);
        let mut first: Option<Vec<u8>> = None;
        for path in paths() {
            let mut out = vec![0; parent.len()];
            factors.reconstruct(path, element, start, &parent, &mut out).unwrap();
            prop_assert!(first.as_ref().is_none_or(|first| *first == out), "{path:?}");
            first = Some(out);
        }
        let found = reference::values(element, &first.unwrap());
        let step = match element { Element::F32 => 1e-6, Element::F16 => 1e-3, _ => 8e-3 };
        for (n, (found, parent)) in found.iter().zip(reference::values(element, &parent)).enumerate() {
            let (i, j) = ((start + n) / cols, (start + n) % cols);
            let product: f32 = (0..rank).map(|k| left[i * rank + k] * right[k * cols + j]).sum();
            // Each factor is rounded to half of 1/127.
            let within = rank as f32 * 1.1 / 127.0 + 4.0 * step * (rank as f32 + 1.0);
            prop_assert!((found - parent - product).abs() < within, "{found} {parent} {product}");
        }
    }
}

#[test]
fn d3_errors_are_within_what_levels_allow() {
    for element in FLOATS {
        // Numbers that are all small, so that the element's own rounding does not matter.
        let (parent, child) = pair(element, 5000, 1e-2, &[]);
        for (levels, share) in [
            (Levels::Int8, 0.01),
            (Levels::Int4, 0.13),
            (Levels::Sign, 0.9),
        ] {
            let mut coded = Quantised::default();
            quantise(
                Path::detect(),
                element,
                (levels, Rounding::Nearest),
                NO_LIMIT,
                (&parent, &child),
                &mut coded,
            )
            .unwrap();
            let mut back = vec![0; child.len()];
            reconstruct(
                Path::detect(),
                element,
                levels,
                (&coded.scales, &coded.codes),
                &parent,
                &mut back,
            )
            .unwrap();
            let loss = loss(Path::detect(), element, &parent, &child, &back).unwrap();
            let rounding = match element {
                Element::F32 => 0.0,
                Element::F16 => 0.08,
                _ => 0.8,
            };
            assert!(
                loss.relative() < share + rounding,
                "{element:?} {levels:?}: {}",
                loss.relative()
            );
            assert!(loss.relative() > 0.0);
        }
    }
}

#[test]
fn d3_rounded_up_is_no_less() {
    let (parent, child) = pair(Element::F32, 5000, 1e-2, &[]);
    let mut coded = Quantised::default();
    quantise(
        Path::detect(),
        Element::F32,
        (Levels::Int8, Rounding::Up),
        NO_LIMIT,
        (&parent, &child),
        &mut coded,
    )
    .unwrap();
    let mut back = vec![0; child.len()];
    reconstruct(
        Path::detect(),
        Element::F32,
        Levels::Int8,
        (&coded.scales, &coded.codes),
        &parent,
        &mut back,
    )
    .unwrap();
    let pairs = reference::values(Element::F32, &back)
        .into_iter()
        .zip(reference::values(Element::F32, &child));
    for (back, child) in pairs {
        assert!(back >= child - 1e-7, "{back} {child}");
    }
}

#[test]
fn d3_integers_are_refused() {
    for element in [Element::Bits8, Element::Bits16, Element::Bits32] {
        let zeros = [0; 8];
        let how = (Levels::Int8, Rounding::Nearest);
        let refused = quantise(
            Path::Portable,
            element,
            how,
            NO_LIMIT,
            (&zeros, &zeros),
            &mut Quantised::default(),
        );
        assert_eq!(refused, Err(NoFloat(element)));
    }
}
