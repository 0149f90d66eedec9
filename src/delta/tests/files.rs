//! One file and chains of them.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

#[test]
fn d1_a_chain_of_files_gives_every_state_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = |i: u32| folder.path().join(format!("{i}.safetensors"));
    let states: Vec<State> = (0..4).map(state).collect();
    for i in 0..4u32 {
        let child = memory(&states[i as usize]);
        let written = if i == 0 {
            write(&path(0), None, &child, &Options::default()).unwrap()
        } else {
            let before = memory(&states[i as usize - 1]);
            write(&path(i), Some(&beside(&before)), &child, &with_moments()).unwrap()
        };
        assert_eq!(written.bytes, std::fs::metadata(path(i)).unwrap().len());
        assert!(
            i == 0 || written.bytes < written.state_bytes * 3 / 4,
            "{written:?}"
        );
        assert_eq!(written.state, hashes(&child).unwrap());
    }
    for last in 0..4u32 {
        let mut delta = open(&path(0)).unwrap().beside(None).unwrap();
        for i in 1..=last {
            let next = open(&path(i)).unwrap();
            assert_eq!(next.parent_id(), Some(delta.state().id.as_str()));
            delta = next.beside(Some(Box::new(delta))).unwrap();
        }
        check(&delta, &states[last as usize]);
    }
}

#[test]
fn d1_a_file_is_valid_safetensors_with_aligned_sections() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = (state(0), state(1));
    write(
        &path,
        Some(&beside(&memory(&before))),
        &memory(&after),
        &with_moments(),
    )
    .unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert!((8 + header) % 64 == 8);
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert!(tensors.len() > 3);
    for (name, info) in metadata.tensors() {
        assert!(
            info.dtype == Dtype::U8 && info.data_offsets.0 % 64 == 0,
            "{name}"
        );
    }
    assert!(
        !tensors.names().contains(&"still"),
        "a tensor that stays takes no room"
    );
}

/// A state small enough that every byte of its file can be spoiled.
fn small(time: u32) -> State {
    let tensors = [
        ("w", Dtype::F32, vec![40]),
        ("n", Dtype::BF16, vec![17]),
        ("k", Dtype::I64, vec![3]),
    ];
    let tensors = tensors.into_iter().enumerate();
    tensors
        .map(|(i, (name, dtype, shape))| {
            let elements = shape.iter().product();
            (
                info(name, dtype, &shape),
                bytes(dtype, elements, i as u32 + 1, time),
            )
        })
        .collect()
}

#[test]
fn d1_every_flipped_bit_and_every_truncation_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = (small(0), small(900));
    let parent = memory(&before);
    write(
        &path,
        Some(&beside(&parent)),
        &memory(&after),
        &Options::default(),
    )
    .unwrap();
    let read = || restored(&open(&path)?.beside(Some(Box::new(&parent)))?);
    assert!(read().is_ok());
    let good = std::fs::read(&path).unwrap();
    for byte in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[byte] ^= 1 << bit;
            std::fs::write(&path, &bad).unwrap();
            assert!(read().is_err(), "bit {bit} of byte {byte}");
        }
        std::fs::write(&path, &good[..byte]).unwrap();
        assert!(read().is_err(), "{byte} bytes");
    }
    let longer = [&good[..], &[0; 64]].concat();
    std::fs::write(&path, longer).unwrap();
    assert!(read().is_err());
}

#[test]
fn d1_another_parent_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = (state(0), state(1));
    write(
        &path,
        Some(&beside(&memory(&before))),
        &memory(&after),
        &with_moments(),
    )
    .unwrap();
    let error = |parent: &State| {
        let parent = memory(parent);
        let read = open(&path).unwrap().beside(Some(Box::new(&parent)));
        let error = read.and_then(|delta| restored(&delta)).unwrap_err();
        assert!(matches!(error, DeltaError::OtherParent { .. }), "{error}");
        error.to_string()
    };
    assert!(error(&state(2)).contains("was not made from memory: "));
    let mut other = state(0);
    other.retain(|(info, _)| info.name != "still");
    assert!(error(&other).ends_with("it has no tensor `still`"));
    let mut other = state(0);
    other
        .iter_mut()
        .filter(|(info, _)| info.name == "still")
        .for_each(|(info, _)| info.dtype = Dtype::F32);
    assert!(error(&other).ends_with("tensor `still` is F32 [64] there"));
    assert!(open(&path).unwrap().beside(None).is_err());
    // What was not asked for is not missed, and a parent that is known is held against what is known.
    let before = memory(&before);
    let mut known = hashes(&before).unwrap();
    known.tensors.insert("c".to_string(), "0".repeat(64));
    let parent = Parent {
        known: Some(known),
        ..beside(&before)
    };
    let error = write(&path, Some(&parent), &memory(&after), &Options::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("memory: tensor `c`: its BLAKE3 is another than it was saved with"),
        "{error}"
    );
}

#[test]
fn d8_tensors_may_come_go_change_shape_and_be_tied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let tensor = |name: &str, shape: &[usize], seed: u32, time: u32| {
        let bytes = bytes(Dtype::F32, shape.iter().product(), seed, time);
        (info(name, Dtype::F32, shape), bytes)
    };
    let before = vec![
        tensor("gone", &[9], 1, 0),
        tensor("turned", &[4, 6], 2, 0),
        tensor("grown", &[5], 3, 0),
        tensor("head", &[8, 8], 4, 0),
    ];
    let after = vec![
        tensor("new", &[700], 5, 0),
        tensor("turned", &[6, 4], 2, 1),
        tensor("grown", &[6], 3, 1),
        tensor("head", &[8, 8], 4, 1),
        tensor("embedding", &[8, 8], 4, 1),
    ];
    let before = memory(&before);
    let mut parent = beside(&before);
    parent
        .names
        .insert("embedding".to_string(), "head".to_string());
    write(&path, Some(&parent), &memory(&after), &with_moments()).unwrap();
    let delta = open(&path)
        .unwrap()
        .beside(Some(Box::new(&before)))
        .unwrap();
    check(&delta, &after);
}

#[test]
fn d1_hostile_indices_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("delta.safetensors");
    let (before, after) = (small(0), small(900));
    let parent = memory(&before);
    let try_with = |change: &dyn Fn(&mut serde_json::Value)| {
        write(
            &path,
            Some(&beside(&parent)),
            &memory(&after),
            &Options::default(),
        )
        .unwrap();
        with_index(&path, change);
        open(&path)?
            .beside(Some(Box::new(&parent)))
            .and_then(|delta| restored(&delta))
    };
    try_with(&|_| ()).unwrap();
    type Change = dyn Fn(&mut serde_json::Value);
    let hostile: [(&str, &Change); 16] = [
        ("a version to come", &|index| index["version"] = json!(3)),
        ("a huge shape", &|index| {
            index["tensors"][0]["shape"] = json!([u64::MAX, 8])
        }),
        ("a large shape", &|index| {
            index["tensors"][0]["shape"] = json!([1u64 << 50])
        }),
        ("a tensor twice", &|index| {
            index["tensors"][0]["name"] = json!("n")
        }),
        ("a section twice", &|index| {
            let section = index["sections"][0].clone();
            index["sections"].as_array_mut().unwrap().push(section);
        }),
        ("no section", &|index| {
            index["sections"][0]["tensors"] = json!([])
        }),
        ("a tensor that is not there", &|index| {
            index["sections"][0]["tensors"] = json!([9])
        }),
        ("more tensors than one", &|index| {
            index["sections"][0]["tensors"] = json!([0, 1])
        }),
        ("a huge section", &|index| {
            index["sections"][0]["bytes"] = json!(u64::MAX)
        }),
        ("a long section", &|index| {
            index["sections"][0]["bytes"] = json!(1u64 << 40)
        }),
        ("a short section", &|index| {
            index["sections"][0]["bytes"] = json!(1)
        }),
        ("no parent", &|index| index["parent"] = json!(null)),
        ("a parent of its own", &|index| {
            index["tensors"][0]["parent"] = json!("w")
        }),
        ("an unknown codec", &|index| {
            index["sections"][0]["codecs"] = json!({"magic": 1})
        }),
        ("an unknown key", &|index| index["more"] = json!(1)),
        ("no hash", &|index| {
            index["tensors"][0]["blake3"] = json!("")
        }),
    ];
    for (what, change) in hostile {
        assert!(try_with(change).is_err(), "{what}");
    }
}

/// Where there is a value in JSON, as pointers.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_string());
    match value {
        Value::Array(values) => {
            let all = values.iter().enumerate();
            all.for_each(|(i, value)| places(value, &format!("{at}/{i}"), found));
        }
        Value::Object(values) => {
            let all = values.iter();
            all.for_each(|(key, value)| places(value, &format!("{at}/{key}"), found));
        }
        _ => {}
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|value| json!(value)),
        (0u64..200).prop_map(|value| json!(value)),
        any::<u64>().prop_map(|value| json!(value)),
        any::<i64>().prop_map(|value| json!(value)),
        any::<f64>().prop_map(|value| json!(value)),
        "[a-z./]{0,12}".prop_map(|value| json!(value)),
        prop::collection::vec(0u64..9, 0..4).prop_map(|value| json!(value)),
        prop::collection::vec(any::<u64>(), 1..4).prop_map(|value| json!(value)),
        Just(json!({})),
    ]
}

#[derive(Debug, Clone)]
enum Mutation {
    Replace(prop::sample::Index, Value),
    /// The second value is put where the first is.
    Copy(prop::sample::Index, prop::sample::Index),
    /// Of a list or of an object the first, or once more.
    Shorten(prop::sample::Index),
    Repeat(prop::sample::Index),
}

impl Mutation {
    fn apply(&self, index: &mut Value) {
        let mut all = Vec::new();
        places(index, "", &mut all);
        let at = |place: &prop::sample::Index| &all[place.index(all.len())];
        let (place, value) = match self {
            Self::Replace(place, value) => (at(place), value.clone()),
            Self::Copy(place, other) => (at(place), index.pointer(at(other)).unwrap().clone()),
            Self::Shorten(place) | Self::Repeat(place) => {
                let place = at(place);
                let mut value = index.pointer(place).unwrap().clone();
                match (&mut value, self) {
                    (Value::Array(values), Self::Repeat(_)) => values.extend(values.clone()),
                    (Value::Array(values), _) => {
                        values.pop();
                    }
                    (Value::Object(values), _) => {
                        let first = values.keys().next().cloned();
                        first.and_then(|key| values.remove(&key));
                    }
                    _ => {}
                }
                (place, value)
            }
        };
        *index.pointer_mut(place).unwrap() = value;
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let place = any::<prop::sample::Index>;
    prop_oneof![
        (place(), any_value()).prop_map(|(place, value)| Mutation::Replace(place, value)),
        (place(), place()).prop_map(|(place, other)| Mutation::Copy(place, other)),
        place().prop_map(Mutation::Shorten),
        place().prop_map(Mutation::Repeat),
    ]
}

struct Written {
    file: Vec<u8>,
    before: State,
    /// What comes back.
    after: HashMap<String, Vec<u8>>,
}

/// Files with sections of every kind.
fn files_of_every_kind() -> &'static [Written] {
    static FILES: LazyLock<Vec<Written>> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("delta.safetensors");
        let lowrank = Options {
            lossy: Some(Lossy::new(Method::LowRank)),
            ..Options::default()
        };
        let (matrix, moved) = lossy::of_rank(Dtype::F32, [40, 50], 2);
        let cases = [
            (state(0), state(900), with_moments()),
            (small(0), small(900), Options::default()),
            (matrix, moved, lowrank),
        ];
        let written = |(before, after, options): (State, State, Options)| {
            let parent = memory(&before);
            write(&path, Some(&beside(&parent)), &memory(&after), &options).unwrap();
            let opened = open(&path).unwrap();
            let delta = opened.beside(Some(Box::new(&parent))).unwrap();
            Written {
                file: std::fs::read(&path).unwrap(),
                after: restored(&delta).unwrap(),
                before: before.clone(),
            }
        };
        cases.into_iter().map(written).collect()
    });
    &FILES
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Whatever an index says: an error, or nothing that was not saved.
    #[test]
    fn d1_any_index_is_an_error_or_tells_nothing_but_the_truth(
        which: prop::sample::Index,
        mutations in prop::collection::vec(mutation(), 1..4),
    ) {
        let Written { file, before, after } = which.get(files_of_every_kind());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("delta.safetensors");
        std::fs::write(&path, file).unwrap();
        with_index(&path, |index| mutations.iter().for_each(|mutation| mutation.apply(index)));
        let parent = memory(before);
        let read = open(&path)
            .and_then(|opened| opened.beside(Some(Box::new(&parent))))
            .and_then(|delta| restored(&delta));
        for (name, bytes) in read.into_iter().flatten() {
            let is_saved = after.values().any(|saved| *saved == bytes);
            prop_assert!(bytes.is_empty() || is_saved, "{name}");
        }
    }
}

/// A source that keeps account of what is asked for together.
struct Asked<'a>(&'a Delta<'a>, std::sync::Mutex<Vec<Vec<String>>>);

impl Source for Asked<'_> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.tensors()
    }

    fn read(
        &self,
        names: &[&str],
        chunk: usize,
    ) -> Result<Vec<std::borrow::Cow<'_, [u8]>>, DeltaError> {
        let asked = names.iter().map(ToString::to_string).collect();
        self.1.lock().unwrap().push(asked);
        self.0.read(names, chunk)
    }

    fn describe(&self) -> String {
        self.0.describe()
    }
}

#[test]
fn d5_what_is_coded_together_is_read_together_to_stand_alone() {
    let folder = tempfile::tempdir().unwrap();
    let [path, alone] = ["delta", "alone"].map(|name| folder.path().join(name));
    let (before, after) = (state(1), state(2));
    let (before, child) = (memory(&before), memory(&after));
    write(&path, Some(&beside(&before)), &child, &with_moments()).unwrap();
    let delta = open(&path)
        .unwrap()
        .beside(Some(Box::new(&before)))
        .unwrap();
    assert_eq!(delta.moments(), moments());

    let asked = Asked(&delta, Default::default());
    let options = Options {
        moments: delta.moments(),
        ..Options::default()
    };
    write(&alone, None, &asked, &options).unwrap();
    check(&open(&alone).unwrap().beside(None).unwrap(), &after);
    let asked = asked.1.into_inner().unwrap();
    let of_section = |names: &&Vec<String>| names.iter().any(|name| name.starts_with("a."));
    let of_section: Vec<_> = asked.iter().filter(of_section).collect();
    assert_eq!(of_section.len(), 2, "one for each chunk: {of_section:?}");
}
