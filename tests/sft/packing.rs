//! R4, R6: rows in sequences.

use std::collections::BTreeSet;

use burn::tensor::Device;
use firebrick::config::Architecture;
use firebrick::config::Task;
use firebrick::data::{Batch, RowSampler, TrainRows, ViewSpec, load_training_data};
use firebrick::model::Decoder;
use firebrick::objective::backward;
use proptest::prelude::*;
use serde_json::json;

use crate::bench::Bench;

#[path = "../support/mod.rs"]
mod support;

/// Completions of these lengths.
fn bench(lengths: &[usize]) -> Bench {
    let mut bench = Bench::new();
    bench.data.sequence_len = 32;
    let row = |(index, &length): (usize, &usize)| {
        let letter = char::from(b'a' + (index % 26) as u8).to_string();
        json!({"prompt": "P", "completion": letter.repeat(length)})
    };
    bench.rows(&lengths.iter().enumerate().map(row).collect::<Vec<_>>());
    bench
}

fn train(bench: &Bench) -> Vec<TrainRows> {
    bench.load().train
}

fn decoder() -> Decoder {
    let mut spec = support::tiny(Architecture::Llama);
    spec.vocab_size = 260;
    spec.shape.max_position_embeddings = 64;
    Decoder::new(&spec, 1, &Device::flex().autodiff()).unwrap()
}

/// Loss and gradient norm of sequences, so many at a time.
fn measure(model: &Decoder, sampler: &RowSampler, rows: usize) -> (f64, f64, f64) {
    let sequences = sampler.sequences_per_epoch();
    let batches: Vec<Batch> = (0..sequences)
        .step_by(rows)
        .map(|first| sampler.batch(first, rows.min((sequences - first) as usize)))
        .collect();
    let found = backward(model, &batches).unwrap();
    (found.loss(), found.gradient.norm(), found.weight)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// Packing changes neither loss nor gradient, nor does the size of the micro-batch.
    #[test]
    fn r4_r6_packed_loss_is_unpacked_loss(lengths in proptest::collection::vec(1usize..30, 1..12)) {
        let bench = bench(&lengths);
        let train = train(&bench);
        let model = decoder();
        let packed = RowSampler::new(&train, 32, true, 7).unwrap();
        let alone = RowSampler::new(&train, 32, false, 7).unwrap();
        let wanted = measure(&model, &alone, 1);
        prop_assert_eq!(wanted.2, lengths.iter().map(|n| n + 1).sum::<usize>() as f64);
        for (sampler, rows) in [(&packed, 1), (&packed, 16), (&alone, 16), (&alone, 3)] {
            let found = measure(&model, sampler, rows);
            prop_assert!((found.0 - wanted.0).abs() < 1e-5, "{found:?} {wanted:?}");
            prop_assert!((found.1 - wanted.1).abs() < 1e-4 * wanted.1, "{found:?} {wanted:?}");
            prop_assert_eq!(found.2, wanted.2);
        }
    }
}

/// Another neighbour changes nothing about a row's loss.
#[test]
fn r4_attention_does_not_leak_between_rows() {
    let model = decoder();
    let sequence = |other: char| {
        let mut bench = Bench::new();
        bench.data.sequence_len = 32;
        bench.rows(&[
            json!({"prompt": "P", "completion": other.to_string().repeat(12)}),
            json!({"prompt": "P", "completion": "same"}),
        ]);
        RowSampler::new(&train(&bench), 32, true, 1)
            .unwrap()
            .batch(0, 1)
    };
    let nats = |batch: &Batch, wanted: &[u32]| {
        let mut batch = batch.clone();
        let start = batch
            .tokens
            .windows(wanted.len())
            .position(|at| at == wanted)
            .unwrap();
        for (at, weight) in batch.weights.iter_mut().enumerate() {
            *weight *= f32::from(u8::from((start..start + wanted.len()).contains(&at)));
        }
        assert_eq!(batch.positions[start], 0, "positions start anew");
        backward(&model, &[batch]).unwrap().sums.loss
    };
    let row: Vec<u32> = "Psame".bytes().map(u32::from).collect();
    let (a, b) = (sequence('x'), sequence('y'));
    assert_ne!(a.tokens, b.tokens);
    assert_eq!(
        a.segment_ids.iter().collect::<BTreeSet<_>>().len(),
        3,
        "two rows and padding"
    );
    assert_eq!(nats(&a, &row), nats(&b, &row));
}

#[test]
fn r4_every_row_comes_once_per_epoch_whole_and_in_another_order() {
    let lengths: Vec<usize> = (0..40).map(|n| 1 + n * 7 % 29).collect();
    let train = train(&bench(&lengths));
    for packed in [true, false] {
        let sampler = RowSampler::new(&train, 32, packed, 3).unwrap();
        let sequences = sampler.sequences_per_epoch();
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let rows: Vec<(usize, usize)> = (0..sequences)
                .flat_map(|i| sampler.sequence(epoch * sequences + i))
                .collect();
            let all: BTreeSet<_> = rows.iter().copied().collect();
            assert_eq!((rows.len(), all.len()), (40, 40));
            orders.push(rows);
        }
        assert!(orders[0] != orders[1] && orders[1] != orders[2]);
        assert_eq!(
            sampler.targets_per_epoch() as usize,
            lengths.iter().map(|n| n + 1).sum::<usize>()
        );
    }
    let packed = RowSampler::new(&train, 32, true, 3).unwrap();
    let fill = packed.places_per_epoch() as f64 / (32 * packed.sequences_per_epoch()) as f64;
    assert!(fill > 0.9, "{fill}");
}

/// A batch is a function of seed and number, whatever was drawn before.
#[test]
fn r4_batches_do_not_depend_on_what_was_drawn_before() {
    let lengths: Vec<usize> = (0..17).map(|n| 1 + n * 5 % 23).collect();
    let mut train = train(&bench(&lengths));
    for weight in [1.0, 2.0, 0.3, 1.7] {
        train[0].weight = weight;
        let sampler = RowSampler::new(&train, 32, true, 9).unwrap();
        let far: Vec<_> = (0..60)
            .rev()
            .map(|number| sampler.sequence(number))
            .collect();
        let again = RowSampler::new(&train, 32, true, 9).unwrap();
        let near: Vec<_> = (0..60).map(|number| again.sequence(number)).collect();
        assert_eq!(far.into_iter().rev().collect::<Vec<_>>(), near);
        let rows = sampler.rows_per_epoch();
        assert_eq!(rows, (weight * 17.0).round() as u64);
        assert_ne!(
            RowSampler::new(&train, 32, true, 10).unwrap().sequence(0),
            near[0],
            "seed"
        );
    }
}

#[test]
fn r4_rows_end_where_they_end() {
    let train = train(&bench(&[3, 5]));
    let batch = RowSampler::new(&train, 32, true, 1).unwrap().batch(0, 1);
    // P bbbbb <end>, P aaa <end>: the longer one first, six and four places, then padding to 16.
    assert_eq!(batch.cols, 16);
    let letter = |c: char| u32::from(c);
    let end = 256;
    assert_eq!(
        batch.tokens[..10],
        ['P', 'b', 'b', 'b', 'b', 'b', 'P', 'a', 'a', 'a'].map(letter)
    );
    let mut targets = [0; 16];
    targets[..5].fill(letter('b'));
    targets[5] = end;
    targets[6..9].fill(letter('a'));
    targets[9] = end;
    assert_eq!(batch.targets, targets);
    assert_eq!(
        batch.segment_ids,
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    );
    assert_eq!(
        batch.positions,
        [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    );
    let weights: Vec<f32> = (0..16).map(|at| f32::from(u8::from(at < 10))).collect();
    assert_eq!(batch.weights, weights);
}

#[test]
fn r11_validation_sees_every_row_once() {
    let mut bench = bench(&(1..=20).collect::<Vec<_>>());
    bench.data.val_fraction = 0.5;
    bench.data.sequence_len = 32;
    let data = load_training_data(
        Task::Sft,
        &bench.data,
        &bench.tokenizer,
        &bench.cache(),
        std::time::SystemTime::now(),
    );
    let data = data.unwrap();
    let view = data.view(&ViewSpec::new(&bench.data, 1)).unwrap();
    for rows in [1, 4] {
        let batches = view.eval_batches(rows).unwrap();
        let weight: f64 = batches.map(|batch| batch.weight()).sum();
        assert_eq!(weight, (11..=20).map(|n| n + 1).sum::<usize>() as f64);
    }
    assert_eq!(data.val_bytes(), (11..=20).sum::<u64>());
}
