//! Tests of extra state.

use std::fs;

use burn::tensor::DType;
use proptest::prelude::*;

use super::*;
use crate::delta::Method;
use crate::extra::ExtraState;

fn tensor(dtype: DType, elements: usize, seed: u8) -> TensorData {
    // Random bit patterns, including NaN payloads.
    let bytes = (0..elements * dtype.size())
        .map(|i| (i as u8).wrapping_mul(37).wrapping_add(seed))
        .collect();
    TensorData::from_bytes_vec(bytes, [elements], dtype)
}

const DTYPES: [DType; 8] = [
    DType::F64,
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::I64,
    DType::I32,
    DType::U32,
    DType::U8,
];

/// Four owners: one with tensors of every dtype and scalars, one with tensors only, one with
/// scalars only, and one with neither.
fn extras(seed: u8) -> Extras {
    let tensors = DTYPES
        .iter()
        .map(|&dtype| (format!("w.{dtype:?}.x"), tensor(dtype, 301, seed)));
    let scalars = [
        ("a.b".to_string(), StateScalar::Float(-0.1)),
        ("count".to_string(), StateScalar::Uint(u64::MAX)),
        ("flag".to_string(), StateScalar::Bool(true)),
    ];
    let plain = ExtraState {
        tensors: [("w".to_string(), tensor(DType::F32, 2000, seed))].into(),
        ..ExtraState::default()
    };
    let counter = ExtraState {
        scalars: [("n".to_string(), StateScalar::Int(-i64::from(seed)))].into(),
        ..ExtraState::default()
    };
    Extras::from([
        (
            "feedback-2_b".to_string(),
            ExtraState {
                tensors: tensors.collect(),
                scalars: scalars.into(),
            },
        ),
        ("plain".to_string(), plain),
        ("counter".to_string(), counter),
        ("present".to_string(), ExtraState::default()),
    ])
}

/// Compares bits, because NaN does not equal NaN.
fn same(found: &Extras, expected: &Extras) {
    let owners = |extras: &Extras| extras.keys().cloned().collect::<Vec<_>>();
    assert_eq!(owners(found), owners(expected));
    for (owner, state) in expected {
        assert_eq!(found[owner].scalars, state.scalars, "{owner}");
        let bits = |tensors: &Tensors| -> Vec<_> {
            let of = |(name, data): (&String, &TensorData)| {
                let shape = data.shape().as_slice().to_vec();
                (name.clone(), data.dtype(), shape, data.as_bytes().to_vec())
            };
            tensors.iter().map(of).collect()
        };
        assert_eq!(bits(&found[owner].tensors), bits(&state.tensors), "{owner}");
    }
}

fn with_extras(step: u64, extra: Extras) -> Capture {
    Capture {
        extra,
        ..capture(step)
    }
}

fn save_with(store: &CheckpointStore, step: u64, extra: Extras, options: &ChainOptions) {
    let capture = with_extras(step, extra);
    let saved = store.save_delta(&at(step), &capture, options).unwrap();
    assert_eq!(told(&saved.warnings), Vec::<String>::new());
}

fn save_whole(store: &CheckpointStore, step: u64, extra: Extras) -> PathBuf {
    let Capture {
        weights, optimizer, ..
    } = capture(step);
    store
        .save(&at(step), || weights, || optimizer, || extra)
        .unwrap()
}

#[test]
fn every_owner_comes_back_from_a_whole_checkpoint() {
    let (_folder, store) = store();
    let folder = save_whole(&store, 1, extras(7));
    assert_eq!(names_in(&folder), [EXTRA, MODEL, OPTIMIZER, STATE]);
    same(&store.load(1).unwrap().extra, &extras(7));
    store.verify(1).unwrap();
    let listed = &store.list().unwrap()[0];
    let files =
        [EXTRA, MODEL, OPTIMIZER].map(|name| fs::metadata(folder.join(name)).unwrap().len());
    let tensor_bytes = listed.details.as_ref().unwrap().tensor_bytes;
    assert_eq!(tensor_bytes, files.iter().sum::<u64>());
    assert!(listed.bytes > tensor_bytes);
    // The weights can be read without extra.safetensors.
    fs::remove_file(folder.join(EXTRA)).unwrap();
    assert!(store.load_model(1).is_ok());
    assert!(store.load(1).is_err());

    // Without tensors there is no such file.
    let mut scalars = extras(1);
    scalars.retain(|_, state| state.tensors.is_empty());
    let folder = save_whole(&store, 2, scalars.clone());
    assert_eq!(names_in(&folder), [MODEL, OPTIMIZER, STATE]);
    same(&store.load(2).unwrap().extra, &scalars);
    let progress = Progress { tokens: 7, ..at(2) };
    store.renew(&progress).unwrap();
    same(&store.load(2).unwrap().extra, &scalars);
}

#[test]
fn every_owner_comes_back_from_a_chain_alone_and_restored() {
    let (_folder, store) = store();
    for step in 1..=3 {
        save_with(&store, step, extras(step as u8), &ChainOptions::exact(9));
    }
    use Stored::{Alone, Beside};
    let expected = [(1, Alone), (2, Beside(1)), (3, Beside(2))];
    assert_eq!(stored(&store), expected);
    for step in 1..=3 {
        let read = store.load(step).unwrap();
        same(&read.extra, &extras(step as u8));
        assert_eq!(read.model.tensors(), capture(step).weights);
        assert_eq!(read.optimizer.tensors, capture(step).optimizer.tensors);
        store.verify(step).unwrap();
    }
    let weights = store.load_model(2).unwrap();
    assert_eq!(weights, Weights::Own(capture(2).weights));
    store.squash(3).unwrap();
    same(&store.load(3).unwrap().extra, &extras(3));

    let run = tempfile::tempdir().unwrap();
    let out = step_folder(run.path(), 2);
    fs::create_dir(run.path().join("checkpoints")).unwrap();
    store.restore(2, &out).unwrap();
    assert_eq!(names_in(&out), [EXTRA, MODEL, OPTIMIZER, STATE]);
    let whole = CheckpointStore::new(run.path());
    assert_eq!(stored(&whole), [(2, Stored::Whole)]);
    same(&whole.load(2).unwrap().extra, &extras(2));
}

#[test]
fn owners_and_tensors_may_come_go_and_change_shape_within_a_chain() {
    let (_folder, store) = store();
    let mut of: Vec<Extras> = vec![Extras::new(), extras(1)];
    let mut changed = extras(2);
    changed.remove("plain");
    let feedback = &mut changed.get_mut("feedback-2_b").unwrap().tensors;
    feedback.remove("w.F16.x");
    feedback.insert("w.F32.x".to_string(), tensor(DType::F32, 17, 9));
    feedback.insert("w.I64.x".to_string(), tensor(DType::F64, 301, 9));
    feedback.insert("empty".to_string(), tensor(DType::F32, 0, 0));
    of.push(changed);
    of.push(Extras::new());
    for (step, extra) in (1..).zip(&of) {
        save_with(&store, step, extra.clone(), &ChainOptions::exact(9));
    }
    let kinds: Vec<Stored> = stored(&store).into_iter().map(|(_, kind)| kind).collect();
    use Stored::{Alone, Beside};
    assert_eq!(kinds, [Alone, Beside(1), Beside(2), Beside(3)]);
    for (step, extra) in (1..).zip(&of) {
        same(&store.load(step).unwrap().extra, extra);
    }
}

#[test]
fn nothing_of_it_is_ever_lost() {
    let (_folder, store) = store();
    let options = ChainOptions {
        lossy: Some(Method::OneBit),
        lossy_moments: true,
        ..ChainOptions::exact(9)
    };
    let matrix = |step: u64| {
        // Names like those of an Adam pair and of a weight, with values that change as theirs do.
        let moved = capture(step);
        let mut tensors = moved.optimizer.tensors;
        tensors.extend(moved.weights);
        let state = ExtraState {
            tensors,
            ..ExtraState::default()
        };
        Extras::from([("model".to_string(), state)])
    };
    for step in 1..=3 {
        save_with(&store, step, matrix(step), &options);
        same(&store.load(step).unwrap().extra, &matrix(step));
    }
    assert_eq!(store.lossy(3).unwrap(), Some(Method::OneBit));
}

#[test]
fn a_state_that_cannot_be_saved_is_refused_and_leaves_nothing() {
    let (folder, store) = store();
    let named = |owner: &str| Extras::from([(owner.to_string(), ExtraState::default())]);
    let of = |state: ExtraState| Extras::from([("x".to_string(), state)]);
    let nan = ExtraState {
        scalars: [("n".to_string(), StateScalar::Float(f64::NAN))].into(),
        ..ExtraState::default()
    };
    let bool = ExtraState {
        tensors: [("t".to_string(), TensorData::new(vec![true], [1]))].into(),
        ..ExtraState::default()
    };
    let wrong = [
        (named(""), "other letters"),
        (named("a.b"), "other letters"),
        (named("Ab"), "other letters"),
        (named("ä"), "other letters"),
        (of(nan), "scalar `n` is NaN"),
        (of(bool), "tensor `t` is of Bool"),
    ];
    for (extra, message) in wrong {
        let Capture {
            weights, optimizer, ..
        } = capture(1);
        let whole = store.save(&at(1), || weights, || optimizer, || extra.clone());
        let chain = store.save_delta(&at(1), &with_extras(1, extra), &ChainOptions::exact(3));
        for error in [whole.unwrap_err(), chain.unwrap_err()] {
            assert!(matches!(error, CheckpointError::Extra { .. }), "{error}");
            assert!(error.to_string().contains(message), "{error}");
        }
    }
    let left = folder.path().join("checkpoints");
    assert!(!left.exists() || names_in(&left).is_empty());
}

#[test]
fn what_was_changed_is_noticed() {
    let (_folder, store) = store();
    let folder = save_whole(&store, 1, extras(3));
    let path = folder.join(EXTRA);
    let good = fs::read(&path).unwrap();
    for byte in (0..good.len()).step_by(97) {
        let mut bad = good.clone();
        bad[byte] ^= 1;
        for bad in [&bad[..], &good[..byte]] {
            fs::write(&path, bad).unwrap();
            let error = store.load(1).unwrap_err();
            assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
        }
    }
    fs::write(&path, &good).unwrap();
    assert!(store.load(1).is_ok());
    let text = fs::read_to_string(folder.join(STATE)).unwrap();
    let state: serde_json::Value = serde_json::from_str(&text).unwrap();
    let changes: [fn(&mut serde_json::Value); 5] = [
        |state| drop(state.as_object_mut().unwrap().remove("extra")),
        |state| drop(state["extra"].as_object_mut().unwrap().remove("present")),
        |state| drop(state["blake3"].as_object_mut().unwrap().remove("extra")),
        |state| state["extra"]["counter"]["n"] = serde_json::json!({"int": 4}),
        |state| state["extra"]["other"] = serde_json::json!({}),
    ];
    for change in changes {
        let mut bad = state.clone();
        change(&mut bad);
        assert_ne!(bad, state);
        fs::write(folder.join(STATE), bad.to_string()).unwrap();
        let error = store.load(1).unwrap_err();
        assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
        assert!(store.verify(1).is_err() && store.load_model(1).is_err());
    }
    fs::write(folder.join(STATE), text).unwrap();
    store.verify(1).unwrap();
}

#[test]
fn tensors_of_an_owner_that_state_json_does_not_know_are_an_error() {
    let (folder, store) = store();
    save_with(&store, 1, extras(1), &ChainOptions::exact(9));
    let path = step_folder(folder.path(), 1);
    let state = super::super::state::State::read(&path, 1).unwrap();
    let contents = super::super::state::Contents {
        optimizer_families: Default::default(),
        progress: state.progress.clone(),
        optimizer: state.optimizer.clone(),
        extra: Default::default(),
    };
    let form = state.form().unwrap();
    let forged = super::super::state::State::new(&path, contents, form).unwrap();
    forged.replace(&path).unwrap();
    for error in [store.load(1).unwrap_err(), store.verify(1).unwrap_err()] {
        assert!(error.to_string().contains("knows no owner"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any valid names and any bits, in both formats.
    #[test]
    fn any_extra_state_comes_back(
        owners in prop::collection::btree_map(
            "[a-z0-9_-]{1,12}",
            (
                prop::collection::btree_map(".{0,12}", (0usize..8, prop::collection::vec(any::<u8>(), 0..40)), 0..4),
                prop::collection::btree_map(".{0,12}", any::<u64>(), 0..4),
            ),
            0..4,
        ),
    ) {
        let extra: Extras = owners
            .into_iter()
            .map(|(owner, (tensors, scalars))| {
                let tensors = tensors.into_iter().map(|(name, (dtype, bytes))| {
                    let dtype = DTYPES[dtype];
                    let elements = bytes.len() / dtype.size();
                    let bytes = bytes[..elements * dtype.size()].to_vec();
                    (name, TensorData::from_bytes_vec(bytes, [elements], dtype))
                });
                let scalars = scalars.into_iter().map(|(name, n)| (name, StateScalar::Uint(n)));
                (owner, ExtraState { tensors: tensors.collect(), scalars: scalars.collect() })
            })
            .collect();
        let (_folder, store) = store();
        save_whole(&store, 1, extra.clone());
        save_with(&store, 2, extras(1), &ChainOptions::exact(9));
        save_with(&store, 3, extra.clone(), &ChainOptions::exact(9));
        for step in [1, 3] {
            same(&store.load(step).unwrap().extra, &extra);
            store.verify(step).unwrap();
        }
    }
}
