use burn::module::Module;
use burn::tensor::TensorData;

use super::*;
use crate::config::Preset;
use crate::model::{DecoderSpec, Tensors, parameters, with_some_parameters};

const NORM: &str = "norm.weight";

fn device() -> Device {
    Device::flex()
}

fn model() -> Decoder {
    let spec = DecoderSpec {
        shape: Preset::Stories260K.shape(),
        vocab_size: 8,
        eos_token_id: None,
        bos_token_id: None,
    };
    Decoder::new(&spec, 1, &device().autodiff()).unwrap()
}

/// The model with this value in every element of its last norm.
fn with_norm(model: Decoder, value: f32) -> Decoder {
    let data = TensorData::new(vec![value; 64], [64]);
    let tensors = Tensors::from([(NORM.to_string(), data)]);
    with_some_parameters(model, tensors, &device().autodiff()).unwrap()
}

fn average(decay: f64, every: u64, start: u64) -> Average {
    Average::new(AverageSettings {
        decay,
        every,
        start,
    })
}

fn value(average: &Average, path: &str) -> Option<f64> {
    let state = average.state(&model());
    let value = state.tensors.get(path)?.iter::<f32>().next();
    value.map(f64::from)
}

fn count(average: &Average, path: &str) -> Option<StateScalar> {
    average.state(&model()).scalars.remove(path)
}

/// Values in no order.
fn weights(step: u64) -> f32 {
    ((step * 7919) % 13) as f32 - 6.0
}

/// The mean of the weights of steps 1 to `last`, with the share that each of them has in the end.
fn reference(decay: f64, last: u64) -> f64 {
    let mut shares = Vec::new();
    for count in 0..last {
        let kept = decay.min(count as f64 / (count as f64 + 1.0));
        shares.iter_mut().for_each(|share| *share *= kept);
        shares.push(1.0 - kept);
    }
    assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    let values = (1..=last).map(|step| f64::from(weights(step)));
    values.zip(shares).map(|(value, share)| value * share).sum()
}

#[test]
fn an_average_is_a_plain_mean_that_comes_to_forget() {
    for decay in [1.0, 0.9, 0.5] {
        let mut average = average(decay, 1, 0);
        assert!(!average.has_begun());
        let mut model = model();
        for step in 1..=30 {
            model = with_norm(model, weights(step));
            average.take(&model, step);
            let (found, expected) = (value(&average, NORM).unwrap(), reference(decay, step));
            assert!(
                (found - expected).abs() < 1e-5,
                "{decay} {step}: {found} {expected}"
            );
            // Of the first 1 / (1 - decay) weights it is the mean.
            if step as f64 <= 1.0 / (1.0 - decay) {
                let mean = (1..=step).map(|step| f64::from(weights(step))).sum::<f64>();
                let mean = mean / step as f64;
                assert!((found - mean).abs() < 1e-5, "{decay} {step}");
            }
        }
        // The parameters that did not move are their own average, without rounding.
        let own = average.state(&model).tensors;
        for (path, data) in parameters(&model) {
            assert_eq!(own[&path] == data, path != NORM, "{path}");
        }
    }
}

#[test]
fn weights_are_taken_in_after_the_start_and_every_so_often() {
    let mut average = average(1.0, 3, 4);
    let mut model = model();
    let mut due = Vec::new();
    for step in 1..=14 {
        model = with_norm(model, step as f32);
        let before = count(&average, NORM);
        average.take(&model, step);
        if count(&average, NORM) != before {
            due.push(step);
        }
        assert_eq!(average.take_begun(), step == 7);
    }
    assert_eq!(due, [7, 10, 13]);
    assert_eq!(value(&average, NORM), Some(10.0));
    assert_eq!(count(&average, NORM), Some(StateScalar::Uint(3)));
}

#[test]
fn a_frozen_parameter_keeps_its_average_and_a_thawed_one_begins_its_own() {
    let frozen = |names: &[&str], value| {
        let names: Vec<_> = names.iter().map(|name| name.parse().unwrap()).collect();
        with_norm(model(), value).with_frozen(&names).unwrap()
    };
    let mut average = average(1.0, 1, 0);
    average.take(&frozen(&["embed_tokens"], 2.0), 1);
    average.take(&frozen(&["embed_tokens"], 4.0), 2);
    let embedding = "embed_tokens.weight";
    assert_eq!(value(&average, embedding), None);
    average.take(&frozen(&["norm"], 8.0), 3);
    assert_eq!(value(&average, NORM), Some(3.0));
    let uint = |count| Some(StateScalar::Uint(count));
    assert_eq!(count(&average, NORM), uint(2));
    assert_eq!(count(&average, embedding), uint(1));
    average.take(&frozen(&[], 9.0), 4);
    assert_eq!(value(&average, NORM), Some(5.0));

    assert!(average.begin_anew() && !average.has_begun());
    assert!(!average.begin_anew());
}

#[test]
fn the_average_takes_the_place_of_the_weights_that_have_one() {
    let model = with_norm(model(), 1.0);
    let model = model
        .with_frozen(&["embed_tokens".parse().unwrap()])
        .unwrap();
    let mut average = average(1.0, 1, 0);
    let plain = parameters(&model.valid());
    assert_eq!(parameters(&average.put_into(model.valid())), plain);
    average.take(&model, 1);
    let moved = with_norm(model, 5.0);
    average.take(&moved, 2);
    let found = parameters(&average.put_into(moved.valid()));
    let expected = parameters(&with_norm(moved, 3.0));
    assert_eq!(found, expected);
}

#[test]
fn a_saved_average_is_restored_bit_for_bit_or_refused() {
    let mut saved = average(0.9, 1, 2);
    let mut model = model();
    for step in 3..9 {
        model = with_norm(model, weights(step) / 7.0);
        saved.take(&model, step);
    }
    let state = saved.state(&model);
    let load = |start, state: ExtraState| {
        let mut restored = average(0.9, 1, start);
        let loaded = restored.load(state, (&model, &device()), 8);
        loaded.map(|()| restored)
    };
    let mut restored = load(2, state.clone()).unwrap();
    assert!(restored.has_begun() && !restored.take_begun());
    let model = with_norm(model.clone(), 0.3);
    saved.take(&model, 9);
    restored.take(&model, 9);
    assert_eq!(restored.state(&model), saved.state(&model));

    let moved = load(3, state.clone()).unwrap_err();
    let (before, now) = (2, 3);
    let expected = TrainError::MovedAverage { before, now };
    assert_eq!(moved.to_string(), expected.to_string());
    // One that has not begun may begin elsewhere.
    let none = average(0.9, 1, 20).state(&model);
    assert!(!load(30, none).unwrap().has_begun());

    type Change = fn(&mut ExtraState);
    let changes: [(Change, &str); 5] = [
        (|state| _ = state.scalars.remove(START), START),
        (|state| _ = state.scalars.remove(NORM), NORM),
        (|state| drop(state.tensors.remove(NORM)), NORM),
        (
            |state| {
                let short = TensorData::new(vec![1.0f32; 63], [63]);
                state.tensors.insert(NORM.to_string(), short);
            },
            NORM,
        ),
        (
            |state| {
                let other = state.tensors[NORM].clone();
                state.tensors.insert("other".to_string(), other);
            },
            "other",
        ),
    ];
    for (change, what) in changes {
        let mut damaged = state.clone();
        change(&mut damaged);
        let message = load(2, damaged).unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
    }
}
