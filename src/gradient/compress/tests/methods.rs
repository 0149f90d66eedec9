//! Every method of the configuration: what it promises, what it sends, what it costs.

use std::f64::consts::TAU;

use super::*;
use crate::config::{CompressionMethod, CompressionPlan};
use crate::gradient::compress::{Code, Method, RatioError};

const METHODS: [CompressionMethod; 8] = [
    CompressionMethod::TopK,
    CompressionMethod::RandomK,
    CompressionMethod::Ternary,
    CompressionMethod::Sign,
    CompressionMethod::PowerSgd,
    CompressionMethod::Demo,
    CompressionMethod::VsaRotate,
    CompressionMethod::VsaSketch,
];

fn plan(method: CompressionMethod, ratio: f64) -> CompressionPlan {
    CompressionPlan {
        method,
        ratio: (method != CompressionMethod::Sign).then_some(ratio),
        warmup_steps: 0,
        error_feedback: true,
        residual_decay: 1.0,
    }
}

fn parameter(path: &str, dims: &[usize]) -> NamedParameter {
    NamedParameter {
        path: path.to_string(),
        dims: dims.to_vec(),
    }
}

fn gaussian(seed: Seed, len: usize) -> Vec<f32> {
    let uniform = |i| (seed.word(i) >> 11) as f64 / (1u64 << 53) as f64;
    let pair = |i| {
        let radius = (-2.0 * (1.0 - uniform(2 * i)).ln()).sqrt();
        (radius * (TAU * uniform(2 * i + 1)).cos()) as f32
    };
    (0..len as u64).map(pair).collect()
}

/// What a worker that is alone sends and keeps of a matrix.
fn alone(code: &Code, parameter: &NamedParameter, values: &[f32], step: u64) -> [Vec<f32>; 2] {
    let tensor = TensorContext::new(parameter, Seed::new(3).with(step));
    let (mut kept, mut sent) = (values.to_vec(), vec![0.0; values.len()]);
    match code {
        Code::Gathered(code) => {
            let mut bytes = Vec::new();
            code.encode(&tensor, &mut kept, &mut bytes).unwrap();
            code.decode(&tensor, &[&bytes], &mut sent).unwrap();
        }
        Code::Added(code) => {
            let mut rounds: Vec<Vec<f32>> = Vec::new();
            for _ in 0..code.rounds() {
                let round = Round {
                    before: rounds.iter().map(Vec::as_slice).collect(),
                    memory: &[],
                };
                let mut numbers = Vec::new();
                code.project(&tensor, &round, &mut kept, &mut numbers)
                    .unwrap();
                rounds.push(numbers);
            }
            let rounds: Vec<&[f32]> = rounds.iter().map(Vec::as_slice).collect();
            code.reconstruct(&tensor, &rounds, &mut Vec::new(), &mut sent)
                .unwrap();
        }
    }
    [sent, kept]
}

/// Matrices of all kinds: one value, equal values, a row of the Walsh matrix, nothing, one huge value
/// among small ones, Gaussian, and low rank.
fn matrices([rows, cols]: [usize; 2]) -> Vec<(&'static str, Vec<f32>)> {
    let len = rows * cols;
    let at = |place: usize, value: f32, others: f32| {
        let mut values = vec![others; len];
        values[place % len] = value;
        values
    };
    let walsh = |place: usize| match (place & 0b1011).count_ones() % 2 {
        0 => 0.5f32,
        _ => -0.5,
    };
    let [left, right] = [rows, cols].map(|side| gaussian(Seed::new(side as u64), side));
    let product = |(left, right): (&f32, f32)| left * right;
    vec![
        ("one value", at(77, 3.0, 0.0)),
        ("equal values", vec![0.25; len]),
        ("a Walsh row", (0..len).map(walsh).collect()),
        ("nothing", vec![0.0; len]),
        ("one huge value", at(5, 1e20, 1e-3)),
        ("Gaussian", gaussian(Seed::new(8), len)),
        (
            "rank one",
            left.iter()
                .flat_map(|x| right.iter().map(move |y| product((x, *y))))
                .collect(),
        ),
    ]
}

#[test]
fn g1_what_is_sent_and_kept_is_all_and_never_more_than_there_was() {
    for dims in [[64, 96], [37, 130], [1, 300], [300, 1]] {
        let parameter = parameter("weight", &dims);
        for method in METHODS {
            let made = Method::new(&plan(method, 24.0), std::slice::from_ref(&parameter), 1);
            // A code of one column or row may not reach the ratio.
            let Ok(made) = made else { continue };
            for (kind, values) in matrices(dims) {
                let [sent, kept] = alone(&made.compression.code, &parameter, &values, 0);
                let case = format!("{method:?} {dims:?} {kind}");
                let energy = squares(&values);
                for ((sent, kept), value) in sent.iter().zip(&kept).zip(&values) {
                    let gap = f64::from(sent + kept - value).abs();
                    assert!(gap <= 2e-6 * energy.sqrt(), "{case}: {gap}");
                }
                assert!(squares(&kept) <= energy * (1.0 + 1e-5), "{case}");
                let declared = match method {
                    // A code of least squared error of a block keeps at least its density.
                    CompressionMethod::TopK | CompressionMethod::Demo => 0.02,
                    CompressionMethod::Ternary | CompressionMethod::VsaRotate => 0.04,
                    CompressionMethod::Sign => (1.0 - 2f64.powi(-15)) / 128.0,
                    // In one step these may send nothing of a matrix.
                    _ => 0.0,
                };
                if energy > 0.0 {
                    let delta = 1.0 - squares(&kept) / energy;
                    assert!(delta >= declared, "{case}: δ {delta}");
                }
            }
        }
    }
}

#[test]
fn g1_a_matrix_that_waits_is_sent_in_the_end() {
    // What is not sent comes again, so that the residual of a constant gradient stays bounded.
    let parameter = parameter("weight", &[64, 96]);
    let gradient = gaussian(Seed::new(2), 64 * 96);
    for method in METHODS {
        let made = Method::new(&plan(method, 24.0), std::slice::from_ref(&parameter), 1).unwrap();
        let mut kept = vec![0.0; gradient.len()];
        let mut norms = Vec::new();
        for step in 0..400 {
            kept.iter_mut().zip(&gradient).for_each(|(e, g)| *e += g);
            let [_, rest] = alone(&made.compression.code, &parameter, &kept, step);
            kept = rest;
            norms.push(squares(&kept).sqrt());
        }
        let own = squares(&gradient).sqrt();
        let largest = norms.iter().copied().fold(0.0, f64::max);
        assert!(largest < 60.0 * own, "{method:?}: {largest} of {own}");
        let [early, late] = [norms[199], norms[399]];
        assert!(late < 1.5 * early, "{method:?}: {early} and {late}");
    }
}

#[test]
fn g1_a_step_sends_what_its_ratio_says() {
    let parameters = [
        parameter("embed", &[256, 128]),
        parameter("up", &[128, 512]),
        parameter("norm", &[128]),
    ];
    let elements: usize = parameters
        .iter()
        .map(|parameter| parameter.dims.iter().product::<usize>())
        .sum();
    for method in METHODS {
        for ratio in [24.0, 32.0, 100.0, 300.0] {
            let made = Method::new(&plan(method, ratio), &parameters, 1);
            let made = match made {
                Ok(made) => made,
                // Low rank stops at rank one; added numbers send vectors whole.
                Err(error) => {
                    let is_low_rank = method == CompressionMethod::PowerSgd && ratio > 60.0;
                    assert!(is_low_rank, "{method:?} {ratio}: {error}");
                    continue;
                }
            };
            let (mut sent, mut steps) = (0.0, 0);
            // Vectors travel in one step of ten.
            for step in 0..10 {
                let code = &made.compression.code;
                let vectors = made.compression.settings.vectors;
                for parameter in &parameters {
                    let mut values = gaussian(Seed::new(step).with_name(&parameter.path), 1 << 16);
                    values.truncate(parameter.dims.iter().product());
                    let tensor = TensorContext::new(parameter, Seed::new(step));
                    let mut bytes = Vec::new();
                    match code {
                        _ if !is_matrix(parameter) => {
                            vectors.encode(step, &mut values, &mut bytes);
                        }
                        Code::Gathered(code) => {
                            code.encode(&tensor, &mut values, &mut bytes).unwrap();
                        }
                        Code::Added(code) => {
                            let mut rounds: Vec<Vec<f32>> = Vec::new();
                            for _ in 0..code.rounds() {
                                let before = rounds.iter().map(Vec::as_slice).collect();
                                let round = Round {
                                    before,
                                    memory: &[],
                                };
                                let mut numbers = Vec::new();
                                code.project(&tensor, &round, &mut values, &mut numbers)
                                    .unwrap();
                                rounds.push(numbers);
                            }
                            let all: usize = rounds.iter().map(Vec::len).sum();
                            bytes.resize(4 * all, 0);
                        }
                    }
                    sent += bytes.len() as f64;
                }
                steps += 1;
            }
            let found = 4.0 * elements as f64 * f64::from(steps) / sent;
            let expected = made.reach.ratio();
            assert!(
                (found / expected - 1.0).abs() < 0.03,
                "{method:?} {ratio}: {found} and {expected}"
            );
            // Ranks are whole numbers, the ratio of signs is fixed.
            let is_near = expected > 0.99 * ratio && expected < 1.05 * ratio;
            assert!(
                is_near
                    || matches!(
                        method,
                        CompressionMethod::Sign | CompressionMethod::PowerSgd
                    ),
                "{method:?}: {expected} for {ratio}"
            );
        }
    }
}

#[test]
fn g1_a_ratio_out_of_reach_says_what_is_in_reach() {
    let parameters = [parameter("up", &[128, 512])];
    let error = Method::new(&plan(CompressionMethod::VsaRotate, 4.0), &parameters, 1);
    let Err(PipelineError::Ratio(error)) = error else {
        panic!("{error:?}")
    };
    let RatioError { reached, .. } = error;
    assert!(reached[0] > 15.0 && reached[0] < 25.0, "{reached:?}");
    let text = error.to_string();
    assert!(
        text.contains("\"vsa-rotate\" does not reach a ratio of 4"),
        "{text}"
    );
}

#[test]
fn g1_low_rank_finds_a_matrix_of_low_rank_and_goes_on_from_it() {
    let dims = [40, 24];
    let parameter = parameter("weight", &dims);
    let values = &matrices(dims)[6].1;
    let code = Code::Added(Box::new(PowerSgd::new(2)));
    let [_, kept] = alone(&code, &parameter, values, 0);
    let share = squares(&kept) / squares(values);
    assert!(share < 1e-10, "{share} is left of a matrix of rank one");
}

#[test]
fn g1_a_sketch_finds_what_is_large_in_the_sum_only() {
    // Two workers with large elements that cancel, and one that both share.
    let (dims, shared) = ([64, 64], 1234);
    let parameter = parameter("weight", &dims);
    let tensor = TensorContext::new(&parameter, Seed::new(3));
    let noise = gaussian(Seed::new(5), 64 * 64);
    let code = Sketch::new(0.05).unwrap();
    let mut workers = [1.0, -1.0].map(|sign| {
        let mut values: Vec<f32> = noise.iter().map(|x| 10.0 * sign * x).collect();
        values[shared] += 1.0;
        values
    });
    let mut rounds: Vec<Vec<f32>> = Vec::new();
    for _ in 0..code.rounds() {
        let mut total: Vec<f32> = Vec::new();
        for values in &mut workers {
            let round = Round {
                before: rounds.iter().map(Vec::as_slice).collect(),
                memory: &[],
            };
            let mut numbers = Vec::new();
            code.project(&tensor, &round, values, &mut numbers).unwrap();
            total.resize(numbers.len(), 0.0);
            total.iter_mut().zip(numbers).for_each(|(sum, x)| *sum += x);
        }
        rounds.push(total);
    }
    let rounds: Vec<&[f32]> = rounds.iter().map(Vec::as_slice).collect();
    let mut sum = vec![0.0; noise.len()];
    code.reconstruct(&tensor, &rounds, &mut Vec::new(), &mut sum)
        .unwrap();
    assert!((sum[shared] - 2.0).abs() < 1e-4, "{}", sum[shared]);
}

#[test]
fn g1_a_frequency_of_demo_is_the_mean_over_those_who_sent_it() {
    let dims = [64, 64];
    let parameter = parameter("weight", &dims);
    let tensor = TensorContext::new(&parameter, Seed::new(3));
    let code = Demo::new(0.02).unwrap();
    let values = gaussian(Seed::new(4), 64 * 64);
    let mut bytes = Vec::new();
    code.encode(&tensor, &mut values.clone(), &mut bytes)
        .unwrap();
    let decoded = |codes: &[&[u8]]| {
        let mut sum = vec![0.0; values.len()];
        code.decode(&tensor, codes, &mut sum).unwrap();
        sum
    };
    let (one, three) = (decoded(&[&bytes]), decoded(&[&bytes, &bytes, &bytes]));
    for (one, three) in one.iter().zip(&three) {
        assert!((one - three).abs() < 1e-6, "{one} and {three}");
    }
}

#[test]
fn g4_a_link_is_worth_it_while_codes_are_fewer_bytes_than_the_sum() {
    let parameters = [parameter("norm", &[DIMS[1]]), parameter("weight", &DIMS)];
    let own = gradient(0, 0);
    let of = |method, ratio, workers| {
        let made = || Method::new(&plan(method, ratio), &parameters, 1);
        let fresh = made().unwrap();
        let pays = fresh.pays(&own, workers, made).unwrap();
        (fresh.reach, pays, pays.describe(workers))
    };
    // Codes that are gathered grow with the workers, a sum does not.
    let (reach, four, text) = of(CompressionMethod::Sign, 1.0, 4);
    let expected = 1.5 * reach.gradient_bytes - 3.0 * reach.sent_bytes;
    assert!((four.saved_bytes - expected).abs() < 1e-6 * expected);
    let bits = four.below().unwrap();
    let seconds = four.coding.as_secs_f64();
    assert!((bits * seconds - 8.0 * expected).abs() < 1e-6 * 8.0 * expected);
    assert!(text.contains("pays on links below"), "{text}");
    let (_, many, text) = of(CompressionMethod::Sign, 1.0, 300);
    assert_eq!(many.below(), None);
    assert!(text.contains("does not pay on any link"), "{text}");
    // Numbers that are added on their way do not grow.
    let (_, many, _) = of(CompressionMethod::RandomK, 8.0, 300);
    assert!(many.below().is_some());
}

#[test]
fn g1_a_gradient_that_is_not_finite_is_an_error_of_every_method() {
    let parameters = [parameter("norm", &[DIMS[1]]), parameter("weight", &DIMS)];
    for method in METHODS {
        // Trits do not reach 8, and rank one of a small matrix is not far below it.
        let made = [24.0, 8.0].map(|ratio| Method::new(&plan(method, ratio), &parameters, 1));
        let mut compression = made
            .into_iter()
            .find_map(Result::ok)
            .expect("one of them is in reach")
            .compression;
        let mut own = gradient(0, 0);
        own.update(|parameter, values| {
            if parameter.path == "weight" {
                values[7] = f32::INFINITY;
            }
        });
        let context = StepContext {
            step: 0,
            seed: 7,
            collective: &SingleProcess,
        };
        let error = compression.reduce(vec![own], &context).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("`weight`: element 7 is not finite"),
            "{method:?}: {error}"
        );
    }
}
