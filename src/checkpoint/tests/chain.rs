//! Tests of delta checkpoints and keyframes.

use super::*;

#[test]
fn d5_every_third_stands_alone_and_every_step_comes_back() {
    let (_folder, store) = store();
    for step in 1..=7 {
        save_delta(&store, step);
    }
    use Stored::{Alone, Beside};
    let expected = [
        Alone,
        Beside(1),
        Beside(2),
        Alone,
        Beside(4),
        Beside(5),
        Alone,
    ];
    assert_eq!(stored(&store), (1..).zip(expected).collect::<Vec<_>>());
    for step in [7, 1, 3, 6, 2, 5, 4] {
        check(&store, step);
    }
    let list = store.list().unwrap();
    let bytes = |listed: &Listed| listed.details.as_ref().unwrap().tensor_bytes;
    assert!(list.iter().all(|listed| bytes(listed) == 24_000));
    assert!(
        list[1].bytes < list[0].bytes && list[0].bytes < 25_500,
        "{list:?}"
    );
}

#[test]
fn d5_what_is_needed_stands_alone_before_what_it_needs_is_deleted() {
    let (_folder, store) = store();
    for step in 1..=3 {
        save_delta(&store, step);
    }
    store.mark_best(2).unwrap();
    save_delta(&store, 4);
    assert_eq!(rotate(&store, 1), [1]);
    use Stored::{Alone, Beside};
    assert_eq!(stored(&store), [(2, Alone), (3, Beside(2)), (4, Alone)]);
    save_delta(&store, 5);
    assert_eq!(rotate(&store, 1), [3]);
    assert_eq!(stored(&store), [(2, Alone), (4, Alone), (5, Beside(4))]);
    store.squash(5).unwrap();
    store.squash(4).unwrap();
    assert_eq!(stored(&store), [(2, Alone), (4, Alone), (5, Alone)]);
    assert_eq!(store.discard_after(2).unwrap(), [5, 4]);
    save_delta(&store, 6);
    assert_eq!(stored(&store), [(2, Alone), (6, Beside(2))]);
    check(&store, 2);
    check(&store, 6);
}

#[test]
fn d5_whole_checkpoints_and_chains_go_together() {
    let (_folder, store) = store();
    save(&store, 1);
    save_delta(&store, 2);
    save_delta(&store, 3);
    save(&store, 4);
    save_delta(&store, 5);
    use Stored::{Alone, Beside, Whole};
    let expected = [
        (1, Whole),
        (2, Alone),
        (3, Beside(2)),
        (4, Whole),
        (5, Alone),
    ];
    assert_eq!(stored(&store), expected);
    assert_eq!(store.load(4).unwrap().progress.step, 4);
    check(&store, 3);
    assert!(store.squash(1).is_ok());
}

#[test]
fn d8_another_model_begins_a_chain_and_another_optimizer_does_not() {
    let (_folder, store) = store();
    let config =
        |width: u64| serde_json::json!({"hidden_size": width, "eps": 1e-5, "base": 10000.0});
    let save = |step: u64, config: serde_json::Value, change: fn(&mut Tensors)| {
        let mut capture = Capture {
            config,
            ..capture(step)
        };
        change(&mut capture.optimizer.tensors);
        let options = ChainOptions::exact(20);
        let saved = store.save_delta(&at(step), &capture, &options).unwrap();
        assert_eq!(told(&saved.warnings), Vec::<String>::new());
        let read = store.load(step).unwrap();
        assert_eq!(read.model.tensors(), capture.weights);
        assert_eq!(read.optimizer.tensors, capture.optimizer.tensors);
        store.list().unwrap().pop().unwrap().details.unwrap().stored
    };
    let same = |_: &mut Tensors| ();
    use Stored::{Alone, Beside};
    assert_eq!(save(1, serde_json::Value::Null, same), Alone);
    assert_eq!(save(2, serde_json::Value::Null, same), Beside(1));
    // First an adapter's weights, then all weights.
    assert_eq!(save(3, config(8), same), Alone);
    assert_eq!(save(4, config(8), same), Beside(3));
    // First momentum only, then no state, then another shape, then Adam again.
    let alone = |tensors: &mut Tensors| drop(tensors.remove("w.momentum.moment_2"));
    assert_eq!(save(5, config(8), alone), Beside(4));
    assert_eq!(save(6, config(8), Tensors::clear), Beside(5));
    let reshaped = |tensors: &mut Tensors| {
        let rows = TensorData::new(vec![0.5f32; 40], [40]);
        *tensors = Tensors::from([("w.momentum.moment_1".to_string(), rows)]);
    };
    assert_eq!(save(7, config(8), reshaped), Beside(6));
    assert_eq!(save(8, config(8), same), Beside(7));
    assert_eq!(save(9, config(16), same), Alone);
    assert_eq!(save(10, serde_json::Value::Null, same), Alone);
}

#[test]
fn d7_a_restored_step_is_a_whole_checkpoint() {
    let (_folder, store) = store();
    save_delta(&store, 1);
    save_delta(&store, 2);
    let run = tempfile::tempdir().unwrap();
    let out = run.path().join("checkpoints/step-000002");
    fs::create_dir(run.path().join("checkpoints")).unwrap();
    store.restore(2, &out).unwrap();
    let whole = CheckpointStore::new(run.path());
    assert_eq!(stored(&whole), [(2, Stored::Whole)]);
    let snapshot = whole.load(2).unwrap();
    assert_eq!(snapshot.model.tensors(), capture(2).weights);
    assert_eq!(snapshot.optimizer.tensors, capture(2).optimizer.tensors);
    assert_eq!(names_in(&out), [MODEL, OPTIMIZER, STATE]);
    assert!(store.restore(3, &run.path().join("x")).is_err());
    assert_eq!(names_in(run.path()), ["checkpoints"]);
}

#[test]
fn d3_lossy_weights_are_labelled_and_moments_are_exact_unless_asked_for() {
    let (_folder, store) = store();
    for (step, lossy_moments) in [(1, false), (2, false), (3, true)] {
        let progress = Progress {
            step,
            ..Progress::default()
        };
        let options = ChainOptions {
            lossy: Some(Method::Int4),
            lossy_moments,
            ..ChainOptions::exact(9)
        };
        let mut capture = capture(step);
        // The second moment alone is not a pair of Adam's.
        let squares = capture.optimizer.tensors["w.momentum.moment_2"].clone();
        let other = &mut capture.optimizer.tensors;
        other.insert("v.momentum.row_avg".to_string(), squares.clone());
        store.save_delta(&progress, &capture, &options).unwrap();
        store.verify(step).unwrap();
        let read = store.load(step).unwrap();
        let weights = read.model.tensors();
        assert_eq!(
            weights == capture.weights,
            step == 1,
            "the first stands alone"
        );
        assert_eq!(read.optimizer.tensors["v.momentum.row_avg"], squares);
        let moments = capture.optimizer.tensors;
        assert_eq!(read.optimizer.tensors == moments, !lossy_moments);
        for (name, moment) in &moments {
            let read = read.optimizer.tensors[name].iter::<f32>();
            let mut pairs = read.zip(moment.iter::<f32>());
            assert!(
                pairs.all(|(read, saved)| (read - saved).abs() < 1e-5),
                "{name}"
            );
        }
    }
    let labels: Vec<_> = store
        .list()
        .unwrap()
        .iter()
        .map(|listed| listed.details.as_ref().unwrap().lossy)
        .collect();
    assert_eq!(labels, [None, Some(Method::Int4), Some(Method::Int4)]);
    assert_eq!(store.lossy(2).unwrap(), Some(Method::Int4));

    // The step still has the same tensors, whether it is a keyframe or not.
    let before = store.load(3).unwrap();
    store.squash(3).unwrap();
    let after = store.load(3).unwrap();
    assert_eq!(before.model, after.model);
    assert_eq!(store.lossy(3).unwrap(), Some(Method::Int4));
}
