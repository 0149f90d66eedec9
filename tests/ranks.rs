//! Several ranks in one process: a collective of threads, each with its own state, and a stage
//! between backward pass and update that records every gradient.
#![allow(missing_docs)]

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use burn::tensor::{Device, FloatDType};
use firebrick::collective::{Collective, CollectiveError, SingleProcess, ThreadRank};
use firebrick::config::{AdamWPlan, Architecture, OptimizerPlan};
use firebrick::data::Batch;
use firebrick::gradient::compress::{Compression, CompressionSettings, Sparse};
use firebrick::gradient::{
    Gradient, ParameterOrder, Pipeline, PipelineError, Restored, Stage, StepContext,
};
use firebrick::model::{Decoder, Tensors, parameters};
use firebrick::objective::CrossEntropy;
use firebrick::optimizer::Optimizer;
use firebrick::train::{
    StepError, StepLimits, StepOutcome, StepReport, StepSettings, TrainState, train_step,
};
use support::{batch, distance, tiny};

const RANKS: usize = 4;
const STEPS: u64 = 5;

/// Wraps a rank and records the paths of the gradients that it sums, in order.
struct Recorded {
    rank: ThreadRank,
    summed: Mutex<Vec<String>>,
}

impl Collective for Recorded {
    fn rank(&self) -> usize {
        self.rank.rank()
    }

    fn ranks(&self) -> usize {
        self.rank.ranks()
    }

    fn sum(&self, values: &mut [f64]) -> Result<(), CollectiveError> {
        self.rank.sum(values)
    }

    fn sum_gradient(&self, path: &str, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.summed.lock().unwrap().push(path.to_string());
        self.rank.sum_gradient(path, values)
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.rank.gather(bytes)
    }
}

/// A step and the parameters that had a gradient in it.
type Seen = (u64, Vec<String>);

/// Records the gradients that it receives.
#[derive(Clone, Default)]
struct Looker(Arc<Mutex<Vec<Seen>>>);

impl Stage for Looker {
    fn owner(&self) -> &str {
        "looker"
    }

    fn apply(
        &mut self,
        gradient: Gradient,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError> {
        let paths = gradient.paths().map(str::to_string).collect();
        self.0.lock().unwrap().push((context.step, paths));
        Ok(gradient)
    }
}

fn state(stages: Vec<Box<dyn Stage>>) -> TrainState {
    let model = Decoder::new(&tiny(Architecture::Llama), 5, &Device::flex().autodiff()).unwrap();
    let optimizer = Optimizer::new(&OptimizerPlan::AdamW(AdamWPlan::new(
        [0.9, 0.95],
        1e-8,
        0.1,
    )));
    let mut state = TrainState::new(model, optimizer);
    state.pipeline = Pipeline::new(stages).unwrap();
    state
}

fn settings() -> StepSettings {
    StepSettings {
        dtype: FloatDType::F32,
        gradient_checkpointing: false,
        int8_forward: false,
        ternary_blend: 1.0,
        limits: StepLimits::default(),
        max_grad_norm: 0.5,
        learning_rate: 1e-2,
        seed: 1,
        workers: 1,
    }
}

/// Rows with different numbers of trained tokens; each rank gets a quarter of the rows.
fn rows(step: u64) -> Batch {
    let mut batch = batch(2 * RANKS, 8, 13);
    for (row, weights) in batch.weights.chunks_mut(8).enumerate() {
        weights[(row + step as usize) % 8 + 1..].fill(0.0);
    }
    batch
}

fn step_of_rank(state: &mut TrainState, step: u64, collective: &Recorded) -> StepReport {
    let rank = collective.rank();
    let own = rows(step).rows(2 * rank..2 * rank + 2);
    train_step(state, &[own], &CrossEntropy, &settings(), collective).unwrap()
}

/// The results of one rank: its weights, its reports, what its stage saw, and the parameters whose
/// gradients it summed.
type EndOfRank = (Tensors, Vec<StepReport>, Vec<Seen>, Vec<String>);

fn train_ranks(poison: Option<(usize, u64)>) -> Vec<EndOfRank> {
    let group = ThreadRank::group(RANKS, Duration::from_secs(300));
    let threads = group.into_iter().enumerate().map(|(number, rank)| {
        std::thread::spawn(move || {
            let collective = Recorded {
                rank,
                summed: Mutex::default(),
            };
            let looker = Looker::default();
            let mut state = state(vec![Box::new(looker.clone())]);
            let mut reports = Vec::new();
            for step in 0..STEPS {
                if poison == Some((number, step)) {
                    let mut own = rows(step).rows(2 * number..2 * number + 2);
                    own.weights[0] = f32::NAN;
                    let report =
                        train_step(&mut state, &[own], &CrossEntropy, &settings(), &collective);
                    reports.push(report.unwrap());
                } else {
                    reports.push(step_of_rank(&mut state, step, &collective));
                }
            }
            let seen = looker.0.lock().unwrap().clone();
            let summed = collective.summed.lock().unwrap().clone();
            (parameters(state.model()), reports, seen, summed)
        })
    });
    let threads: Vec<_> = threads.collect();
    threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect()
}

#[test]
fn every_rank_sees_each_gradient_by_path_in_the_same_order_and_ends_with_the_same_weights() {
    let ends = train_ranks(None);
    let order = ParameterOrder::of(state(Vec::new()).model());
    let all: Vec<String> = order.parameters().iter().map(|p| p.path.clone()).collect();
    // The order is that of the modules and not alphabetical: norms come before and after
    // projections.
    assert_ne!(all, {
        let mut sorted = all.clone();
        sorted.sort();
        sorted
    });
    for (weights, reports, seen, summed) in &ends {
        assert_eq!(*weights, ends[0].0, "bit for bit");
        let expected: Vec<(u64, Vec<String>)> =
            (0..STEPS).map(|step| (step, all.clone())).collect();
        assert_eq!(*seen, expected);
        let expected: Vec<String> = (0..STEPS).flat_map(|_| all.clone()).collect();
        assert_eq!(*summed, expected);
        for (report, first) in reports.iter().zip(&ends[0].1) {
            assert_eq!(report.loss, first.loss);
            assert_eq!(report.grad_norm, first.grad_norm);
            assert_eq!(report.tokens, first.tokens);
        }
    }
}

#[test]
fn ranks_train_as_one_process_with_all_of_their_rows() {
    let ends = train_ranks(None);
    let mut alone = state(Vec::new());
    for step in 0..STEPS {
        let batches: Vec<Batch> = (0..RANKS)
            .map(|rank| rows(step).rows(2 * rank..2 * rank + 2))
            .collect();
        let report = train_step(
            &mut alone,
            &batches,
            &CrossEntropy,
            &settings(),
            &SingleProcess,
        )
        .unwrap();
        let of_ranks = &ends[0].1[step as usize];
        assert!((report.loss - of_ranks.loss).abs() < 1e-5 * report.loss);
        assert!((report.grad_norm - of_ranks.grad_norm).abs() < 1e-4 * report.grad_norm);
        assert_eq!(report.tokens, of_ranks.tokens);
    }
    let alone = parameters(alone.model());
    for (path, data) in &ends[0].0 {
        let [found, expected] =
            [data, &alone[path]].map(|data| data.iter::<f32>().collect::<Vec<f32>>());
        assert!(distance(&found, &expected) < 1e-4, "{path}");
    }
    assert_eq!(ends[0].0.len(), alone.len());
}

#[test]
fn g1_ranks_train_alike_on_rotated_signs_and_close_to_the_whole_gradient() {
    const LONG: u64 = 60;
    let train = |density: Option<f64>| {
        let group = ThreadRank::group(RANKS, Duration::from_secs(300));
        std::thread::scope(|scope| {
            let ranks = group.into_iter().map(|rank| {
                scope.spawn(move || {
                    let mut state = state(Vec::new());
                    if let Some(density) = density {
                        let code = Box::new(Sparse::rotated(density).unwrap());
                        let compression = Compression::new(code, CompressionSettings::default());
                        let pipeline = std::mem::take(&mut state.pipeline);
                        state.pipeline = pipeline.with_exchange(Box::new(compression.unwrap()));
                    }
                    let mut last = None;
                    for step in 0..LONG {
                        let number = rank.rank();
                        let own = rows(step).rows(2 * number..2 * number + 2);
                        let report =
                            train_step(&mut state, &[own], &CrossEntropy, &settings(), &rank);
                        last = Some(report.unwrap());
                    }
                    (parameters(state.model()), last.unwrap())
                })
            });
            let ranks: Vec<_> = ranks.collect();
            let ends: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
            assert!(ends.iter().all(|end| end.0 == ends[0].0), "the same bits");
            ends.into_iter().next().unwrap().1
        })
    };
    let (whole, sent) = (train(None), train(Some(0.25)));
    let exchange = sent.exchange.unwrap();
    assert!(whole.exchange.is_none());
    assert!(
        exchange.sent_energy > 0.5 && exchange.sent_energy < 0.8,
        "{exchange:?}"
    );
    assert!(
        exchange.gradient_bytes > 15 * exchange.sent_bytes,
        "{exchange:?}"
    );
    assert!(
        sent.loss < whole.loss + 0.5,
        "{} and {}",
        sent.loss,
        whole.loss
    );
}

#[test]
fn a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all() {
    let ends = train_ranks(Some((2, 1)));
    for (weights, reports, seen, _) in &ends {
        assert_eq!(*weights, ends[0].0);
        let outcomes: Vec<bool> = reports
            .iter()
            .map(|report| report.outcome == StepOutcome::Updated)
            .collect();
        assert_eq!(outcomes, [true, false, true, true, true]);
        assert_eq!(reports[1].outcome, StepOutcome::NotFinite);
        // A skipped gradient does not change the state of stages.
        let steps: Vec<u64> = seen.iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, [0, 2, 3, 4]);
    }
}

#[test]
fn a_pipeline_tells_its_stages_apart_and_refuses_state_that_is_not_theirs() {
    let two: Vec<Box<dyn Stage>> = vec![Box::new(Looker::default()), Box::new(Looker::default())];
    let error = Pipeline::new(two).unwrap_err().to_string();
    assert_eq!(error, "gradient stage `looker`: there are two of that name");

    let mut pipeline = Pipeline::new(vec![Box::new(Looker::default())]).unwrap();
    let mut extras = firebrick::extra::Extras::default();
    // A stage without saved state begins from an empty state, and a stage that keeps nothing has an
    // empty entry.
    assert_eq!(
        pipeline.load(&mut extras, &SingleProcess).unwrap().new,
        ["looker"]
    );
    let mut saved = pipeline.state(&SingleProcess).unwrap();
    assert_eq!(saved.keys().collect::<Vec<_>>(), ["looker"]);
    let restored = pipeline.load(&mut saved, &SingleProcess).unwrap();
    assert_eq!(restored, Restored::default());
    let mut state = firebrick::extra::ExtraState::default();
    let count = firebrick::extra::StateScalar::Uint(3);
    state.scalars.insert("count".to_string(), count);
    extras.insert("looker".to_string(), state);
    let error = pipeline.load(&mut extras, &SingleProcess);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`looker` cannot be used"), "{error}");
}

#[test]
fn a_name_that_no_checkpoint_can_have_is_refused_before_the_run() {
    struct Named;
    impl Stage for Named {
        fn owner(&self) -> &str {
            "Error Feedback"
        }

        fn apply(
            &mut self,
            gradient: Gradient,
            _context: &StepContext,
        ) -> Result<Gradient, PipelineError> {
            Ok(gradient)
        }
    }
    let error = Pipeline::new(vec![Box::new(Named)])
        .unwrap_err()
        .to_string();
    assert!(error.contains("a-z, 0-9, _ and -"), "{error}");
}

#[test]
fn a_step_of_nothing_is_refused() {
    let mut state = state(Vec::new());
    let error = train_step(&mut state, &[], &CrossEntropy, &settings(), &SingleProcess);
    assert!(matches!(error, Err(StepError::NoBatches)));
    assert_eq!(state.progress.step, 0);
}
