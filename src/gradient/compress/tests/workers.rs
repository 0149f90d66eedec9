//! Logical workers, and residuals of another number of workers.

use super::*;

const WORKERS: usize = 4;

/// Makes a compression for so many workers.
type Make = Box<dyn Fn(usize) -> Compression>;

fn methods() -> Vec<(&'static str, Make)> {
    let settings = |workers| CompressionSettings {
        residual_decay: 0.9,
        workers,
        ..CompressionSettings::default()
    };
    vec![
        (
            "rotated",
            Box::new(move |workers| {
                let code = Box::new(Sparse::rotated(0.05).unwrap());
                Compression::new(code, settings(workers)).unwrap()
            }),
        ),
        (
            "low rank",
            Box::new(move |workers| {
                Compression::linear(Box::new(PowerSgd::new(2)), settings(workers)).unwrap()
            }),
        ),
        (
            "sketch",
            Box::new(move |workers| {
                let code = Box::new(Sketch::new(0.05).unwrap());
                Compression::linear(code, settings(workers)).unwrap()
            }),
        ),
        (
            "demo",
            Box::new(move |workers| {
                let code = Box::new(Demo::new(0.05).unwrap());
                Compression::new(code, settings(workers)).unwrap()
            }),
        ),
    ]
}

fn step_of(
    compression: &mut Compression,
    gradients: Vec<Gradient>,
    step: u64,
    collective: &dyn Collective,
) -> (Tensors, ExchangeReport) {
    let context = StepContext {
        step,
        seed: 7,
        collective,
    };
    let sum = compression.reduce(gradients, &context).unwrap();
    (sum.to_tensors(), compression.report().unwrap())
}

#[test]
fn g1_logical_workers_are_ranks_bit_for_bit() {
    for (name, make) in methods() {
        let mut together = make(WORKERS);
        let expected: Vec<_> = (0..3)
            .map(|step| {
                let gradients = (0..WORKERS).map(|worker| gradient(worker, step)).collect();
                step_of(&mut together, gradients, step, &SingleProcess)
            })
            .collect();
        let make = &*make;
        let found = std::thread::scope(|scope| {
            let ranks = ThreadRank::group(WORKERS, Duration::from_secs(300));
            let ranks = ranks.into_iter().map(|rank| {
                let mut compression = make(1);
                scope.spawn(move || {
                    let steps = (0..3).map(|step| {
                        let own = vec![gradient(rank.rank(), step)];
                        step_of(&mut compression, own, step, &rank)
                    });
                    let steps: Vec<_> = steps.collect();
                    (steps, compression.state(&rank).unwrap())
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks
                .into_iter()
                .map(|rank| rank.join().unwrap())
                .collect::<Vec<_>>()
        });
        // Rank 0 has the state of all.
        assert_eq!(
            found[0].1,
            together.state(&SingleProcess).unwrap(),
            "{name}"
        );
        for (rank, (steps, _)) in found.into_iter().enumerate() {
            for (step, (found, expected)) in steps.iter().zip(&expected).enumerate() {
                assert_eq!(found.0, expected.0, "{name}, rank {rank}, step {step}");
            }
        }
    }
}

#[test]
fn g1_a_group_of_ranks_with_logical_workers_counts_them_all() {
    let (name, make) = &methods()[0];
    let mut together = make(WORKERS);
    let gradients = (0..WORKERS).map(|worker| gradient(worker, 0)).collect();
    let (expected, _) = step_of(&mut together, gradients, 0, &SingleProcess);
    let found = on_ranks(2, |rank| {
        let settings = CompressionSettings {
            residual_decay: 0.9,
            workers: 2,
            ..CompressionSettings::default()
        };
        let code = Box::new(Sparse::rotated(0.05).unwrap());
        let mut compression = Compression::new(code, settings).unwrap();
        let own = [0, 1].map(|worker| gradient(2 * rank.rank() + worker, 0));
        let (sum, _) = step_of(&mut compression, own.to_vec(), 0, rank);
        (sum, compression.state(rank).unwrap())
    });
    let names: Vec<String> = found[0].1.tensors.keys().cloned().collect();
    let expected_names = ["rank0", "rank1", "rank2", "rank3"].map(|rank| format!("{rank}.weight"));
    assert_eq!(names, expected_names);
    for (sum, _) in found {
        assert_eq!(sum, expected, "{name}");
    }
}

#[test]
fn n3_residuals_of_other_workers_are_shared_out() {
    let (_, make) = &methods()[0];
    let mut four = make(4);
    let gradients = (0..4).map(|worker| gradient(worker, 0)).collect();
    step_of(&mut four, gradients, 0, &SingleProcess);
    let saved = four.state(&SingleProcess).unwrap();
    let all = |state: &ExtraState| {
        let mut sum = vec![0.0f64; DIMS[0] * DIMS[1]];
        for data in state.tensors.values() {
            let pairs = sum.iter_mut().zip(values(data));
            pairs.for_each(|(sum, x)| *sum += f64::from(x));
        }
        sum
    };
    for workers in [1, 2, 7] {
        let mut other = make(workers);
        let note = other.load(saved.clone(), &SingleProcess).unwrap();
        let note = note.unwrap();
        assert_eq!(
            note,
            format!("the residuals of 4 workers are shared out over {workers}")
        );
        let state = other.state(&SingleProcess).unwrap();
        assert_eq!(state.tensors.len(), workers);
        for (a, b) in all(&state).iter().zip(all(&saved)) {
            assert!((a - b).abs() < 1e-4, "{a} and {b}");
        }
    }
    let mut same = make(4);
    assert_eq!(same.load(saved.clone(), &SingleProcess).unwrap(), None);
    assert_eq!(same.state(&SingleProcess).unwrap(), saved);
}

#[test]
fn g1_vectors_that_travel_seldom_lose_nothing() {
    let settings = CompressionSettings {
        vectors: Vectors::Seldom { every: 3 },
        ..CompressionSettings::default()
    };
    let mut compression = Compression::new(Box::new(Sign), settings).unwrap();
    let mut expected = vec![0.0f32; DIMS[1]];
    let mut found = expected.clone();
    for step in 0..6 {
        let own = gradient(0, step);
        let of_norm = values(&own.to_tensors()["norm"]);
        let pairs = expected.iter_mut().zip(of_norm);
        pairs.for_each(|(sum, x)| *sum += x);
        let (sum, _) = step_of(&mut compression, vec![own], step, &SingleProcess);
        let of_norm = values(&sum["norm"]);
        let is_sent = step % 3 == 2;
        assert_eq!(of_norm.iter().any(|x| *x != 0.0), is_sent, "step {step}");
        found.iter_mut().zip(of_norm).for_each(|(sum, x)| *sum += x);
    }
    let rest = compression.residual(0, "norm").unwrap();
    for ((found, rest), expected) in found.iter().zip(rest).zip(&expected) {
        assert!((found + rest - expected).abs() < 1e-5);
        assert!(rest.abs() < 0.05, "bf16 keeps eight bits: {rest}");
    }
}

#[test]
fn p1_a_phase_keeps_residuals_of_what_it_trains_on() {
    let (_, make) = &methods()[1];
    let mut compression = make(1);
    step_of(&mut compression, vec![gradient(0, 0)], 0, &SingleProcess);
    let names = |compression: &Compression| -> Vec<String> {
        compression
            .state(&SingleProcess)
            .unwrap()
            .tensors
            .into_keys()
            .collect()
    };
    assert_eq!(names(&compression), ["rank0.weight", "shared.weight"]);
    let weight = NamedParameter {
        path: "weight".to_string(),
        dims: DIMS.to_vec(),
    };
    let trained = std::slice::from_ref(&weight);
    compression.enter_phase(trained, &|_| false).unwrap();
    assert_eq!(names(&compression), ["rank0.weight", "shared.weight"]);
    // A new adapter at the same path.
    compression.enter_phase(trained, &|_| true).unwrap();
    assert!(names(&compression).is_empty());
    step_of(&mut compression, vec![gradient(0, 1)], 1, &SingleProcess);
    // Frozen.
    compression.enter_phase(&[], &|_| false).unwrap();
    assert!(names(&compression).is_empty());
}

#[test]
fn g1_another_number_of_gradients_is_refused() {
    let (_, make) = &methods()[0];
    let context = StepContext {
        step: 0,
        seed: 7,
        collective: &SingleProcess,
    };
    let error = make(2).reduce(vec![gradient(0, 0)], &context).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("gradients of 1 workers, where 2"),
        "{error}"
    );
}
