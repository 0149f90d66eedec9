mod methods;
mod workers;

use std::time::Duration;

use burn::tensor::{Device, Tensor, TensorData};
use proptest::prelude::*;

use super::*;
use crate::collective::{Collective, SingleProcess, ThreadRank};
use crate::gradient::{Pipeline, Restored, StepContext};
use crate::model::Tensors;

/// A model of one matrix and one vector.
#[derive(burn::module::Module, Debug)]
struct Small {
    weight: burn::module::Param<Tensor<2>>,
    norm: burn::module::Param<Tensor<1>>,
}

const DIMS: [usize; 2] = [37, 130];

fn small(seed: u64) -> (Small, Tensors) {
    let device = Device::flex();
    let seed = Seed::new(seed);
    let values = |len: usize, seed: Seed| -> Vec<f32> {
        let value = |i| (seed.word(i) as u32) as f32 / 2f32.powi(31) - 1.0;
        (0..len as u64).map(value).collect()
    };
    let weight = TensorData::new(values(DIMS[0] * DIMS[1], seed), DIMS);
    let norm = TensorData::new(values(DIMS[1], seed.with(1)), [DIMS[1]]);
    let model = Small {
        weight: burn::module::Param::from_data(weight.clone(), &device),
        norm: burn::module::Param::from_data(norm.clone(), &device),
    };
    let tensors = [("weight", weight), ("norm", norm)];
    let tensors = tensors.map(|(path, data)| (path.to_string(), data));
    (model, tensors.into_iter().collect())
}

/// The gradient of a rank in a step: of any numbers.
fn gradient(rank: usize, step: u64) -> Gradient {
    let (model, _) = small(0);
    let order = std::sync::Arc::new(crate::gradient::ParameterOrder::of(&model));
    let (_, tensors) = small(1 + rank as u64 + 100 * step);
    Gradient::from_tensors(tensors, &order, &Device::flex()).expect("its own paths")
}

fn compressors() -> Vec<(&'static str, Box<dyn Compressor>)> {
    vec![
        ("top-k", Box::new(Sparse::top_k(0.02).unwrap())),
        ("ternary", Box::new(Sparse::ternary(0.05).unwrap())),
        ("rotated", Box::new(Sparse::rotated(0.05).unwrap())),
        ("sign", Box::new(Sign)),
    ]
}

/// So many steps of one rank, from `begin` on: the sums, the reports, and the state at the end.
fn steps_of(
    rank: &ThreadRank,
    (compressor, settings): (Box<dyn Compressor>, CompressionSettings),
    saved: Option<ExtraState>,
    steps: std::ops::Range<u64>,
) -> (Vec<Tensors>, Vec<ExchangeReport>, ExtraState) {
    let mut compression = Compression::new(compressor, settings).unwrap();
    if let Some(saved) = saved {
        compression.load(saved, rank).unwrap();
    }
    let (mut sums, mut reports) = (Vec::new(), Vec::new());
    for step in steps {
        let context = StepContext {
            step,
            seed: 7,
            collective: rank,
        };
        let sum = compression.reduce(vec![gradient(rank.rank(), step)], &context);
        sums.push(sum.unwrap().to_tensors());
        reports.push(compression.report().unwrap());
    }
    (sums, reports, compression.state(rank).unwrap())
}

fn on_ranks<T: Send>(ranks: usize, of: impl Fn(&ThreadRank) -> T + Sync) -> Vec<T> {
    let group = ThreadRank::group(ranks, Duration::from_secs(300));
    std::thread::scope(|scope| {
        let of = &of;
        let threads: Vec<_> = group
            .into_iter()
            .map(|rank| scope.spawn(move || of(&rank)))
            .collect();
        let ends = threads.into_iter().map(|thread| thread.join());
        ends.map(|end| end.expect("no panic")).collect()
    })
}

fn values(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

#[test]
fn g1_what_is_sent_and_what_is_left_is_all_there_was() {
    const STEPS: u64 = 6;
    const RANKS: usize = 3;
    for place in 0..compressors().len() {
        let name = compressors()[place].0;
        let ends = on_ranks(RANKS, |rank| {
            let compressor = compressors().swap_remove(place).1;
            steps_of(
                rank,
                (compressor, CompressionSettings::default()),
                None,
                0..STEPS,
            )
        });
        // The same bits on every rank.
        for (sums, _, _) in &ends {
            assert_eq!(*sums, ends[0].0, "{name}");
        }
        // Σ over steps of what was sent, and residuals: the sum of all gradients.
        let mut expected = vec![0.0f64; DIMS[0] * DIMS[1]];
        let mut found = expected.clone();
        let mut norm_expected = vec![0.0f32; DIMS[1]];
        for step in 0..STEPS {
            norm_expected.fill(0.0);
            for rank in 0..RANKS {
                let tensors = gradient(rank, step).to_tensors();
                let of_weight = values(&tensors["weight"]);
                expected
                    .iter_mut()
                    .zip(of_weight)
                    .for_each(|(sum, x)| *sum += f64::from(x));
                let of_norm = values(&tensors["norm"]);
                norm_expected
                    .iter_mut()
                    .zip(of_norm)
                    .for_each(|(sum, x)| *sum += x);
            }
            let sums = &ends[0].0[step as usize];
            found
                .iter_mut()
                .zip(values(&sums["weight"]))
                .for_each(|(sum, x)| *sum += f64::from(x));
            // Vectors travel whole, and are added in the order of the ranks.
            assert_eq!(values(&sums["norm"]), norm_expected, "{name}");
        }
        for (rank, (_, reports, _)) in ends.iter().enumerate() {
            let residual = values(&ends[0].2.tensors[&format!("rank{rank}.weight")]);
            found
                .iter_mut()
                .zip(&residual)
                .for_each(|(sum, x)| *sum += f64::from(*x));
            let last = reports[STEPS as usize - 1];
            assert!(
                last.sent_energy > 0.0 && last.sent_energy < 1.0,
                "{name}: {last:?}"
            );
            let norm = squares(&residual).sqrt();
            assert!((last.residual_norm - norm).abs() < 1e-9 * norm, "{name}");
        }
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-4,
                "{name}: {found} and {expected}"
            );
        }
    }
}

#[test]
fn g1_the_bytes_of_a_step_are_counted_whole() {
    let ends = on_ranks(2, |rank| {
        let compressor: Box<dyn Compressor> = Box::new(Sign);
        steps_of(
            rank,
            (compressor, CompressionSettings::default()),
            None,
            0..1,
        )
    });
    let elements = DIMS[0] * DIMS[1];
    // Lengths of two codes, of two bytes each, and of both together; a scale for each 128 elements,
    // a bit for each, the vector in f32.
    let expected = 4 + 2 + 2 * elements.div_ceil(128) + elements.div_ceil(8) + 4 * DIMS[1];
    for (_, reports, _) in &ends {
        assert_eq!(reports[0].sent_bytes, expected as u64);
        assert_eq!(reports[0].received_bytes, expected as u64);
        assert_eq!(reports[0].gradient_bytes, 4 * (elements + DIMS[1]) as u64);
    }
}

#[test]
fn g1_a_saved_residual_goes_on_to_the_same_bits() {
    let settings = CompressionSettings {
        residual_decay: 0.9,
        ..CompressionSettings::default()
    };
    let rotated = || -> Box<dyn Compressor> { Box::new(Sparse::rotated(0.05).unwrap()) };
    let whole = on_ranks(2, |rank| steps_of(rank, (rotated(), settings), None, 0..4));
    let first = on_ranks(2, |rank| steps_of(rank, (rotated(), settings), None, 0..2));
    let mut all = ExtraState::default();
    for (_, _, state) in &first {
        all.tensors.extend(state.tensors.clone());
    }
    let second = on_ranks(2, |rank| {
        let saved = all.clone();
        steps_of(rank, (rotated(), settings), Some(saved), 2..4)
    });
    for (whole, second) in whole.iter().zip(&second) {
        assert_eq!(whole.0[2..], second.0);
        assert_eq!(whole.2, second.2);
    }
}

#[test]
fn g1_warm_up_steps_travel_whole() {
    let settings = CompressionSettings {
        warmup_steps: 2,
        ..CompressionSettings::default()
    };
    let ends = on_ranks(2, |rank| {
        steps_of(rank, (Box::new(Sign), settings), None, 0..3)
    });
    for (sums, reports, _) in &ends {
        let both = [0, 1].map(|rank| values(&gradient(rank, 1).to_tensors()["weight"]));
        let expected: Vec<f32> = both[0].iter().zip(&both[1]).map(|(a, b)| a + b).collect();
        assert_eq!(values(&sums[1]["weight"]), expected);
        let energies: Vec<bool> = reports
            .iter()
            .map(|report| report.sent_energy < 1.0)
            .collect();
        assert_eq!(energies, [false, false, true]);
    }
}

#[test]
fn g1_without_error_feedback_nothing_is_left() {
    let settings = CompressionSettings {
        error_feedback: false,
        ..CompressionSettings::default()
    };
    let ends = on_ranks(1, |rank| {
        steps_of(rank, (Box::new(Sign), settings), None, 0..2)
    });
    let (_, reports, state) = &ends[0];
    assert!(state.tensors.is_empty());
    assert_eq!(reports[1].residual_norm, 0.0);
}

#[test]
fn g1_states_that_are_not_residuals_are_refused() {
    let mut compression = Compression::new(Box::new(Sign), CompressionSettings::default()).unwrap();
    let state = |name: &str, data: TensorData| ExtraState {
        tensors: [(name.to_string(), data)].into(),
        ..ExtraState::default()
    };
    for (name, data) in [
        ("weight", TensorData::new(vec![0.0f32], [1])),
        ("rankx.weight", TensorData::new(vec![0.0f32], [1])),
        ("rank0.weight", TensorData::new(vec![0i32], [1])),
        ("rank0.weight", TensorData::new(vec![f32::NAN], [1])),
    ] {
        let error = compression
            .load(state(name, data), &SingleProcess)
            .unwrap_err();
        assert!(matches!(error, PipelineError::State { .. }), "{error}");
    }
    // Of another shape: found at the first step.
    let other = TensorData::new(vec![0.0f32; 3], [3]);
    compression
        .load(state("rank0.weight", other), &SingleProcess)
        .unwrap();
    let context = StepContext {
        step: 0,
        seed: 7,
        collective: &SingleProcess,
    };
    let error = compression
        .reduce(vec![gradient(0, 0)], &context)
        .unwrap_err();
    assert!(error.to_string().contains("its residual 3"), "{error}");
    // One of the workers is missing.
    let other = TensorData::new(vec![0.0f32; DIMS[0] * DIMS[1]], [DIMS[0] * DIMS[1]]);
    let error = compression.load(state("rank2.weight", other), &SingleProcess);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("residuals of 1 workers"), "{error}");
}

#[test]
fn g1_an_exchange_is_the_end_of_the_pipeline_and_saved_with_it() {
    let compression = Compression::new(Box::new(Sign), CompressionSettings::default()).unwrap();
    let pipeline = Pipeline::new(Vec::new()).unwrap();
    assert!(pipeline.is_identity(&SingleProcess));
    let mut pipeline = pipeline.with_exchange(Box::new(compression));
    assert!(!pipeline.is_identity(&SingleProcess));
    let context = StepContext {
        step: 0,
        seed: 7,
        collective: &SingleProcess,
    };
    pipeline.reduce(vec![gradient(0, 0)], &context).unwrap();
    let mut saved = pipeline.state(&SingleProcess).unwrap();
    assert_eq!(saved.keys().collect::<Vec<_>>(), ["gradient"]);
    assert_eq!(saved["gradient"].tensors.len(), 1);
    let restored = pipeline.load(&mut saved, &SingleProcess).unwrap();
    assert!(restored == Restored::default() && saved.is_empty());
}

proptest! {
    #[test]
    fn g1_damaged_messages_are_errors_and_never_panics(
        cut in 0usize..10_000, change in (0usize..10_000, 1u8..=255), which in 0usize..4,
    ) {
        let parameter = NamedParameter { path: "weight".to_string(), dims: DIMS.to_vec() };
        let tensor = TensorContext { parameter: &parameter, seed: Seed::new(1) };
        let compressor = compressors().swap_remove(which).1;
        let mut x = values(&small(3).1["weight"]);
        let mut code = Vec::new();
        compressor.encode(&tensor, &mut x, &mut code).unwrap();
        let mut sum = vec![0.0; x.len()];
        let cut = cut % code.len();
        prop_assert!(compressor.add_decoded(&tensor, &code[..cut], &mut sum).is_err());
        let mut longer = code.clone();
        longer.push(0);
        prop_assert!(compressor.add_decoded(&tensor, &longer, &mut sum).is_err());
        let at = change.0 % code.len();
        code[at] ^= change.1;
        let mut sum = vec![0.0; x.len()];
        if compressor.add_decoded(&tensor, &code, &mut sum).is_ok() {
            prop_assert!(sum.iter().all(|x| x.is_finite()));
        }
        let mut message = Writer::default();
        message.push(&code);
        message.push(&[1, 2]);
        let mut message = message.finish();
        prop_assert!(Reader::new(&message, 2).is_some());
        prop_assert!(Reader::new(&message, 1).is_none());
        let lengths = message.len() - code.len() - 2;
        message[change.0 % lengths] ^= change.1;
        prop_assert!(Reader::new(&message, 2).is_none());
    }
}
