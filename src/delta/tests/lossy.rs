//! Differences of which something may be lost.

use super::*;

/// A child that has moved from its parent as fine-tunes do, with numbers of every kind in it.
fn moved(dtype: Dtype, shape: &[usize], by: f32) -> (State, State) {
    let elements: usize = shape.iter().product();
    let mut state = 9u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let put = |out: &mut Vec<u8>, value: f32| match dtype {
        Dtype::F32 => out.extend(value.to_le_bytes()),
        Dtype::BF16 => out.extend(half::bf16::from_f32(value).to_le_bytes()),
        _ => out.extend(half::f16::from_f32(value).to_le_bytes()),
    };
    for i in 0..elements {
        let value = next();
        let moved = value + by * next() * next();
        let (value, moved) = match i % 5003 {
            17 => (value, f32::NAN),
            18 => (f32::INFINITY, moved),
            19 => (f32::NEG_INFINITY, f32::NEG_INFINITY),
            20 => (-f32::MAX, f32::MAX),
            21 => (0.0, -0.0),
            22 => (value, 1e-40),
            23 => (f32::NAN, value),
            _ => (value, moved),
        };
        put(&mut before, value);
        put(&mut after, moved);
    }
    let of = |bytes| vec![(info("w", dtype, shape), bytes)];
    (of(before), of(after))
}

fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let half = |bytes: &[u8]| u16::from_le_bytes(bytes.try_into().unwrap());
    match dtype {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Dtype::BF16 => bytes
            .chunks(2)
            .map(|b| half::bf16::from_bits(half(b)).to_f32())
            .collect(),
        _ => bytes
            .chunks(2)
            .map(|b| half::f16::from_bits(half(b)).to_f32())
            .collect(),
    }
}

fn lossy(method: Method) -> Options {
    Options {
        lossy: Some(Lossy::new(method)),
        ..Options::default()
    }
}

const BLOCKS: [Method; 4] = [Method::Int8, Method::Int4, Method::OneBit, Method::Hybrid];

#[test]
fn d3_what_is_lost_is_within_what_the_file_says() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let (before, after) = moved(dtype, &[413, 701], 0.3);
        for method in BLOCKS {
            let path = folder
                .path()
                .join(format!("{dtype:?}-{method:?}.safetensors"));
            let parent = memory(&before);
            let written = write(
                &path,
                Some(&beside(&parent)),
                &memory(&after),
                &lossy(method),
            )
            .unwrap();
            let opened = open(&path).unwrap();
            let record = opened.lossy().get("w").copied();
            let delta = opened.beside(Some(Box::new(&parent))).unwrap();
            let back = restored(&delta).unwrap();
            let Some(record) = record else {
                // Of bf16, eight bits and scales are about what it takes without loss.
                assert_eq!((dtype, method), (Dtype::BF16, Method::Int8));
                assert!(back["w"] == after[0].1);
                continue;
            };
            assert_eq!(record.method, method);
            let (was, is, from) = (
                floats(dtype, &after[0].1),
                floats(dtype, &back["w"]),
                floats(dtype, &before[0].1),
            );
            let (mut error, mut change) = (0.0f64, 0.0f64);
            for ((was, is), from) in was.iter().zip(&is).zip(&from) {
                assert_eq!(was.is_finite(), is.is_finite(), "{method:?}: {was} {is}");
                if was.is_finite() {
                    let lost = (is - was).abs();
                    assert!(
                        lost <= record.largest_error,
                        "{method:?}: {was} {is} {record:?}"
                    );
                    error += f64::from(lost).powi(2);
                    if (was - from).is_finite() {
                        change += f64::from(was - from).powi(2);
                    }
                } else {
                    assert!(was.is_nan() || was == is);
                }
            }
            assert!(error > 0.0);
            assert!(
                (error / change).sqrt() <= f64::from(record.relative_error),
                "{method:?}"
            );
            let bits = 8.0 * written.bytes as f64 / (413.0 * 701.0);
            let most = match method {
                Method::Int8 => 8.5,
                Method::OneBit => 1.5,
                _ => 4.8,
            };
            assert!(bits < most, "{dtype:?} {method:?}: {bits} bits an element");
        }
    }
}

#[test]
fn d3_later_differences_are_taken_from_what_came_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = |i: usize| folder.path().join(format!("{i}.safetensors"));
    let (first, _) = moved(Dtype::F32, &[300, 500], 0.1);
    write(&path(0), None, &memory(&first), &lossy(Method::Int4)).unwrap();
    assert!(
        open(&path(0)).unwrap().lossy().is_empty(),
        "alone it is exact"
    );
    let mut target = first.clone();
    let mut before: Box<dyn Source> = Box::new(open(&path(0)).unwrap().beside(None).unwrap());
    let mut errors = Vec::new();
    for i in 1..6 {
        for value in target[0].1.as_chunks_mut::<4>().0 {
            let old = f32::from_le_bytes(*value);
            *value = (old + 1e-3 * (old * 1e4 + i as f32).sin()).to_le_bytes();
        }
        write(
            &path(i),
            Some(&beside(&*before)),
            &memory(&target),
            &lossy(Method::Int4),
        )
        .unwrap();
        let delta = open(&path(i)).unwrap().beside(Some(before)).unwrap();
        let back = restored(&delta).unwrap();
        let pairs = floats(Dtype::F32, &back["w"])
            .into_iter()
            .zip(floats(Dtype::F32, &target[0].1));
        let finite = pairs.filter(|(_, is)| is.abs() < 2.0);
        errors.push(finite.map(|(was, is)| (was - is).abs()).fold(0.0, f32::max));
        before = Box::new(delta);
    }
    // Errors that added up would be several times that of one.
    assert!(errors[4] < 1.5 * errors[0], "{errors:?}");

    // And what was lost stays lost, and labelled, when the chain is cut; an exact successor is exact.
    let alone = folder.path().join("alone.safetensors");
    write(&alone, None, &*before, &Options::default()).unwrap();
    assert_eq!(
        open(&alone).unwrap().lossy(),
        open(&path(5)).unwrap().lossy()
    );
    let exact = folder.path().join("exact.safetensors");
    write(
        &exact,
        Some(&beside(&*before)),
        &memory(&target),
        &Options::default(),
    )
    .unwrap();
    let exact = open(&exact).unwrap();
    assert!(exact.lossy().is_empty());
    check(&exact.beside(Some(before)).unwrap(), &target);
}

#[test]
fn d3_only_matrices_of_floats_lose_anything_and_nothing_that_is_said_to_be_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = (state(0), state(1));
    let parent = memory(&before);
    let is_lossy = |options: &Options| -> Vec<String> {
        write(&path, Some(&beside(&parent)), &memory(&after), options).unwrap();
        let opened = open(&path).unwrap();
        let lossy: Vec<String> = opened.lossy().into_keys().collect();
        let back = restored(&opened.beside(Some(Box::new(&parent))).unwrap()).unwrap();
        for (info, bytes) in &after {
            assert!(
                lossy.contains(&info.name) || back[&info.name] == *bytes,
                "{}",
                info.name
            );
        }
        lossy
    };
    let mut options = lossy(Method::Int8);
    options.moments = moments();
    assert_eq!(
        is_lossy(&options),
        ["a.weight", "a.weight.moment_1", "a.weight.moment_2"]
    );
    let exact = ["a.weight.moment_1", "a.weight.moment_2"].map(str::to_string);
    options.lossy.as_mut().unwrap().exact = exact.into();
    assert_eq!(is_lossy(&options), ["a.weight"]);
}

#[test]
fn d3_means_of_squares_are_rounded_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let of = |time: u32| -> State {
        let value = |i: u32| ((i as f32 * 0.7 + time as f32).sin().powi(2) * 1e-6).to_le_bytes();
        let names = ["m", "v"];
        names
            .map(|name| {
                (
                    info(name, Dtype::F32, &[200, 300]),
                    (0..60_000).flat_map(value).collect(),
                )
            })
            .into()
    };
    let (before, after) = (of(0), of(1));
    for method in [Method::OneBit, Method::Int4, Method::LowRank] {
        let options = Options {
            moments: vec![Moments {
                first: "m".into(),
                second: "v".into(),
                parameter: None,
                step: None,
            }],
            ..lossy(method)
        };
        let parent = memory(&before);
        write(&path, Some(&beside(&parent)), &memory(&after), &options).unwrap();
        let opened = open(&path).unwrap();
        assert_eq!(opened.lossy()["v"].method, Method::Int8);
        let back = restored(&opened.beside(Some(Box::new(&parent))).unwrap()).unwrap();
        let (was, is) = (
            floats(Dtype::F32, &after[1].1),
            floats(Dtype::F32, &back["v"]),
        );
        assert!(was.iter().zip(&is).all(|(was, is)| is >= was));
    }
}

#[test]
fn d3_energy_that_is_not_kept_makes_it_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = moved(Dtype::F32, &[300, 500], 0.3);
    let parent = memory(&before);
    let mut options = lossy(Method::OneBit);
    // A sign keeps less than two thirds of most.
    for (energy, is_exact) in [(0.2, false), (0.95, true)] {
        options.lossy.as_mut().unwrap().energy = Some(energy);
        write(&path, Some(&beside(&parent)), &memory(&after), &options).unwrap();
        let opened = open(&path).unwrap();
        assert_eq!(opened.lossy().is_empty(), is_exact);
        if is_exact {
            check(&opened.beside(Some(Box::new(&parent))).unwrap(), &after);
        }
    }
    // Nothing moved, and what moved by little is smaller without loss.
    write(
        &path,
        Some(&beside(&parent)),
        &memory(&before),
        &lossy(Method::Int8),
    )
    .unwrap();
    assert_eq!(open(&path).unwrap().codecs(), Default::default());
    let mut few = before.clone();
    few[0].1[4000] ^= 3;
    write(
        &path,
        Some(&beside(&parent)),
        &memory(&few),
        &lossy(Method::Int8),
    )
    .unwrap();
    check(
        &open(&path)
            .unwrap()
            .beside(Some(Box::new(&parent)))
            .unwrap(),
        &few,
    );
}

/// A child that is its parent and a matrix of this rank.
pub(super) fn of_rank(dtype: Dtype, [rows, cols]: [usize; 2], rank: usize) -> (State, State) {
    let wave = |i: usize, by: f32| (i as f32 * by + 0.3).sin();
    let put = |value: f32| -> Vec<u8> {
        match dtype {
            Dtype::F32 => value.to_le_bytes().to_vec(),
            _ => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        }
    };
    let parent = |i: usize| wave(i * i % 10_007, 0.913);
    let change = |i: usize| -> f32 {
        let (row, col) = (i / cols, i % cols);
        (0..rank)
            .map(|k| wave(row * (k + 1), 0.71 + k as f32) * wave(col * (k + 2), 1.3))
            .sum()
    };
    let of = |value: &dyn Fn(usize) -> f32| -> State {
        let bytes = (0..rows * cols).flat_map(|i| put(value(i))).collect();
        vec![(info("w", dtype, &[rows, cols]), bytes)]
    };
    (of(&parent), of(&|i| parent(i) + 0.1 * change(i)))
}

#[test]
fn d3_a_product_is_found_and_has_the_energy_that_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    for (dtype, energy, most) in [
        (Dtype::F32, None, 0.05f32),
        (Dtype::F32, Some(0.999), 0.001),
        (Dtype::BF16, Some(0.9), 0.1),
    ] {
        let (before, after) = of_rank(dtype, [700, 431], 12);
        let parent = memory(&before);
        let mut options = lossy(Method::LowRank);
        options.lossy.as_mut().unwrap().energy = energy;
        let written = write(&path, Some(&beside(&parent)), &memory(&after), &options).unwrap();
        let factors = 12 * (700 + 431 + 4) as u64;
        assert!(written.bytes < 2 * factors, "{} {factors}", written.bytes);
        let opened = open(&path).unwrap();
        let record = opened.lossy()["w"];
        assert!(record.relative_error.powi(2) <= most + 1e-6, "{record:?}");
        let back = restored(&opened.beside(Some(Box::new(&parent))).unwrap()).unwrap();
        let pairs = floats(dtype, &back["w"])
            .into_iter()
            .zip(floats(dtype, &after[0].1));
        let largest = pairs.map(|(is, was)| (is - was).abs()).fold(0.0, f32::max);
        assert!(largest <= record.largest_error && largest > 0.0);
    }
    // Nor do numbers that are not finite keep it from being one: they come back as they are.
    let (before, mut after) = of_rank(Dtype::F32, [700, 431], 12);
    after[0].1[400..404].copy_from_slice(&f32::NAN.to_le_bytes());
    let parent = memory(&before);
    let options = lossy(Method::LowRank);
    write(&path, Some(&beside(&parent)), &memory(&after), &options).unwrap();
    let opened = open(&path).unwrap();
    assert!(opened.lossy().contains_key("w"));
    let back = restored(&opened.beside(Some(Box::new(&parent))).unwrap()).unwrap();
    assert_eq!(back["w"][400..404], f32::NAN.to_le_bytes());
    // What has no low rank is exact.
    let (before, after) = moved(Dtype::F32, &[300, 500], 0.3);
    let parent = memory(&before);
    write(
        &path,
        Some(&beside(&parent)),
        &memory(&after),
        &lossy(Method::LowRank),
    )
    .unwrap();
    let opened = open(&path).unwrap();
    assert!(opened.lossy().is_empty());
    check(&opened.beside(Some(Box::new(&parent))).unwrap(), &after);
}

#[test]
fn d3_every_changed_byte_of_a_lossy_file_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    for method in [
        Method::Int8,
        Method::Hybrid,
        Method::OneBit,
        Method::LowRank,
    ] {
        let (before, after) = match method {
            Method::LowRank => of_rank(Dtype::F32, [60, 70], 1),
            _ => moved(Dtype::F32, &[20, 30], 0.3),
        };
        let parent = memory(&before);
        write(
            &path,
            Some(&beside(&parent)),
            &memory(&after),
            &lossy(method),
        )
        .unwrap();
        assert!(!open(&path).unwrap().lossy().is_empty(), "{method:?}");
        let good = std::fs::read(&path).unwrap();
        for byte in 0..good.len() {
            let mut bad = good.clone();
            bad[byte] ^= 1 << (byte % 8);
            std::fs::write(&path, &bad).unwrap();
            let read = open(&path).and_then(|opened| opened.beside(Some(Box::new(&parent))));
            assert!(
                read.and_then(|delta| restored(&delta)).is_err(),
                "{method:?}: byte {byte}"
            );
        }
    }
}

proptest::proptest! {
    /// What a record may say takes no more room than was left for it.
    #[test]
    fn d3_no_record_is_longer_than_was_foreseen(largest: u32, relative: u32) {
        let of = |bits: u32| f32::from_bits(bits & 0x7f7f_ffff);
        let record = LossRecord { method: Method::LowRank, largest_error: of(largest), relative_error: of(relative) };
        let length = |record: &LossRecord| serde_json::to_string(record).unwrap().len();
        proptest::prop_assert!(length(&record) <= length(&crate::delta::lossy::LossRecord::longest()));
    }
}
